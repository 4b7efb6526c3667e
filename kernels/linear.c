// linear.c -- y = x @ weight^T (+ bias) (+ y): every product of the model
//
// shapes    x (T, C) float32; weights (F, C) as they lie in the checkpoint, several stacked; y (T, F) float32
// lanes     what an instruction adds up is a lane of 32 bits: one element of weight and activation in float32, or a pair
//           of each in bfloat16. A row has C or C / 2 lanes
// order     a row is cut into blocks of at most 512 lanes. In a block each place of a vector is one chain of
//           multiply-adds; then the places are added (sum_lanes), and the blocks in order. With tiles (AMX) a row is one
//           chain of steps of 32 elements. Either way a token's bits do not depend on the tokens beside it
// work      chunks of rows of the weight, whichever thread is free takes the next
// bytes     one token: every weight once, memory-bound: a row after the other, prefetched 2 KB ahead. Several: tiles
//           of rows by tokens, whose sums stay in registers, while the next rows are prefetched; some rows of a block (a
//           panel) meet all tokens of a group before the next rows come. From about 16 tokens on bound by multiply-adds
#include "linear.h"
#include "tiles.h"

#include <string.h>

#define INLINE static inline __attribute__((always_inline))

enum {
  BLOCK = 512,                       // most lanes of a block
  ROWS = 3, TOKENS = VL == 8 ? 4 : 8,  // of a tile: 12 sums fit the 16 registers of AVX2, 24 the 32 of others
  PANEL = 48, TILED_PANEL = 64,      // rows of a panel, a multiple of a tile's
  MANY_ROWS = 256,                   // rows of a chunk at most, for which a block of x is read from the cache
  FEW_TOKENS = 32,                   // up to so many tokens both are lower (for one tile of tokens a panel is a tile high)
  LOW_PANEL = 24, LOW_TILED_PANEL = 32, LOW_ROWS = 192,
  GROUP = 256,                       // tokens for which a panel is made
  STREAM_BYTES = 1 << 19,            // of weights that a chunk of one token's product reads
  PIECE = 1024,                      // elements that are rounded at once
};

static inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

// How one weight is multiplied.
enum Kind {
  WIDE,     // float32
  WIDENED,  // bfloat16 made float32
  PAIRED,   // bfloat16 with rounded activations, in vectors
  MATRIX,   // the same, in tiles
};

static enum Kind kind_of(const Product *p, const Weight *weight) {
  if (weight->format == F32) return WIDE;
  if (p->arithmetic == FLOAT32 || weight->columns % TILE_DEPTH) return WIDENED;
  return p->arithmetic == PAIRS ? PAIRED : MATRIX;
}

static int64_t num_lanes(enum Kind kind, int64_t columns) { return kind < PAIRED ? columns : columns / 2; }
static int64_t lane_bytes(enum Kind kind) { return kind == WIDENED ? 2 : 4; }  // of the weight
static int64_t tile_rows(enum Kind kind) { return kind == MATRIX ? TILE : ROWS; }
static int64_t tile_tokens(enum Kind kind) { return kind == MATRIX ? TILE : TOKENS; }
static int64_t panel_rows(enum Kind kind, int64_t num_tokens) {
  if (num_tokens <= TOKENS && kind != MATRIX) return ROWS;
  if (num_tokens <= FEW_TOKENS) return kind == MATRIX ? LOW_TILED_PANEL : LOW_PANEL;
  return kind == MATRIX ? TILED_PANEL : PANEL;
}

// Lanes of each block of a row but the last.
static int64_t block_length(int64_t lanes) {
  int64_t count = (lanes + BLOCK - 1) / BLOCK;
  return (lanes + 16 * count - 1) / (16 * count) * 16;
}

INLINE vec load_lanes(const char *row, int64_t j, enum Kind kind) {
  return kind == WIDENED ? load_bf16((const uint16_t *)row + j) : load((const float *)row + j);
}

INLINE vec multiply_add(vec w, vec x, vec sum, enum Kind kind) {
  return kind == PAIRED ? dot_pairs((uvec)w, (uvec)x, sum) : fma_vec(w, x, sum);
}

// -- activations as they are multiplied

typedef uint32_t Pairs[TILE][TILE];  // [pair of elements][token]: what a tile of weights is multiplied with

