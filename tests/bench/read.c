// read.c -- how fast this machine reads memory: the ceiling of decoding one sequence (built and called by cpu.py)
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#if defined(__AVX512F__)
typedef uint64_t vec __attribute__((vector_size(64)));
#elif defined(__AVX__)
typedef uint64_t vec __attribute__((vector_size(32)));
#else
typedef uint64_t vec __attribute__((vector_size(16)));
#endif

enum { AHEAD = 2048 };  // bytes

typedef vec open_vec __attribute__((aligned(1)));  // weights lie anywhere

typedef struct {
  const int64_t *regions;  // address, size
  int64_t count;
  int id, threads;
  uint64_t sum;
} Reader;

// A thread's part of each region.
static void *read_parts(void *argument) {
  Reader *reader = argument;
  vec sums[4] = {{0}};
  for (int64_t i = 0; i < reader->count; i++) {
    const char *memory = (const char *)reader->regions[2 * i];
    int64_t part = reader->regions[2 * i + 1] / reader->threads;
    const char *p = memory + part * reader->id, *stop = memory + part * (reader->id + 1);
    for (; p + sizeof sums <= stop; p += sizeof sums) {
      for (size_t j = 0; j < sizeof sums; j += 64) __builtin_prefetch(p + AHEAD + j);
      for (int j = 0; j < 4; j++) sums[j] ^= ((const open_vec *)p)[j];
    }
  }
  vec all = sums[0] ^ sums[1] ^ sums[2] ^ sums[3];
  reader->sum = all[0];
  return NULL;
}

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + t.tv_nsec * 1e-9;
}

// The best of `rounds` readings of some regions by `threads` threads, in bytes a second; 0
// on failure.
double read_regions(const int64_t *regions, int64_t count, int threads, int rounds) {
  Reader readers[64];
  pthread_t ids[64];
  double best = 0, total = 0;
  if (threads > 64) return 0;
  for (int64_t i = 0; i < count; i++) total += regions[2 * i + 1];
  for (int round = 0; round < rounds; round++) {
    double started = now();
    for (int t = 0; t < threads; t++) {
      readers[t] = (Reader){regions, count, t, threads, 0};
      if (pthread_create(&ids[t], NULL, read_parts, &readers[t])) return 0;
    }
    for (int t = 0; t < threads; t++) pthread_join(ids[t], NULL);
    double rate = total / (now() - started);
    if (rate > best) best = rate;
  }
  return best;
}

// The same of `size` bytes of its own in huge pages.
double read_bandwidth(int64_t size, int threads, int rounds) {
  char *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return 0;
  madvise(memory, size, MADV_HUGEPAGE);
  memset(memory, 1, size);
  int64_t region[2] = {(int64_t)memory, size};
  double best = read_regions(region, 1, threads, rounds);
  munmap(memory, size);
  return best;
}
