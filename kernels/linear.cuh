// linear.cuh -- y[t, n] = sum over k of a[t, k] * w[n, k]: the product in qkv_rope, gate_up, add_linear and lm_head.
//
// One arithmetic. K is cut in four quarters; in each runs one chain of mma.sync m16n8k16, 32 elements of K (a block)
// after the other, from 0; y = ((s0 + s1) + s2) + s3. Both loops below keep to it, so a token's result has the same
// bits whatever kernel computes it and whichever tokens stand beside it.
//
// A block of K is two mma steps. Lane (g = lane / 4, t = lane % 4) holds elements 8t..8t+7 of a row, one 16-byte load:
// words x and y feed the first step, z and w the second. Weights and activations are permuted alike, so the sum is
// right, no weight is repacked, and no ldmatrix is needed.
//
// An Op says what is multiplied and what becomes of it:
//   K, ROWS                        the weight is (ROWS, K)
//   TILES, UNITS                   a unit is TILES n8 tiles (8 weight rows each) whose results `store` needs together
//   row(unit, tile)                the first weight row of a tile
//   fetch(token, unit, column)     what `store` needs of memory, Fetched: asked for before the sums are there
//   store(token, unit, column, y, fetched)     y[tile] = columns `column` and `column + 1` of the tile
//
// An op must give the same bits in every kernel: a * b + c is written as fmaf, or with __fmul_rn, which never fuses.
#pragma once
#include "common.cuh"

__device__ constexpr int quarter(int k) { return (k + 127) / 128 * 32; }

// Whether a block of K exists. Only the last quarters can be short, and only where K is no multiple of 128.
template <int K> __device__ __forceinline__ bool inside(int k) { return K % 128 == 0 || k < K; }

template <int K> __device__ __forceinline__ float rms_scale(float squares, float eps) {
  return rsqrtf(fmaf(squares, 1.0f / K, eps));
}

// Eight consecutive float32 values that an earlier kernel wrote.
struct Eight {
  float at[8];
  __device__ __forceinline__ Eight(const float *p) {
    const uint4 u = load_activations((const uint4 *)p), v = load_activations((const uint4 *)p + 1);
    const unsigned words[8] = {u.x, u.y, u.z, u.w, v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 8; i++) at[i] = __uint_as_float(words[i]);
  }
};

// bf16(x * g); the squares of x are added to `squares` in rising order.
__device__ __forceinline__ uint4 round_scaled(const Eight &x, const Eight &g, float &squares) {
  unsigned words[4];
#pragma unroll
  for (int i = 0; i < 8; i += 2) {
    squares = fmaf(x.at[i + 1], x.at[i + 1], fmaf(x.at[i], x.at[i], squares));
    words[i / 2] = pack_bf16(x.at[i] * g.at[i], x.at[i + 1] * g.at[i + 1]);
  }
  return {words[0], words[1], words[2], words[3]};
}

// The two steps of a block of K for one n8 tile: rows g and g + 8 of the activations, row g of the weights.
__device__ __forceinline__ void mma_first(float (&sum)[4], const uint4 (&a)[2], const uint4 &w) {
  mma_bf16(sum, a[0].x, a[1].x, a[0].y, a[1].y, w.x, w.y);
}
__device__ __forceinline__ void mma_second(float (&sum)[4], const uint4 (&a)[2], const uint4 &w) {
  mma_bf16(sum, a[0].z, a[1].z, a[0].w, a[1].w, w.z, w.w);
}

__device__ __forceinline__ void add(float (&sum)[4], const float4 &v) {
  sum[0] += v.x;
  sum[1] += v.y;
  sum[2] += v.z;
  sum[3] += v.w;
}

// ----------------------------------------------------------------------------------------------------------------
// linear_stream: at most 16 tokens, weights from global memory straight to registers.
// launch  grid UNITS, block 128: a block owns a unit, warp q its quarter q of K
// A lane asks for 16 x 16 bytes of weights (a round) before it multiplies, the first round before pdl_wait.