// One vector of lanes from the elements of x that begin at lane `j`.
INLINE vec pack_lanes(const float *x, int64_t j, enum Kind kind) {
  if (kind != PAIRED) return load(x + j);
  union { uint16_t halves[2 * VL]; vec lanes; } u;
  store_bf16(u.halves, load(x + 2 * j));
  store_bf16(u.halves + VL, load(x + 2 * j + VL));
  return u.lanes;
}

// Lanes [first, stop) of up to TOKENS tokens: vectors, and in them tokens, side by side.
INLINE void pack_vectors(float *y, const float *x, int64_t columns, int64_t count, int64_t first, int64_t stop,
                         enum Kind kind) {
  for (int64_t j = first; j < stop; j += VL)
    for (int64_t t = 0; t < count; t++) store(y + j * count + t * VL, pack_lanes(x + t * columns, j, kind));
}

// The same for tile registers, of 16 tokens; of those that are missing, zeros.
static void pack_tiles(float *y, const float *x, int64_t columns, int64_t count, int64_t first, int64_t stop) {
  Pairs *tiles = (Pairs *)(y + first * TILE);
  for (int64_t j = first; j < stop; j += TILE, tiles++)
    for (int64_t t = 0; t < TILE; t++)
      for (int64_t pair = 0; pair < TILE; pair += VL) {
        union { vec lanes; uint32_t pairs[VL]; } u = {{0}};
        if (t < count) u.lanes = pack_lanes(x + t * columns, j + pair, PAIRED);
        for (int i = 0; i < VL; i++) (*tiles)[pair + i][t] = u.pairs[i];
      }
}

// By every thread: x, tile of tokens after tile of tokens. One token of float32 lies like that already.
static void pack_activations(Team *team, const Product *p, enum Kind kind) {
  int64_t columns = p->weights->columns, lanes = num_lanes(kind, columns), tokens = tile_tokens(kind);
  int64_t pieces = (lanes + PIECE - 1) / PIECE, chunks = (p->num_tokens + tokens - 1) / tokens * pieces;
  for (int64_t chunk; (chunk = next_chunk(team)) < chunks;) {
    int64_t t = chunk / pieces * tokens, first = chunk % pieces * PIECE, stop = min64(first + PIECE, lanes);
    int64_t count = min64(tokens, p->num_tokens - t);
    const float *x = p->x + t * columns;
    float *y = p->packed + t * lanes;
    if (kind == MATRIX) pack_tiles(y, x, columns, count, first, stop);
    else if (kind == PAIRED) pack_vectors(y, x, columns, count, first, stop, PAIRED);
    else pack_vectors(y, x, columns, count, first, stop, WIDE);
  }
  barrier(team);
}

static int is_packed(const Product *p, enum Kind kind) { return kind >= PAIRED || p->num_tokens > 1; }

static const float *activations(const Product *p, enum Kind kind) { return is_packed(p, kind) ? p->packed : p->x; }

// y = sum (+ bias) (+ y) for one row, and for four, of one token.
INLINE void put(const Product *p, float *y, float sum, int64_t row) {
  if (p->bias) sum += p->bias[row];
  y[row] = p->add ? y[row] + sum : sum;
}

INLINE void put_four(const Product *p, float *y, quad sums, int64_t row) {
  quad *place = (quad *)(y + row);
  if (p->bias) sums += *(const quad *)(p->bias + row);
  *place = p->add ? *place + sums : sums;
}

// -- one token

// The dot product of one row. A block is one chain; the machine itself begins the next ones meanwhile.
INLINE float dot(const char *row, const float *x, int64_t lanes, enum Kind kind) {
  int64_t length = block_length(lanes), size = lane_bytes(kind);
  float total = 0;
  for (int64_t first = 0; first < lanes; first += length) {
    vec sum = {0};
    int64_t j = first, stop = min64(first + length, lanes);
    for (; j + 8 * VL <= stop; j += 8 * VL) {
#pragma GCC unroll 8
      for (int i = 0; i < 8 * VL * size; i += 64) __builtin_prefetch(row + j * size + i + 2048);
#pragma GCC unroll 8
      for (int i = 0; i < 8; i++) sum = multiply_add(load_lanes(row, j + i * VL, kind), load(x + j + i * VL), sum, kind);
    }
    for (; j < stop; j += VL) sum = multiply_add(load_lanes(row, j, kind), load(x + j), sum, kind);
    total = first ? total + sum_places(sum) : sum_places(sum);
  }
  return total;
}

