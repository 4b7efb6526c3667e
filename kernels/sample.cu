// sample -- one token a row, drawn on the card: penalties, biases, masks, temperature, top_k, min_p, top_p, logprobs;
//           or given, where a prompt is scored: its logprobs, with the bits that it would have if it had been drawn
//           `Sampler` in rustinfer.py is the array twin; uniform numbers by Philox4x32-10 (Salmon et al. 2011)
// shapes    logits (R, V) float32, kept as they are; row_seats (R,) int32, the last seat is padding; row_tokens (R,)
//           int32: which token of the step a row is, NULL: token r; positions (T,) int32
//           by seat: floats, ints (num_seats, 8), see Request; bias_ids int32, bias_values float32 (num_seats, 300),
//           no id twice; counts (num_seats, V) uint16: how often a token was put out (COUNT_MASK), IN_PROMPT; masks
//           (num_seats, ceil(V / 32)) uint32: a bit for each token, the lowest first, 0: it may not come now
//           slices (R, SLICES) uint4: scratch between the two launches; SLICES = ceil(V / 128) while V <= 131072
//           records (4, max_rows, 44) int32, at place *ring % 4: token, whether the logits are sound, its logprob,
//           number of top entries (-1: none wanted), their ids [20], their logprobs [20]; float32 as bits; may be the
//           host's memory. Of score: (R, 44); tokens, num_top (R,) int32: each row's token, how many to list
// launch    sample_scan grid (ceil(SLICES / 8), R), block 256; then sample_draw grid R, block 512: its last block moves
//           *ring on. *ticket is 0 before and after
//           reset_counts grid ceil(V / 2048), block 256, when a sequence with penalties takes a seat
//           score grid R, block 512, alone: it writes `slices` itself
// bytes     4*R*V, read once; rows with filters or logprobs read the slices where survivors can be some ten times more,
//           which is next to nothing unless thousands of tokens survive; a row with a mask V/8 more, others none of it;
//           score the same, by one block
// numerics  logits in float32, rounded as the twin's. Weights exp((x - top) / temperature) are summed in fixed point,
//           whose sums have no order: a row's token depends on no other row. log_softmax in float32
#include "common.cuh"

typedef unsigned long long u64;

constexpr int PER_LANE = 4 * ((VOCAB + 131071) / 131072); // tokens of a slice that a lane holds
constexpr int SLICE = 32 * PER_LANE;                      // consecutive tokens that a warp looks at
constexpr int SLICES = (VOCAB + SLICE - 1) / SLICE;
constexpr int MAX_SLICES = 1024;
constexpr int MAX_BIAS = 300, MAX_TOP = 20, RING = 4, RECORD = 4 + 2 * MAX_TOP;
constexpr int SCAN_WARPS = 8, WARPS = 16, THREADS = 32 * WARPS;
constexpr int BIN_BITS = 11, BINS = 1 << BIN_BITS;
constexpr int COUNTED = 2048; // tokens of a block of reset_counts
constexpr int MASK_WORDS = (VOCAB + 31) / 32;
constexpr unsigned COUNT_MASK = 0x7fff, IN_PROMPT = 0x8000;
static_assert(SLICES <= MAX_SLICES && MAX_SLICES == 2 * THREADS && BINS == 4 * THREADS, "shares of a thread");

constexpr float MOST = 3.402823466e38f, LEAST_TEMPERATURE = 1.17549435e-38f; // colder is greedy, or 1 / it is infinite
constexpr float UNIT = 1099511627776.f;         // the weight 1 in fixed point: 2^40, so that 2^20 of them fit
constexpr float NOTHING = -28.f;                // exp(NOTHING) * UNIT < 1
constexpr double REACHED = 1. - 1. / (1 << 24); // of top_p is enough: the float32 next to 0.1 is more than one of ten

// ---------------------------------------------------------------- numbers in order

// Keys rise with the numbers, NaN is the greatest, -0 and 0 are equal.
constexpr unsigned NAN_KEY = 0xffffffffu, INF_KEY = 0xff800000u, MINUS_INF_KEY = 0x007fffffu;

__device__ __forceinline__ unsigned key_of(float x) {
  if (x != x) return NAN_KEY;
  const unsigned bits = __float_as_uint(x + 0.f);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float number_of(unsigned key) {
  return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key);
}
__device__ __forceinline__ bool is_finite(unsigned key) { return key > MINUS_INF_KEY && key < INF_KEY; }

__device__ __forceinline__ u64 fixed(float weight) { return (u64)(weight * UNIT); }

template <class T> __device__ __forceinline__ T warp_sum(T v) {
#pragma unroll
  for (int mask = 16; mask; mask /= 2) v += __shfl_xor_sync(0xffffffffu, v, mask);
  return v;
}
__device__ __forceinline__ unsigned warp_max(unsigned v) {
#pragma unroll
  for (int mask = 16; mask; mask /= 2) v = max(v, __shfl_xor_sync(0xffffffffu, v, mask));
  return v;
}

