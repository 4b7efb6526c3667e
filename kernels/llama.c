// llama.c -- the decoder layers, the embedding and the head, one call each
//
// shapes    x (T, C) float32, the residual stream; weights as in the checkpoint; KV cache: keys (N, K, D, S), values
//           (N, K, S, D) float32 a layer, so that attention reads both along its lanes
// work      every op is shared out over the team and ends in a barrier; nothing is allocated
// numerics  float32, but for the activations that products round (enum Arithmetic); each sum in an order that its row fixes
#include "llama.h"

#include <math.h>
#include <string.h>

enum { COLUMNS = 1024 };  // of h that silu_mul takes at once

// y = x / sqrt(mean(x^2) + eps) * weight (Zhang & Sennrich 2019, 1910.07467), one row.
static void rms_norm_row(float *y, const float *x, const float *weight, int64_t size, float eps) {
  vec sums[4] = {{0}};
  int64_t i = 0;
  for (; i + 4 * VL <= size; i += 4 * VL)
    for (int j = 0; j < 4; j++) {
      vec v = load(x + i + j * VL);
      sums[j] = fma_vec(v, v, sums[j]);
    }
  for (; i < size; i += VL) sums[0] = fma_vec(load(x + i), load(x + i), sums[0]);
  quad parts = sum_lanes(sums[0], sums[1], sums[2], sums[3]);
  float sum = (parts[0] + parts[1]) + (parts[2] + parts[3]);
  vec scale = broadcast(1.0f / sqrtf(sum / (float)size + eps));
  for (i = 0; i < size; i += VL) store(y + i, load(x + i) * scale * load(weight + i));
}

static void rms_norm(Team *team, const Model *m, float *y, const float *x, int64_t num_rows, const float *weight) {
  for (int64_t t; (t = next_chunk(team)) < num_rows;)
    rms_norm_row(y + t * m->hidden_size, x + t * m->hidden_size, weight, m->hidden_size, m->rms_norm_eps);
  barrier(team);
}

static void project(Team *team, const Model *m, float *y, const float *x, float *packed, int64_t num_tokens,
                    const Stack *stack, int add) {
  int64_t arithmetic = num_tokens == 1 ? m->one_token : m->arithmetic;
  Product product = {y, 0, x, num_tokens, stack->weights, stack->num_weights, stack->bias, add, arithmetic, packed};
  for (int64_t i = 0; i < stack->num_weights; i++) product.stride += stack->weights[i].rows;
  linear(team, &product);
  barrier(team);
}

// Turns the halves of one head (Su et al. 2021, 2104.09864); element i of the result lies at y[i * step].
static void rope(float *y, int64_t step, const float *x, const float *cos, const float *sin, int64_t half) {
  for (int64_t i = 0; i < half; i++) {
    float low = x[i], high = x[i + half];
    y[i * step] = low * cos[i] - high * sin[i];
    y[(i + half) * step] = high * cos[i] + low * sin[i];
  }
}

// The queries of each token turned; keys turned and values go to the cache.
static void rope_append(Team *team, const Model *m, const Buffers *b, float *keys, float *values, const Step *step) {
  int64_t dim = m->head_dim, half = dim / 2, size = m->block_size, heads = m->num_heads, kv_heads = m->num_kv_heads;
  for (int64_t t; (t = next_chunk(team)) < step->num_tokens;) {
    const float *row = b->qkv + t * (heads + 2 * kv_heads) * dim;
    const float *cos = m->cos + step->positions[t] * half, *sin = m->sin + step->positions[t] * half;
    int64_t slot = step->slot_mapping[t], place = slot / size * kv_heads * dim * size, offset = slot % size;
    for (int64_t h = 0; h < heads; h++, row += dim) rope(b->q + (t * heads + h) * dim, 1, row, cos, sin, half);
    for (int64_t h = 0; h < kv_heads; h++, row += dim)
      rope(keys + place + h * dim * size + offset, size, row, cos, sin, half);
    for (int64_t h = 0; h < kv_heads; h++, row += dim)
      memcpy(values + place + (h * size + offset) * dim, row, dim * sizeof(float));
  }
  barrier(team);
}

