// tiles.h -- the matrix tiles of AMX (Intel SDM, chapter 20), and what they compute in C where there is no AMX
//
// Eight registers of 16 rows of 64 bytes. `tile_dot(c, a, b)`: c (16, 16) float32 += a (16, 32) @ b (32, 16), bfloat16;
// a row of b holds two elements of each column side by side. The twin takes the registers from a variable named
// `tiles`, which `TILES` declares, and keeps the order of the manual: even and odd elements are a chain each.
#ifndef RUSTINFER_TILES_H
#define RUSTINFER_TILES_H
#include "cpu.h"

#include <string.h>

enum { TILE = 16, TILE_DEPTH = 32, TILE_PAIRS = TILE * TILE };

#if defined(__AMX_BF16__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#define HAVE_TILES 1
#define TILES
#define tile_zero(c) _tile_zero(c)
#define tile_load(c, p, stride) _tile_loadd(c, p, stride)
#define tile_store(c, p, stride) _tile_stored(c, p, stride)
#define tile_dot(c, a, b) _tile_dpbf16ps(c, a, b)

// The system gives a process the registers only when it asks; threads that begin later have them too.
static inline int tiles_allowed(void) {
#if defined(SYS_arch_prctl)
  enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 };
  return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#else
  return 0;
#endif
}

static inline void tiles_begin(void) {
  struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  } config = {.palette = 1};
  for (int i = 0; i < 8; i++) config.row_bytes[i] = 64, config.rows[i] = TILE;
  __asm__ volatile("" ::"r"(&config) : "memory");  // GCC up to 12 drops the stores otherwise
  _tile_loadconfig(&config);
}

static inline void tiles_end(void) { _tile_release(); }
#else
#define HAVE_TILES 0
typedef union {
  float sums[TILE][TILE];
  uint32_t pairs[TILE][TILE];
} TileRegister;
#define TILES TileRegister tiles[8]
#define tile_zero(c) memset(&tiles[c], 0, sizeof tiles[c])
#define tile_load(c, p, stride) tile_move(&tiles[c], TILE * 4, (const void *)(p), stride)
#define tile_store(c, p, stride) tile_move(p, stride, &tiles[c], TILE * 4)
#define tile_dot(c, a, b) tile_dot_twin(&tiles[c], &tiles[a], &tiles[b])

static inline void tile_move(void *to, int64_t to_stride, const void *from, int64_t from_stride) {
  for (int row = 0; row < TILE; row++)
    memcpy((char *)to + row * to_stride, (const char *)from + row * from_stride, TILE * 4);
}

static inline float upper_half(uint32_t bits) {
  union { uint32_t u; float f; } u = {bits & 0xffff0000u};
  return u.f;
}

static inline void tile_dot_twin(TileRegister *c, const TileRegister *a, const TileRegister *b) {
  for (int i = 0; i < TILE; i++)
    for (int t = 0; t < TILE; t++) {
      float even = 0, odd = 0;
      for (int k = 0; k < TILE; k++) {
        uint32_t w = a->pairs[i][k], x = b->pairs[k][t];
        even = fma_one(upper_half(w << 16), upper_half(x << 16), even);
        odd = fma_one(upper_half(w), upper_half(x), odd);
      }
      c->sums[i][t] += even + odd;
    }
}

static inline int tiles_allowed(void) { return 0; }
static inline void tiles_begin(void) {}
static inline void tiles_end(void) {}
#endif
#endif
