// team_work.c -- team.c with work that looks for its mistakes, on a system that can refuse threads and memory
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <unistd.h>

static int num_threads_left = -1, has_memory = 1;  // -1: as many threads as wanted
static int num_held;                               // threads and pieces of memory that were not given back

static int create_thread(pthread_t *thread, const pthread_attr_t *attributes, void *(*start)(void *), void *argument) {
  if (num_threads_left == 0) return EAGAIN;
  if (num_threads_left > 0) num_threads_left--;
  num_held++;
  return pthread_create(thread, attributes, start, argument);
}

static int join_thread(pthread_t thread, void **result) {
  num_held--;
  return pthread_join(thread, result);
}

static void *allocate(size_t alignment, size_t size) {
  if (!has_memory) return NULL;
  num_held++;
  return aligned_alloc(alignment, size);
}

static void release(void *memory) {
  num_held--;
  free(memory);
}

#define pthread_create create_thread
#define pthread_join join_thread
#define aligned_alloc allocate
#define free release
#include "team.c"

enum { MAX_SIZE = 64, MAX_CHUNKS = 64, MAX_LOOPS = 16 };

typedef struct {
  int num_loops, num_chunks, pause;                 // pause: microseconds for which one thread keeps the others waiting
  int taken[MAX_LOOPS][MAX_CHUNKS], last[MAX_SIZE];  // how often a chunk was handed out; the loop a thread was in last
  pthread_t threads[MAX_SIZE];
  int num_calls[MAX_SIZE];
  atomic_int num_mistakes;
} Report;

static void expect(Report *report, int is_right) {
  if (!is_right) atomic_fetch_add(&report->num_mistakes, 1);
}

// Loops over a few more chunks each time. Only a barrier stands between what is written here and read by others.
static void work(void *argument, Team *team, int id) {
  Report *report = argument;
  report->threads[id] = pthread_self();
  report->num_calls[id]++;
  for (int loop = 0; loop < report->num_loops; loop++) {
    int num_chunks = report->num_chunks + loop;
    if (report->pause && id == loop % team_size(team)) usleep(report->pause);
    for (int64_t chunk; (chunk = next_chunk(team)) < num_chunks;) report->taken[loop][chunk]++;
    report->last[id] = loop;
    barrier(team);
    for (int other = 0; other < team_size(team); other++) expect(report, report->last[other] == loop);
    for (int chunk = 0; chunk < num_chunks; chunk++) expect(report, report->taken[loop][chunk] == 1);
    barrier(team);
  }
}

// Runs it some times; the number of mistakes.
EXPORT int64_t count_mistakes(Team *team, int64_t num_runs, int64_t num_loops, int64_t num_chunks, int64_t pause) {
  int64_t num_mistakes = 0;
  for (int64_t run = 0; run < num_runs; run++) {
    Report report = {.num_loops = num_loops, .num_chunks = num_chunks, .pause = pause};
    team_run(team, work, &report);
    expect(&report, pthread_equal(report.threads[0], pthread_self()));
    for (int id = 0; id < MAX_SIZE; id++) expect(&report, report.num_calls[id] == (id < team_size(team)));
    for (int id = 1; id < team_size(team); id++)
      expect(&report, id < 2 || !pthread_equal(report.threads[id], report.threads[id - 1]));
    num_mistakes += report.num_mistakes;
  }
  return num_mistakes;
}

EXPORT void limit_system(int64_t num_threads, int64_t memory) { num_threads_left = num_threads, has_memory = memory; }

EXPORT int64_t count_held(void) { return num_held; }
