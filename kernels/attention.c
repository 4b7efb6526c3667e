// attention -- causal attention of new queries over the paged cache       (Kwon et al. 2023, 2309.06180)
//
// shapes    q, out (T, H, D); keys (N, K, D, S), values (N, K, S, D) float32; a token at position p sees keys 0..p
// work      a chunk has up to ROWS rows (token, head): a few tokens of a prompt with the query heads of one KV head, or one
//           token with those of several, which lie side by side in a block. Where chunks would be few and uneven, each
//           head is one
// order     online softmax over units of UNIT keys, in order, whatever the block size: a score is CHAINS chains over D; the
//           sum of a unit's weights one vector chain, its lanes added pairwise; a value's sum one chain over keys,
//           rescaled a unit. None of it depends on the rows beside a row. A masked key weighs exactly 0
// bytes     decode: keys and values once a KV head, memory-bound; prompts: a block stays in the first cache for all rows
#include "cpu.h"

#include <float.h>
#include <math.h>

#define INLINE static inline __attribute__((always_inline))

enum {
  ROWS = 32, MAX_DIM = 256, UNIT = 16, TILE = 4,
  CHAINS = VL == 16 ? 4 : 1,  // of a score over D: a few rows and one vector of keys alone would wait for each other
};

typedef struct {
  float q[ROWS][MAX_DIM], sums[ROWS][MAX_DIM];  // scaled queries; weighted values so far
  float weights[ROWS][UNIT];                    // scores, then e^(score - maximum)
  float maximum[ROWS], total[ROWS], rescale[ROWS];
  int64_t limit[ROWS];                          // the last key that a row sees
  float *out[ROWS];
  int64_t count, dim, size;                     // rows; D; S
} Rows;

// Scores of `count` rows with UNIT keys, or with half as many where a block has no more; `at` is their place in the unit.
INLINE void score(Rows *rows, int64_t first, const float *keys, int64_t at, int count) {
  int64_t dim = rows->dim, size = rows->size, num_keys = size < UNIT ? size : UNIT, key = 0;
  for (; key + 2 * VL <= num_keys; key += 2 * VL) {
    vec s[TILE][2] = {{{0}}};
    for (int64_t d = 0; d < dim; d++) {
      vec low = load(keys + d * size + key), high = load(keys + d * size + key + VL);
      KEEP(low);
      KEEP(high);
#pragma GCC unroll 4
      for (int i = 0; i < count; i++) {
        vec q = broadcast(rows->q[first + i][d]);
        s[i][0] = fma_vec(q, low, s[i][0]);
        s[i][1] = fma_vec(q, high, s[i][1]);
      }
    }
    for (int i = 0; i < count; i++)
      for (int j = 0; j < 2; j++) store(rows->weights[first + i] + at + key + j * VL, s[i][j]);
  }
  for (; key + VL <= num_keys; key += VL) {
    vec s[TILE][CHAINS] = {{{0}}};
    for (int64_t d = 0; d < dim; d += CHAINS)
#pragma GCC unroll 4
      for (int j = 0; j < CHAINS; j++) {
        vec k = load(keys + (d + j) * size + key);
        KEEP(k);
#pragma GCC unroll 4
        for (int i = 0; i < count; i++) s[i][j] = fma_vec(broadcast(rows->q[first + i][d + j]), k, s[i][j]);
      }
    for (int i = 0; i < count; i++) {
      for (int j = 1; j < CHAINS; j++) s[i][0] += s[i][j];
      store(rows->weights[first + i] + at + key, s[i][0]);
    }
  }
  for (; key < num_keys; key++)
    for (int i = 0; i < count; i++) {
      float s[CHAINS] = {0};
      for (int64_t d = 0; d < dim; d++)
        s[d % CHAINS] = fma_one(rows->q[first + i][d], keys[d * size + key], s[d % CHAINS]);
      for (int j = 1; j < CHAINS; j++) s[0] += s[j];
      rows->weights[first + i][at + key] = s[0];
    }
}

// Scores to weights, and what the sums so far are worth beside them.
static void soften(Rows *rows, int64_t i, int64_t first_key) {
  float *weights = rows->weights[i], maximum = rows->maximum[i];
  int64_t visible = rows->limit[i] + 1 - first_key;
  for (int64_t key = visible < 0 ? 0 : visible; key < UNIT; key++) weights[key] = -INFINITY;
  for (int64_t key = 0; key < UNIT; key++) maximum = weights[key] > maximum ? weights[key] : maximum;
  quad total = {0};
  for (int64_t key = 0; key < UNIT; key += VL) {
    vec weight = exp_vec(load(weights + key) - broadcast(maximum));
    store(weights + key, weight);
    total += fold(weight);
  }
  rows->rescale[i] = exp_vec(broadcast(rows->maximum[i] - maximum))[0];
  rows->total[i] = rows->total[i] * rows->rescale[i] + ((total[0] + total[1]) + (total[2] + total[3]));
  rows->maximum[i] = maximum;
}

