// attention -- causal attention of new queries over all cached keys of their sequence
//              FlashAttention-2 (Dao 2023, 2307.08691) on a paged cache (Kwon et al. 2023, 2309.06180)
// shapes    q (T, H, D) bf16, rotated, not scaled; k_cache (N, K, S, D), v_cache (N, K, D, S) bf16 of one layer;
//           positions, seats (T,) int32; block_tables (seats, max_blocks) int32 -> out (T, H, D) bf16
//           D % 32 == 0, S = 16, H / K <= 16. Keys 0..positions[t] count; no block table entry beyond them is read
// launch    attention_decode   one token a sequence: grid (K, T, splits), block 128. Chunk c of the keys is for warp
//                              c % (4 * splits), so the grid does not depend on the positions. partials (T, K,
//                              max_chunks, H / K, D + 2) float32, max_chunks > positions[t] / 128; tickets (T, K)
//                              uint32, 0 before and after
//           attention_prefill  tiles (n,) int2: first token and number of tokens, 1 to 8 * TOKENS, of one sequence at
//                              consecutive positions: grid (n, K), block 256, shared 512 * D bytes
// bytes     4*K*D a key, once a sequence (decode) or once a tile, mostly from L2 (prefill)
// numerics  float32, but weights meet V in bf16. Chunks of 128 keys, each with two steps of online softmax, are merged
//           in rising order, in both kernels: a query's bits depend on nothing but its own keys
#include "common.cuh"

constexpr int SPAN = 32;                 // keys of four n8 tiles of scores, and of two k16 steps of P V
constexpr int STEP = 2 * SPAN;           // keys between two looks at the largest score
constexpr int CHUNK = 2 * STEP;          // keys of one result
constexpr int SPANS = CHUNK / SPAN, CHUNK_BLOCKS = CHUNK / BLOCK_SIZE;
constexpr int PARTS = HEAD_DIM / 32;     // of a key or value: k32 blocks of Q K^T, groups of four n8 tiles of P V
constexpr int PIECES = SPANS * PARTS;    // of a chunk's keys, and of its values: four 16-byte loads a lane
constexpr int TOKENS = 16 / GROUP;       // of a warp in attention_prefill
constexpr int DECODE_WARPS = 4, PREFILL_WARPS = 8;
constexpr int PARTIAL = HEAD_DIM + 2;    // floats of a row's partial result: o, m, l
constexpr float LOG2_E = 1.44269504f;
constexpr float NEVER = -1e30f;          // the score of a key that a row does not see; finite: no NaN comes of it
static_assert(GROUP <= 16 && GROUP * KV_HEADS == HEADS, "a warp has 16 rows");

// One KV head of one sequence's cache, as far as a warp's rows may see it.
struct Context {
  const bf16 *keys, *values; // of this head in block 0
  const int *blocks;         // the sequence's block table
  int first, last;           // the last key that all rows see, and the last that any row sees

  __device__ Context(const bf16 *k_cache, const bf16 *v_cache, const int *block_table, int kv_head, int first, int last)
      : keys(k_cache + kv_head * BLOCK_SIZE * HEAD_DIM), values(v_cache + kv_head * BLOCK_SIZE * HEAD_DIM),
        blocks(block_table), first(first), last(last) {}

  // Block number lane % 8 of a chunk. Past the last key it is the last key's again: what is read there is not used.
  __device__ int block(int chunk) const {
    return blocks[min(chunk * CHUNK_BLOCKS + (int)threadIdx.x % CHUNK_BLOCKS, last / BLOCK_SIZE)];
  }
};

// A warp's 16 rows; row r is head r % GROUP of the KV head's group, of token r / GROUP. Lane (g, t) = (lane / 4,
// lane % 4) has row g and, where HALVES is 2, row g + 8. Rows past the last are the first row again, for nobody.
template <int HALVES> struct Queries {
  uint4 words[HALVES][PARTS];
  int position[HALVES];

  __device__ Queries(const bf16 *q, int rows, int first_position) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int h = 0; h < HALVES; h++) {
      const int row = g + 8 * h < rows ? g + 8 * h : 0;
      const bf16 *from = q + (size_t)(row / GROUP) * Q_SIZE + row % GROUP * HEAD_DIM + 8 * t;
      position[h] = first_position + row / GROUP;
#pragma unroll
      for (int part = 0; part < PARTS; part++) words[h][part] = load_activations((const uint4 *)(from + part * 32));
    }
  }
};