// h = silu(gate) * up (Shazeer 2020, 2002.05202): gate_up (T, 2F) -> h (T, F).
static void silu_mul(Team *team, const Model *m, float *h, const float *gate_up, int64_t num_tokens) {
  int64_t size = m->intermediate_size, pieces = (size + COLUMNS - 1) / COLUMNS;
  for (int64_t chunk; (chunk = next_chunk(team)) < num_tokens * pieces;) {
    int64_t t = chunk / pieces, start = chunk % pieces * COLUMNS, stop = start + COLUMNS < size ? start + COLUMNS : size;
    const float *gate = gate_up + 2 * t * size, *up = gate + size;
    for (int64_t i = start; i < stop; i += VL) {
      vec g = load(gate + i);
      store(h + t * size + i, g / (broadcast(1.0f) + exp_vec(-g)) * load(up + i));
    }
  }
  barrier(team);
}

static void run_layer(Team *team, const Layers *a, const Layer *layer, float *keys, float *values) {
  const Model *m = a->model;
  const Buffers *b = a->buffers;
  int64_t num_tokens = a->step->num_tokens;
  rms_norm(team, m, b->normed, a->x, num_tokens, layer->attention_norm);
  project(team, m, b->qkv, b->normed, b->packed, num_tokens, &layer->qkv, 0);
  rope_append(team, m, b, keys, values, a->step);
  attention(team, b->attended, b->q, keys, values, &a->step->attention);
  barrier(team);
  project(team, m, a->x, b->attended, b->packed, num_tokens, &layer->output, 1);
  rms_norm(team, m, b->normed, a->x, num_tokens, layer->mlp_norm);
  project(team, m, b->gate_up, b->normed, b->packed, num_tokens, &layer->gate_up, 0);
  silu_mul(team, m, b->h, b->gate_up, num_tokens);
  project(team, m, a->x, b->h, b->packed, num_tokens, &layer->down, 1);
}

static void layers_work(void *argument, Team *team, int id) {
  const Layers *a = argument;
  (void)id;
  for (int64_t i = 0; i < a->num_layers; i++)
    run_layer(team, a, &a->layers[i], a->keys + i * a->layer_stride, a->values + i * a->layer_stride);
}

void run_layers(Team *team, const Layers *layers) { team_run(team, layers_work, (void *)layers); }

static void embedding_work(void *argument, Team *team, int id) {
  const Embedding *a = argument;
  (void)id;
  int64_t size = a->table.columns;
  for (int64_t t; (t = next_chunk(team)) < a->num_tokens;) {
    int64_t first = a->input_ids[t] * size;
    if (a->table.format == F32) memcpy(a->x + t * size, (const float *)a->table.data + first, size * sizeof(float));
    else for (int64_t i = 0; i < size; i += VL)
      store(a->x + t * size + i, load_bf16((const uint16_t *)a->table.data + first + i));
  }
}

void run_embedding(Team *team, const Embedding *embedding) { team_run(team, embedding_work, (void *)embedding); }

static void lm_head_work(void *argument, Team *team, int id) {
  const Head *a = argument;
  const Model *m = a->model;
  (void)id;
  for (int64_t r; (r = next_chunk(team)) < a->num_rows;)
    rms_norm_row(a->normed + r * m->hidden_size, a->x + a->rows[r] * m->hidden_size, a->norm, m->hidden_size,
                 m->rms_norm_eps);
  barrier(team);
  project(team, m, a->logits, a->normed, a->packed, a->num_rows, &a->head, 0);
}

void run_lm_head(Team *team, const Head *head) { team_run(team, lm_head_work, (void *)head); }

// Tells the sizes of all structs, so that a file of another version is not taken for this one.
int64_t layout(void) {
  const int64_t sizes[] = {sizeof(Weight), sizeof(Stack), sizeof(Model), sizeof(Layer), sizeof(Buffers),
                           sizeof(AttentionShape), sizeof(Step), sizeof(Layers), sizeof(Embedding), sizeof(Head)};
  int64_t layout = 0;
  for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) layout = 31 * layout + sizes[i];
  return layout;
}