// Where a lane begins in a row of K, and its two tokens. A lane beyond the last token takes the last one once more: its
// results are never stored, and no load needs a condition.
template <int K> __device__ __forceinline__ int begin_k() {
  return threadIdx.x / 32 * quarter(K) + threadIdx.x % 4 * 8;
}
__device__ __forceinline__ int lane_token(int i, int tokens) {
  return min((int)threadIdx.x % 32 / 4 + 8 * i, tokens - 1);
}

// Activations (T, K) bf16 and their rows' factors (NULL: 1).
template <int K> struct RoundedRows {
  static constexpr bool NORMED = false;
  static constexpr int AHEAD = 16;  // blocks that may be on their way at a time: a whole round
  const bf16 *row[2];
  const float *scales;
  float factors[2];

  __device__ RoundedRows(const bf16 *x, const float *scales, int tokens) : scales(scales) {
#pragma unroll
    for (int i = 0; i < 2; i++) row[i] = x + (size_t)lane_token(i, tokens) * K + begin_k<K>();
  }
  // After pdl_wait, once.
  __device__ void fetch(int tokens) {
#pragma unroll
    for (int i = 0; i < 2; i++) factors[i] = scales ? scales[lane_token(i, tokens)] : 1.0f;
  }
  // The block that begins k elements on: row g, and row g + 8 if BOTH.
  template <bool BOTH> __device__ void load(uint4 (&a)[2], int k) {
    a[0] = load_activations((const uint4 *)(row[0] + k));
    if (BOTH) a[1] = load_activations((const uint4 *)(row[1] + k));
  }
  __device__ void advance(int k) {
    row[0] += k;
    row[1] += k;
  }
  __device__ float factor(int i) const { return factors[i]; }
};

// The residual x (T, K) float32 and the norm's weight: what rms_norm would have made of them.
template <int K> struct NormedRows {
  static constexpr bool NORMED = true;
  static constexpr int AHEAD = 4;  // more of them would not fit the registers
  const float *row[2], *norm;
  float eps, squares[2] = {0.0f, 0.0f};

  __device__ NormedRows(const float *x, const float *norm, float eps, int tokens)
      : norm(norm + begin_k<K>()), eps(eps) {
#pragma unroll
    for (int i = 0; i < 2; i++) row[i] = x + (size_t)lane_token(i, tokens) * K + begin_k<K>();
  }
  __device__ void fetch(int) {}
  template <bool BOTH> __device__ void load(uint4 (&a)[2], int k) {
    const Eight g(norm + k);
    a[0] = round_scaled(Eight(row[0] + k), g, squares[0]);
    if (BOTH) a[1] = round_scaled(Eight(row[1] + k), g, squares[1]);
  }
  __device__ void advance(int k) {
    row[0] += k;
    row[1] += k;
    norm += k;
  }
  __device__ float factor(int i) const { return rms_scale<K>(squares[i], eps); }
};

// A lane's pointers into the weight rows of its unit. Rows beyond the last repeat the last: they are never stored.
template <class Op> struct WeightRows {
  const bf16 *row[Op::TILES];

  __device__ WeightRows(const bf16 *weight, int unit) {
#pragma unroll
    for (int tile = 0; tile < Op::TILES; tile++) {
      const int n = min(Op::row(unit, tile) + (int)threadIdx.x % 32 / 4, Op::ROWS - 1);
      row[tile] = weight + (size_t)n * Op::K + begin_k<Op::K>();
    }
  }
  // Asks for COUNT blocks of every tile, which begin at k, and steps over them. Without __syncwarp the compiler would
  // mix loads and mma, with one or two loads in flight.
  template <int COUNT, int BLOCKS> __device__ void load(uint4 (&w)[Op::TILES][BLOCKS], int k) {
#pragma unroll
    for (int tile = 0; tile < Op::TILES; tile++) {
#pragma unroll
      for (int i = 0; i < COUNT; i++)
        if (inside<Op::K>(k + 32 * i)) w[tile][i] = load_weights((const uint4 *)(row[tile] + 32 * i));
      row[tile] += 32 * COUNT;
    }
    __syncwarp();
  }
};