INLINE void dot_rows(float *sums, const Weight *weight, const float *x, int64_t start, int64_t stop, enum Kind kind) {
  int64_t lanes = num_lanes(kind, weight->columns), bytes = lanes * lane_bytes(kind);
  for (int64_t row = start; row < stop; row++)
    sums[row - start] = dot((const char *)weight->data + row * bytes, x, lanes, kind);
}

static void stream_chunk(const Product *p, const Weight *weight, enum Kind kind, int64_t base, int64_t start,
                         int64_t stop) {
  float sums[MAX_STREAM_ROWS];
  const float *x = activations(p, kind);
  if (kind == WIDE) dot_rows(sums, weight, x, start, stop, WIDE);
  else if (kind == WIDENED) dot_rows(sums, weight, x, start, stop, WIDENED);
  else dot_rows(sums, weight, x, start, stop, PAIRED);
  for (int64_t i = 0; i < stop - start; i++) put(p, p->y, sums[i], base + start + i);
}

// -- several tokens: what both kinds of tiles share

typedef struct {
  _Alignas(64) float panel[TILED_PANEL * BLOCK];  // lanes: (rows, length), or for tiles (rows / 16, length / 16, 16, 16)
  _Alignas(64) float sums[GROUP * MANY_ROWS];     // (panels, tiles of tokens, rows, tokens of a tile)
} Scratch;

// Rows of weights that will be wanted soon: asked for between multiplications, what comes from memory costs no time.
typedef struct {
  const char *data;
  int64_t rows, stride, lane;  // bytes from row to row, and from lane to lane
} Ahead;

static Ahead part_of(const Ahead *all, int64_t part, int64_t parts) {
  int64_t first = all->rows * part / parts;
  return (Ahead){all->data + first * all->stride, all->rows * (part + 1) / parts - first, all->stride, all->lane};
}

INLINE void ask(const Ahead *ahead, int64_t j) {
  for (int64_t i = 0; i < ahead->rows; i++) __builtin_prefetch(ahead->data + i * ahead->stride + j * ahead->lane);
}

// Some rows of a block of weights, and the tokens that they are multiplied with.
typedef struct {
  const char *data;        // of the first row
  int64_t num_rows, stride;
  const float *x;          // packed
  int64_t num_tokens, lanes;  // lanes of a whole token
  int64_t first, length;   // lanes of the block
  float *sums;             // (tiles of tokens, rows, tokens of a tile)
  Ahead ahead;
} Panel;

static int64_t padded(int64_t rows, enum Kind kind) {
  int64_t unit = tile_rows(kind);
  return (rows + unit - 1) / unit * unit;
}

// -- tiles of sums in vectors

typedef struct {
  const char *rows;       // ROWS of them
  int64_t stride, stop;   // bytes from row to row; lanes
  const float *x;         // up to TOKENS tokens
  Ahead ahead;
} Tile;

// The sums of tokens beyond `count` are zero.
INLINE void multiply_tile(float *sums, const Tile *tile, int is_first, int count, enum Kind kind) {
  const char *rows = tile->rows;
  const float *x = tile->x;
  int64_t stride = tile->stride, stop = tile->stop;
  Ahead ahead = tile->ahead;
  vec s[ROWS][TOKENS], zero = {0};
  KEEP(zero);  // or a register would hold it all along
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 8
    for (int t = 0; t < TOKENS; t++) s[i][t] = zero;
  for (int64_t j = 0; j < stop; j += VL) {
    vec w[ROWS];
    ask(&ahead, j);
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++) {
      w[i] = load_lanes(rows + i * stride, j, kind);
      KEEP(w[i]);
    }
#pragma GCC unroll 8
    for (int t = 0; t < TOKENS; t++) {
      if (t >= count) break;
      vec v = load(x + j * count + t * VL);
      KEEP(v);
#pragma GCC unroll 8
      for (int i = 0; i < ROWS; i++) s[i][t] = multiply_add(w[i], v, s[i][t], kind);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 2
    for (int t = 0; t < TOKENS; t += 4) {
      quad sum = sum_lanes(s[i][t], s[i][t + 1], s[i][t + 2], s[i][t + 3]), *place = (quad *)(sums + i * TOKENS + t);
      *place = is_first ? sum : *place + sum;
    }
}

// One function a count, called and not inlined: inside a loop over tiles GCC would keep a zero vector in a register.
typedef void MultiplyTile(float *sums, const Tile *tile, int is_first);
#define FOR_EACH_COUNT(define, name, kind) \
  define(name, 1, kind) define(name, 2, kind) define(name, 3, kind) define(name, 4, kind) \
  define(name, 5, kind) define(name, 6, kind) define(name, 7, kind) define(name, 8, kind)
#define ALL_COUNTS(name) {name##_1, name##_2, name##_3, name##_4, name##_5, name##_6, name##_7, name##_8}
#define DEFINE_TILE(name, count, kind) \
  __attribute__((noinline)) static void name##_##count(float *sums, const Tile *tile, int is_first) { \
    multiply_tile(sums, tile, is_first, count, kind); \
  }
