// gate_up -- h = silu(norm(x) * gate^T) * (norm(x) * up^T), silu(a) = a / (1 + exp(-a))     (Shazeer 2020, 2002.05202)
// shapes    h (T, F) bf16; weight (2F, C) bf16, gate's rows, then up's
//           fused: x (T, C), norm (C,) float32; stream, tiled: xg (T, C) bf16, scales (T,) float32 or NULL (rms_norm)
// launch    see linear.cuh; a unit is 8 rows of gate and the same 8 of up, F/8 units
//           fused, stream (T <= 16)   grid F/8, block 128
//           tiled_32, _64, _128       grid (ceil(units / 4, 4, 8), ceil(T / 32, 64, 128), splits 1 or 4),
//                                     block 128, 128, 256, shared memory 75264, 83200, 99072
// bytes     weights 4*C*F once per 16 or BM tokens            numerics  float32, h rounded once
#include "linear.cuh"

struct GateUp {
  static constexpr int K = HIDDEN, TILES = 2, ROWS = 2 * INTER, UNITS = INTER / 8;
  bf16 *h;

  struct Fetched {};
  static __device__ int row(int unit, int tile) { return tile * INTER + unit * 8; }
  __device__ Fetched fetch(int, int, int) const { return {}; }
  // Where exp overflows, a / infinity is 0, as it should be.
  static __device__ float silu(float a) { return __fdividef(a, 1.0f + __expf(-a)); }
  __device__ void store(int token, int unit, int column, const float2 (&y)[2], const Fetched &) const {
    *(unsigned *)(h + (size_t)token * INTER + unit * 8 + column) =
        pack_bf16(__fmul_rn(silu(y[0].x), y[1].x), __fmul_rn(silu(y[0].y), y[1].y));
  }
};
extern __shared__ __align__(16) unsigned char shared[];

extern "C" __global__ void __launch_bounds__(128, 3)
gate_up_fused(bf16 *h, const float *x, const float *norm, const bf16 *weight, int tokens, float eps) {
  pdl_launch();
  linear_stream(GateUp{h}, NormedRows<HIDDEN>(x, norm, eps, tokens), weight, tokens);
}

extern "C" __global__ void __launch_bounds__(128, 3)
gate_up_stream(bf16 *h, const bf16 *xg, const float *scales, const bf16 *weight, int tokens) {
  pdl_launch();
  linear_stream(GateUp{h}, RoundedRows<HIDDEN>(xg, scales, tokens), weight, tokens);
}

extern "C" __global__ void __launch_bounds__(128, 3)
gate_up_tiled_32(bf16 *h, const bf16 *xg, const float *scales, const bf16 *weight, int tokens, float4 *partials,
                 unsigned *tickets) {
  pdl_launch();
  linear_tiled<GateUp, Tile32>(GateUp{h}, xg, scales, weight, tokens, partials, tickets, shared);
}

extern "C" __global__ void __launch_bounds__(128, 2)
gate_up_tiled_64(bf16 *h, const bf16 *xg, const float *scales, const bf16 *weight, int tokens, float4 *partials,
                 unsigned *tickets) {
  pdl_launch();
  linear_tiled<GateUp, Tile64>(GateUp{h}, xg, scales, weight, tokens, partials, tickets, shared);
}

extern "C" __global__ void __launch_bounds__(256)
gate_up_tiled_128(bf16 *h, const bf16 *xg, const float *scales, const bf16 *weight, int tokens, float4 *partials,
                  unsigned *tickets) {
  pdl_launch();
  linear_tiled<GateUp, Tile128>(GateUp{h}, xg, scales, weight, tokens, partials, tickets, shared);
}