template <class Op, int COUNT, bool BOTH, int BLOCKS, class Rows>
__device__ __forceinline__ void multiply(float (&sums)[Op::TILES][4], const uint4 (&w)[Op::TILES][BLOCKS], Rows &x,
                                         int k) {
#pragma unroll
  for (int i = 0; i < COUNT; i++) {
    if (!inside<Op::K>(k + 32 * i)) continue;
    uint4 a[2] = {};
    x.template load<BOTH>(a, 32 * i);
#pragma unroll
    for (int tile = 0; tile < Op::TILES; tile++) {
      mma_first(sums[tile], a, w[tile][i]);
      mma_second(sums[tile], a, w[tile][i]);
    }
    if (i % Rows::AHEAD == Rows::AHEAD - 1) __syncwarp();
  }
  x.advance(32 * COUNT);
}

// COUNT blocks from k on; rows 8..15 of the tile cost nothing where there are no such tokens.
template <class Op, int COUNT, int BLOCKS, class Rows>
__device__ __forceinline__ void multiply_round(float (&sums)[Op::TILES][4], const uint4 (&w)[Op::TILES][BLOCKS],
                                               Rows &x, int k, int tokens) {
  if (tokens > 8) multiply<Op, COUNT, true>(sums, w, x, k);
  else multiply<Op, COUNT, false>(sums, w, x, k);
}

// Adds the four warps' sums in order. The result is warp 0's; false in the others, which are done.
template <int TILES, class Rows> __device__ __forceinline__ bool add_quarters(float (&sums)[TILES][4], Rows &x) {
  __shared__ float4 parts[3][TILES][32];
  __shared__ float2 squares[3][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if constexpr (Rows::NORMED) {
    x.squares[0] = quad_sum(x.squares[0]);
    x.squares[1] = quad_sum(x.squares[1]);
    if (warp > 0) squares[warp - 1][lane] = {x.squares[0], x.squares[1]};
  }
#pragma unroll
  for (int i = 0; i < TILES; i++)
    if (warp > 0) parts[warp - 1][i][lane] = {sums[i][0], sums[i][1], sums[i][2], sums[i][3]};
  __syncthreads();
  if (warp > 0) return false;
#pragma unroll
  for (int q = 0; q < 3; q++) {
#pragma unroll
    for (int i = 0; i < TILES; i++) add(sums[i], parts[q][i][lane]);
    if constexpr (Rows::NORMED) {
      x.squares[0] += squares[q][lane].x;
      x.squares[1] += squares[q][lane].y;
    }
  }
  return true;
}

template <class Op, class Rows>
__device__ __forceinline__ void linear_stream(const Op &op, Rows x, const bf16 *weight, int tokens) {
  constexpr int TILES = Op::TILES, BLOCKS = 16 / TILES, ROUND = 32 * BLOCKS;
  constexpr int ROUNDS = quarter(Op::K) / ROUND, REST = quarter(Op::K) % ROUND / 32;
  const int g = threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2, unit = blockIdx.x;
  int k = begin_k<Op::K>();
  WeightRows<Op> rows(weight, unit);
  uint4 w[TILES][BLOCKS];
  float sums[TILES][4] = {};
  rows.template load<ROUNDS ? BLOCKS : REST>(w, k);
  pdl_wait();
  x.fetch(tokens);
  typename Op::Fetched fetched[2];
#pragma unroll
  for (int i = 0; i < 2; i++) fetched[i] = op.fetch(lane_token(i, tokens), unit, column);
#pragma unroll 1  // the compiler would mix straight rounds and run out of registers
  for (int round = 0; round < ROUNDS; round++, k += ROUND) {
    multiply_round<Op, BLOCKS>(sums, w, x, k, tokens);
    if (round + 1 < ROUNDS) rows.template load<BLOCKS>(w, k + ROUND);
  }
  if constexpr (REST > 0) {
    if constexpr (ROUNDS > 0) rows.template load<REST>(w, k);
    multiply_round<Op, REST>(sums, w, x, k, tokens);
  }

  if (!add_quarters(sums, x)) return;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    if (g + 8 * i >= tokens) continue;
    const float factor = x.factor(i);
    float2 y[TILES];
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
      y[tile] = {__fmul_rn(sums[tile][2 * i], factor), __fmul_rn(sums[tile][2 * i + 1], factor)};
    op.store(g + 8 * i, unit, column, y, fetched[i]);
  }
}

