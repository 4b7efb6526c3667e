// sample -- one token a row: the likeliest, or one drawn at a temperature from what top_k, min_p and top_p leave, and
//           log-probabilities. `Sampler` in rustinfer.py is the array twin; uniform numbers by Philox4x32-10
//           (Salmon et al. 2011)
// shapes    logits, raw (B, V) float32, after and before penalties and biases; the same array where there are none
//           draws, drawn (B,): Draw and Drawn, whose fields all have 8 bytes
// shared    a row is a chunk; one thread has it to its end
// memory    about 80 KB of stack a thread, for any V, and nothing else: no row can fail for want of memory
// bytes     4*V for each reading of a row: one to be greedy, two to draw; filters read some times more, where all but
//           two skip the blocks that have nothing; logprobs two or three. A row stays in the cache meanwhile
// numerics  exp((x - top) / temperature) and its sums in double, to 1e-14, and 0 below e^-46: a token differs from the
//           twin's only where the uniform number or a filter is within 1e-12 of a border. log_softmax rounds to float32
//           where the twin does. All sums go by id or by rank, within blocks whose size V alone decides
//
// Without filters the distribution is inverted in the order of ids: first the block, then the token. With filters the
// order is by rank (scaled logit, then id), and each filter keeps a beginning of it, of which we only need the mass; so
// nothing is sorted but a few tokens. A histogram over the scaled logit tells in which bin a running total passes its
// target, and only that bin is looked at more closely.
#include "cpu.h"

#include <math.h>
#include <string.h>

enum { MAX_TOP = 20, BLOCK = 64, MAX_BLOCKS = 2048, BINS = 1024, FEW = 256 };

typedef struct {
  double temperature, top_p, min_p;  // temperature 0: greedy; top_p 1 and min_p 0: off
  int64_t top_k, num_top;            // top_k <= 0: off; num_top: how many of the likeliest to list, -1: no logprobs
  int64_t choice, position;
  uint64_t seed;
} Draw;

typedef struct {
  int64_t token_id, finite, num_top;  // finite 0: the logits are broken; num_top: entries below, -1: no logprobs
  double logprob;                     // of the token; NaN where raw is broken, and the list is empty
  int64_t top_ids[MAX_TOP];           // likeliest first, of equal ones the least id
  double top_logprobs[MAX_TOP];
} Drawn;

// A number in (0, 1) with 32 random bits.
static double philox_uniform(uint64_t seed, uint32_t choice, uint32_t position) {
  uint32_t a = position, b = choice, c = 0, d = 0, k = (uint32_t)seed, m = (uint32_t)(seed >> 32);
  for (int round = 0; round < 10; round++) {
    uint64_t first = (uint64_t)0xD2511F53u * a, second = (uint64_t)0xCD9E8D57u * c;
    a = (uint32_t)(second >> 32) ^ b ^ k, b = (uint32_t)second;
    c = (uint32_t)(first >> 32) ^ d ^ m, d = (uint32_t)first;
    k += 0x9E3779B9u, m += 0xBB67AE85u;
  }
  return (a + 0.5) / 4294967296.0;
}

// ---- weights, half a vector at a time

typedef float fhalf __attribute__((vector_size(2 * VL), aligned(4)));
typedef int32_t ihalf __attribute__((vector_size(2 * VL), aligned(4)));
typedef double dvec __attribute__((vector_size(4 * VL), aligned(4)));
typedef int64_t lvec __attribute__((vector_size(4 * VL), aligned(4)));
typedef uint64_t ulvec __attribute__((vector_size(4 * VL), aligned(4)));

static const double NOTHING = -46;    // e^-46 is 1e-20: all of a vocabulary weigh less than the least uniform number
static const double HOTTEST = 1e100;  // from here on all weights are 1; hotter, and differences might underflow
static const double LOG2E = 1.44269504088896338700, LN2_HIGH = 6.93147180369123816490e-01;
static const double LN2_LOW = 1.90821492927058770002e-10;  // the rest; small whole numbers times LN2_HIGH are exact
static const double ROUNDS = 6755399441055744.0;           // 1.5 * 2^52: adding it rounds to a whole number

