// cpu.h -- what the CPU kernels share: vectors for AVX-512, AVX2, NEON and SSE from one source, and the team of threads
//
// Every thread of a team runs the same function; `barrier` stands between what one thread writes and another reads, and
// `next_chunk` hands out the pieces of a loop. A result never depends on which thread computes it.
#ifndef RUSTINFER_CPU_H
#define RUSTINFER_CPU_H
#include <stdint.h>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

// VL: floats in a vector. A build may set it to what the machine has not: the compiler then splits each vector.
#ifndef VL
#if defined(__AVX512F__)
#define VL 16
#elif defined(__AVX__)
#define VL 8
#else
#define VL 4
#endif
#endif

#define EXPORT __attribute__((visibility("default")))  // what Python calls

typedef float vec __attribute__((vector_size(4 * VL), aligned(4)));  // loads and stores need no alignment
typedef int32_t ivec __attribute__((vector_size(4 * VL), aligned(4)));
typedef uint32_t uvec __attribute__((vector_size(4 * VL), aligned(4)));
typedef uint16_t halves __attribute__((vector_size(2 * VL), aligned(2)));  // bfloat16
typedef float quad __attribute__((vector_size(16), aligned(4)));

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#define SHUFFLE_QUAD SHUFFLE
#endif
#endif
#ifndef SHUFFLE
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (ivec){__VA_ARGS__})
#define SHUFFLE_QUAD(a, b, ...) __builtin_shuffle(a, b, (int32_t __attribute__((vector_size(16)))){__VA_ARGS__})
#endif

// Keeps a vector in a register, where the compiler would rather load it again for each use.
#if defined(__x86_64__) && (VL == 4 || (VL == 8 && defined(__AVX__)) || (VL == 16 && defined(__AVX512F__)))
#define KEEP(v) __asm__("" : "+x"(v))
#elif defined(__aarch64__) && VL == 4
#define KEEP(v) __asm__("" : "+w"(v))
#else
#define KEEP(v) ((void)0)
#endif

static inline vec load(const float *p) { return *(const vec *)p; }
static inline void store(float *p, vec v) { *(vec *)p = v; }
static inline vec broadcast(float a) { return a - (vec){0}; }  // not +, which would lose the sign of -0

