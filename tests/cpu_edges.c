// cpu_edges.c -- every op of kernels/*.c at the edges of its shapes, for sanitizers
//
// usage     cpu_edges OP [THREADS]; what an op is run with stands in the tables before it
// arrays    each has memory of just its size, on a boundary of 16 bytes and then off it by an element, so that a vector
//           is no better aligned than the kernels are promised
#include "llama.h"
#include "tiles.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { MAX_ARRAYS = 1000, MAX_PIECES = 8, NOWHERE = 1 << 30, MIXED = F32 + 1 };  // MIXED: both formats in turn
#define LENGTH(array) ((int64_t)(sizeof(array) / sizeof *(array)))
#define EACH(item, array) for (__typeof__(&(array)[0]) item = array; item < array + LENGTH(array); item++)

// ---- arrays

static void *arrays[MAX_ARRAYS];
static int num_arrays, offset;  // elements between the beginning of the memory and that of an array
static uint32_t state;          // of the random numbers

static void *keep(void *memory) {
  if (!memory || num_arrays == MAX_ARRAYS) abort();
  return arrays[num_arrays++] = memory;
}

static void release(void) {
  while (num_arrays) free(arrays[--num_arrays]);
}

static void *array_of(int64_t count, int64_t size) {
  return (char *)keep(malloc((count + offset) * size)) + offset * size;
}

static float random_number(void) {  // from -1 to 1
  state = state * 1664525 + 1013904223;
  return (int32_t)state / 2147483648.0f;
}

static float *floats(int64_t count) {
  float *x = array_of(count, sizeof *x);
  for (int64_t i = 0; i < count; i++) x[i] = random_number();
  return x;
}

static int64_t *numbers(int64_t count) { return array_of(count, sizeof(int64_t)); }

static int64_t allowed(int64_t arithmetic) {  // tile registers must be asked for; where there are none their twin runs
  return arithmetic == TILED && HAVE_TILES && !tiles_allowed() ? PAIRS : arithmetic;
}

static float *packed(int64_t num_tokens, int64_t columns) {  // the scratch of a product
  return array_of(PACKED_ROWS(num_tokens) * columns, sizeof(float));
}

static Weight weight(int64_t rows, int64_t columns, int64_t format) {
  float *wide = floats(rows * columns);
  if (format == F32) return (Weight){.data = wide, .rows = rows, .columns = columns, .format = F32};
  uint16_t *data = array_of(rows * columns / 2, 4);  // on a boundary of 4 bytes: pairs are read as one number
  for (int64_t i = 0; i < rows * columns; i++) memcpy(data + i, (char *)(wide + i) + 2, 2);
  return (Weight){.data = data, .rows = rows, .columns = columns, .format = BF16};
}

static Stack stack(int64_t num_weights, const int64_t *rows, int64_t columns, int64_t format, int has_bias) {
  Weight *weights = array_of(num_weights, sizeof *weights);
  int64_t sum = 0;
  for (int64_t i = 0; i < num_weights; i++, sum += rows[i - 1])
    weights[i] = weight(rows[i], columns, format == MIXED ? i % 2 : format);
  return (Stack){.weights = weights, .num_weights = num_weights, .bias = has_bias ? floats(sum) : NULL};
}
#define STACK(columns, format, has_bias, ...) \
  stack(LENGTH(((int64_t[]){__VA_ARGS__})), (int64_t[]){__VA_ARGS__}, columns, format, has_bias)

// ---- sequences: pieces of them in a step, and where their keys and values lie

typedef struct {
  int64_t num_heads, num_kv_heads, head_dim, block_size;
  struct { int64_t first, count; } pieces[MAX_PIECES];  // position of the first token; ends with one without tokens
} Sequences;

static int64_t count_pieces(const Sequences *s) {
  int64_t count = 0;
  while (count < MAX_PIECES && s->pieces[count].count) count++;
  return count;
}