// a * b + c, in one rounding where the machine can; compilers make one instruction of the loop.
static inline dvec fma_half(dvec a, dvec b, dvec c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  for (int n = 0; n < VL / 2; n++) c[n] = __builtin_fma(a[n], b[n], c[n]);
  return c;
#else
  return a * b + c;
#endif
}
static inline dvec line(dvec x, double slope, double start) {
  return fma_half(x, slope - (dvec){0}, start - (dvec){0});
}

// e^s for s <= 0, within 1e-14 of it; 0 below NOTHING and for NaN; exactly 1 for 0.
static inline dvec weigh(dvec s) {
  lvec keep = s >= NOTHING;
  dvec x = (dvec)(keep & (lvec)s);
  dvec shifted = line(x, LOG2E, ROUNDS), n = shifted - ROUNDS;
  dvec r = fma_half(n, -LN2_LOW - (dvec){0}, x - n * LN2_HIGH);
  dvec square = r * r, fourth = square * square;  // Taylor: |r| <= 0.347, and 0.347^12 / 12! is 6e-15
  dvec first = fma_half(line(r, 1.0 / 6, 1.0 / 2), square, 1.0 + r);
  dvec second = fma_half(line(r, 1.0 / 5040, 1.0 / 720), square, line(r, 1.0 / 120, 1.0 / 24));
  dvec third = fma_half(line(r, 1.0 / 39916800, 1.0 / 3628800), square, line(r, 1.0 / 362880, 1.0 / 40320));
  dvec p = fma_half(fma_half(third, fourth, second), fourth, first);
  return (dvec)((ulvec)keep & ((ulvec)p + ((ulvec)shifted << 52)));
}

static inline dvec scale(fhalf x, float top, double temperature) {  // the twin's bits, so that ranks are the twin's
  return (__builtin_convertvector(x, dvec) - (double)top) / temperature;
}

// ---- a row in blocks

typedef struct {
  const float *values;
  int64_t size, block, num_blocks;  // block: tokens, a power of two
  int64_t likeliest;                // the first of the greatest
  float top;                        // the greatest; NaN where there is one
  double temperature;
  double mass;                // the sum of all weights, once `weigh_blocks` has run
  float log_sum;              // its logarithm, where logprobs are wanted
  float tail[VL];             // the last vector, filled up with -inf
  float tops[MAX_BLOCKS];     // the greatest of each block
  double masses[MAX_BLOCKS];  // the sum of its weights
} Row;

static inline vec choose(ivec mask, vec a, vec b) { return (vec)((mask & (ivec)a) | (~mask & (ivec)b)); }

static inline int any(ivec mask) {
  union { ivec v; int64_t q[VL / 2]; } u = {mask};
  int64_t all = 0;
  for (int n = 0; n < VL / 2; n++) all |= u.q[n];
  return all != 0;
}

static inline float greatest(vec v) {
  float top = v[0];
  for (int n = 1; n < VL; n++) top = v[n] > top ? v[n] : top;
  return top;
}

// VL numbers from `id` on, a multiple of VL below `size`.
static inline const float *at(const Row *row, int64_t id) {
  return id + VL <= row->size ? row->values + id : row->tail;
}
static inline vec load_at(const Row *row, int64_t id) { return load(at(row, id)); }

static inline int64_t block_end(const Row *row, int64_t block) {
  int64_t end = (block + 1) * row->block;
  return end < row->size ? end : row->size;
}

// `id`, or where the next block begins that has a number of at least `low`; `size` or more after the last.
static inline int64_t next_open(const Row *row, int64_t id, float low) {
  if (id & (row->block - 1)) return id;
  int64_t block = id / row->block;
  while (block < row->num_blocks && row->tops[block] < low) block++;
  return block * row->block;
}

static int64_t first_of(const Row *row, float wanted) {
  int64_t id = 0;
  if (isnan(wanted)) {
    while (!isnan(row->values[id])) id++;
    return id;
  }
  while (row->tops[id / row->block] != wanted) id += row->block;
  while (row->values[id] != wanted) id++;
  return id;
}

static inline int64_t block_size(int64_t size) {
  int64_t block = BLOCK;
  while (block * MAX_BLOCKS < size) block *= 2;
  return block;
}

