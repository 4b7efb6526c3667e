// patch_state -- state[place] = value for a list of changes: what the host tells the card between two captured steps
// shapes    state (size,) int32; patches (count,) of (place, value), no place twice
// launch    grid ceil(count / 128), block 128
// bytes     12*count                                          numerics  exact
#include "common.cuh"

extern "C" __global__ void __launch_bounds__(128)
patch_state(int *state, const int2 *patches, int count) {
  pdl_launch();
  pdl_wait();
  const int i = blockIdx.x * 128 + threadIdx.x;
  if (i < count) state[patches[i].x] = patches[i].y;
}