// The sum over the lanes before this one and this one.
template <class T> __device__ __forceinline__ T warp_sum_through(T v) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const T other = __shfl_up_sync(0xffffffffu, v, step);
    if ((int)threadIdx.x % 32 >= step) v += other;
  }
  return v;
}

// ---------------------------------------------------------------- a request and its logits

struct Request {
  float temperature, top_p, min_p, repetition, presence, frequency; // floats[0..5]
  int top_k, num_logprobs, choice;                                  // ints[0..2]; top_k <= 0: off; logprobs -1: none
  unsigned seed_low, seed_high;                                     // ints[3], ints[4]
  int num_bias, has_penalties, has_mask;                            // ints[5..7]
};

__device__ __forceinline__ Request load_request(const float *floats, const int *ints, int seat) {
  const float4 f = *(const float4 *)(floats + seat * 8), g = *(const float4 *)(floats + seat * 8 + 4);
  const int4 i = *(const int4 *)(ints + seat * 8), j = *(const int4 *)(ints + seat * 8 + 4);
  return {f.x, f.y, f.z, f.w, g.x, g.y, i.x, i.y, i.z, (unsigned)i.w, (unsigned)j.x, j.y, j.z, j.w};
}

// Philox's first word for (position, choice) under the seed; as a uniform number it is (word + 0.5) / 2^32.
__device__ __forceinline__ unsigned philox(const Request &request, unsigned position) {
  unsigned a = position, b = request.choice, c = 0, d = 0, k = request.seed_low, m = request.seed_high;
#pragma unroll
  for (int round = 0; round < 10; round++) {
    const unsigned next_a = __umulhi(0xCD9E8D57u, c) ^ b ^ k, next_c = __umulhi(0xD2511F53u, a) ^ d ^ m;
    b = 0xCD9E8D57u * c, d = 0xD2511F53u * a;
    a = next_a, c = next_c, k += 0x9E3779B9u, m += 0xBB67AE85u;
  }
  return a;
}

// floor(uniform * total), exactly.
__device__ __forceinline__ u64 part_of(u64 total, unsigned word) {
  return __umul64hi(total, (u64)word << 32 | 0x80000000u);
}

// A row of numbers and what changes them: penalties where `counts` is given, then biases, then what `mask` forbids.
struct Row {
  const float *values;
  int size;
  const unsigned short *counts;
  const unsigned *mask;
  const int *bias_ids;
  const float *bias_values;
  int num_bias;
  float repetition, presence, frequency;
};

__device__ __forceinline__ Row plain_row(const float *values, int size) {
  return {values, size, nullptr, nullptr, nullptr, nullptr, 0, 1.f, 0.f, 0.f};
}

__device__ __forceinline__ Row adjusted_row(const float *logits, const unsigned short *counts, const unsigned *masks,
                                            const int *bias_ids, const float *bias_values, const Request &request,
                                            int row, int seat) {
  return {logits + (size_t)row * VOCAB, VOCAB, request.has_penalties ? counts + (size_t)seat * VOCAB : nullptr,
          request.has_mask ? masks + (size_t)seat * MASK_WORDS : nullptr, bias_ids + seat * MAX_BIAS,
          bias_values + seat * MAX_BIAS, request.num_bias, request.repetition, request.presence, request.frequency};
}

// The id of the lane's first token of a slice; the others follow it.
__device__ __forceinline__ int first_id(int slice) { return slice * SLICE + (int)threadIdx.x % 32 * PER_LANE; }

__device__ __forceinline__ void load_slice(float (&x)[PER_LANE], const Row &row, int slice) {
  const int first = first_id(slice);
  if (VOCAB % 4 == 0 && first + PER_LANE <= row.size) { // rows are aligned
#pragma unroll
    for (int i = 0; i < PER_LANE; i += 4) {
      const float4 v = *(const float4 *)(row.values + first + i);
      x[i] = v.x, x[i + 1] = v.y, x[i + 2] = v.z, x[i + 3] = v.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) x[i] = first + i < row.size ? row.values[first + i] : 0.f;
  }
}

__device__ __forceinline__ float penalise(float x, unsigned counted, const Row &row) {
  if (!counted) return x;
  const unsigned count = counted & COUNT_MASK;
  x = x > 0.f ? x / row.repetition : __fmul_rn(x, row.repetition); // rounded as the twin's: nothing may be fused
  x -= __fmul_rn(row.frequency, (float)count);
  return count ? x - row.presence : x;
}