static void scan(Row *row, const float *values, int64_t size) {
  row->values = values, row->size = size, row->block = block_size(size);
  row->num_blocks = (size + row->block - 1) / row->block;
  row->top = -INFINITY;
  for (int64_t id = size / VL * VL, n = 0; n < VL; n++) row->tail[n] = id + n < size ? values[id + n] : -INFINITY;
  ivec nan = {0};
  for (int64_t block = 0, id = 0; block < row->num_blocks; block++) {
    vec most = broadcast(-INFINITY);
    for (int64_t end = block_end(row, block); id < end; id += VL) {
      vec x = load_at(row, id);
      nan |= x != x;
      most = choose(x > most, x, most);
    }
    row->tops[block] = greatest(most);
    if (row->tops[block] > row->top) row->top = row->tops[block];
  }
  if (any(nan)) row->top = NAN;
  row->likeliest = first_of(row, row->top);
}

static inline dvec weigh_half(const Row *row, const float *p) {
  return weigh(scale(*(const fhalf *)p, row->top, row->temperature));
}
static double scale_one(const Row *row, float x) { return scale(x - (fhalf){0}, row->top, row->temperature)[0]; }
static double weigh_one(double scaled) { return weigh(scaled - (dvec){0})[0]; }

static double weigh_block(const Row *row, int64_t block) {
  dvec sum[2] = {{0}, {0}};
  for (int64_t id = block * row->block, end = block_end(row, block); id < end; id += VL) {
    sum[0] += weigh_half(row, at(row, id));
    sum[1] += weigh_half(row, at(row, id) + VL / 2);
  }
  sum[0] += sum[1];
  double mass = 0;
  for (int n = 0; n < VL / 2; n++) mass += sum[0][n];
  return mass;
}

static void weigh_blocks(Row *row) {
  row->mass = 0;
  for (int64_t block = 0; block < row->num_blocks; block++) {
    row->masses[block] = scale_one(row, row->tops[block]) < NOTHING ? 0 : weigh_block(row, block);
    row->mass += row->masses[block];
  }
}

// ---- a draw in the order of ids

// The token of a block at which the running sum, which is `before` where it begins, passes the target.
static int64_t draw_from_block(const Row *row, int64_t block, double before, double target) {
  int64_t drawn = block * row->block;
  for (int64_t id = drawn, end = block_end(row, block); id < end; id += VL) {
    dvec weights[2] = {weigh_half(row, at(row, id)), weigh_half(row, at(row, id) + VL / 2)};
    for (int n = 0; n < VL; n++) {
      double weight = weights[n / (VL / 2)][n % (VL / 2)];
      if (weight > 0) drawn = id + n;  // the last that weighs anything, should rounding hide the border
      before += weight;
      if (before > target) return drawn;
    }
  }
  return drawn;
}

static int64_t draw_by_id(Row *row, double uniform) {
  weigh_blocks(row);
  double target = uniform * row->mass, before = 0;
  int64_t drawn = 0;
  for (int64_t block = 0; block < row->num_blocks; block++) {
    if (row->masses[block] == 0) continue;
    drawn = block;
    if (before + row->masses[block] > target) break;
    before += row->masses[block];
  }
  return draw_from_block(row, drawn, before, target);
}

// ---- the least number that reaches something: numbers as keys, which rise with them

static inline uint32_t key_of(float x) {
  union { float f; uint32_t u; } u = {x};
  return u.u >> 31 ? ~u.u : u.u | 0x80000000u;
}

static inline float number_of(uint32_t key) {
  union { uint32_t u; float f; } u = {key >> 31 ? key & 0x7fffffffu : ~key};
  return u.f;
}

typedef int Reaches(const void *what, float x);  // false below some number, true from there on

// The least of the numbers from low to high that reaches; `high` does.
static float least(Reaches *reaches, const void *what, float low, float high) {
  uint32_t first = key_of(low), last = key_of(high);
  while (first < last) {
    uint32_t middle = first + (last - first) / 2;
    if (reaches(what, number_of(middle))) last = middle;
    else first = middle + 1;
  }
  return number_of(last);
}

typedef struct {
  const Row *row;
  int64_t rank;
  double weight;
  float logprob;
} Wanted;

static int is_rank(const void *what, float x) {  // fewer than `rank` of the tops are greater
  const Wanted *wanted = what;
  int64_t greater = 0;
  for (int64_t block = 0; block < wanted->row->num_blocks; block++) greater += wanted->row->tops[block] > x;
  return greater < wanted->rank;
}