// ----------------------------------------------------------------------------------------------------------------
// linear_tiled: any number of tokens, both operands through shared memory (cp.async, STAGES steps of 64 elements of K).
// launch  grid (ceil(UNITS * TILES / (BN / 8)), ceil(T / BM), splits), block THREADS, SHARED bytes of shared memory
// splits is 1, or 4 where there are few tiles: block z then computes quarter z, and the last of the four adds them in
// order. They meet in `partials` (grid x * grid y * 4 * BM * BN float32) and `tickets` (grid x * grid y; 0 before and
// after).
//
// In shared memory a step is two blocks of K, each [rows][32] with 64 bytes a row: the 16-byte loads of a warp are then
// 512 bytes in one piece. 64 bytes lie between the blocks, so that the eight copies of a row's 128 bytes hit all banks.

template <int BM_, int BN_, int WARPS_M_, int WARPS_N_, int STAGES_> struct TileShape {
  static constexpr int BM = BM_, BN = BN_, WARPS_M = WARPS_M_, WARPS_N = WARPS_N_, STAGES = STAGES_;
  static constexpr int THREADS = 32 * WARPS_M * WARPS_N;
  static constexpr int M16 = BM / WARPS_M / 16, N8 = BN / WARPS_N / 8;  // what a warp has of it
  static constexpr int A_BLOCK = 64 * BM + 64, W_BLOCK = 64 * BN + 64;  // bytes
  static constexpr int STAGE = 2 * (A_BLOCK + W_BLOCK), SHARED = STAGES * STAGE;
};
typedef TileShape<32, 64, 2, 2, 6> Tile32;     // 75,264 bytes
typedef TileShape<64, 64, 2, 2, 5> Tile64;     // 83,200
typedef TileShape<128, 128, 2, 4, 3> Tile128;  // 99,072; a block may have 101,376 on every architecture

// The steps of K: quarter q has COUNT of them, the first of which is step q * COUNT.
template <int K> struct Steps {
  static constexpr int COUNT = (quarter(K) + 63) / 64;
  static constexpr bool EVEN = quarter(K) % 64 == 0;
  static __device__ int k(int step) { return EVEN ? 64 * step : step / COUNT * quarter(K) + step % COUNT * 64; }
  static __device__ bool has_block(int step, int block) {
    return (EVEN || step % COUNT * 64 + 32 * block < quarter(K)) && inside<K>(k(step) + 32 * block);
  }
};

// Which tile a block computes. Blocks go through eight rows of tiles column by column: those that run at a time share
// weights and activations in L2.
struct Place {
  int id, m, n;
  __device__ Place() : id(blockIdx.y * gridDim.x + blockIdx.x) {
    const int group = id / (8 * gridDim.x), inner = id % (8 * gridDim.x);
    const int height = min((int)gridDim.y - 8 * group, 8);
    m = 8 * group + inner % height;
    n = inner / height;
  }
};

// What a thread copies to shared memory in every step: piece threadIdx.x % 8 (16 bytes) of COUNT rows.
template <int K, int ROWS, int THREADS> struct Copies {
  static constexpr int COUNT = 8 * ROWS / THREADS;
  const bf16 *from[COUNT];
  bool exists[COUNT];

  static __device__ int row(int i) { return threadIdx.x / 8 + i * (THREADS / 8); }
  __device__ void set(int i, const bf16 *rows, int row, bool ok) {
    from[i] = rows + (ok ? (size_t)row * K : 0) + threadIdx.x % 8 * 8;
    exists[i] = ok;
  }
  __device__ void start(unsigned char *to, int step) const {
    const int piece = threadIdx.x % 8;
    const bool ok = Steps<K>::has_block(step, piece / 4);
    const int k = ok ? Steps<K>::k(step) : 0;
    to += piece / 4 * (64 * ROWS + 64) + piece % 4 * 16;
#pragma unroll
    for (int i = 0; i < COUNT; i++) cp_async16(to + 64 * row(i), from[i] + k, ok && exists[i]);
  }
};