// What a chunk's keys weigh for each row; one step's weights are relative to the largest score up to its end.
template <int HALVES> struct Weights {
  unsigned p[HALVES][SPANS][4]; // exp2(score - m) in bf16, as A of P V
  float m[HALVES];              // the largest score, to base 2
  float keep[HALVES];           // what the latest step makes of what was before it
  float l[HALVES];              // the sum of the weights, over this lane's keys until quad_sum makes it the row's
};

typedef uint4 Piece[4];

// Piece n of the keys is of span n % 2 of step n / 2 / PARTS, as B of Q K^T. Column g of tile j is the span's key
// 8 * (g / 2) + 2j + g % 2, so that a lane's scores in the four tiles are of keys 8t..8t+7: one 16-byte load of values.
__device__ __forceinline__ void load_keys(Piece &piece, const Context &context, int chunk_block, int n) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, span = n / 2 / PARTS * 2 + n % 2, part = n / 2 % PARTS;
  const int block = __shfl_sync(0xffffffffu, chunk_block, 2 * span + g / 4);
  const bf16 *key = context.keys + (size_t)block * (KV_SIZE * BLOCK_SIZE) + (g / 2 % 2 * 8 + g % 2) * HEAD_DIM + 8 * t;
#pragma unroll
  for (int j = 0; j < 4; j++) piece[j] = load_activations((const uint4 *)(key + 2 * j * HEAD_DIM + part * 32));
}

// Piece n of the values is of span n % SPANS, elements 32 * part + 8j + g of keys 8t..8t+7, as B of P V.
__device__ __forceinline__ void load_values(Piece &piece, const Context &context, int chunk_block, int n) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, span = n % SPANS, part = n / SPANS;
  const int block = __shfl_sync(0xffffffffu, chunk_block, 2 * span + t / 2);
  const bf16 *value = context.values + (size_t)block * (KV_SIZE * BLOCK_SIZE) + g * BLOCK_SIZE + t % 2 * 8;
#pragma unroll
  for (int j = 0; j < 4; j++) piece[j] = load_activations((const uint4 *)(value + (part * 32 + 8 * j) * BLOCK_SIZE));
}

// Zeros for the keys past `last`: nobody wrote them, and what lies there may be NaN, which is not 0 when times 0.
__device__ __forceinline__ void clear_values(Piece &piece, int first_key, int last) {
  const int count = last + 1 - first_key - (int)threadIdx.x % 4 * 8; // of the lane's 8; may be below 0 or above
  unsigned keep[4];
#pragma unroll
  for (int w = 0; w < 4; w++) keep[w] = count > 2 * w + 1 ? 0xffffffffu : count > 2 * w ? 0x0000ffffu : 0u;
#pragma unroll
  for (int j = 0; j < 4; j++) {
    piece[j].x &= keep[0], piece[j].y &= keep[1], piece[j].z &= keep[2], piece[j].w &= keep[3];
  }
}

// s += Q K^T over one k32 block.
template <int HALVES>
__device__ __forceinline__ void score(float (&s)[4][4], const Queries<HALVES> &queries, const Piece &k, int part) {
  const uint4 upper = queries.words[0][part], none = {}, lower = HALVES == 2 ? queries.words[HALVES - 1][part] : none;
#pragma unroll
  for (int j = 0; j < 4; j++) mma_bf16(s[j], upper.x, lower.x, upper.y, lower.y, k[j].x, k[j].y);
#pragma unroll
  for (int j = 0; j < 4; j++) mma_bf16(s[j], upper.z, lower.z, upper.w, lower.w, k[j].z, k[j].w);
}

// o += P V over a span: tiles 0 and 1 of the weights meet the first four of each lane's eight keys, 2 and 3 the others.
template <int HALVES>
__device__ __forceinline__ void add_values(float (&o)[4][4], const Weights<HALVES> &weights, const Piece &v, int span) {
  const unsigned none[4] = {}, *upper = weights.p[0][span], *lower = HALVES == 2 ? weights.p[HALVES - 1][span] : none;
#pragma unroll
  for (int j = 0; j < 4; j++) mma_bf16(o[j], upper[0], lower[0], upper[1], lower[1], v[j].x, v[j].y);
#pragma unroll
  for (int j = 0; j < 4; j++) mma_bf16(o[j], upper[2], lower[2], upper[3], lower[3], v[j].z, v[j].w);
}