__device__ __forceinline__ void add_biases(float (&x)[PER_LANE], const Row &row, int slice) {
  for (int start = 0; start < row.num_bias; start += 32) {
    const int entry = start + threadIdx.x % 32;
    const int id = entry < row.num_bias ? row.bias_ids[entry] : -1;
    const float value = entry < row.num_bias ? row.bias_values[entry] : 0.f;
    unsigned here = __ballot_sync(0xffffffffu, id >= 0 && id / SLICE == slice);
    for (; here; here &= here - 1) {
      const int source = __ffs(here) - 1, place = __shfl_sync(0xffffffffu, id, source) - first_id(slice);
      const float bias = __shfl_sync(0xffffffffu, value, source);
#pragma unroll
      for (int i = 0; i < PER_LANE; i++)
        if (i == place) x[i] += bias;
    }
  }
}

// What is not finite stays as it is, and what is stays finite.
__device__ __forceinline__ void penalise_and_bias(float (&x)[PER_LANE], const Row &row, int slice) {
  float before[PER_LANE];
#pragma unroll
  for (int i = 0; i < PER_LANE; i++) {
    before[i] = x[i];
    if (row.counts && first_id(slice) + i < row.size) x[i] = penalise(x[i], row.counts[first_id(slice) + i], row);
  }
  add_biases(x, row, slice);
#pragma unroll
  for (int i = 0; i < PER_LANE; i++)
    x[i] = is_finite(key_of(before[i])) ? fminf(fmaxf(x[i], -MOST), MOST) : before[i];
}

// Tokens that may not come become -inf; NaN stays NaN.
__device__ __forceinline__ void forbid(float (&x)[PER_LANE], const Row &row, int slice) {
#pragma unroll
  for (int i = 0; i < PER_LANE; i += 4) { // whose bits stand in one word
    const int first = first_id(slice) + i;
    const unsigned bits = first < row.size ? row.mask[first / 32] >> first % 32 : 0;
#pragma unroll
    for (int n = 0; n < 4; n++)
      if (!(bits >> n & 1) && x[i + n] == x[i + n]) x[i + n] = number_of(MINUS_INF_KEY);
  }
}

// Penalties, then biases, then the mask.
__device__ __forceinline__ void adjust(float (&x)[PER_LANE], const Row &row, int slice) {
  if (row.counts || row.num_bias) penalise_and_bias(x, row, slice);
  if (row.mask) forbid(x, row, slice);
}

// ---------------------------------------------------------------- sample_scan

// The greatest key of a slice, and the sum of exp((x - greatest) * inverse): 0 if inverse is, or greatest not finite.
__device__ __forceinline__ uint2 summarise(const float (&x)[PER_LANE], int slice, float inverse) {
  unsigned top = 0;
#pragma unroll
  for (int i = 0; i < PER_LANE; i++)
    if (first_id(slice) + i < VOCAB) top = max(top, key_of(x[i]));
  top = warp_max(top);
  if (inverse == 0.f || !is_finite(top)) return make_uint2(top, 0);
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < PER_LANE; i++)
    if (first_id(slice) + i < VOCAB) sum += expf((x[i] - number_of(top)) * inverse);
  return make_uint2(top, __float_as_uint(warp_sum(sum)));
}

__device__ __forceinline__ float inverse_temperature(const Request &request) {
  return request.temperature >= LEAST_TEMPERATURE ? 1.f / request.temperature : 0.f;
}

extern "C" __global__ void __launch_bounds__(SCAN_WARPS * 32)
sample_scan(uint4 *slices, const float *logits, const int *row_seats, const float *floats, const int *ints,
            const int *bias_ids, const float *bias_values, const unsigned short *counts, const unsigned *masks,
            int num_seats) {
  pdl_launch();
  pdl_wait();
  const int r = blockIdx.y, seat = row_seats[r], slice = blockIdx.x * SCAN_WARPS + threadIdx.x / 32;
  if (seat == num_seats - 1 || slice >= SLICES) return;
  const Request request = load_request(floats, ints, seat);
  const Row row = adjusted_row(logits, counts, masks, bias_ids, bias_values, request, r, seat);
  float x[PER_LANE];
  load_slice(x, row, slice);
  const uint2 raw = request.num_logprobs >= 0 ? summarise(x, slice, 1.f) : make_uint2(0, 0);
  adjust(x, row, slice);
  const uint2 adjusted = summarise(x, slice, inverse_temperature(request));
  if (threadIdx.x % 32 == 0) slices[(size_t)r * SLICES + slice] = make_uint4(adjusted.x, adjusted.y, raw.x, raw.y);
}

// ---------------------------------------------------------------- sample_draw: searches in order of rank

struct Totals {
  unsigned count;
  u64 mass;
};
__device__ __forceinline__ Totals operator+(Totals a, Totals b) { return {a.count + b.count, a.mass + b.mass}; }

// Where a running total, likeliest first, passes a target: among the numbers that are `below` the top by so many keys.
struct Place {
  unsigned below;
  Totals before; // of all that are likelier; of everything where the target was not reached
  u64 each;      // mass of each of the equal numbers here
};