// Adds the values of `num_keys` keys of a unit, from `at` on, to the sums of `count` rows.
INLINE void accumulate(Rows *rows, int64_t first, const float *values, int64_t at, int64_t num_keys, int count) {
  int64_t dim = rows->dim, d = 0;
  for (; d + 2 * VL <= dim; d += 2 * VL) {
    vec s[TILE][2];
    for (int i = 0; i < count; i++)
      for (int j = 0; j < 2; j++) s[i][j] = load(rows->sums[first + i] + d + j * VL);
    for (int64_t key = 0; key < num_keys; key++) {
      vec low = load(values + key * dim + d), high = load(values + key * dim + d + VL);
      KEEP(low);
      KEEP(high);
#pragma GCC unroll 4
      for (int i = 0; i < count; i++) {
        vec weight = broadcast(rows->weights[first + i][at + key]);
        s[i][0] = fma_vec(weight, low, s[i][0]);
        s[i][1] = fma_vec(weight, high, s[i][1]);
      }
    }
    for (int i = 0; i < count; i++)
      for (int j = 0; j < 2; j++) store(rows->sums[first + i] + d + j * VL, s[i][j]);
  }
  for (; d < dim; d++)  // what two vectors do not divide
    for (int i = 0; i < count; i++) {
      float *s = &rows->sums[first + i][d];
      for (int64_t key = 0; key < num_keys; key++)
        *s = fma_one(rows->weights[first + i][at + key], values[key * dim + d], *s);
    }
}

static void rescale(Rows *rows, int64_t i) {
  if (rows->rescale[i] == 1) return;
  for (int64_t d = 0; d < rows->dim; d++) rows->sums[i][d] *= rows->rescale[i];
}

// One function a count of rows: not inlined, so that each has the registers to itself.
typedef void Score(Rows *rows, int64_t first, const float *keys, int64_t at);
typedef void Accumulate(Rows *rows, int64_t first, const float *values, int64_t at, int64_t num_keys);
#define DEFINE(name, count) \
  __attribute__((noinline)) static void score_##name(Rows *rows, int64_t first, const float *keys, int64_t at) { \
    score(rows, first, keys, at, count); \
  } \
  __attribute__((noinline)) static void accumulate_##name(Rows *rows, int64_t first, const float *values, int64_t at, \
                                                          int64_t num_keys) { \
    accumulate(rows, first, values, at, num_keys, count); \
  }
DEFINE(one, 1)
DEFINE(two, 2)
DEFINE(three, 3)
DEFINE(four, 4)
static Score *const SCORE[] = {score_one, score_two, score_three, score_four};
static Accumulate *const ACCUMULATE[] = {accumulate_one, accumulate_two, accumulate_three, accumulate_four};

// Where the keys and values of some KV heads lie for one sequence.
typedef struct {
  const float *keys, *values;  // of the layer
  const int64_t *block_table;
  int64_t num_kv_heads, first, count;  // of all; of these heads the first, and how many
} Cache;

static int64_t place_of(const Cache *cache, const Rows *rows, int64_t kv_head, int64_t key) {
  int64_t block = cache->block_table[key / rows->size];
  return (block * cache->num_kv_heads + cache->first + kv_head) * rows->dim * rows->size;
}

// Keys [key, key + UNIT) of one KV head, of which `last_key` is the last that any row sees: one block's, or two small
// blocks'. The head's rows are [row, stop).
static void attend_unit(Rows *rows, const Cache *cache, int64_t kv_head, int64_t row, int64_t stop, int64_t key,
                        int64_t last_key) {
  int64_t step = rows->size < UNIT ? rows->size : UNIT;
  for (int64_t i = row; i < stop; i += TILE) {
    int64_t count = stop - i < TILE ? stop - i : TILE;
    for (int64_t at = 0; at < UNIT && key + at <= last_key; at += step) {
      const float *keys = cache->keys + place_of(cache, rows, kv_head, key + at) + (key + at) % rows->size;
      SCORE[count - 1](rows, i, keys, at);
    }
    for (int64_t j = i; j < i + count; j++) {
      soften(rows, j, key);
      rescale(rows, j);
    }
    for (int64_t at = 0; at < UNIT && key + at <= last_key; at += step) {
      int64_t left = last_key + 1 - key - at, offset = (key + at) % rows->size * rows->dim;
      const float *values = cache->values + place_of(cache, rows, kv_head, key + at) + offset;
      ACCUMULATE[count - 1](rows, i, values, at, left < step ? left : step);
    }
  }
}

static void finish(const Rows *rows) {
  for (int64_t i = 0; i < rows->count; i++) {
    float scale = 1.0f / rows->total[i];
    for (int64_t d = 0; d < rows->dim; d++) rows->out[i][d] = rows->sums[i][d] * scale;
  }
}