static int64_t blocks_of(const Sequences *s, int64_t b) {
  return (s->pieces[b].first + s->pieces[b].count + s->block_size - 1) / s->block_size;
}

// The blocks of all sequences, last ones first; *num_blocks becomes their number.
static AttentionShape shape_of(const Sequences *s, int64_t *num_blocks) {
  int64_t count = count_pieces(s), max_blocks = 0, *cu = numbers(count + 1);
  *num_blocks = cu[0] = 0;
  for (int64_t b = 0; b < count; b++) {
    cu[b + 1] = cu[b] + s->pieces[b].count;
    *num_blocks += blocks_of(s, b);
    if (blocks_of(s, b) > max_blocks) max_blocks = blocks_of(s, b);
  }
  int64_t *positions = numbers(cu[count]), *tables = numbers(count * max_blocks), next = *num_blocks;
  for (int64_t b = 0; b < count; b++) {
    for (int64_t i = 0; i < s->pieces[b].count; i++) positions[cu[b] + i] = s->pieces[b].first + i;
    for (int64_t i = 0; i < max_blocks; i++) tables[b * max_blocks + i] = i < blocks_of(s, b) ? --next : NOWHERE;
  }
  return (AttentionShape){.num_sequences = count, .max_blocks = max_blocks, .num_heads = s->num_heads,
                          .num_kv_heads = s->num_kv_heads, .head_dim = s->head_dim, .block_size = s->block_size,
                          .cu_seqlens_q = cu, .positions = positions, .block_tables = tables};
}

static int64_t tokens_of(const AttentionShape *shape) { return shape->cu_seqlens_q[shape->num_sequences]; }

static int64_t *slots_of(const AttentionShape *shape) {
  int64_t *slots = numbers(tokens_of(shape)), size = shape->block_size;
  for (int64_t b = 0; b < shape->num_sequences; b++)
    for (int64_t t = shape->cu_seqlens_q[b]; t < shape->cu_seqlens_q[b + 1]; t++) {
      int64_t position = shape->positions[t];
      slots[t] = shape->block_tables[b * shape->max_blocks + position / size] * size + position % size;
    }
  return slots;
}

// ---- attention

static const Sequences SEQUENCES[] = {
  {1, 1, 8, 8, {{0, 1}}}, {1, 1, 8, 8, {{7, 1}}}, {1, 1, 8, 8, {{8, 1}}}, {2, 1, 8, 8, {{0, 8}, {3, 13}}},
  {4, 2, 16, 16, {{15, 1}, {16, 1}, {0, 16}, {31, 1}}}, {3, 1, 24, 16, {{0, 17}, {5, 27}, {47, 1}}},
  {14, 2, 40, 32, {{0, 33}, {63, 1}, {30, 34}}}, {8, 1, 64, 64, {{0, 1}, {1, 63}, {127, 1}}},
  {40, 1, 80, 128, {{0, 3}, {127, 1}}}, {80, 2, 16, 16, {{0, 40}}}, {2, 2, 128, 8, {{0, 70}, {23, 1}}},
  {3, 3, 256, 16, {{0, 19}, {15, 1}, {255, 1}}}, {6, 6, 8, 16, {{0, 0}}},
};

static void attention_edges(Team *team) {
  EACH(s, SEQUENCES) {
    int64_t num_blocks;
    AttentionShape shape = shape_of(s, &num_blocks);
    int64_t size = tokens_of(&shape) * s->num_heads * s->head_dim;
    int64_t cache = num_blocks * s->num_kv_heads * s->head_dim * s->block_size;
    run_attention(team, floats(size), floats(size), floats(cache), floats(cache), &shape);
    release();
  }
}

// ---- products

static const int64_t TOKENS[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 17, 33};
static const int64_t COLUMNS[] = {16, 32, 48, 96};
static const int64_t ROWS[] = {1, 5, 16, 49};
static const struct { int64_t tokens, columns, rows; } LARGE[] = {
  {1, 1040, 3}, {1, 4128, 9}, {1, 16, 1100}, {2, 2064, 13}, {5, 4160, 7}, {33, 1056, 50}, {257, 32, 65}, {300, 80, 31},
  {40, 16, 600}, {3, 32, 700},
};