// A block's row, and what it searches in it: the tokens of its open slices that are at most `limit` keys below the top.
struct Shared {
  Row row;
  unsigned top, limit;
  float inverse;                                // of the temperature; 0: masses do not matter
  __align__(16) float tops[MAX_SLICES];         // the greatest number of each slice
  int open[MAX_SLICES], num_open;               // slices that may have what is looked for
  unsigned counts[BINS], low[BINS], high[BINS]; // a histogram: how many, and the two words of their mass
  int bin;
  Place place;            // what `find` found
  int equals[MAX_SLICES]; // how many equal numbers are in each slice, then in those before it
  uint2 picked[MAX_TOP];  // (below, id)
  int num_picked, token;
  Totals warp_totals[WARPS];
  unsigned warp_tops[WARPS];
  int bias_ids[MAX_BIAS];
  float bias_values[MAX_BIAS];
};
__shared__ Shared shared;

constexpr unsigned ABSENT = 0xffffffffu, ANYTHING = 0xfffffffeu; // as `below` and as `limit`

// The slices of a row that a search looks at; open == NULL: the first num_open.
struct Field {
  Row row;
  const int *open;
  int num_open;

  __device__ __forceinline__ int slice(int i) const { return open ? open[i] : i; }
};

__device__ __forceinline__ Field open_field() { return {shared.row, shared.open, shared.num_open}; }
__device__ __forceinline__ Field tops_field() {
  return {plain_row(shared.tops, SLICES), nullptr, (SLICES + SLICE - 1) / SLICE};
}

// visit(slice, x, below) for each slice, by a warp; `below` of a token beyond the limit is ABSENT. The next slice is
// loaded meanwhile.
template <class Visit> __device__ __forceinline__ void for_slices(const Field &field, Visit visit) {
  const unsigned top = shared.top, limit = shared.limit;
  const Row &row = field.row;
  float next[PER_LANE];
  int i = threadIdx.x / 32;
  if (i < field.num_open) load_slice(next, row, field.slice(i));
#pragma unroll 1
  for (; i < field.num_open; i += WARPS) {
    const int slice = field.slice(i);
    float x[PER_LANE];
#pragma unroll
    for (int n = 0; n < PER_LANE; n++) x[n] = next[n];
    if (i + WARPS < field.num_open) load_slice(next, row, field.slice(i + WARPS));
    adjust(x, row, slice);
    unsigned below[PER_LANE];
#pragma unroll
    for (int n = 0; n < PER_LANE; n++) {
      below[n] = top - key_of(x[n]);
      if (first_id(slice) + n >= row.size || below[n] > limit) below[n] = ABSENT;
    }
    visit(slice, x, below);
  }
}

// The totals of the threads before this one; `all` becomes those of the block.
__device__ __forceinline__ Totals sum_before(Totals mine, Totals &all) {
  const Totals through = {warp_sum_through(mine.count), warp_sum_through(mine.mass)};
  const int warp = threadIdx.x / 32;
  if (threadIdx.x % 32 == 31) shared.warp_totals[warp] = through;
  __syncthreads();
  Totals before = {through.count - mine.count, through.mass - mine.mass};
  all = {0, 0};
#pragma unroll 4
  for (int w = 0; w < WARPS; w++) {
    if (w == warp) before = before + all;
    all = all + shared.warp_totals[w];
  }
  return before;
}

__device__ __forceinline__ void count_in(unsigned bin, u64 mass) {
  atomicAdd(&shared.counts[bin], 1u);
  const unsigned low = (unsigned)mass;
  unsigned high = (unsigned)(mass >> 32);
  if (low) high += atomicAdd(&shared.low[bin], low) > ~low; // the carry
  if (high) atomicAdd(&shared.high[bin], high);
}
__device__ __forceinline__ Totals bin_totals(int bin) {
  return {shared.counts[bin], (u64)shared.high[bin] << 32 | shared.low[bin]};
}

// Spreads numbers over the bins: bin b gets those that are base + (b << shift) keys below the top, or some more.
__device__ __forceinline__ void fill_bins(const Field &field, unsigned base, int shift, unsigned num_bins) {
  for (int bin = threadIdx.x; bin < BINS; bin += THREADS) shared.counts[bin] = shared.low[bin] = shared.high[bin] = 0;
  __syncthreads();
  const float top = number_of(shared.top), inverse = shared.inverse;
  for_slices(field, [&](int, const float (&x)[PER_LANE], const unsigned (&below)[PER_LANE]) {
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
      const unsigned bin = (below[i] - base) >> shift;
      if (below[i] == ABSENT || bin >= num_bins) continue;
      count_in(bin, inverse > 0.f ? fixed(expf((x[i] - top) * inverse)) : 0);
    }
  });
  __syncthreads();
}

