// embedding -- x[t] = table[id of token t], and where in the sequence and in the KV cache the token stands
// shapes    x (T, C) float32; positions, slot_mapping, seats (T,) int32, slot = block * S + offset; table (V, C) bf16;
//           last_token, next_position (num_seats,), block_tables (num_seats, max_blocks) int32
//           input_ids, given_positions (T,) int32: what the host knows; -1: the seat's last token, its next position
// launch    grid T, block 128
// bytes     6*T*C                                             numerics  exact
#include "common.cuh"

extern "C" __global__ void __launch_bounds__(128)
embedding(float *x, int *positions, int *slot_mapping, const bf16 *table, const int *input_ids,
          const int *given_positions, const int *seats, const int *last_token, const int *next_position,
          const int *block_tables, int max_blocks) {
  pdl_launch();
  pdl_wait();
  const int t = blockIdx.x, seat = seats[t];
  const int id = input_ids[t] >= 0 ? input_ids[t] : last_token[seat];
  if (threadIdx.x == 0) {
    const int position = given_positions[t] >= 0 ? given_positions[t] : next_position[seat];
    const int block = block_tables[(size_t)seat * max_blocks + position / BLOCK_SIZE];
    positions[t] = position;
    slot_mapping[t] = block * BLOCK_SIZE + position % BLOCK_SIZE;
  }
  const uint4 *row = (const uint4 *)(table + (size_t)id * HIDDEN);
  float4 *to = (float4 *)(x + (size_t)t * HIDDEN);
  for (int i = threadIdx.x; i < HIDDEN / 8; i += 128) {
    const uint4 v = load_weights(row + i);
    to[2 * i] = {low_half(v.x), high_half(v.x), low_half(v.y), high_half(v.y)};
    to[2 * i + 1] = {low_half(v.z), high_half(v.z), low_half(v.w), high_half(v.w)};
  }
}
