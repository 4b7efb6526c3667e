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

enum { AHEAD = 4096 };  // bytes

typedef struct {
  const char *start, *stop;
  uint64_t sum;
} Part;

static void *read_part(void *argument) {
  Part *part = argument;
  vec sums[4] = {{0}};
  for (const char *p = part->start; p + sizeof sums <= part->stop; p += sizeof sums) {
    for (size_t i = 0; i < sizeof sums; i += 64) __builtin_prefetch(p + AHEAD + i);
    for (int i = 0; i < 4; i++) sums[i] ^= ((const vec *)p)[i];
  }
  vec all = sums[0] ^ sums[1] ^ sums[2] ^ sums[3];
  part->sum = all[0];
  return NULL;
}

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + t.tv_nsec * 1e-9;
}

// The best of `rounds` readings of `size` bytes in huge pages by `threads` threads, in bytes a second; 0 on failure.
double read_bandwidth(int64_t size, int threads, int rounds) {
  Part parts[64];
  pthread_t ids[64];
  double best = 0;
  char *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED || threads > 64) return 0;
  madvise(memory, size, MADV_HUGEPAGE);
  memset(memory, 1, size);
  for (int round = 0; round < rounds; round++) {
    double started = now();
    for (int i = 0; i < threads; i++) {
      parts[i] = (Part){memory + size / threads * i / 64 * 64, memory + size / threads * (i + 1) / 64 * 64, 0};
      if (pthread_create(&ids[i], NULL, read_part, &parts[i])) return 0;
    }
    for (int i = 0; i < threads; i++) pthread_join(ids[i], NULL);
    double rate = size / (now() - started);
    if (rate > best) best = rate;
  }
  munmap(memory, size);
  return best;
}