FOR_EACH_COUNT(DEFINE_TILE, tile_wide, WIDE)
FOR_EACH_COUNT(DEFINE_TILE, tile_widened, WIDENED)
FOR_EACH_COUNT(DEFINE_TILE, tile_paired, PAIRED)
static MultiplyTile *const MULTIPLY[][8] = {ALL_COUNTS(tile_wide), ALL_COUNTS(tile_widened), ALL_COUNTS(tile_paired)};

// Rows from `first` on as lanes of 32 bits, and zeros up to a whole tile.
static void copy_rows(float *copy, const Panel *p, int64_t first, enum Kind kind) {
  int64_t rows = p->num_rows - first;
  for (int64_t i = 0; i < rows; i++) {
    const char *row = p->data + (first + i) * p->stride;
    float *to = copy + i * p->length;
    if (kind == WIDENED) for (int64_t j = 0; j < p->length; j += VL) store(to + j, load_lanes(row, j, WIDENED));
    else memcpy(to, row, p->length * 4);
  }
  memset(copy + rows * p->length, 0, (padded(rows, kind) - rows) * p->length * 4);
}

// Weights are read where they lie, unless widening them once is cheaper; of the last rows, fewer than a tile's, there is
// a copy.
static void multiply_vectors(const Panel *p, float *copy, enum Kind kind) {
  int64_t whole = kind == WIDENED && p->num_tokens > TOKENS ? 0 : p->num_rows / ROWS * ROWS, part = 0;
  int64_t parts = padded(p->num_rows, kind) / ROWS * ((p->num_tokens + TOKENS - 1) / TOKENS);
  float *sums = p->sums;
  if (whole < p->num_rows) copy_rows(copy, p, whole, kind);
  for (int64_t t = 0; t < p->num_tokens; t += TOKENS)
    for (int64_t row = 0; row < p->num_rows; row += ROWS, sums += ROWS * TOKENS, part++) {
      int64_t count = min64(TOKENS, p->num_tokens - t);
      int is_copied = row >= whole;
      Tile tile = {is_copied ? (const char *)(copy + (row - whole) * p->length) : p->data + row * p->stride,
                   is_copied ? p->length * 4 : p->stride, p->length, p->x + t * p->lanes + p->first * count,
                   part_of(&p->ahead, part, parts)};
      MULTIPLY[is_copied && kind == WIDENED ? WIDE : kind][count - 1](sums, &tile, p->first == 0);
    }
}

// -- tiles of sums in tile registers

// The rows in tiles of 16 rows and 16 lanes; rows that are missing in the last tile are zero.
static void copy_tiles(float *copy, const Panel *p) {
  for (int64_t i = 0; i < padded(p->num_rows, MATRIX); i++) {
    float *row = copy + i / TILE * TILE * p->length + i % TILE * TILE;
    for (int64_t j = 0; j < p->length; j += TILE)
      if (i < p->num_rows) memcpy(row + j * TILE, p->data + i * p->stride + j * 4, TILE * 4);
      else memset(row + j * TILE, 0, TILE * 4);
  }
}