// The one thread in whose bins the running total passes the target finds the bin.
__device__ __forceinline__ void find_bin(Totals before, bool by_mass, u64 target) {
#pragma unroll 1
  for (int bin = threadIdx.x * 4; bin < (int)threadIdx.x * 4 + 4; bin++) {
    const Totals here = bin_totals(bin), after = before + here;
    if ((by_mass ? before.mass : before.count) <= target && target < (by_mass ? after.mass : after.count)) {
      shared.bin = bin;
      shared.place.before = before;
      shared.place.each = here.mass / here.count;
    }
    before = after;
  }
}

// Where the running total of numbers (or of their mass), likeliest first, passes the target: a descent in a tree of
// keys whose nodes have BINS children. False if the whole does not; shared.place says the rest.
__device__ __forceinline__ bool find(const Field &field, bool by_mass, u64 target) {
  Totals before = {0, 0}, all;
  unsigned base = 0;
  int bits = 32 - __clz(shared.limit), shift;
  do {
    shift = max(bits - BIN_BITS, 0);
    fill_bins(field, base, shift, 1u << (bits - shift));
    Totals mine = {0, 0};
#pragma unroll
    for (int i = 0; i < 4; i++) mine = mine + bin_totals(threadIdx.x * 4 + i);
    find_bin(before + sum_before(mine, all), by_mass, target);
    const bool reached = target < (by_mass ? before.mass + all.mass : before.count + all.count);
    if (!reached && threadIdx.x == 0) shared.place.before = all;
    __syncthreads();
    if (!reached) return false;
    before = shared.place.before;
    base += (unsigned)shared.bin << shift;
    bits = shift;
  } while (shift > 0);
  if (threadIdx.x == 0) shared.place.below = base;
  __syncthreads();
  return true;
}

// Of the tokens exactly so far below the top, by rising id, numbers `from` to `to` - 1 become shared.picked[at] and on.
// Before them come the tokens that are likelier, of which there are `at`; none where that is 0.
__device__ __forceinline__ void pick(unsigned wanted, int from, int to, int at) {
  if (threadIdx.x == 0) shared.num_picked = 0;
  for (int slice = threadIdx.x; slice < MAX_SLICES; slice += THREADS) shared.equals[slice] = 0;
  __syncthreads();
#pragma unroll 1
  for (int numbered = 0; numbered < 2; numbered++) { // first they are counted
    for_slices(open_field(), [&](int slice, const float (&)[PER_LANE], const unsigned (&below)[PER_LANE]) {
      int count = 0;
#pragma unroll
      for (int i = 0; i < PER_LANE; i++) count += below[i] == wanted;
      const int through = warp_sum_through(count);
      if (!numbered) {
        if (threadIdx.x % 32 == 31) shared.equals[slice] = through;
        return;
      }
      int n = shared.equals[slice] + through - count;
#pragma unroll
      for (int i = 0; i < PER_LANE; i++) {
        const uint2 token = make_uint2(below[i], first_id(slice) + i);
        if (below[i] == wanted && n >= from && n < to) shared.picked[at + n - from] = token;
        n += below[i] == wanted;
        if (at && below[i] < wanted) shared.picked[atomicAdd(&shared.num_picked, 1)] = token;
      }
    });
    __syncthreads();
    if (numbered) return;
    Totals all;
    const unsigned first = shared.equals[2 * threadIdx.x], second = shared.equals[2 * threadIdx.x + 1];
    const unsigned before = sum_before({first + second, 0}, all).count;
    shared.equals[2 * threadIdx.x] = before, shared.equals[2 * threadIdx.x + 1] = before + first;
    __syncthreads();
  }
}

// Sets the limit and opens the slices whose greatest number is within it.
__device__ __forceinline__ void set_limit(unsigned limit) {
  if (threadIdx.x == 0) shared.limit = limit, shared.num_open = 0;
  __syncthreads();
  for (int slice = threadIdx.x; slice < SLICES; slice += THREADS)
    if (shared.top - key_of(shared.tops[slice]) <= limit) shared.open[atomicAdd(&shared.num_open, 1)] = slice;
  __syncthreads();
}

// ---------------------------------------------------------------- sample_draw: one row

// A thread's two slices, as sample_scan summed them up.
struct Summaries {
  unsigned key[2];
  float sum[2];
};

__device__ __forceinline__ Summaries load_summaries(const uint4 *slices, int row, bool raw) {
  Summaries mine;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int slice = 2 * threadIdx.x + i;
    const uint4 v = slice < SLICES ? slices[(size_t)row * SLICES + slice] : make_uint4(0, 0, 0, 0);
    mine.key[i] = raw ? v.z : v.x, mine.sum[i] = __uint_as_float(raw ? v.w : v.y);
  }
  return mine;
}

