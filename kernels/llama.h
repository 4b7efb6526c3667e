// llama.h -- what Python hands to the kernels; every field is 8 bytes wide
#ifndef RUSTINFER_LLAMA_H
#define RUSTINFER_LLAMA_H
#include "linear.h"

typedef struct {  // weights stacked along their first axis
  const Weight *weights;
  int64_t num_weights;
  const float *bias;  // or NULL
} Stack;

typedef struct {
  int64_t hidden_size, intermediate_size, num_heads, num_kv_heads, head_dim, block_size;
  double rms_norm_eps;
  const float *cos, *sin;        // (max_model_len, D / 2)
  int64_t arithmetic, one_token;  // enum Arithmetic of products; of one token: another one only without batch invariance
} Model;

typedef struct {
  const float *attention_norm, *mlp_norm;  // (C,)
  Stack qkv, output, gate_up, down;
} Layer;

typedef struct {  // for as many tokens as a step may have
  float *normed;    // (T, C)
  float *qkv;       // (T, (H + 2K) D)
  float *q;         // (T, H, D)
  float *attended;  // (T, H D)
  float *gate_up;   // (T, 2F)
  float *h;         // (T, F)
  float *packed;    // (PACKED_ROWS(T), max(C, H D, F)), scratch of products
} Buffers;

typedef struct {
  int64_t num_tokens;
  const int64_t *positions, *slot_mapping;  // (T,)
  AttentionShape attention;
} Step;

typedef struct {
  float *x;  // (T, C), in and out
  const Layer *layers;
  int64_t num_layers;
  float *keys, *values;  // of the first layer; the next one's lie layer_stride floats further
  int64_t layer_stride;
  const Model *model;
  const Step *step;
  const Buffers *buffers;
} Layers;

typedef struct {
  float *x;  // (T, C)
  Weight table;  // (V, C)
  const int64_t *input_ids;
  int64_t num_tokens;
} Embedding;

typedef struct {
  float *logits;        // (R, V)
  float *normed;        // (R, C), scratch
  const float *x;       // (T, C)
  const int64_t *rows;  // (R,) of x
  int64_t num_rows;
  const float *norm;    // (C,)
  Stack head;           // (V, C)
  float *packed;        // (PACKED_ROWS(R), C), scratch
  const Model *model;
} Head;

EXPORT void run_layers(Team *team, const Layers *layers);
EXPORT void run_embedding(Team *team, const Embedding *embedding);
EXPORT void run_lm_head(Team *team, const Head *head);
EXPORT int64_t layout(void);  // the same number for the same structs

#endif
