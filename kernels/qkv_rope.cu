// qkv_rope -- q, k, v = norm(x) * weight^T; q and k rotated by their position; k and v into the KV cache
//             (rotary embedding: Su et al. 2021, 2104.09864; dims d and d + D/2 make a pair, as Hugging Face has them)
// shapes    q (T, H, D) bf16; k_cache (N, K, S, D), v_cache (N, K, D, S) bf16, one layer's
//           weight ((H + 2K) * D, C) bf16, the rows of q, k and v
//           cos_sin (max_len, D/2, 2) float32; positions, slot_mapping (T,) int32, slot = block * S + offset
//           fused: x (T, C), norm (C,) float32; stream, tiled: xg (T, C) bf16, scales (T,) float32 or NULL (rms_norm)
// launch    see linear.cuh; a unit is 8 dims of a head's lower half and the same 8 of its upper half, D/16 units a head
//           fused, stream (T <= 16)   grid (H + 2K) * D/16, block 128
//           tiled_32, _64, _128       grid (ceil(units / 4, 4, 8), ceil(T / 32, 64, 128), splits 1 or 4),
//                                     block 128, 128, 256, shared memory 75264, 83200, 99072
// bytes     weights 2*C*(H + 2K)*D once per 16 or BM tokens   numerics  float32, q, k and v rounded once
#include "linear.cuh"

struct QkvRope {
  static constexpr int K = HIDDEN, TILES = 2, ROWS = Q_SIZE + 2 * KV_SIZE, UNITS = ROWS / 16;
  static constexpr int HEAD_UNITS = HEAD_DIM / 16;
  bf16 *q, *k_cache, *v_cache;
  const float *cos_sin;
  const int *positions, *slot_mapping;

  struct Fetched {
    float4 turn;  // cos, sin of dim d, cos, sin of dim d + 1
    int slot;
  };
  static __device__ int row(int unit, int tile) {
    return unit / HEAD_UNITS * HEAD_DIM + unit % HEAD_UNITS * 8 + tile * (HEAD_DIM / 2);
  }
  __device__ Fetched fetch(int token, int unit, int column) const {
    Fetched f = {{1.0f, 0.0f, 1.0f, 0.0f}, 0};
    const int head = unit / HEAD_UNITS, d = unit % HEAD_UNITS * 8 + column;
    if (head >= HEADS) f.slot = slot_mapping[token];
    if (head < HEADS + KV_HEADS)
      f.turn = *(const float4 *)(cos_sin + ((size_t)positions[token] * (HEAD_DIM / 2) + d) * 2);
    return f;
  }
  __device__ void store(int token, int unit, int column, const float2 (&y)[2], const Fetched &f) const {
    const int head = unit / HEAD_UNITS, d = unit % HEAD_UNITS * 8 + column;
    if (head >= HEADS + KV_HEADS) return store_value(head - HEADS - KV_HEADS, d, y, f.slot);
    const size_t block = f.slot / BLOCK_SIZE, offset = f.slot % BLOCK_SIZE;
    bf16 *to = q + ((size_t)token * HEADS + head) * HEAD_DIM;
    if (head >= HEADS) to = k_cache + ((block * KV_HEADS + head - HEADS) * BLOCK_SIZE + offset) * HEAD_DIM;
    const float low0 = fmaf(y[0].x, f.turn.x, -__fmul_rn(y[1].x, f.turn.y));
    const float low1 = fmaf(y[0].y, f.turn.z, -__fmul_rn(y[1].y, f.turn.w));
    const float high0 = fmaf(y[1].x, f.turn.x, __fmul_rn(y[0].x, f.turn.y));
    const float high1 = fmaf(y[1].y, f.turn.z, __fmul_rn(y[0].y, f.turn.w));
    *(unsigned *)(to + d) = pack_bf16(low0, low1);
    *(unsigned *)(to + d + HEAD_DIM / 2) = pack_bf16(high0, high1);
  }
  static __device__ void store_pair(bf16 *to, unsigned pair) {
    *(unsigned short *)to = (unsigned short)pair;
    *(unsigned short *)(to + BLOCK_SIZE) = (unsigned short)(pair >> 16);
  }
  // Transposed: the tokens of a block lie side by side.
  __device__ void store_value(int head, int d, const float2 (&y)[2], int slot) const {
    const size_t block = slot / BLOCK_SIZE, offset = slot % BLOCK_SIZE;
    bf16 *to = v_cache + ((block * KV_HEADS + head) * HEAD_DIM + d) * BLOCK_SIZE + offset;
    store_pair(to, pack_bf16(y[0].x, y[0].y));
    store_pair(to + HEAD_DIM / 2 * BLOCK_SIZE, pack_bf16(y[1].x, y[1].y));
  }
};
extern __shared__ __align__(16) unsigned char shared[];

extern "C" __global__ void __launch_bounds__(128, 3)
qkv_rope_fused(bf16 *q, bf16 *k_cache, bf16 *v_cache, const float *x, const float *norm, const bf16 *weight,
               const float *cos_sin, const int *positions, const int *slot_mapping, int tokens, float eps) {
  pdl_launch();
  const QkvRope op = {q, k_cache, v_cache, cos_sin, positions, slot_mapping};
  linear_stream(op, NormedRows<HIDDEN>(x, norm, eps, tokens), weight, tokens);
}

extern "C" __global__ void __launch_bounds__(128, 3)
qkv_rope_stream(bf16 *q, bf16 *k_cache, bf16 *v_cache, const bf16 *xg, const float *scales, const bf16 *weight,
                const float *cos_sin, const int *positions, const int *slot_mapping, int tokens) {
  pdl_launch();
  const QkvRope op = {q, k_cache, v_cache, cos_sin, positions, slot_mapping};
  linear_stream(op, RoundedRows<HIDDEN>(xg, scales, tokens), weight, tokens);
}

extern "C" __global__ void __launch_bounds__(128, 3)
qkv_rope_tiled_32(bf16 *q, bf16 *k_cache, bf16 *v_cache, const bf16 *xg, const float *scales, const bf16 *weight,
                  const float *cos_sin, const int *positions, const int *slot_mapping, int tokens, float4 *partials,
                  unsigned *tickets) {
  pdl_launch();
  const QkvRope op = {q, k_cache, v_cache, cos_sin, positions, slot_mapping};
  linear_tiled<QkvRope, Tile32>(op, xg, scales, weight, tokens, partials, tickets, shared);
}

extern "C" __global__ void __launch_bounds__(128, 2)
qkv_rope_tiled_64(bf16 *q, bf16 *k_cache, bf16 *v_cache, const bf16 *xg, const float *scales, const bf16 *weight,
                  const float *cos_sin, const int *positions, const int *slot_mapping, int tokens, float4 *partials,
                  unsigned *tickets) {
  pdl_launch();
  const QkvRope op = {q, k_cache, v_cache, cos_sin, positions, slot_mapping};
  linear_tiled<QkvRope, Tile64>(op, xg, scales, weight, tokens, partials, tickets, shared);
}

extern "C" __global__ void __launch_bounds__(256)
qkv_rope_tiled_128(bf16 *q, bf16 *k_cache, bf16 *v_cache, const bf16 *xg, const float *scales, const bf16 *weight,
                   const float *cos_sin, const int *positions, const int *slot_mapping, int tokens, float4 *partials,
                   unsigned *tickets) {
  pdl_launch();
  const QkvRope op = {q, k_cache, v_cache, cos_sin, positions, slot_mapping};
  linear_tiled<QkvRope, Tile128>(op, xg, scales, weight, tokens, partials, tickets, shared);
}