// Begins with a row: what it is, its slices' greatest numbers, and the greatest of all.
__device__ __forceinline__ void begin(const Row &row, float inverse, const Summaries &mine) {
  const unsigned top = warp_max(max(mine.key[0], mine.key[1]));
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 2; i++) shared.tops[2 * threadIdx.x + i] = number_of(mine.key[i]);
  if (threadIdx.x % 32 == 0) shared.warp_tops[threadIdx.x / 32] = top;
  __syncthreads();
  if (threadIdx.x == 0) {
    shared.row = row, shared.inverse = inverse, shared.top = 0;
    for (int w = 0; w < WARPS; w++) shared.top = max(shared.top, shared.warp_tops[w]);
  }
  __syncthreads();
}

__device__ __forceinline__ u64 slice_mass(const Summaries &mine, int i, float inverse) {
  const unsigned key = i ? mine.key[1] : mine.key[0];
  if (!is_finite(key)) return 0;
  return fixed((i ? mine.sum[1] : mine.sum[0]) * expf((number_of(key) - number_of(shared.top)) * inverse));
}

// The mass of the row; `before`: of the slices before the thread's two.
__device__ __forceinline__ u64 row_mass(const Summaries &mine, float inverse, u64 &before) {
  Totals all;
  before = sum_before({0, slice_mass(mine, 0, inverse) + slice_mass(mine, 1, inverse)}, all).mass;
  return all.mass;
}

// The token of a slice at which the running sum of weights passes a part of the slice's whole; by one warp.
__device__ __forceinline__ void draw_from_slice(int slice, double part) {
  float x[PER_LANE];
  u64 mass[PER_LANE], sum = 0;
  load_slice(x, shared.row, slice);
  adjust(x, shared.row, slice);
#pragma unroll
  for (int i = 0; i < PER_LANE; i++) {
    mass[i] = first_id(slice) + i < VOCAB ? fixed(expf((x[i] - shared.tops[slice]) * shared.inverse)) : 0;
    sum += mass[i];
  }
  const u64 through = warp_sum_through(sum), all = __shfl_sync(0xffffffffu, through, 31);
  const u64 target = min((u64)(part * (double)all), all - 1);
  u64 before = through - sum;
#pragma unroll
  for (int i = 0; i < PER_LANE; i++) {
    if (before <= target && target < before + mass[i]) shared.token = first_id(slice) + i;
    before += mass[i];
  }
}

// Without filters the distribution is inverted in the order of ids: first the slice, then the token, by the warp that
// has the slice. `mass` is the row's, `before` that of the slices before the thread's two.
__device__ __forceinline__ void draw_by_id(const Summaries &mine, u64 mass, u64 before, unsigned word) {
  const u64 target = part_of(mass, word);
#pragma unroll 1
  for (int i = 0; i < 2; i++) {
    const u64 here = slice_mass(mine, i, shared.inverse);
    const bool is_here = before <= target && target < before + here;
    const int lane = __ffs(__ballot_sync(0xffffffffu, is_here)) - 1;
    const double part = __shfl_sync(0xffffffffu, is_here ? (double)(target - before) / (double)here : 0., max(lane, 0));
    if (lane >= 0) draw_from_slice(2 * ((int)threadIdx.x / 32 * 32 + lane) + i, part);
    before += here;
  }
}

// What is looked for in a row: a token that is drawn from what the filters leave, or the top_k likeliest tokens.
struct Goal {
  bool draws;
  int top_k; // <= 0: off; 1: no draw but the greatest
  float top_p, min_p, temperature;
  unsigned word; // the uniform number

  __device__ __forceinline__ bool is_filtered() const { return top_k > 0 || top_p < 1.f || min_p > 0.f; }
};

// Each filter keeps a beginning of the order of ranks, of which we know the end and the mass. A step is one `find`.
enum Step {
  TOPS,    // where every survivor still is, as the slices' greatest numbers tell: from here on few slices are open
  LEADERS, // the last of top_k; without it, the mass that min_p leaves
  NUCLEUS, // the last of top_p
  DRAWN    // the token
};

__device__ __forceinline__ bool wants(const Goal &goal, int step) {
  if (step == TOPS) return goal.top_k > 0 || goal.min_p <= 0.f;
  if (step == LEADERS) return goal.top_k > 0 || goal.min_p > 0.f;
  return step == NUCLEUS ? goal.top_p < 1.f : goal.draws;
}

// What the running total is to pass; `mass` is that of what is left.
__device__ __forceinline__ u64 target_of(const Goal &goal, int step, u64 mass) {
  if (step == DRAWN) return part_of(mass, goal.word);
  if (step != NUCLEUS && goal.top_k > 0) return goal.top_k - 1; // as many of the slices' greatest are as many tokens
  if (step == LEADERS) return ABSENT;
  return max((u64)ceil((double)goal.top_p * REACHED * (double)mass), 1ull) - 1; // the same goes for their mass
}