// One block of K for what a warp has of the tile; eight rows are 512 bytes.
template <class Tile>
__device__ __forceinline__ void multiply_block(float (&sums)[Tile::M16][Tile::N8][4], const unsigned char *stage,
                                               int block) {
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 / Tile::WARPS_N, column = threadIdx.x / 32 % Tile::WARPS_N;
  const uint4 *from_a = (const uint4 *)(stage + block * Tile::A_BLOCK + row * Tile::M16 * 1024) + lane;
  const unsigned char *weights = stage + 2 * Tile::A_BLOCK;
  const uint4 *from_w = (const uint4 *)(weights + block * Tile::W_BLOCK + column * Tile::N8 * 512) + lane;
  uint4 a[Tile::M16][2], w[Tile::N8];
#pragma unroll
  for (int i = 0; i < 2 * Tile::M16; i++) a[i / 2][i % 2] = from_a[32 * i];
#pragma unroll
  for (int j = 0; j < Tile::N8; j++) w[j] = from_w[32 * j];
#pragma unroll
  for (int i = 0; i < Tile::M16; i++)
#pragma unroll
    for (int j = 0; j < Tile::N8; j++) mma_first(sums[i][j], a[i], w[j]);
#pragma unroll
  for (int i = 0; i < Tile::M16; i++)
#pragma unroll
    for (int j = 0; j < Tile::N8; j++) mma_second(sums[i][j], a[i], w[j]);
}

// Steps [first, last) of K, quarter by quarter; `total` gets the sum of the quarters.
template <class Tile, int K, class A, class W>
__device__ __forceinline__ void multiply_steps(float (&total)[Tile::M16][Tile::N8][4], const A &a, const W &w,
                                               int first, int last, unsigned char *shared) {
  constexpr int AHEAD = Tile::STAGES - 1;
#pragma unroll
  for (int i = 0; i < AHEAD; i++)
    if (first + i < last) w.start(shared + i * Tile::STAGE + 2 * Tile::A_BLOCK, first + i);
  pdl_wait();
#pragma unroll
  for (int i = 0; i < AHEAD; i++) {
    if (first + i < last) a.start(shared + i * Tile::STAGE, first + i);
    cp_async_commit();
  }
  int stage = 0;
  for (int step = first; step < last;) {
    float sums[Tile::M16][Tile::N8][4] = {};
    for (int i = 0; i < Steps<K>::COUNT; i++, step++) {
      cp_async_wait<AHEAD - 1>();
      __syncthreads();
      if (step + AHEAD < last) {
        unsigned char *free = shared + (stage == 0 ? AHEAD : stage - 1) * Tile::STAGE;
        a.start(free, step + AHEAD);
        w.start(free + 2 * Tile::A_BLOCK, step + AHEAD);
      }
      cp_async_commit();
#pragma unroll
      for (int block = 0; block < 2; block++)
        if (Steps<K>::has_block(step, block)) multiply_block<Tile>(sums, shared + stage * Tile::STAGE, block);
      stage = stage == AHEAD ? 0 : stage + 1;
    }
    const bool is_first = step == first + Steps<K>::COUNT;
#pragma unroll
    for (int i = 0; i < Tile::M16 * Tile::N8 * 4; i++) {
      const float s = sums[i / 4 / Tile::N8][i / 4 % Tile::N8][i % 4];
      float &y = total[i / 4 / Tile::N8][i / 4 % Tile::N8][i % 4];
      y = is_first ? s : y + s;
    }
  }
}

