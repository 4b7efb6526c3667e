// rms_norm -- xg = bf16(x * g) and scale = 1 / sqrt(mean(x^2) + eps)           (Zhang & Sennrich 2019, 1910.07467)
// shapes    xg (R, C) bf16; scales (R,), x (T, C), g (C,) float32; rows (R,) int32: row r reads x[rows[r]], NULL: x[r]
// launch    grid R, block 32: quad q of the warp owns quarter q of C (quads 4..7 have nothing to do)
// bytes     6*R*C                                             numerics  float32 sums, in the order of linear.cuh
//
// The scale multiplies the product's float32 result, so a product that reads x itself (linear.cuh, NormedRows) needs no
// second pass over it, and has the same bits.
#include "linear.cuh"

constexpr int AHEAD = 8;  // blocks of K that a lane asks for before it stores the first
constexpr bool WHOLE = HIDDEN % (4 * 32 * AHEAD) == 0;

extern "C" __global__ void __launch_bounds__(32)
rms_norm(bf16 *xg, float *scales, const float *x, const float *weight, const int *rows, float eps) {
  pdl_launch();
  pdl_wait();
  const int r = blockIdx.x, quad = threadIdx.x / 4;
  const float *from = x + (size_t)(rows ? rows[r] : r) * HIDDEN;
  float squares = 0.0f;
  if (quad < 4) {
    const int begin = quad * quarter(HIDDEN) + threadIdx.x % 4 * 8, end = min(begin + quarter(HIDDEN), HIDDEN);
    for (int k = begin; k < end; k += 32 * AHEAD) {
      uint4 rounded[AHEAD];
#pragma unroll
      for (int i = 0; i < AHEAD; i++)
        if (WHOLE || k + 32 * i < end)
          rounded[i] = round_scaled(Eight(from + k + 32 * i), Eight(weight + k + 32 * i), squares);
#pragma unroll
      for (int i = 0; i < AHEAD; i++)
        if (WHOLE || k + 32 * i < end) *(uint4 *)(xg + (size_t)r * HIDDEN + k + 32 * i) = rounded[i];
    }
  }
  squares = quad_sum(squares);
  float sum = __shfl_sync(0xffffffffu, squares, 0);
#pragma unroll
  for (int q = 1; q < 4; q++) sum += __shfl_sync(0xffffffffu, squares, 4 * q);
  if (threadIdx.x == 0) scales[r] = rms_scale<HIDDEN>(sum, eps);
}