// Keys between the top and the logit whose weight is exp(exponent).
__device__ __forceinline__ unsigned keys_to(const Goal &goal, float exponent) {
  const unsigned key = key_of(number_of(shared.top) + goal.temperature * exponent);
  return key < shared.top ? shared.top - key : 0;
}

// How far below the top there may be survivors: as far as weights are not 0, as min_p says, and not where all weights
// together are less than what top_p leaves out.
__device__ __forceinline__ unsigned first_limit(const Goal &goal, u64 mass) {
  if (!goal.draws) return ANYTHING;
  unsigned limit = keys_to(goal, NOTHING);
  if (goal.min_p > 0.f) return min(limit, keys_to(goal, logf(goal.min_p)));
  const float left_out = (1.f - goal.top_p) * ((float)mass / UNIT);
  return goal.top_k > 0 ? limit : min(limit, keys_to(goal, logf(left_out / VOCAB)));
}

// Searches the row, whose mass is given, by rank; what is found is picked.
__device__ __forceinline__ void search(const Goal &goal, u64 mass) {
  const Place &place = shared.place;
  int number = 0; // of the token among its equals
  set_limit(goal.top_k == 1 ? 0 : first_limit(goal, mass));
#pragma unroll 1
  for (int step = TOPS; step <= DRAWN && goal.top_k != 1; step++) {
    if (!wants(goal, step)) continue;
    const u64 target = target_of(goal, step, mass);
    const bool by_mass = step >= NUCLEUS || (step == TOPS && goal.top_k <= 0);
    const bool reached = find(step == TOPS ? tops_field() : open_field(), by_mass, target);
    if (step == DRAWN) {
      number = (target - place.before.mass) / place.each;
      break;
    }
    if (step != TOPS) {
      mass = place.before.mass;
      const u64 equals = step == LEADERS ? goal.top_k - place.before.count : (target - mass) / place.each + 1;
      if (reached) mass += equals * place.each;
    }
    if (reached) set_limit(place.below);
  }
  if (goal.top_k == 1 || goal.draws) pick(goal.top_k == 1 ? 0 : place.below, number, number + 1, 0);
  else pick(place.below, 0, goal.top_k - place.before.count, place.before.count);
}

// The token's logprob and the likeliest tokens, of the logits as they came: log_softmax in float32.
__device__ __forceinline__ void record_logprobs(int *record, float chosen, int count, u64 mass) {
  const float top = number_of(shared.top), log_sum = logf((float)mass / UNIT);
  if (threadIdx.x == 0) {
    record[2] = __float_as_int(chosen - top - log_sum);
    record[3] = count;
  }
  if ((int)threadIdx.x >= count) return;
  const auto logprob = [&](int i) { return number_of(shared.top - shared.picked[i].x) - top - log_sum; };
  const int id = shared.picked[threadIdx.x].y;
  const float own = logprob(threadIdx.x);
  int rank = 0; // by logprob, then by id: logits that differ may have the same logprob
  for (int i = 0; i < count; i++) rank += logprob(i) > own || (logprob(i) == own && (int)shared.picked[i].y < id);
  record[4 + rank] = id;
  record[4 + MAX_TOP + rank] = __float_as_int(own);
}

// The block's copy, which is closer.
__device__ __forceinline__ Row with_own_biases(Row row) {
  for (int i = threadIdx.x; i < row.num_bias; i += THREADS) {
    shared.bias_ids[i] = row.bias_ids[i];
    shared.bias_values[i] = row.bias_values[i];
  }
  row.bias_ids = shared.bias_ids, row.bias_values = shared.bias_values;
  return row;
}

// Greedy is the same as top_k = 1; so are broken logits, of which NaN is the greatest.
__device__ __forceinline__ Goal drawing_goal(const Request &request, bool sound, int position) {
  const bool draws = sound && inverse_temperature(request) > 0.f;
  const int top_k = draws ? request.top_k : 1;
  return {true, top_k, request.top_p, request.min_p, request.temperature, philox(request, position)};
}
__device__ __forceinline__ Goal listing_goal(int num_top, bool sound) {
  return {false, sound ? min(num_top, VOCAB) : 0, 1.f, 0.f, 0.f, 0};
}