static int has_weight(const void *what, float x) {
  const Wanted *wanted = what;
  return weigh_one(scale_one(wanted->row, x)) >= wanted->weight;
}

// A number that at least `count` tokens reach, most often few more: that many blocks have one; -inf if they are fewer.
static float reached_by(const Row *row, int64_t count) {
  if (count > row->num_blocks) return -INFINITY;
  return least(is_rank, &(Wanted){.row = row, .rank = count}, -INFINITY, row->top);
}

// ---- a draw in the order of ranks

typedef struct {
  float low, high;  // both belong to it
} Range;

typedef double totals __attribute__((vector_size(16)));  // of some tokens
enum Measure { COUNT = 0, MASS = 1 };

typedef struct {
  Range range;
  double top, factor;  // a scaled logit's bin is floor((top - scaled) * factor): equal ones share a bin
  const Row *row;
  totals bins[BINS];
} Histogram;

typedef struct {
  double scaled;
  int64_t id;
} Token;

typedef struct {
  int64_t id;
  totals through;  // of the token and all before it
} Place;

static inline ivec within(vec x, Range range) { return (x >= broadcast(range.low)) & (x <= broadcast(range.high)); }

// The range from the least to the greatest of the row's numbers that are in it; there is one.
static Range tighten(const Row *row, Range range) {
  vec low = broadcast(range.high), high = broadcast(range.low);
  for (int64_t id = next_open(row, 0, range.low); id < row->size; id = next_open(row, id + VL, range.low)) {
    vec x = load_at(row, id);
    ivec in = within(x, range);
    low = choose(in & (x < low), x, low);
    high = choose(in & (x > high), x, high);
  }
  return (Range){-greatest(-low), greatest(high)};
}

static inline void count_half(Histogram *histogram, fhalf x) {
  ihalf in = (x >= histogram->range.low) & (x <= histogram->range.high);
  dvec scaled = scale(x, histogram->row->top, histogram->row->temperature), weights = weigh(scaled);
  dvec place = (dvec)(__builtin_convertvector(in, lvec) & (lvec)((histogram->top - scaled) * histogram->factor));
  ihalf bin = __builtin_convertvector(place, ihalf);
  for (int n = 0; n < VL / 2; n++)
    if (in[n]) histogram->bins[bin[n]] += (totals){1, weights[n]};
}

static void fill(Histogram *histogram, const Row *row, Range range) {
  memset(histogram->bins, 0, sizeof histogram->bins);
  histogram->row = row;
  histogram->range = range = tighten(row, range);
  histogram->top = scale_one(row, range.high);
  double width = histogram->top - scale_one(row, range.low);
  histogram->factor = width > 0 ? (BINS - 1) / width : 0;
  for (int64_t id = next_open(row, 0, range.low); id < row->size; id = next_open(row, id + VL, range.low)) {
    const float *p = at(row, id);
    if (!any(within(load(p), range))) continue;
    count_half(histogram, *(const fhalf *)p);
    count_half(histogram, *(const fhalf *)(p + VL / 2));
  }
}

typedef struct {
  const Histogram *histogram;
  int bin;
} Edge;

static int is_above(const void *what, float x) {
  const Edge *edge = what;
  const Histogram *histogram = edge->histogram;
  return (histogram->top - scale_one(histogram->row, x)) * histogram->factor < edge->bin;
}

static Range range_of(const Histogram *histogram, int bin) {
  Range range = histogram->range;
  float low = least(is_above, &(Edge){histogram, bin + 1}, range.low, range.high);
  if (bin == 0) return (Range){low, range.high};
  return (Range){low, number_of(key_of(least(is_above, &(Edge){histogram, bin}, range.low, range.high)) - 1)};
}

// The bin in which the running total passes the target, or the last that has tokens; *before grows to where it begins.
static int find_bin(const Histogram *histogram, enum Measure measure, double target, totals *before) {
  int found = -1;
  for (int bin = 0; bin < BINS; bin++) {
    totals here = histogram->bins[bin];
    if (here[COUNT] == 0) continue;
    if (found >= 0) *before += histogram->bins[found];
    found = bin;
    if (before[0][measure] + here[measure] > target) break;
  }
  return found;
}