// Hides the keys after each row's own position. A row that sees no key of a chunk gets weights that mean nothing.
template <int HALVES>
__device__ __forceinline__ void mask(float (&s)[2][4][4], const Queries<HALVES> &queries, int first_key) {
#pragma unroll
  for (int h = 0; h < HALVES; h++) {
    const int seen = queries.position[h] - first_key - (int)threadIdx.x % 4 * 8;
#pragma unroll
    for (int n = 0; n < 16; n++) {
      float &x = s[n / 8][n / 2 % 4][2 * h + n % 2];
      if (n / 8 * SPAN + n % 8 > seen) x = NEVER;
    }
  }
}

// The weights of one step. fmaf and __fmul_rn are spelled out, here and below: the compiler must not fuse a formula in
// one kernel and not in the other.
template <int HALVES>
__device__ __forceinline__ void weigh(Weights<HALVES> &weights, const float (&s)[2][4][4], int step, float scale_log2) {
#pragma unroll
  for (int h = 0; h < HALVES; h++) {
    float top = NEVER, sum = 0.0f;
#pragma unroll
    for (int n = 0; n < 16; n++) top = fmaxf(top, s[n / 8][n / 2 % 4][2 * h + n % 2]);
    top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
    top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
    const float m = fmaxf(weights.m[h], __fmul_rn(top, scale_log2));
#pragma unroll
    for (int n = 0; n < 8; n++) {
      const float *pair = &s[n / 4][n % 4][2 * h];
      const float p0 = exp2f(fmaf(pair[0], scale_log2, -m)), p1 = exp2f(fmaf(pair[1], scale_log2, -m));
      weights.p[h][2 * step + n / 4][n % 4] = pack_bf16(p0, p1);
      sum += p0 + p1;
    }
    weights.keep[h] = exp2f(weights.m[h] - m);
    weights.l[h] = fmaf(weights.l[h], weights.keep[h], sum);
    weights.m[h] = m;
  }
}

// Makes the first step's sums relative to the largest score of both.
template <int HALVES> __device__ __forceinline__ void rescale(float (&o)[4][4], const Weights<HALVES> &weights) {
#pragma unroll
  for (int h = 0; h < HALVES; h++)
#pragma unroll
    for (int j = 0; j < 4; j++) o[j][2 * h] *= weights.keep[h], o[j][2 * h + 1] *= weights.keep[h];
}

// What the rows find in one chunk. The sink gets the weights' m and l, then the sums o of exp2(score - m) * v, 32
// elements at a time: o[j][2h + c] is element 32 * part + 8j + 2t + c of row g + 8h. EDGE: some row misses some keys.
template <bool EDGE, int HALVES, class Sink>
__device__ __forceinline__ void attend_chunk(Sink &sink, const Queries<HALVES> &queries, const Context &context,
                                             int chunk, int chunk_block, float scale_log2) {
  constexpr int AHEAD = HALVES == 1 ? 7 : 3; // pieces on their way while one is used: as many as registers allow
  Piece pieces[2 * PIECES];
  auto load = [&](int n) {
    if (n < PIECES) load_keys(pieces[n], context, chunk_block, n);
    else if (n < 2 * PIECES) load_values(pieces[n], context, chunk_block, n - PIECES);
    if (n >= AHEAD - 1) __syncwarp(); // or the compiler moves loads down to where they are needed
  };
#pragma unroll
  for (int n = 0; n < AHEAD; n++) load(n);

  Weights<HALVES> weights;
#pragma unroll
  for (int h = 0; h < HALVES; h++) weights.m[h] = NEVER, weights.l[h] = 0.0f;
#pragma unroll
  for (int step = 0; step < 2; step++) {
    float s[2][4][4] = {};
#pragma unroll
    for (int n = step * 2 * PARTS; n < (step + 1) * 2 * PARTS; n++) {
      load(n + AHEAD);
      score(s[n % 2], queries, pieces[n], n / 2 % PARTS);
    }
    if (EDGE) mask(s, queries, chunk * CHUNK + step * STEP);
    weigh(weights, s, step, scale_log2);
  }
#pragma unroll
  for (int h = 0; h < HALVES; h++) weights.l[h] = quad_sum(weights.l[h]);

  sink.begin(weights.m, weights.l);
#pragma unroll
  for (int part = 0; part < PARTS; part++) {
    float o[4][4] = {};
#pragma unroll
    for (int span = 0; span < SPANS; span++) {
      const int n = PIECES + part * SPANS + span;
      load(n + AHEAD);
      if (span == SPANS / 2) rescale(o, weights);
      if (EDGE) clear_values(pieces[n], chunk * CHUNK + span * SPAN, context.last);
      add_values(o, weights, pieces[n], span);
    }
    sink.take(part, o);
  }
}