static void multiply(Team *team, int64_t tokens, int64_t columns, const Stack *weights, int64_t stride, int add,
                     int64_t arithmetic) {
  Product product = {.y = floats(tokens * stride), .stride = stride, .x = floats(tokens * columns),
                     .num_tokens = tokens, .weights = weights->weights, .num_weights = weights->num_weights,
                     .bias = weights->bias, .add = add, .arithmetic = allowed(arithmetic),
                     .packed = packed(tokens, columns)};
  run_linear(team, &product);
  release();
}

static void multiply_both(Team *team, int64_t tokens, int64_t columns, int64_t rows, int64_t format,
                          int64_t arithmetic) {
  Stack one = STACK(columns, format, 1, rows);
  multiply(team, tokens, columns, &one, rows, 0, arithmetic);
  Stack several = STACK(columns, format, 0, rows, 1, 18);
  multiply(team, tokens, columns, &several, rows + 19, 1, arithmetic);
}

static void linear_edges(Team *team) {
  for (int64_t format = BF16; format <= MIXED; format++)
    for (int64_t arithmetic = FLOAT32; arithmetic <= (format == F32 ? FLOAT32 : TILED); arithmetic++) {
      EACH(tokens, TOKENS) EACH(columns, COLUMNS) EACH(rows, ROWS)
        multiply_both(team, *tokens, *columns, *rows, format, arithmetic);
      EACH(shape, LARGE) multiply_both(team, shape->tokens, shape->columns, shape->rows, format, arithmetic);
    }
}

// ---- layers, embedding, head

typedef struct {
  int64_t hidden_size, intermediate_size, format, arithmetic;
  int has_bias;
  Sequences sequences;
} Transformer;

static const Transformer TRANSFORMERS[] = {
  {16, 16, F32, FLOAT32, 0, {2, 1, 8, 8, {{0, 1}}}},
  {16, 48, BF16, FLOAT32, 1, {2, 2, 8, 8, {{0, 9}, {7, 1}, {8, 1}}}},
  {48, 1040, BF16, FLOAT32, 0, {6, 2, 24, 16, {{0, 17}, {15, 1}, {16, 1}}}},
  {80, 112, F32, FLOAT32, 1, {7, 1, 16, 32, {{31, 1}}}},
  {64, 96, BF16, PAIRS, 0, {4, 2, 16, 16, {{0, 33}, {5, 12}, {31, 1}}}},
  {64, 96, BF16, PAIRS, 1, {4, 1, 16, 128, {{127, 1}}}},
  {96, 80, BF16, TILED, 0, {4, 2, 40, 64, {{0, 18}, {63, 1}}}},
  {96, 64, MIXED, TILED, 1, {4, 1, 24, 8, {{0, 5}, {9, 2}}}},
  {32, 2112, BF16, TILED, 1, {2, 1, 256, 16, {{15, 1}}}},
};

enum { NUM_LAYERS = 2, VOCAB_SIZE = 33 };

static Model model_of(const Transformer *t) {
  const Sequences *s = &t->sequences;
  int64_t last = 0;
  for (int64_t b = 0; b < count_pieces(s); b++)
    if (s->pieces[b].first + s->pieces[b].count > last) last = s->pieces[b].first + s->pieces[b].count;
  Model model = {.hidden_size = t->hidden_size, .intermediate_size = t->intermediate_size, .num_heads = s->num_heads,
                 .num_kv_heads = s->num_kv_heads, .head_dim = s->head_dim, .block_size = s->block_size,
                 .rms_norm_eps = 1e-5, .cos = floats(last * s->head_dim / 2), .sin = floats(last * s->head_dim / 2)};
  model.arithmetic = model.one_token = allowed(t->arithmetic);
  return model;
}

