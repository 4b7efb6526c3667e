// linear.h -- a product of the model (linear.c)
#ifndef RUSTINFER_LINEAR_H
#define RUSTINFER_LINEAR_H
#include "cpu.h"

// How bfloat16 weights meet the activations. Each is an order of summation of its own, the same for any number of tokens.
enum Arithmetic {
  FLOAT32 = 0,  // weights are widened, activations stay float32
  PAIRS = 1,    // activations are rounded to bfloat16 once; an instruction adds the products of two pairs (AVX512-BF16)
  TILED = 2,    // likewise, by tiles of 16 rows and 16 tokens (AMX)
};

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
  int64_t arithmetic;      // enum Arithmetic
  float *packed;           // scratch for x, PACKED_ROWS(T) * C floats
} Product;

#define PACKED_ROWS(num_tokens) (((num_tokens) + 15) / 16 * 16)

EXPORT int64_t fastest_arithmetic(void);          // of this build, on this machine
void linear(Team *team, const Product *product);  // by every thread of the team; a barrier must follow
EXPORT void run_linear(Team *team, const Product *product);

#endif
