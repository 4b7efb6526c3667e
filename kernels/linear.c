// linear.c -- y = x @ weight^T (+ bias) (+ y): every product of the model
//
// shapes    x (T, C) float32; weights (F, C) as they lie in the checkpoint, several stacked; y (T, F) float32
// order     a row of C elements is cut into blocks (a multiple of four of them, at most 512 elements each). In a block
//           each lane is one chain of multiply-adds; lanes are then added pairwise (sum_lanes), blocks in order. Both
//           kernels below do just that, so a token's bits do not depend on the tokens beside it.
// work      chunks of rows of the weight, whichever thread is free takes the next
// bytes     one token: every weight once, memory-bound: four blocks of a row at a time, prefetched 4 KB ahead.
//           Several: a chunk's block is widened to float32 once (a panel, in the second cache) for tiles of
//           ROWS x TOKENS sums that stay in registers; from about eight tokens on bound by multiply-adds
#include "linear.h"

#include <string.h>

#define INLINE static inline __attribute__((always_inline))

enum {
  BLOCK = 512,                               // most elements of a block
  ROWS = VL == 8 ? 3 : 6,                    // of a tile: 12 sums fit the 16 registers of AVX2, 24 the 32 of others
  TOKENS = 4,
  PANEL = 48,                                // rows of a panel, a multiple of ROWS
  FEW_TOKENS = 32, FEW_ROWS = 12,            // up to so many tokens a chunk is one small panel
  MANY_ROWS = 5 * PANEL,                     // else some, for which a block of x is read from the cache
  GROUP = 256,                               // tokens for which a panel is made
  STREAM_BYTES = 1 << 17,                    // of weights that a chunk of one token's product reads
};

static inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

typedef struct {
  int64_t count, length;  // blocks, and elements of each but the last ones
} Blocks;

static Blocks cut(int64_t columns) {
  int64_t count = 4 * ((columns + 4 * BLOCK - 1) / (4 * BLOCK));
  return (Blocks){count, (columns + 16 * count - 1) / (16 * count) * 16};
}

INLINE vec load_weight(const char *row, int64_t j, int format) {
  return format == BF16 ? load_bf16((const uint16_t *)row + j) : load((const float *)row + j);
}

static int64_t weight_size(int64_t format) { return format == BF16 ? 2 : 4; }

// -- one token

// The last elements of a block, where the four of a row differ or do not fill a turn.
INLINE vec chain(vec sum, const char *row, const float *x, int64_t j, int64_t stop, int format) {
  for (; j < stop; j += VL) sum = fma_vec(load_weight(row, j, format), load(x + j), sum);
  return sum;
}

// The dot product of one row, four blocks side by side.
INLINE float dot(const char *row, const float *x, int64_t columns, int format) {
  Blocks blocks = cut(columns);
  int64_t size = weight_size(format), length = blocks.length;
  float total = 0;
  for (int64_t first = 0; first < blocks.count; first += 4) {
    vec sums[4] = {{0}};
    int64_t start = first * length, common = min64(length, columns - start - 3 * length) / (4 * VL) * (4 * VL);
    int64_t done = max64(common, 0);
    const char *w = row + start * size;
    for (int64_t j = 0; j < common; j += 4 * VL) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) __builtin_prefetch(w + 4 * j * size + i * VL * 4 * size + 4096);
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++)
#pragma GCC unroll 4
        for (int b = 0; b < 4; b++)
        {
          int64_t at = b * length + j + i * VL;
          sums[b] = fma_vec(load_weight(w, at, format), load(x + start + at), sums[b]);
        }
    }
    for (int b = 0; b < 4; b++)
      sums[b] = chain(sums[b], w, x + start, b * length + done, b * length + min64(length, columns - start - b * length), format);
    quad parts = sum_lanes(sums[0], sums[1], sums[2], sums[3]);
    total = first ? total + parts[0] : parts[0];
    total = ((total + parts[1]) + parts[2]) + parts[3];
  }
  return total;
}

INLINE void stream_rows(float *sums, const Weight *weight, const float *x, int64_t start, int64_t stop, int format) {
  int64_t bytes = weight->columns * weight_size(format);
  for (int64_t row = start; row < stop; row++)
    sums[row - start] = dot((const char *)weight->data + row * bytes, x, weight->columns, format);
}

// -- several tokens

typedef struct {
  float panel[PANEL * BLOCK];           // (rows, length)
  float sums[GROUP * MANY_ROWS];        // (panels, tiles of tokens, rows, TOKENS)
} Scratch;