static Layer layer_of(const Transformer *t) {
  int64_t query = t->sequences.num_heads * t->sequences.head_dim, hidden = t->hidden_size, inner = t->intermediate_size;
  int64_t key = t->sequences.num_kv_heads * t->sequences.head_dim;
  return (Layer){.attention_norm = floats(hidden), .mlp_norm = floats(hidden),
                 .qkv = STACK(hidden, t->format, t->has_bias, query, key, key),
                 .output = STACK(query, t->format, t->has_bias, hidden),
                 .gate_up = STACK(hidden, t->format, t->has_bias, inner, inner),
                 .down = STACK(inner, t->format, t->has_bias, hidden)};
}

static Buffers buffers_of(const Transformer *t, int64_t tokens) {
  int64_t query = t->sequences.num_heads * t->sequences.head_dim, hidden = t->hidden_size, inner = t->intermediate_size;
  int64_t key = t->sequences.num_kv_heads * t->sequences.head_dim, widest = hidden > inner ? hidden : inner;
  return (Buffers){.normed = floats(tokens * hidden), .qkv = floats(tokens * (query + 2 * key)),
                   .q = floats(tokens * query), .attended = floats(tokens * query),
                   .gate_up = floats(tokens * 2 * inner), .h = floats(tokens * inner),
                   .packed = packed(tokens, widest > query ? widest : query)};
}

static void layers_edges(Team *team) {
  EACH(t, TRANSFORMERS) {
    int64_t num_blocks;
    Model model = model_of(t);
    Step step = {.attention = shape_of(&t->sequences, &num_blocks)};
    step.num_tokens = tokens_of(&step.attention);
    step.positions = step.attention.positions, step.slot_mapping = slots_of(&step.attention);
    Buffers buffers = buffers_of(t, step.num_tokens);
    Layer *layers = array_of(NUM_LAYERS, sizeof *layers);
    for (int i = 0; i < NUM_LAYERS; i++) layers[i] = layer_of(t);
    int64_t cache = num_blocks * model.num_kv_heads * model.head_dim * model.block_size;
    run_layers(team, &(Layers){.x = floats(step.num_tokens * model.hidden_size), .layers = layers,
                               .num_layers = NUM_LAYERS, .keys = floats(NUM_LAYERS * cache),
                               .values = floats(NUM_LAYERS * cache), .layer_stride = cache, .model = &model,
                               .step = &step, .buffers = &buffers});
    release();
  }
}

static void embedding_edges(Team *team) {
  for (int64_t format = BF16; format <= F32; format++)
    for (int64_t size = 16; size <= 80; size += 16)
      EACH(tokens, TOKENS) {
        int64_t *ids = numbers(*tokens);
        for (int64_t t = 0; t < *tokens; t++) ids[t] = t % 2 ? 0 : VOCAB_SIZE - 1;
        run_embedding(team, &(Embedding){.x = floats(*tokens * size), .table = weight(VOCAB_SIZE, size, format),
                                         .input_ids = ids, .num_tokens = *tokens});
        release();
      }
}

static void lm_head_edges(Team *team) {
  EACH(t, TRANSFORMERS) EACH(count, TOKENS) {
    Model model = model_of(t);
    int64_t tokens = 7, *rows = numbers(*count);
    for (int64_t r = 0; r < *count; r++) rows[r] = r % 2 ? 0 : tokens - 1;
    Head head = {.logits = floats(*count * VOCAB_SIZE), .normed = floats(*count * model.hidden_size),
                 .x = floats(tokens * model.hidden_size), .rows = rows, .num_rows = *count,
                 .norm = floats(model.hidden_size), .head = STACK(model.hidden_size, t->format, 0, VOCAB_SIZE),
                 .packed = packed(*count, model.hidden_size), .model = &model};
    run_lm_head(team, &head);
    release();
  }
}

// ---- sampling

typedef struct {  // as in sample.c
  double temperature, top_p, min_p;
  int64_t top_k, num_top, choice, position;
  uint64_t seed;
} Draw;