// The last of the grid's blocks moves the ring on, when the host can see all records.
__device__ __forceinline__ void finish(unsigned *ring, unsigned *ticket) {
  __syncthreads();
  if (threadIdx.x > 0) return;
  __threadfence_system();
  if (atomicInc(ticket, gridDim.x - 1) < gridDim.x - 1) return;
  __threadfence();
  *ring += 1;
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
sample_draw(int *records, unsigned *ring, unsigned *ticket, int *last_token, int *next_position, unsigned short *counts,
            const uint4 *slices, const float *logits, const int *row_seats, const int *row_tokens, const int *positions,
            const float *floats, const int *ints, const int *bias_ids, const float *bias_values,
            const unsigned *masks, int num_seats, int max_rows) {
  pdl_launch();
  pdl_wait();
  const int r = blockIdx.x, seat = row_seats[r];
  if (seat == num_seats - 1) return finish(ring, ticket);
  const Request request = load_request(floats, ints, seat);
  int *record = records + ((size_t)(*ring % RING) * max_rows + r) * RECORD;
  const int position = positions[row_tokens ? row_tokens[r] : r] + 1; // where the new token will stand
  const Row row = with_own_biases(adjusted_row(logits, counts, masks, bias_ids, bias_values, request, r, seat));
  bool sound;
#pragma unroll 1
  for (int listing = 0; listing <= (request.num_logprobs >= 0); listing++) { // first the token, then the logprobs
    const float inverse = inverse_temperature(request);
    const Summaries mine = load_summaries(slices, r, listing);
    begin(listing ? plain_row(logits + (size_t)r * VOCAB, VOCAB) : row, listing ? 0.f : inverse, mine);
    u64 before;
    const u64 mass = row_mass(mine, listing ? 1.f : inverse, before);
    const bool is_sound = is_finite(shared.top);
    if (!listing) sound = is_sound; // of what may come: a mask can leave nothing of a sound row
    const Goal goal = listing ? listing_goal(request.num_logprobs, is_sound) : drawing_goal(request, is_sound, position);
    if (goal.is_filtered()) search(goal, mass);
    else if (!listing) draw_by_id(mine, mass, before, goal.word);
    if (listing) record_logprobs(record, logits[(size_t)r * VOCAB + shared.token], goal.top_k, mass);
    else if (goal.is_filtered() && threadIdx.x == 0) shared.token = shared.picked[0].y;
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    const int token = shared.token;
    record[0] = last_token[seat] = token;
    record[1] = sound;
    if (request.num_logprobs < 0) record[3] = -1;
    next_position[seat] = position;
    unsigned short *count = counts + (size_t)seat * VOCAB + token;
    if (request.has_penalties && (*count & COUNT_MASK) < COUNT_MASK) *count += 1;
  }
  finish(ring, ticket);
}

// ---------------------------------------------------------------- score

// A row's second pass in sample_draw, for a token that was not drawn but given.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
score(int *records, uint4 *slices, const float *logits, const int *tokens, const int *num_top) {
  pdl_launch();
  pdl_wait();
  const int r = blockIdx.x, token = tokens[r];
  const Row row = plain_row(logits + (size_t)r * VOCAB, VOCAB);
#pragma unroll 1
  for (int slice = threadIdx.x / 32; slice < SLICES; slice += WARPS) {
    float x[PER_LANE];
    load_slice(x, row, slice);
    const uint2 raw = summarise(x, slice, 1.f);
    if (threadIdx.x % 32 == 0) slices[(size_t)r * SLICES + slice] = make_uint4(0, 0, raw.x, raw.y);
  }
  __syncthreads();
  const Summaries mine = load_summaries(slices, r, true);
  begin(row, 0.f, mine);
  u64 before;
  const u64 mass = row_mass(mine, 1.f, before);
  const bool sound = is_finite(shared.top);
  const Goal goal = listing_goal(num_top[r], sound);
  if (goal.is_filtered()) search(goal, mass);
  int *record = records + (size_t)r * RECORD;
  record_logprobs(record, row.values[token], goal.top_k, mass);
  if (threadIdx.x == 0) record[0] = token, record[1] = sound;
}

// ---------------------------------------------------------------- reset_counts

// What a seat's sequence has said so far: its prompt, then its output. Ids below 0 are of tokens still to come.
extern "C" __global__ void __launch_bounds__(256)
reset_counts(unsigned short *counts, int seat, const int *token_ids, int num_prompt_tokens, int num_tokens) {
  constexpr unsigned PROMPT_BIT = 1u << 31;
  __shared__ unsigned found[COUNTED];
  pdl_launch();
  pdl_wait();
  const int first = blockIdx.x * COUNTED;
  for (int i = threadIdx.x; i < COUNTED; i += 256) found[i] = 0;
  __syncthreads();
  for (int t = threadIdx.x; t < num_tokens; t += 256) {
    const int i = token_ids[t] - first;
    if (i < 0 || i >= COUNTED) continue;
    if (t < num_prompt_tokens) atomicOr(&found[i], PROMPT_BIT);
    else atomicAdd(&found[i], 1u);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < COUNTED && first + i < VOCAB; i += 256) {
    const unsigned count = min(found[i] & ~PROMPT_BIT, COUNT_MASK);
    counts[(size_t)seat * VOCAB + first + i] = count | (found[i] & PROMPT_BIT ? IN_PROMPT : 0);
  }
}
