// team.c -- threads that run one function together, then wait for the next
//
// waiting   a thread spins for a short while, since the next op or step is microseconds away, then sleeps: where other
//           programs want the cores too, one that slept gets its core back sooner than one that kept it busy
#define _GNU_SOURCE
#include "cpu.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

enum { SPINS = 4000, STACK = 1 << 21 };  // about 0.1 ms; linear.c takes 0.4 MB

typedef struct {
  Team *team;
  int id;
  pthread_t thread;
} Member;

struct Team {
  _Alignas(64) atomic_uint generation;  // of the work handed out
  _Alignas(64) atomic_uint phase;       // barriers passed
  _Alignas(64) atomic_int arrived;      // at the barrier
  _Alignas(64) atomic_llong ticket;     // the next chunk
  _Alignas(64) atomic_int num_asleep;
  _Alignas(64) atomic_int num_held;  // asleep at the barrier
  pthread_mutex_t mutex;
  pthread_cond_t wake;
  Work *work;  // NULL: the threads end
  void *argument;
  int size;
  Member members[];
};

int team_size(const Team *team) { return team->size; }

int64_t next_chunk(Team *team) { return atomic_fetch_add_explicit(&team->ticket, 1, memory_order_relaxed); }

#ifdef __linux__
// Sleeps until somebody wakes those at the barrier; returns at once if its phase has changed.
static void sleep_at_barrier(Team *team, unsigned phase) {
  atomic_fetch_add(&team->num_held, 1);
  syscall(SYS_futex, &team->phase, FUTEX_WAIT_PRIVATE, phase, NULL, NULL, 0);
  atomic_fetch_sub(&team->num_held, 1);
}

static void wake_at_barrier(Team *team) {  // a thread counts itself before the kernel looks at the phase
  if (atomic_load(&team->num_held)) syscall(SYS_futex, &team->phase, FUTEX_WAKE_PRIVATE, team->size, NULL, NULL, 0);
}
#else
static void sleep_at_barrier(Team *team, unsigned phase) { (void)team, (void)phase, sched_yield(); }
static void wake_at_barrier(Team *team) { (void)team; }
#endif

void barrier(Team *team) {
  unsigned phase = atomic_load_explicit(&team->phase, memory_order_relaxed);  // cannot move before we arrive
  if (atomic_fetch_add_explicit(&team->arrived, 1, memory_order_acq_rel) == team->size - 1) {
    atomic_store_explicit(&team->arrived, 0, memory_order_relaxed);
    atomic_store_explicit(&team->ticket, 0, memory_order_relaxed);
    atomic_store_explicit(&team->phase, phase + 1, memory_order_seq_cst);  // before num_held is read
    wake_at_barrier(team);
    return;
  }
  for (int spins = 0; atomic_load_explicit(&team->phase, memory_order_acquire) == phase; spins++) {
    if (spins < SPINS) RELAX();
    else sleep_at_barrier(team, phase);
  }
}

static void sleep_until_changed(Team *team, unsigned generation) {
  pthread_mutex_lock(&team->mutex);
  atomic_fetch_add(&team->num_asleep, 1);
  while (atomic_load(&team->generation) == generation) pthread_cond_wait(&team->wake, &team->mutex);
  atomic_fetch_sub(&team->num_asleep, 1);
  pthread_mutex_unlock(&team->mutex);
}

static void *member_main(void *pointer) {
  Member *member = pointer;
  Team *team = member->team;
  for (unsigned generation = 0;; generation++) {
    for (int spins = 0; atomic_load(&team->generation) == generation; spins++) {
      if (spins < SPINS) RELAX();
      else sleep_until_changed(team, generation);
    }
    if (!team->work) return NULL;
    team->work(team->argument, team, member->id);
    barrier(team);
  }
}

static void hand_out(Team *team, Work *work, void *argument) {
  team->work = work;
  team->argument = argument;
  atomic_fetch_add(&team->generation, 1);
  if (atomic_load(&team->num_asleep)) {  // a thread counts itself before it looks at the generation again
    pthread_mutex_lock(&team->mutex);
    pthread_cond_broadcast(&team->wake);
    pthread_mutex_unlock(&team->mutex);
  }
}

void team_run(Team *team, Work *work, void *argument) {
  hand_out(team, work, argument);
  work(argument, team, 0);
  barrier(team);
}

Team *team_create(int size) {
  size_t bytes = (sizeof(Team) + size * sizeof(Member) + 63) / 64 * 64;
  Team *team = aligned_alloc(64, bytes);
  if (!team) return NULL;
  *team = (Team){.size = 1};
  pthread_mutex_init(&team->mutex, NULL);
  pthread_cond_init(&team->wake, NULL);
  pthread_attr_t attributes;
  pthread_attr_init(&attributes);
  pthread_attr_setstacksize(&attributes, STACK);
  for (int id = 1; id < size; id++) {  // no member passes a barrier before the first work is handed out
    team->members[id] = (Member){.team = team, .id = id};
    if (pthread_create(&team->members[id].thread, &attributes, member_main, &team->members[id])) break;
    team->size = id + 1;
  }
  pthread_attr_destroy(&attributes);
  return team;
}

void team_free(Team *team) {
  hand_out(team, NULL, NULL);
  for (int id = 1; id < team->size; id++) pthread_join(team->members[id].thread, NULL);
  pthread_mutex_destroy(&team->mutex);
  pthread_cond_destroy(&team->wake);
  free(team);
}