typedef struct {
  int64_t token_id, finite, num_top;
  double logprob;
  int64_t top_ids[20];
  double top_logprobs[20];
} Drawn;

void sample_rows(Team *team, const float *logits, const float *raw, int64_t num_rows, int64_t vocab_size,
                 const Draw *draws, Drawn *drawn);

static const int64_t VOCABS[] = {1, 2, 7, 8, 15, 16, 17, 63, 64, 65, 300, 4099, 131073};
static const Draw DRAWS[] = {
  {0, 1, 0, 0, -1, 0, 0, 0}, {1, 1, 0, 0, -1, 0, 0, 1}, {1, 1, 0, 0, 0, 127, 1, 2}, {0.7, 1, 0, 40, 5, 0, 0, 3},
  {2, 0.95, 0, 0, 20, 0, 9, 4}, {1, 1e-9, 0, 0, 3, 0, 0, 5}, {1.5, 0.999, 0, 3000, 1000, 0, 0, 6},
  {1, 1, 0.1, 0, 1, 0, 0, 7}, {1e-310, 1, 1, 1, 20, 0, 0, 8}, {1e300, 0.5, 1e-12, 500, -1, 0, 0, 9},
  {0, 1, 0, 0, 20, 0, 0, UINT64_MAX},
};
enum { KINDS = 6 };

static float logit(int64_t kind, int64_t id) {
  switch (kind) {
    case 0: return random_number() * 10;
    case 1: return 7;
    case 2: return id % 5 ? -INFINITY : random_number();
    case 3: return id % 3 * 0.5f;
    case 4: return random_number() * 3e38f;
    default: return id % 7 == 1 ? NAN : 0;
  }
}

static void sample_edges(Team *team) {
  EACH(size, VOCABS) for (int64_t kind = 0; kind < (*size < 10000 ? KINDS : 2); kind++) {
    int64_t num_rows = LENGTH(DRAWS);
    float *logits = floats(num_rows * *size), *raw = kind % 2 ? logits : floats(num_rows * *size);
    for (int64_t i = 0; i < num_rows * *size; i++) logits[i] = logit(kind, i % *size);
    Draw *draws = array_of(num_rows, sizeof *draws);
    Drawn *drawn = array_of(num_rows, sizeof *drawn);
    memcpy(draws, DRAWS, sizeof DRAWS);
    sample_rows(team, logits, raw, num_rows, *size, draws, drawn);
    sample_rows(team, logits, raw, 1, *size, draws, drawn);
    for (int64_t row = 0; row < num_rows; row++)
      if (drawn[row].token_id < 0 || drawn[row].token_id >= *size) abort();
    release();
  }
}

// ---- the team itself: runs at once, after a while and not at all, before it is freed

static void team_edges(Team *team) {
  for (int turn = 0; turn < 30; turn++) {
    Team *other = team_create(team_size(team));
    for (int run = 0; run < turn % 3; run++) {
      if (turn % 2) usleep(500);
      run_embedding(other, &(Embedding){.x = floats(64 * 16), .table = weight(1, 16, BF16),
                                        .input_ids = memset(numbers(64), 0, 64 * sizeof(int64_t)), .num_tokens = 64});
    }
    team_free(other);
    release();
  }
}

// ---- by name

static const struct { const char *name; void (*run)(Team *team); } OPS[] = {
  {"attention", attention_edges}, {"linear", linear_edges}, {"layers", layers_edges}, {"embedding", embedding_edges},
  {"lm_head", lm_head_edges}, {"sample", sample_edges}, {"team", team_edges},
};

int main(int argc, char **argv) {
  EACH(op, OPS) if (argc > 1 && !strcmp(argv[1], op->name)) {
    Team *team = team_create(argc > 2 ? atoi(argv[2]) : 2);
    for (offset = 0; offset < 2; offset++) op->run(team);
    team_free(team);
    return 0;
  }
  fprintf(stderr, "usage: cpu_edges OP [THREADS]\n");
  return 2;
}