// a * b + c, in one rounding where the machine can. Kernels are built with -ffp-contract=off: a compiler that fuses here
// and not there (GCC avoids chains of it on some CPUs) would give one sum two results.
static inline vec fma_vec(vec a, vec b, vec c) {
#if VL == 16 && defined(__AVX512F__)
  return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#define FUSED 1
#elif VL == 8 && defined(__FMA__)
  return (vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#define FUSED 1
#elif VL == 4 && defined(__FMA__)
  return (vec)_mm_fmadd_ps((__m128)a, (__m128)b, (__m128)c);
#define FUSED 1
#elif VL == 4 && defined(__aarch64__)
  return (vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#define FUSED 1
#else
  return a * b + c;
#define FUSED 0
#endif
}

static inline float fma_one(float a, float b, float c) { return FUSED ? __builtin_fmaf(a, b, c) : a * b + c; }

static inline vec load_bf16(const uint16_t *p) {  // a bfloat16 is the upper half of a float
  return (vec)(__builtin_convertvector(*(const halves *)p, uvec) << 16);
}

static inline void store_bf16(uint16_t *p, vec v) {  // to the nearest, of two the even one; NaN stays NaN
  uvec bits = (uvec)v, rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16, nan = (uvec)(v != v);
  *(halves *)p = __builtin_convertvector((nan & 0x7fc0) | (~nan & rounded), halves);
}

// sum + the products of two pairs of bfloat16 in each lane.
static inline vec dot_pairs(uvec a, uvec b, vec sum) {
#if VL == 16 && defined(__AVX512BF16__)
  return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#define HAVE_DOT_PAIRS 1
#else
  sum = fma_vec((vec)(a << 16), (vec)(b << 16), sum);
  return fma_vec((vec)(a & 0xffff0000u), (vec)(b & 0xffff0000u), sum);
#define HAVE_DOT_PAIRS 0
#endif
}

// The places of a vector folded to four, each the sum of those whose number is the same modulo four.
static inline quad fold(vec v) {
  union { vec v; quad q[VL / 4]; } u = {v};
#if VL == 16
  return (u.q[0] + u.q[1]) + (u.q[2] + u.q[3]);
#elif VL == 8
  return u.q[0] + u.q[1];
#else
  return u.q[0];
#endif
}

// Places i, j, k, l of each group of four of two vectors, of which the second one's are VL further.
#if VL == 16
#define SHUFFLE_FOURS(a, b, i, j, k, l) \
  SHUFFLE(a, b, i, j, k, l, i + 4, j + 4, k + 4, l + 4, i + 8, j + 8, k + 8, l + 8, i + 12, j + 12, k + 12, l + 12)
#elif VL == 8
#define SHUFFLE_FOURS(a, b, i, j, k, l) SHUFFLE(a, b, i, j, k, l, i + 4, j + 4, k + 4, l + 4)
#else
#define SHUFFLE_FOURS(a, b, i, j, k, l) SHUFFLE(a, b, i, j, k, l)
#endif

// The sums of four vectors' places, always added in the same order: each group of four, then the groups.
static inline quad sum_lanes(vec a, vec b, vec c, vec d) {
  vec ab = SHUFFLE_FOURS(a, b, 0, VL, 1, VL + 1) + SHUFFLE_FOURS(a, b, 2, VL + 2, 3, VL + 3);  // a02 b02 a13 b13
  vec cd = SHUFFLE_FOURS(c, d, 0, VL, 1, VL + 1) + SHUFFLE_FOURS(c, d, 2, VL + 2, 3, VL + 3);
  return fold(SHUFFLE_FOURS(ab, cd, 0, 1, VL, VL + 1) + SHUFFLE_FOURS(ab, cd, 2, 3, VL + 2, VL + 3));
}

static inline float sum_places(vec v) { return sum_lanes(v, v, v, v)[0]; }  // one vector's

// e^x within 2 units in the last place; 0 below -87, so that a masked score (-inf) weighs nothing. NaN stays NaN.
static inline vec exp_vec(vec x) {
  ivec small = x < broadcast(-87.0f), large = x > broadcast(88.0f);
  vec clipped = (vec)((large & (ivec)broadcast(88.0f)) | (~large & (ivec)x));
  clipped = (vec)((small & (ivec)broadcast(-87.0f)) | (~small & (ivec)clipped));
  vec magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
  vec shifted = fma_vec(clipped, broadcast(1.44269504f), magic);
  vec n = shifted - magic;
  vec r = fma_vec(n, broadcast(2.12194440e-4f), fma_vec(n, broadcast(-0.693359375f), clipped));  // ln 2 in two parts
  vec p = broadcast(1.9875691500e-4f);
  p = fma_vec(p, r, broadcast(1.3981999507e-3f));
  p = fma_vec(p, r, broadcast(8.3334519073e-3f));
  p = fma_vec(p, r, broadcast(4.1665795894e-2f));
  p = fma_vec(p, r, broadcast(1.6666665459e-1f));
  p = fma_vec(p, r, broadcast(5.0000001201e-1f));
  p = fma_vec(p * r, r, r) + broadcast(1.0f);
  uvec exponent = ((uvec)shifted - (uvec)magic + 127) << 23;
  return (vec)(~small & (ivec)(p * (vec)exponent));
}

#if defined(__x86_64__)
#define RELAX() __builtin_ia32_pause()
#elif defined(__aarch64__)
#define RELAX() __asm__ volatile("yield")
#else
#define RELAX() ((void)0)
#endif

// -- team.c

typedef struct Team Team;
typedef void Work(void *argument, Team *team, int id);

EXPORT Team *team_create(int size);   // fewer threads where the system gives fewer; NULL without memory
EXPORT void team_free(Team *team);
EXPORT int team_size(const Team *team);
void team_run(Team *team, Work *work, void *argument);  // on every thread, the caller's included (id 0)
void barrier(Team *team);                               // all have arrived; the chunks begin at 0 again
int64_t next_chunk(Team *team);                         // 0, 1, 2, ... each to one thread, until the next barrier

// -- linear.c

enum Format { BF16 = 0, F32 = 1 };  // how a weight lies in memory; 8-bit formats come with their scales here

typedef struct {
  const void *data;   // (rows, columns), row-major, aligned to 4 bytes
  int64_t rows, columns;
  int64_t format;     // enum Format
} Weight;

// -- attention.c

typedef struct {
  int64_t num_sequences, max_blocks, num_heads, num_kv_heads, head_dim, block_size;
  const int64_t *cu_seqlens_q;  // (B + 1,) sequence b owns tokens [cu[b], cu[b + 1])
  const int64_t *positions;     // (T,)
  const int64_t *block_tables;  // (B, max_blocks)
} AttentionShape;

// By every thread of the team; a barrier must follow. q, out (T, H, D), keys (N, K, D, S), values (N, K, S, D).
void attention(Team *team, float *out, const float *q, const float *keys, const float *values,
               const AttentionShape *shape);
EXPORT void run_attention(Team *team, float *out, const float *q, const float *keys, const float *values,
                          const AttentionShape *shape);

#endif