// One tile: rows of the panel (stride `length`) against tokens (stride `columns`); tokens beyond `count` are zero.
INLINE void tile(float *sums, const float *panel, const float *x, int64_t columns, int64_t length, int64_t stop,
                 int count, int is_first) {
  vec s[ROWS][TOKENS], zero = {0};
  KEEP(zero);  // or a register would hold it all along
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
    for (int t = 0; t < TOKENS; t++) s[i][t] = zero;
  for (int64_t j = 0; j < stop; j += VL) {
    vec w[ROWS];
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++) {
      w[i] = load(panel + i * length + j);
      KEEP(w[i]);
    }
#pragma GCC unroll 4
    for (int t = 0; t < TOKENS; t++) {
      if (t >= count) break;
      vec v = load(x + t * columns + j);
      KEEP(v);
#pragma GCC unroll 8
      for (int i = 0; i < ROWS; i++) s[i][t] = fma_vec(w[i], v, s[i][t]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; i++) {
    quad sum = sum_lanes(s[i][0], s[i][1], s[i][2], s[i][3]), *place = (quad *)(sums + i * TOKENS);
    *place = is_first ? sum : *place + sum;
  }
}

// One function a count, called and not inlined: inside a loop over tiles GCC would keep a zero vector in a register.
typedef void Tile(float *sums, const float *panel, const float *x, int64_t columns, int64_t length, int64_t stop,
                  int is_first);
#define DEFINE_TILE(name, count) \
  __attribute__((noinline)) static void name(float *sums, const float *panel, const float *x, int64_t columns, \
                                             int64_t length, int64_t stop, int is_first) { \
    tile(sums, panel, x, columns, length, stop, count, is_first); \
  }
DEFINE_TILE(tile_1, 1)
DEFINE_TILE(tile_2, 2)
DEFINE_TILE(tile_3, 3)
DEFINE_TILE(tile_4, TOKENS)

// Memory that will be wanted soon: rows of `bytes` bytes, `stride` bytes apart.
typedef struct {
  const char *data;
  int64_t rows, stride, bytes;
} Region;

// Asks for one of `parts` parts of a region. Asked for between tiles, what comes from memory costs no time of its own.
static void prefetch(const Region *r, int64_t part, int64_t parts) {
  int64_t lines = (r->bytes + 63) / 64, first = r->rows * lines * part / parts, stop = r->rows * lines * (part + 1) / parts;
  const char *row = r->data + first / lines * r->stride;
  for (int64_t line = first % lines; first < stop; first++) {
    __builtin_prefetch(row + line * 64);
    if (++line == lines) line = 0, row += r->stride;
  }
}

// One block of `rows` rows as float32.
INLINE void widen(float *panel, const char *data, int64_t rows, int64_t stride, int64_t length, int64_t stop,
                  int format) {
  for (int64_t i = 0; i < rows; i++, data += stride, panel += length)
    for (int64_t j = 0; j < stop; j += VL) store(panel + j, load_weight(data, j, format));
}

// The panel against all tokens; x begins at the block's first element. `next` is the panel's next block of weights.
static void multiply_block(float *sums, const float *panel, const float *x, int64_t num_tokens, int64_t num_rows, int64_t columns,
                           int64_t length, int64_t stop, int is_first, const Region *next) {
  Tile *const by_count[] = {tile_1, tile_2, tile_3, tile_4};
  int64_t part = 0, parts = num_rows / ROWS * ((num_tokens + TOKENS - 1) / TOKENS);
  for (int64_t t = 0; t < num_tokens; t += TOKENS, x += TOKENS * columns) {
    int64_t left = num_tokens - t - TOKENS;
    Region next_tile = {(const char *)(x + TOKENS * columns), max64(0, min64(TOKENS, left)), columns * 4, stop * 4};
    for (int64_t row = 0; row < num_rows; row += ROWS, sums += ROWS * TOKENS, part++) {
      prefetch(next, part, parts);
      prefetch(&next_tile, row, num_rows);
      by_count[min64(TOKENS, num_tokens - t) - 1](sums, panel + row * length, x, columns, length, stop, is_first);
    }
  }
}

static int64_t padded(int64_t rows) { return (rows + ROWS - 1) / ROWS * ROWS; }

// Widens `rows` rows of one block and multiplies them; the next block, or the next rows, are asked for meanwhile.
static void multiply_panel(Scratch *scratch, float *sums, const Weight *weight, int64_t row, int64_t rows,
                           int64_t block, const float *x, int64_t num_tokens) {
  int64_t columns = weight->columns, length = cut(columns).length, size = weight_size(weight->format);
  int64_t first = block * length, stop = min64(length, columns - first), stride = columns * size;
  if (stop <= 0) return;
  const char *data = (const char *)weight->data + row * stride + first * size;
  int64_t step = rows == PANEL ? rows * stride : first + stop < columns ? length * size : rows * stride - first * size;
  if (weight->format == BF16) widen(scratch->panel, data, rows, stride, length, stop, BF16);
  else widen(scratch->panel, data, rows, stride, length, stop, F32);
  memset(scratch->panel + rows * length, 0, (padded(rows) - rows) * length * sizeof(float));
  Region next = {data + step, rows, stride, stop * size};
  multiply_block(sums, scratch->panel, x + first, num_tokens, padded(rows), columns, length, stop, block == 0, &next);
}

// y = sums (+ bias) (+ y) for `rows` rows, of which the first is `row`; y begins at the group's first token.
static void finish(const Product *p, float *y, const float *sums, int64_t row, int64_t rows, int64_t num_tokens) {
  for (int64_t t = 0; t < num_tokens; t++, y += p->stride) {
    const float *column = sums + t / TOKENS * TOKENS * padded(rows) + t % TOKENS;
    for (int64_t i = 0; i < rows; i++) {
      float sum = p->bias ? column[i * TOKENS] + p->bias[row + i] : column[i * TOKENS];
      y[row + i] = p->add ? y[row + i] + sum : sum;
    }
  }
}

// Rows [start, stop) of a weight whose first row is row `base` of the stack.
static void panel_chunk(const Product *p, const Weight *weight, int64_t base, int64_t start, int64_t stop) {
  Scratch scratch;
  for (int64_t first = 0; first < p->num_tokens; first += GROUP) {
    int64_t count = min64(GROUP, p->num_tokens - first), num_blocks = cut(weight->columns).count;
    const float *x = p->x + first * weight->columns;
    for (int64_t block = 0; block < num_blocks; block++)
      for (int64_t row = start; row < stop; row += PANEL)
        multiply_panel(&scratch, scratch.sums + (row - start) * GROUP, weight, row, min64(PANEL, stop - row), block, x,
                       count);
    for (int64_t row = start; row < stop; row += PANEL)
      finish(p, p->y + first * p->stride, scratch.sums + (row - start) * GROUP, base + row, min64(PANEL, stop - row),
             count);
  }
}

// -- both

static void stream_chunk(const Product *p, const Weight *weight, int64_t base, int64_t start, int64_t stop) {
  float sums[MAX_STREAM_ROWS];
  if (weight->format == BF16) stream_rows(sums, weight, p->x, start, stop, BF16);
  else stream_rows(sums, weight, p->x, start, stop, F32);
  for (int64_t i = 0; i < stop - start; i++) {
    float *y = p->y + base + start + i, sum = p->bias ? sums[i] + p->bias[base + start + i] : sums[i];
    *y = p->add ? *y + sum : sum;
  }
}

// Rows that a thread takes at once; nobody's bits depend on it.
static int64_t chunk_rows(const Product *p, const Weight *weight, int64_t num_threads) {
  if (p->num_tokens == 1)
    return max64(1, min64(STREAM_BYTES / (weight->columns * weight_size(weight->format)),
                          min64(MAX_STREAM_ROWS, weight->rows / (8 * num_threads))));
  if (p->num_tokens <= FEW_TOKENS) return FEW_ROWS;
  int64_t panels = (weight->rows + PANEL - 1) / PANEL, turns = (panels + 5 * num_threads - 1) / (5 * num_threads);
  return (panels + num_threads * turns - 1) / (num_threads * turns) * PANEL;  // every thread gets as much
}

void linear(Team *team, const Product *p) {
  int64_t chunk = next_chunk(team), first_chunk = 0, base = 0;
  for (const Weight *weight = p->weights; weight < p->weights + p->num_weights; base += weight->rows, weight++) {
    int64_t rows = chunk_rows(p, weight, team_size(team)), count = (weight->rows + rows - 1) / rows;
    for (; chunk < first_chunk + count; chunk = next_chunk(team)) {
      int64_t start = (chunk - first_chunk) * rows, stop = min64(start + rows, weight->rows);
      (p->num_tokens > 1 ? panel_chunk : stream_chunk)(p, weight, base, start, stop);
    }
    first_chunk += count;
  }
}

static void linear_work(void *product, Team *team, int id) {
  (void)id;
  linear(team, product);
}

void run_linear(Team *team, const Product *product) { team_run(team, linear_work, (void *)product); }
