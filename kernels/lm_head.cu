// lm_head -- logits = norm(x) * weight^T
// shapes    logits (R, V) float32; weight (V, C) bf16, V any number
//           fused: x (R, C), norm (C,) float32; stream, tiled: xg (R, C) bf16, scales (R,) float32 or NULL (rms_norm)
// launch    see linear.cuh; a unit is 16 rows of the weight, units = ceil(V / 16)
//           fused, stream (R <= 16)   grid units, block 128
//           tiled_32, _64, _128       grid (ceil(units / 4, 4, 8), ceil(R / 32, 64, 128), splits 1 or 4),
//                                     block 128, 128, 256, shared memory 75264, 83200, 99072
// bytes     weights 2*C*V once per 16 or BM rows, 4*R*V       numerics  float32
#include "linear.cuh"

struct LmHead {
  static constexpr int K = HIDDEN, TILES = 2, ROWS = VOCAB, UNITS = (VOCAB + 15) / 16;
  float *logits;

  struct Fetched {};
  static __device__ int row(int unit, int tile) { return unit * 16 + tile * 8; }
  __device__ Fetched fetch(int, int, int) const { return {}; }
  __device__ void store(int token, int unit, int column, const float2 (&y)[2], const Fetched &) const {
#pragma unroll
    for (int tile = 0; tile < 2; tile++) {
      const int n = row(unit, tile) + column;
      float *to = logits + (size_t)token * VOCAB + n;
      if (VOCAB % 2 == 0 && n < VOCAB) *(float2 *)to = y[tile];
      if (VOCAB % 2 == 1 && n < VOCAB) to[0] = y[tile].x;
      if (VOCAB % 2 == 1 && n + 1 < VOCAB) to[1] = y[tile].y;
    }
  }
};
extern __shared__ __align__(16) unsigned char shared[];

extern "C" __global__ void __launch_bounds__(128, 3)
lm_head_fused(float *logits, const float *x, const float *norm, const bf16 *weight, int tokens, float eps) {
  pdl_launch();
  linear_stream(LmHead{logits}, NormedRows<HIDDEN>(x, norm, eps, tokens), weight, tokens);
}

extern "C" __global__ void __launch_bounds__(128, 3)
lm_head_stream(float *logits, const bf16 *xg, const float *scales, const bf16 *weight, int tokens) {
  pdl_launch();
  linear_stream(LmHead{logits}, RoundedRows<HIDDEN>(xg, scales, tokens), weight, tokens);
}

extern "C" __global__ void __launch_bounds__(128, 3)
lm_head_tiled_32(float *logits, const bf16 *xg, const float *scales, const bf16 *weight, int tokens, float4 *partials,
                 unsigned *tickets) {
  pdl_launch();
  linear_tiled<LmHead, Tile32>(LmHead{logits}, xg, scales, weight, tokens, partials, tickets, shared);
}

extern "C" __global__ void __launch_bounds__(128, 2)
lm_head_tiled_64(float *logits, const bf16 *xg, const float *scales, const bf16 *weight, int tokens, float4 *partials,
                 unsigned *tickets) {
  pdl_launch();
  linear_tiled<LmHead, Tile64>(LmHead{logits}, xg, scales, weight, tokens, partials, tickets, shared);
}

extern "C" __global__ void __launch_bounds__(256)
lm_head_tiled_128(float *logits, const bf16 *xg, const float *scales, const bf16 *weight, int tokens, float4 *partials,
                  unsigned *tickets) {
  pdl_launch();
  linear_tiled<LmHead, Tile128>(LmHead{logits}, xg, scales, weight, tokens, partials, tickets, shared);
}