// Up to `room` tokens of a range, by id, after the first `skip`; returns how many.
static int collect(const Row *row, Range range, int64_t skip, Token *tokens, int room) {
  int count = 0;
  for (int64_t id = next_open(row, 0, range.low); id < row->size; id = next_open(row, id + VL, range.low)) {
    vec x = load_at(row, id);
    ivec in = within(x, range);
    if (!any(in)) continue;
    for (int n = 0; n < VL; n++) {
      if (!in[n] || skip-- > 0) continue;
      tokens[count++] = (Token){scale_one(row, x[n]), id + n};
      if (count == room) return count;
    }
  }
  return count;
}

static void sort(Token *tokens, int count) {  // the greatest first; equal ones stay in their order
  for (int end = 1; end < count; end++) {
    Token token = tokens[end];
    int place = end;
    for (; place > 0 && tokens[place - 1].scaled < token.scaled; place--) tokens[place] = tokens[place - 1];
    tokens[place] = token;
  }
}

static Place find_among_few(const Row *row, Range range, enum Measure measure, double target, totals before) {
  Token tokens[FEW];
  int count = collect(row, range, 0, tokens, FEW);
  sort(tokens, count);
  for (int n = 0;; n++) {
    before += (totals){1, weigh_one(tokens[n].scaled)};
    if (before[measure] > target || n == count - 1) return (Place){tokens[n].id, before};
  }
}

static Place find_among_equals(const Row *row, Range range, int64_t count, enum Measure measure, double target,
                               totals before) {
  totals one = {1, weigh_one(scale_one(row, range.high))};
  int64_t number = (int64_t)fmin(fmax((target - before[measure]) / one[measure], 0), count - 1.0);
  Token token;
  collect(row, range, number, &token, 1);
  return (Place){token.id, before + (double)(number + 1) * one};
}

// The token, likeliest first, at which the running total passes the target; the last where none does. Each turn of the
// loop leaves fewer tokens, since the least and the greatest of a range are in different bins unless they are equal.
static Place find(const Histogram *histogram, enum Measure measure, double target) {
  const Row *row = histogram->row;
  totals before = {0, 0};
  Histogram closer;
  for (;;) {
    int bin = find_bin(histogram, measure, target, &before);
    int64_t count = (int64_t)histogram->bins[bin][COUNT];
    Range range = range_of(histogram, bin);
    if (count <= FEW) return find_among_few(row, range, measure, target, before);
    range = tighten(row, range);
    if (scale_one(row, range.low) == scale_one(row, range.high))
      return find_among_equals(row, range, count, measure, target, before);
    fill(&closer, row, range);
    histogram = &closer;
  }
}

// The least logit that the filters may leave: not less than min_p says, nor than top_k tokens reach, nor than all that
// together weigh less than top_p leaves out.
static float least_survivor(const Row *row, const Draw *draw) {
  double weight = fmax(draw->min_p, 1e-300);
  if (draw->top_k > 0) {
    double reached = weigh_one(scale_one(row, reached_by(row, draw->top_k)));
    weight = fmax(weight, reached);
  } else if (draw->min_p <= 0) {
    weight = fmax(weight, (1 - draw->top_p) * row->mass / row->size / 2);
  }
  return least(has_weight, &(Wanted){.row = row, .weight = weight}, -INFINITY, row->top);
}

static int64_t draw_by_rank(Row *row, const Draw *draw, double uniform) {
  int is_top_p_alone = draw->top_k <= 0 && draw->min_p <= 0;
  if (is_top_p_alone) weigh_blocks(row);
  Histogram histogram;
  fill(&histogram, row, (Range){least_survivor(row, draw), row->top});
  totals all = {0, 0};
  for (int bin = 0; bin < BINS; bin++) all += histogram.bins[bin];
  double mass = is_top_p_alone ? row->mass : all[MASS];
  if (draw->top_k > 0 && draw->top_k < all[COUNT]) mass = find(&histogram, COUNT, draw->top_k - 0.5).through[MASS];
  if (draw->top_p < 1)  // the target is to be reached, not passed
    mass = find(&histogram, MASS, nextafter(draw->top_p * mass, 0)).through[MASS];
  return find(&histogram, MASS, uniform * mass).id;
}

