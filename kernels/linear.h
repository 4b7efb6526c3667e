// linear.h -- a product of the model (linear.c)
#ifndef RUSTINFER_LINEAR_H
#define RUSTINFER_LINEAR_H
#include "cpu.h"

enum { MAX_STREAM_ROWS = 512 };

typedef struct {
  float *y;                // (T, F), rows `stride` apart
  int64_t stride;
  const float *x;          // (T, C)
  int64_t num_tokens;
  const Weight *weights;   // stacked: their rows sum up to F, their columns are C, a multiple of 16
  int64_t num_weights;
  const float *bias;       // (F,) or NULL
  int64_t add;             // y += instead of y =
} Product;

void linear(Team *team, const Product *product);  // by every thread of the team; a barrier must follow
EXPORT void run_linear(Team *team, const Product *product);

#endif
