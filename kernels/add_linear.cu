// add_linear -- x += a * weight^T: the output projection and the down projection with their residual connection
// shapes    x (T, C) float32, in place; a (T, WIDTH) bf16; weight (C, WIDTH) bf16; compiled once for each -DWIDTH
// launch    see linear.cuh; a unit is 8 rows of the weight, C/8 units: smaller ones, since there are few rows
//           stream (T <= 16)          grid C/8, block 128
//           tiled_32, _64, _128       grid (ceil(units / 8, 8, 16), ceil(T / 32, 64, 128), splits 1 or 4),
//                                     block 128, 128, 256, shared memory 75264, 83200, 99072
// bytes     weights 2*C*WIDTH once per 16 or BM tokens        numerics  float32
#include "linear.cuh"

static_assert(WIDTH % 32 == 0, "see CudaBackend.why_not");

struct AddLinear {
  static constexpr int K = WIDTH, TILES = 1, ROWS = HIDDEN, UNITS = HIDDEN / 8;
  float *x;

  typedef float2 Fetched;  // what is in x before
  static __device__ int row(int unit, int) { return unit * 8; }
  __device__ float2 *at(int token, int unit, int column) const {
    return (float2 *)(x + (size_t)token * HIDDEN + unit * 8 + column);
  }
  __device__ Fetched fetch(int token, int unit, int column) const { return *at(token, unit, column); }
  __device__ void store(int token, int unit, int column, const float2 (&y)[1], const Fetched &before) const {
    *at(token, unit, column) = {before.x + y[0].x, before.y + y[0].y};
  }
};
extern __shared__ __align__(16) unsigned char shared[];

extern "C" __global__ void __launch_bounds__(128, 3)
add_linear_stream(float *x, const bf16 *a, const bf16 *weight, int tokens) {
  pdl_launch();
  linear_stream(AddLinear{x}, RoundedRows<WIDTH>(a, nullptr, tokens), weight, tokens);
}

extern "C" __global__ void __launch_bounds__(128, 3)
add_linear_tiled_32(float *x, const bf16 *a, const bf16 *weight, int tokens, float4 *partials, unsigned *tickets) {
  pdl_launch();
  linear_tiled<AddLinear, Tile32>(AddLinear{x}, a, nullptr, weight, tokens, partials, tickets, shared);
}

extern "C" __global__ void __launch_bounds__(128, 2)
add_linear_tiled_64(float *x, const bf16 *a, const bf16 *weight, int tokens, float4 *partials, unsigned *tickets) {
  pdl_launch();
  linear_tiled<AddLinear, Tile64>(AddLinear{x}, a, nullptr, weight, tokens, partials, tickets, shared);
}

extern "C" __global__ void __launch_bounds__(256)
add_linear_tiled_128(float *x, const bf16 *a, const bf16 *weight, int tokens, float4 *partials, unsigned *tickets) {
  pdl_launch();
  linear_tiled<AddLinear, Tile128>(AddLinear{x}, a, nullptr, weight, tokens, partials, tickets, shared);
}