// Block z leaves quarter z in `partials`, in the order of threads. The last of a tile's four blocks gets the sum; false
// in the others.
template <class Tile>
__device__ __forceinline__ bool add_splits(float (&total)[Tile::M16][Tile::N8][4], float4 *partials, unsigned *ticket,
                                           int id) {
  constexpr int COUNT = Tile::M16 * Tile::N8, QUARTER = COUNT * Tile::THREADS;
  float4 *const tile = partials + (size_t)id * 4 * QUARTER + threadIdx.x;
#pragma unroll
  for (int i = 0; i < COUNT; i++) {
    const float(&s)[4] = total[i / Tile::N8][i % Tile::N8];
    tile[blockIdx.z * QUARTER + i * Tile::THREADS] = {s[0], s[1], s[2], s[3]};
  }
  if (!is_last_block(ticket, 4)) return false;
#pragma unroll
  for (int i = 0; i < COUNT; i++) {
    float(&s)[4] = total[i / Tile::N8][i % Tile::N8];
    const float4 part = __ldcg(tile + i * Tile::THREADS);  // past L1, which other blocks' writes do not reach
    s[0] = part.x;
    s[1] = part.y;
    s[2] = part.z;
    s[3] = part.w;
#pragma unroll
    for (int q = 1; q < 4; q++) add(s, __ldcg(tile + q * QUARTER + i * Tile::THREADS));
  }
  return true;
}

// What a lane has of one token: elements 2 * half and 2 * half + 1 of the sums of its warp's N8 tiles.
template <class Op, int N8>
__device__ __forceinline__ void store_token(const Op &op, const float (&sums)[N8][4], int half, int token, int unit,
                                            float factor) {
  const int column = threadIdx.x % 4 * 2;
  typename Op::Fetched fetched[N8 / Op::TILES];
#pragma unroll
  for (int j = 0; j < N8 / Op::TILES; j++)
    if (unit + j < Op::UNITS) fetched[j] = op.fetch(token, unit + j, column);
#pragma unroll
  for (int j = 0; j < N8 / Op::TILES; j++) {
    if (unit + j >= Op::UNITS) continue;
    float2 y[Op::TILES];
#pragma unroll
    for (int tile = 0; tile < Op::TILES; tile++) {
      const float(&s)[4] = sums[j * Op::TILES + tile];
      y[tile] = {__fmul_rn(s[2 * half], factor), __fmul_rn(s[2 * half + 1], factor)};
    }
    op.store(token, unit + j, column, y, fetched[j]);
  }
}

template <class Op, class Tile>
__device__ __forceinline__ void linear_tiled(const Op &op, const bf16 *x, const float *scales, const bf16 *weight,
                                             int tokens, float4 *partials, unsigned *tickets, unsigned char *shared) {
  constexpr int K = Op::K, TILES = Op::TILES, BLOCK_UNITS = Tile::BN / 8 / TILES, COUNT = Steps<K>::COUNT;
  const Place place;
  Copies<K, Tile::BM, Tile::THREADS> a;
#pragma unroll
  for (int i = 0; i < a.COUNT; i++) {
    const int token = place.m * Tile::BM + a.row(i);
    a.set(i, x, token, token < tokens);
  }
  Copies<K, Tile::BN, Tile::THREADS> w;
#pragma unroll
  for (int i = 0; i < w.COUNT; i++) {
    const int unit = place.n * BLOCK_UNITS + w.row(i) / 8 / TILES;
    const int row = Op::row(unit, w.row(i) / 8 % TILES) + w.row(i) % 8;
    w.set(i, weight, row, unit < Op::UNITS && row < Op::ROWS);
  }

  float total[Tile::M16][Tile::N8][4] = {};
  const bool split = gridDim.z > 1;
  const int first = split ? blockIdx.z * COUNT : 0;
  multiply_steps<Tile, K>(total, a, w, first, split ? first + COUNT : 4 * COUNT, shared);
  if (split && !add_splits<Tile>(total, partials, tickets + place.id, place.id)) return;

  const int warp = threadIdx.x / 32, unit = place.n * BLOCK_UNITS + warp % Tile::WARPS_N * Tile::N8 / TILES;
  const int token = place.m * Tile::BM + warp / Tile::WARPS_N * Tile::M16 * 16 + threadIdx.x % 32 / 4;
#pragma unroll
  for (int i = 0; i < 2 * Tile::M16; i++) {
    const int t = token + 8 * i;
    if (t < tokens) store_token(op, total[i / 2], i % 2, t, unit, scales ? scales[t] : 1.0f);
  }
}