template <int HALVES, class Sink>
__device__ __forceinline__ void attend(Sink &sink, const Queries<HALVES> &queries, const Context &context, int chunk,
                                       float scale) {
  const int block = context.block(chunk);
  const float scale_log2 = __fmul_rn(scale, LOG2_E);
  if (chunk * CHUNK + CHUNK - 1 > context.first) attend_chunk<true>(sink, queries, context, chunk, block, scale_log2);
  else attend_chunk<false>(sink, queries, context, chunk, block, scale_log2);
}

// How a chunk enters a total: m becomes the larger one, l and o are merged by the factors of the total and the chunk.
__device__ __forceinline__ float2 merge_factors(float &m, float chunk_m) {
  const float before = m;
  m = fmaxf(before, chunk_m);
  return make_float2(exp2f(before - m), exp2f(chunk_m - m));
}
__device__ __forceinline__ float merge(float total, float chunk, float2 factors) {
  return fmaf(chunk, factors.y, __fmul_rn(total, factors.x));
}

// Writes a chunk's results: GROUP rows of o, m, l.
template <int HALVES> struct PartialRows {
  float *rows;

  __device__ bool has(int h) const { return (int)threadIdx.x % 32 / 4 + 8 * h < GROUP; }
  __device__ float *row(int h) const { return rows + (threadIdx.x % 32 / 4 + 8 * h) * PARTIAL; }
  __device__ void begin(const float (&m)[HALVES], const float (&l)[HALVES]) {
#pragma unroll
    for (int h = 0; h < HALVES; h++)
      if (has(h) && threadIdx.x % 4 == 0) *(float2 *)(row(h) + HEAD_DIM) = make_float2(m[h], l[h]);
  }
  __device__ void take(int part, const float (&o)[4][4]) {
#pragma unroll
    for (int h = 0; h < HALVES; h++) {
      float2 *to = (float2 *)(row(h) + part * 32) + threadIdx.x % 4;
#pragma unroll
      for (int j = 0; j < 4; j++)
        if (has(h)) to[4 * j] = make_float2(o[j][2 * h], o[j][2 * h + 1]);
    }
  }
};

// The sum over the chunks so far. o lies in shared memory, each lane's own: at D = 128 there are no registers for it.
struct Totals {
  float4 *o;
  float m[2] = {NEVER, NEVER}, l[2] = {};
  float2 factors[2];
  bool sees[2]; // a key of the chunk; a chunk of which a row sees nothing leaves its total as it is, to the bit

  __device__ explicit Totals(float4 *o) : o(o) {
#pragma unroll
    for (int i = 0; i < PARTS * 4; i++) tile(i) = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  }
  __device__ float4 &tile(int i) const { return o[i * PREFILL_WARPS * 32]; }
  __device__ void begin(const float (&chunk_m)[2], const float (&chunk_l)[2]) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      if (!sees[h]) continue;
      factors[h] = merge_factors(m[h], chunk_m[h]);
      l[h] = merge(l[h], chunk_l[h], factors[h]);
    }
  }
  __device__ void take(int part, const float (&chunk_o)[4][4]) {
#pragma unroll
    for (int j = 0; j < 4; j++) {
      float4 x = tile(4 * part + j);
      if (sees[0]) x.x = merge(x.x, chunk_o[j][0], factors[0]), x.y = merge(x.y, chunk_o[j][1], factors[0]);
      if (sees[1]) x.z = merge(x.z, chunk_o[j][2], factors[1]), x.w = merge(x.w, chunk_o[j][3], factors[1]);
      tile(4 * part + j) = x;
    }
  }
  __device__ void store(bf16 *out, int rows) const {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const float upper = 1.0f / l[0], lower = 1.0f / l[1];
    unsigned *to[2];
#pragma unroll
    for (int h = 0; h < 2; h++)
      to[h] = (unsigned *)(out + (size_t)((g + 8 * h) / GROUP) * Q_SIZE + (g + 8 * h) % GROUP * HEAD_DIM) + t;
#pragma unroll
    for (int i = 0; i < PARTS * 4; i++) {
      const float4 x = tile(i);
      if (g < rows) to[0][4 * i] = pack_bf16(__fmul_rn(x.x, upper), __fmul_rn(x.y, upper));
      if (g + 8 < rows) to[1][4 * i] = pack_bf16(__fmul_rn(x.z, lower), __fmul_rn(x.w, lower));
    }
  }
};