static void add_row(Rows *rows, float *out, const float *q, int64_t position) {
  int64_t i = rows->count++;
  float scale = 1.0f / sqrtf((float)rows->dim);
  for (int64_t d = 0; d < rows->dim; d++) {
    rows->q[i][d] = q[d] * scale;
    rows->sums[i][d] = 0;
  }
  rows->maximum[i] = -FLT_MAX;  // not -inf: a first unit of such scores would leave NaN
  rows->total[i] = 0;
  rows->limit[i] = position;
  rows->out[i] = out;
}

typedef struct {
  float *out;
  const float *q, *keys, *values;
  const AttentionShape *shape;
} Arguments;

// What is read next: keys [key, key + step) of a KV head, whole blocks.
static void prefetch(const Cache *cache, const Rows *rows, int64_t kv_head, int64_t key, int64_t step, int64_t last_key) {
  for (int64_t stop = key + step; key < stop && key <= last_key; key += rows->size) {
    int64_t place = place_of(cache, rows, kv_head, key);
    for (int64_t i = 0; i < rows->dim * rows->size; i += 16) {  // a line of each
      __builtin_prefetch(cache->keys + place + i);
      __builtin_prefetch(cache->values + place + i);
    }
  }
}

// Tokens [first, stop) of sequence b with `num_heads` query heads from `head` on; one token, or all of one KV head.
static void attend(const Arguments *a, int64_t b, int64_t first, int64_t stop, int64_t head, int64_t num_heads) {
  const AttentionShape *s = a->shape;
  int64_t dim = s->head_dim, last_key = s->positions[stop - 1], group = s->num_heads / s->num_kv_heads;
  Cache cache = {a->keys, a->values, s->block_tables + b * s->max_blocks, s->num_kv_heads, head / group,
                 (num_heads + group - 1) / group};
  Rows rows;
  rows.count = 0, rows.dim = dim, rows.size = s->block_size;
  for (int64_t t = first; t < stop; t++)
    for (int64_t h = head; h < head + num_heads; h++)
      add_row(&rows, a->out + (t * s->num_heads + h) * dim, a->q + (t * s->num_heads + h) * dim, s->positions[t]);
  int64_t step = rows.size > UNIT ? rows.size : UNIT, share = rows.count / cache.count;
  for (int64_t start = 0; start <= last_key; start += step)  // in the order in which heads lie in a block
    for (int64_t kv_head = 0; kv_head < cache.count; kv_head++) {
      int64_t next = (kv_head + 1) % cache.count;
      prefetch(&cache, &rows, next, next ? start : start + step, step, last_key);
      for (int64_t key = start; key < start + step && key <= last_key; key += UNIT)
        attend_unit(&rows, &cache, kv_head, kv_head * share, (kv_head + 1) * share, key, last_key);
    }
  finish(&rows);
}

// Query heads that a chunk has: of a lone token those of many KV heads, unless that leaves threads without work.
static int64_t chunk_heads(const AttentionShape *s, int64_t num_tokens, int64_t num_threads) {
  int64_t group = s->num_heads / s->num_kv_heads, wanted = 4 * num_threads, heads = group;
  int64_t chunks = s->cu_seqlens_q[s->num_sequences] * s->num_kv_heads;
  if ((chunks < wanted && chunks % num_threads) || group > ROWS) return 1;
  while (num_tokens == 1 && 2 * heads <= ROWS && s->num_heads % (2 * heads) == 0 &&
         s->num_sequences * s->num_heads / (2 * heads) >= wanted)
    heads *= 2;
  return heads;
}

void attention(Team *team, float *out, const float *q, const float *keys, const float *values,
               const AttentionShape *s) {
  Arguments arguments = {out, q, keys, values, s};
  int64_t chunk = next_chunk(team), first_chunk = 0;
  for (int64_t b = 0; b < s->num_sequences; b++) {
    int64_t start = s->cu_seqlens_q[b], stop = s->cu_seqlens_q[b + 1];
    int64_t heads = chunk_heads(s, stop - start, team_size(team)), pieces = s->num_heads / heads;
    int64_t tokens = stop - start > 1 && heads < ROWS ? ROWS / heads : 1, tiles = (stop - start + tokens - 1) / tokens;
    for (; chunk < first_chunk + tiles * pieces; chunk = next_chunk(team)) {
      int64_t first = start + (chunk - first_chunk) / pieces * tokens, last = first + tokens < stop ? first + tokens : stop;
      attend(&arguments, b, first, last, (chunk - first_chunk) % pieces * heads, heads);
    }
    first_chunk += tiles * pieces;
  }
}

static void attention_work(void *argument, Team *team, int id) {
  const Arguments *a = argument;
  (void)id;
  attention(team, a->out, a->q, a->keys, a->values, a->shape);
}

void run_attention(Team *team, float *out, const float *q, const float *keys, const float *values,
                   const AttentionShape *shape) {
  Arguments arguments = {out, q, keys, values, shape};
  team_run(team, attention_work, &arguments);
}