// One or two tiles of rows against one or two of tokens: weights in registers 4 and 5, tokens in 6 and 7.
INLINE void multiply_tiles(const Panel *p, Ahead ahead, float *sums, const float *w, const float *x, int two_rows,
                           int two_tokens) {
  TILES;
  float *right = sums + padded(p->num_rows, MATRIX) * TILE;  // the sums of the second tile of tokens
  tile_zero(0);
  tile_zero(1);
  tile_zero(2);
  tile_zero(3);
  if (p->first) {
    tile_load(0, sums, 64);
    if (two_tokens) tile_load(1, right, 64);
    if (two_rows) tile_load(2, sums + TILE_PAIRS, 64);
    if (two_rows && two_tokens) tile_load(3, right + TILE_PAIRS, 64);
  }
  for (int64_t lane = 0; lane < p->length; lane += TILE) {
    int64_t at = lane * TILE;
    ask(&ahead, lane);
    tile_load(4, w + at, 64);
    tile_load(6, x + at, 64);
    tile_dot(0, 4, 6);
    if (two_tokens) {
      tile_load(7, x + TILE * p->lanes + at, 64);
      tile_dot(1, 4, 7);
    }
    if (two_rows) {
      tile_load(5, w + TILE * p->length + at, 64);
      tile_dot(2, 5, 6);
    }
    if (two_rows && two_tokens) tile_dot(3, 5, 7);
  }
  tile_store(0, sums, 64);
  if (two_tokens) tile_store(1, right, 64);
  if (two_rows) tile_store(2, sums + TILE_PAIRS, 64);
  if (two_rows && two_tokens) tile_store(3, right + TILE_PAIRS, 64);
}

static void multiply_matrix(const Panel *p, float *copy) {
  int64_t tiles = (p->num_tokens + TILE - 1) / TILE, rows = padded(p->num_rows, MATRIX), part = 0;
  int64_t parts = (rows + 2 * TILE - 1) / (2 * TILE) * ((tiles + 1) / 2);
  copy_tiles(copy, p);
  for (int64_t t = 0; t < tiles; t += 2)
    for (int64_t row = 0; row < rows; row += 2 * TILE, part++) {
      float *sums = p->sums + (t * rows + row) * TILE;
      const float *w = copy + row * p->length, *x = p->x + (t * p->lanes + p->first) * TILE;
      int two_rows = row + TILE < rows, two_tokens = t + 1 < tiles;
      Ahead ahead = part_of(&p->ahead, part, parts);
      if (two_rows && two_tokens) multiply_tiles(p, ahead, sums, w, x, 1, 1);
      else if (two_rows) multiply_tiles(p, ahead, sums, w, x, 1, 0);
      else if (two_tokens) multiply_tiles(p, ahead, sums, w, x, 0, 1);
      else multiply_tiles(p, ahead, sums, w, x, 0, 0);
    }
}

// -- several tokens: chunks of rows

// Four rows' sums of four tokens, each row's `tokens` after the one before, as four tokens' sums of four rows.
INLINE void turn(quad by_token[4], const float *sums, int64_t tokens) {
  quad a = *(const quad *)sums, b = *(const quad *)(sums + tokens);
  quad c = *(const quad *)(sums + 2 * tokens), d = *(const quad *)(sums + 3 * tokens);
  quad ab = SHUFFLE_QUAD(a, b, 0, 4, 1, 5), cd = SHUFFLE_QUAD(c, d, 0, 4, 1, 5);
  by_token[0] = SHUFFLE_QUAD(ab, cd, 0, 1, 4, 5), by_token[1] = SHUFFLE_QUAD(ab, cd, 2, 3, 6, 7);
  ab = SHUFFLE_QUAD(a, b, 2, 6, 3, 7), cd = SHUFFLE_QUAD(c, d, 2, 6, 3, 7);
  by_token[2] = SHUFFLE_QUAD(ab, cd, 0, 1, 4, 5), by_token[3] = SHUFFLE_QUAD(ab, cd, 2, 3, 6, 7);
}

// The sums of `rows` rows, of which the first is `row`, to y, which begins at the group's first token.
static void finish(const Product *p, float *y, const float *sums, enum Kind kind, int64_t row, int64_t rows,
                   int64_t num_tokens) {
  int64_t tokens = tile_tokens(kind), all = padded(rows, kind);
  for (int64_t t = 0; t < num_tokens; t += 4, y += 4 * p->stride) {  // a tile has room for four tokens or more
    const float *column = sums + t / tokens * tokens * all + t % tokens;
    int64_t count = min64(4, num_tokens - t), i = 0;
    for (; i + 4 <= rows; i += 4) {
      quad by_token[4];
      turn(by_token, column + i * tokens, tokens);
      for (int64_t j = 0; j < count; j++) put_four(p, y + j * p->stride, by_token[j], row + i);
    }
    for (; i < rows; i++)
      for (int64_t j = 0; j < count; j++) put(p, y + j * p->stride, column[i * tokens + j], row + i);
  }
}