// The same sum for attention_decode, of one token and KV head; two elements a thread.
__device__ __forceinline__ void merge_partials(bf16 *out, const float *partials, int chunks) {
  for (int i = threadIdx.x * 2; i < GROUP * HEAD_DIM; i += DECODE_WARPS * 64) {
    const float *row = partials + i / HEAD_DIM * PARTIAL;
    float m = NEVER, l = 0.0f, o0 = 0.0f, o1 = 0.0f;
#pragma unroll 8
    for (int chunk = 0; chunk < chunks; chunk++, row += GROUP * PARTIAL) {
      const float2 o = __ldcg((const float2 *)(row + i % HEAD_DIM)), ml = __ldcg((const float2 *)(row + HEAD_DIM));
      const float2 factors = merge_factors(m, ml.x);
      l = merge(l, ml.y, factors);
      o0 = merge(o0, o.x, factors);
      o1 = merge(o1, o.y, factors);
    }
    const float inverse = 1.0f / l;
    *(unsigned *)(out + i) = pack_bf16(__fmul_rn(o0, inverse), __fmul_rn(o1, inverse));
  }
}

extern "C" __global__ void __launch_bounds__(DECODE_WARPS * 32)
attention_decode(bf16 *out, const bf16 *q, const bf16 *k_cache, const bf16 *v_cache, const int *positions,
                 const int *seats, const int *block_tables, int max_blocks, float *partials, unsigned *tickets,
                 int max_chunks, float scale) {
  constexpr int HALVES = GROUP > 8 ? 2 : 1;
  pdl_launch();
  pdl_wait();
  const int kv_head = blockIdx.x, token = blockIdx.y, warp = threadIdx.x / 32;
  const size_t pair = (size_t)token * KV_HEADS + kv_head;
  const int seat = seats[token], position = positions[token];
  const int chunks = position / CHUNK + 1;
  const int busy = min((int)gridDim.z, (chunks + DECODE_WARPS - 1) / DECODE_WARPS); // blocks that have a chunk
  if ((int)blockIdx.z >= busy) return;
  out += pair * GROUP * HEAD_DIM;
  partials += pair * max_chunks * GROUP * PARTIAL;

  const Queries<HALVES> queries(q + pair * GROUP * HEAD_DIM, GROUP, position);
  const Context context(k_cache, v_cache, block_tables + (size_t)seat * max_blocks, kv_head, position, position);
#pragma unroll 1
  for (int chunk = blockIdx.z * DECODE_WARPS + warp; chunk < chunks; chunk += gridDim.z * DECODE_WARPS) {
    PartialRows<HALVES> sink = {partials + (size_t)chunk * GROUP * PARTIAL};
    attend(sink, queries, context, chunk, scale);
  }
  if (busy == 1) __syncthreads();
  else if (!is_last_block(tickets + pair, busy)) return;
  merge_partials(out, partials, chunks);
}

extern __shared__ float4 shared[];

extern "C" __global__ void __launch_bounds__(PREFILL_WARPS * 32)
attention_prefill(bf16 *out, const bf16 *q, const bf16 *k_cache, const bf16 *v_cache, const int *positions,
                  const int *seats, const int *block_tables, int max_blocks, const int2 *tiles, float scale) {
  pdl_launch();
  pdl_wait();
  const int kv_head = blockIdx.y, before = threadIdx.x / 32 * TOKENS;
  const int2 tile = tiles[blockIdx.x];
  const int token = tile.x + before, tokens = min(TOKENS, tile.y - before);
  if (tokens <= 0) return;
  const int seat = seats[token], first = positions[token], last = first + tokens - 1;
  const size_t at = (size_t)token * Q_SIZE + kv_head * GROUP * HEAD_DIM;

  const Queries<2> queries(q + at, tokens * GROUP, first);
  const Context context(k_cache, v_cache, block_tables + (size_t)seat * max_blocks, kv_head, first, last);
  Totals totals(shared + threadIdx.x);
#pragma unroll 1
  for (int chunk = 0; chunk * CHUNK <= last; chunk++) {
#pragma unroll
    for (int h = 0; h < 2; h++) totals.sees[h] = queries.position[h] >= chunk * CHUNK;
    attend(totals, queries, context, chunk, scale);
  }
  totals.store(out + at, tokens * GROUP);
}