static int64_t draw_token(Row *row, const Draw *draw) {
  row->temperature = fmin(draw->temperature, HOTTEST);
  double uniform = philox_uniform(draw->seed, (uint32_t)draw->choice, (uint32_t)draw->position);
  int is_filtered = draw->top_k > 0 || draw->top_p < 1 || draw->min_p > 0;
  return is_filtered ? draw_by_rank(row, draw, uniform) : draw_by_id(row, uniform);
}

// ---- log-probabilities

static inline vec logprobs(const Row *row, vec x) { return (x - broadcast(row->top)) - broadcast(row->log_sum); }
static float logprob_of(const Row *row, float x) { return logprobs(row, broadcast(x))[0]; }

static int has_logprob(const void *what, float x) {
  const Wanted *wanted = what;
  return logprob_of(wanted->row, x) >= wanted->logprob;
}

// Puts a token into the list, from which the last falls out if it is full.
static void insert(Drawn *drawn, int64_t num_top, int64_t id, double logprob) {
  int64_t place = drawn->num_top < num_top ? drawn->num_top++ : num_top - 1;
  for (; place > 0 && drawn->top_logprobs[place - 1] < logprob; place--) {
    drawn->top_ids[place] = drawn->top_ids[place - 1];
    drawn->top_logprobs[place] = drawn->top_logprobs[place - 1];
  }
  drawn->top_ids[place] = id;
  drawn->top_logprobs[place] = logprob;
}

// Tokens come by id, so that one which only equals the last of a full list is not let in. Logits that differ may have
// the same logprob, after which the twin ranks.
static void list_likeliest(const Row *row, int64_t num_top, Drawn *drawn) {
  if (num_top == 0) return;
  float needed = logprob_of(row, reached_by(row, num_top));
  float low = least(has_logprob, &(Wanted){.row = row, .logprob = needed}, -INFINITY, row->top);
  for (int64_t id = next_open(row, 0, low); id < row->size; id = next_open(row, id + VL, low)) {
    vec values = logprobs(row, load_at(row, id));
    if (!any(values >= broadcast(needed))) continue;
    for (int n = 0; n < VL && id + n < row->size; n++) {
      if (!(values[n] >= needed)) continue;
      insert(drawn, num_top, id + n, values[n]);
      if (drawn->num_top == num_top) needed = nextafterf((float)drawn->top_logprobs[num_top - 1], INFINITY);
    }
  }
}

static void find_logprobs(Row *row, int64_t num_top, Drawn *drawn) {
  drawn->num_top = 0;
  drawn->logprob = NAN;
  if (!isfinite(row->top)) return;
  row->temperature = 1;
  weigh_blocks(row);
  row->log_sum = (float)log(row->mass);
  drawn->logprob = logprob_of(row, row->values[drawn->token_id]);
  num_top = num_top < MAX_TOP ? num_top : MAX_TOP;
  list_likeliest(row, num_top < row->size ? num_top : row->size, drawn);
}

// ---- rows

typedef struct {
  const float *logits, *raw;
  int64_t num_rows, vocab_size;
  const Draw *draws;
  Drawn *drawn;
} Rows;

static void sample_row(const float *logits, const float *raw, int64_t vocab_size, const Draw *draw, Drawn *drawn) {
  Row row;
  scan(&row, logits, vocab_size);
  *drawn = (Drawn){.token_id = row.likeliest, .finite = isfinite(row.top), .num_top = -1};
  if (drawn->finite && draw->temperature > 0) drawn->token_id = draw_token(&row, draw);
  if (draw->num_top < 0) return;
  if (raw != logits) scan(&row, raw, vocab_size);
  find_logprobs(&row, draw->num_top, drawn);
}

static void sample_work(void *argument, Team *team, int id) {
  (void)id;
  const Rows *rows = argument;
  for (int64_t row = next_chunk(team); row < rows->num_rows; row = next_chunk(team)) {
    int64_t first = row * rows->vocab_size;
    sample_row(rows->logits + first, rows->raw + first, rows->vocab_size, rows->draws + row, rows->drawn + row);
  }
}

EXPORT void sample_rows(Team *team, const float *logits, const float *raw, int64_t num_rows, int64_t vocab_size,
                        const Draw *draws, Drawn *drawn) {
  if (num_rows == 1) sample_row(logits, raw, vocab_size, draws, drawn);  // wakes nobody
  else team_run(team, sample_work, &(Rows){logits, raw, num_rows, vocab_size, draws, drawn});
}