// Rows [start, stop) of a weight whose first row is row `base` of the stack: block by block, panel by panel.
static void panel_chunk(const Product *p, const Weight *weight, enum Kind kind, int64_t base, int64_t start, int64_t stop) {
  Scratch scratch;
  int64_t lanes = num_lanes(kind, weight->columns), length = block_length(lanes), size = lane_bytes(kind);
  int64_t stride = lanes * size, height = panel_rows(kind, p->num_tokens);
  const char *data = (const char *)weight->data + start * stride;
  for (int64_t first = 0; first < p->num_tokens; first += GROUP) {
    int64_t count = min64(GROUP, p->num_tokens - first), room = (count + TILE - 1) / TILE * TILE;
    for (int64_t lane = 0; lane < lanes; lane += length)
      for (int64_t row = 0; row < stop - start; row += height) {
        int64_t rows = min64(height, stop - start - row), left = stop - start - row - rows;
        const char *at = data + row * stride + lane * size;
        Ahead ahead = {at + height * stride, min64(height, left), stride, size};
        if (!left) ahead = (Ahead){data + (lane + length) * size, lane + length < lanes ? height : 0, stride, size};
        Panel panel = {at, rows, stride, activations(p, kind) + first * lanes, count, lanes, lane,
                       min64(length, lanes - lane), scratch.sums + row * room, ahead};
        if (kind == MATRIX) multiply_matrix(&panel, scratch.panel);
        else multiply_vectors(&panel, scratch.panel, kind);
      }
    for (int64_t row = 0; row < stop - start; row += height)
      finish(p, p->y + first * p->stride, scratch.sums + row * room, kind, base + start + row,
             min64(height, stop - start - row), count);
  }
}

// -- both

// Rows that a thread takes at once; nobody's bits depend on it.
static int64_t chunk_rows(const Product *p, const Weight *weight, enum Kind kind, int64_t num_threads) {
  if (p->num_tokens == 1 && kind != MATRIX)
    return max64(1, min64(STREAM_BYTES / (num_lanes(kind, weight->columns) * lane_bytes(kind)),
                          min64(MAX_STREAM_ROWS, weight->rows / (8 * num_threads))));
  int64_t height = panel_rows(kind, p->num_tokens), panels = (weight->rows + height - 1) / height;
  if (p->num_tokens <= FEW_TOKENS) return max64(1, min64(LOW_ROWS / height, panels / (8 * num_threads))) * height;
  int64_t most = MANY_ROWS / height, turns = (panels + most * num_threads - 1) / (most * num_threads);
  return (panels + num_threads * turns - 1) / (num_threads * turns) * height;  // every thread gets as much
}

// A product whose weights are of one kind.
static void multiply(Team *team, const Product *p, enum Kind kind) {
  int64_t chunk, first_chunk = 0, base = 0;
  if (is_packed(p, kind)) pack_activations(team, p, kind);
  if (kind == MATRIX) tiles_begin();
  chunk = next_chunk(team);
  for (const Weight *weight = p->weights; weight < p->weights + p->num_weights; base += weight->rows, weight++) {
    int64_t rows = chunk_rows(p, weight, kind, team_size(team)), count = (weight->rows + rows - 1) / rows;
    for (; chunk < first_chunk + count; chunk = next_chunk(team)) {
      int64_t start = (chunk - first_chunk) * rows, stop = min64(start + rows, weight->rows);
      int is_streamed = p->num_tokens == 1 && kind != MATRIX;
      (is_streamed ? stream_chunk : panel_chunk)(p, weight, kind, base, start, stop);
    }
    first_chunk += count;
  }
  if (kind == MATRIX) tiles_end();
}

void linear(Team *team, const Product *p) {
  Product part = *p;
  for (int64_t first = 0, stop; first < p->num_weights; first = stop) {
    enum Kind kind = kind_of(p, &p->weights[first]);
    int64_t rows = 0;
    for (stop = first; stop < p->num_weights && kind_of(p, &p->weights[stop]) == kind; stop++) rows += p->weights[stop].rows;
    if (first) barrier(team);
    part.weights = p->weights + first, part.num_weights = stop - first;
    multiply(team, &part, kind);
    part.y += rows;
    if (part.bias) part.bias += rows;
  }
}

static void linear_work(void *product, Team *team, int id) {
  (void)id;
  linear(team, product);
}

void run_linear(Team *team, const Product *product) { team_run(team, linear_work, (void *)product); }

int64_t fastest_arithmetic(void) {
#if HAVE_TILES
  if (tiles_allowed()) return TILED;
#endif
#if HAVE_DOT_PAIRS
  return PAIRS;
#else
  return FLOAT32;
#endif
}
