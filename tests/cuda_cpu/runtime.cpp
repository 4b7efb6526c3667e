// runtime.cpp -- runs the threads of a launch, block after block, and checks what they do.
//
// A thread is a fiber: a stack of its own, left and entered by switch_stack. It runs until it has to wait at a barrier
// or for the other lanes of its warp; then choose() picks the next: a lane of the same warp if one can run (its data is
// still in the cache), any at random if the launch has a seed. A block ends when its last thread returns. If threads
// are left and none can run, that is a deadlock, and the report says who waits where.
//
// Shuffles, votes and mma are meetings: every lane leaves a pointer to what it brings and one to where its result goes,
// and the last to arrive computes the results of all lanes at once.
//
// In mode check of __init__.py the compiler calls __tsan_read4(p) and the like before every access of a kernel, as it
// does for ThreadSanitizer. Those functions are ours (the Linux kernel's KCSAN has its own, too) and look the address
// up in shadow cells: who touched it last, and which barriers have passed since.
//
// This file is never instrumented. It is linked into every module, so each module has its own state; __init__.py lets
// one launch run at a time.
#include "device.h"

#include <link.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>

#include <algorithm>
#include <unordered_map>
#include <vector>

using u32 = uint32_t;
using Address = uintptr_t;

uint3 threadIdx, blockIdx, blockDim, gridDim;

constexpr u32 MAX_THREADS = 1024, MAX_WARPS = MAX_THREADS / 32;
constexpr size_t STACK_BYTES = 128 << 10, GUARD_BYTES = 4096;
constexpr size_t MAX_DYNAMIC_BYTES = 232448;  // 227 KiB, what a block can have on compute capability 9.0
extern "C" CC_INTERNAL thread_local unsigned char cc_dynamic_shared[];  // defined by __init__.py's link step

// Mirrored in __init__.py.
struct Buffer {
  Address address;
  size_t bytes;
  const char *name;
  u32 writable, unused;
};
struct Launch {
  u32 grid[3], block[3];
  u32 shared_bytes, seed, noise_bytes, cpu_seconds;
  const Buffer *buffers;
  size_t num_buffers;
  unsigned char *stacks;  // of cc_allocate_stacks
};

namespace {
enum Operation { SYNC_WARP, SHUFFLE, BALLOT, MMA };
const char *const OPERATION_NAMES[] = {"__syncwarp", "a shuffle", "a vote", "mma"};

struct Copy {  // a cp.async on its way
  unsigned char *to;
  const unsigned char *from;
  u32 bytes, valid_bytes, group;
};

struct Fiber {
  void *stack_pointer;
  unsigned char *stack;
  uint3 index;
  u32 thread, lane, warp;
  const char *waits_for;  // NULL: it can run, or has returned
  cc::Site site;
  std::vector<Copy> copies;
  u32 groups;  // committed so far
};

struct Meeting {
  Operation operation;
  u32 mask, arrived;
  cc::Site site;
  const void *in[32];
  void *out[32];
};

struct Warp {
  u32 lanes, returned, ready, at_barrier;  // bit sets of lanes
  u32 epoch;                               // __syncwarps of the whole warp so far
  u32 open;                                // bit set of meetings that still wait for lanes
  Meeting meetings[32];
};

struct Block {
  u32 id, threads, alive;
  u32 ready_warps;        // bit set of warps with ready lanes
  u32 at_barrier, epoch;  // threads that wait in __syncthreads; barriers so far
  cc::Site site;          // of the barrier that they wait at
};

Launch launch;
void (*kernel)(void **);
void **kernel_arguments;
Fiber fibers[MAX_THREADS];
Warp warps[MAX_WARPS];
Block block;
Fiber *current;  // NULL while no thread runs
void *main_stack_pointer;
u32 random_state;
bool checking;     // the module was compiled in mode check
char error[4096];  // empty while all is well
Address module_begin, module_end, shared_begin, shared_end;  // as the loader placed them

// ---------------------------------------------------------------- stacks
// switch_stack(&save, to) pushes the registers that a function must preserve, stores the stack pointer in `save`, takes
// `to` for it, pops the registers from there and returns to who called it there. A fresh stack (prepare_stack) has
// zeros for the registers and run_thread to return to.
extern "C" CC_INTERNAL void switch_stack(void **save, void *to);

#if defined(__x86_64__)
constexpr size_t SAVED_WORDS = 8, RETURN_WORD = 6;  // word 7 keeps the stack aligned as after a call
asm(R"(
  .text
  .globl switch_stack
  .hidden switch_stack
  .type switch_stack, @function
switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size switch_stack, . - switch_stack
)");
#elif defined(__aarch64__)
constexpr size_t SAVED_WORDS = 20, RETURN_WORD = 11;
asm(R"(
  .text
  .globl switch_stack
  .hidden switch_stack
  .type switch_stack, %function
switch_stack:
  sub sp, sp, #160
  stp x19, x20, [sp]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
  .size switch_stack, . - switch_stack
)");
#else
#error "runtime.cpp: switch_stack is missing for this machine"
#endif

void run_thread();

// Stacks begin at different cache lines: at a distance of 128 KiB all of them would compete for the same few lines.
void prepare_stack(Fiber &fiber) {
  const size_t color = fiber.thread * 17 % 64 * 64;
  fiber.stack = launch.stacks + fiber.thread * STACK_BYTES;
  void **words = (void **)(fiber.stack + STACK_BYTES - color) - SAVED_WORDS;
  std::fill(words, words + SAVED_WORDS, nullptr);
  words[RETURN_WORD] = (void *)run_thread;
  fiber.stack_pointer = words;
  // In mode init locals live in memory that holds NaN.
  if (launch.noise_bytes) memset((unsigned char *)words - launch.noise_bytes, 0xFF, launch.noise_bytes);
}

// ---------------------------------------------------------------- who runs
u32 random_number() {  // xorshift32 (Marsaglia 2003)
  random_state ^= random_state << 13;
  random_state ^= random_state >> 17;
  return random_state ^= random_state << 5;
}

u32 random_bit(u32 set) {
  for (u32 skip = random_number() % __builtin_popcount(set); skip; skip--) set &= set - 1;
  return __builtin_ctz(set);
}

void make_ready(u32 warp, u32 lanes) {
  if (!lanes) return;
  warps[warp].ready |= lanes;
  block.ready_warps |= 1u << warp;
}

// The next thread to run, NULL if all wait or have returned.
Fiber *choose() {
  if (!block.ready_warps) return nullptr;
  u32 w = __builtin_ctz(block.ready_warps);
  if (launch.seed) w = random_bit(block.ready_warps);
  else if (current && block.ready_warps >> current->warp & 1) w = current->warp;
  Warp &warp = warps[w];
  const u32 lane = launch.seed ? random_bit(warp.ready) : __builtin_ctz(warp.ready);
  warp.ready &= ~(1u << lane);
  if (!warp.ready) block.ready_warps &= ~(1u << w);
  return &fibers[w * 32 + lane];
}

void enter(Fiber *fiber) {
  current = fiber;
  threadIdx = fiber->index;
}

// Leaves the current thread; returns when it is chosen again.
void pause() {
  Fiber *from = current, *to = choose();
  if (to) enter(to);
  switch_stack(&from->stack_pointer, to ? to->stack_pointer : main_stack_pointer);
}

void wait(const char *what, cc::Site site) {
  current->waits_for = what;
  current->site = site;
  pause();
  current->waits_for = nullptr;
}

// ---------------------------------------------------------------- what goes wrong
void report(const char *format, ...) {
  int n = 0;
  if (current)
    n = snprintf(error, sizeof error, "block (%u,%u,%u) thread (%u,%u,%u): ", blockIdx.x, blockIdx.y, blockIdx.z,
                 threadIdx.x, threadIdx.y, threadIdx.z);
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(error + n, sizeof error - n, format, arguments);
  va_end(arguments);
}

// Ends the launch from inside a thread.
[[noreturn]] void leave_launch() {
  void *nowhere;
  switch_stack(&nowhere, main_stack_pointer);
  __builtin_unreachable();
}

template <class... T> [[noreturn]] void fail(const char *format, T... values) {
  report(format, values...);
  leave_launch();
}

// With an address of the machine code, which __init__.py turns into a line of the source.
template <class... T> [[noreturn]] void fail_at(const void *pc, const char *format, T... values) {
  report(format, values...);
  const size_t n = strlen(error);
  snprintf(error + n, sizeof error - n, " [pc 0x%zx]", (size_t)((Address)pc - module_begin - 1));
  leave_launch();
}

// ---------------------------------------------------------------- __syncthreads
bool same(cc::Site a, cc::Site b) { return a.line == b.line && (a.file == b.file || !strcmp(a.file, b.file)); }

void open_barrier() {
  block.at_barrier = 0;
  block.epoch++;
  for (u32 w = 0; w * 32 < block.threads; w++) {
    make_ready(w, warps[w].at_barrier);
    warps[w].at_barrier = 0;
  }
}

// ---------------------------------------------------------------- meetings of the lanes of a warp
struct ShuffleIn {
  uint64_t value;
  int source;
};

struct MmaIn {
  const unsigned *a, *b;
  const float *c;
};

void exchange(const Meeting &m) {
  for (u32 left = m.arrived; left; left &= left - 1) {
    const int lane = __builtin_ctz(left);
    const int source = ((const ShuffleIn *)m.in[lane])->source;
    const bool defined = m.arrived >> source & 1;
    *(uint64_t *)m.out[lane] = defined ? ((const ShuffleIn *)m.in[source])->value : ~(uint64_t)0;
  }
}

void count_votes(const Meeting &m) {
  u32 votes = 0;
  for (u32 left = m.arrived; left; left &= left - 1) {
    const int lane = __builtin_ctz(left);
    votes |= (u32) * (const bool *)m.in[lane] << lane;
  }
  for (u32 left = m.arrived; left; left &= left - 1) *(u32 *)m.out[__builtin_ctz(left)] = votes;
}

double low_half(unsigned word) { return cc::bits<float>(word << 16); }
double high_half(unsigned word) { return cc::bits<float>(word & 0xFFFF0000u); }

typedef double Row __attribute__((vector_size(64)));  // of eight columns

// Compiled twice, and the machine takes what it has registers for. No result depends on it, since nothing is fused.
#if defined(__x86_64__)
#define WIDE __attribute__((target_clones("avx2", "default")))
#else
#define WIDE
#endif

// d = a b + c of mma.m16n8k16, fragments as in the PTX ISA. Products of bf16 are exact in double. The 16 of an element
// are added in rising k, then c, then one rounding to float: a row's result does not depend on its place in the tile,
// and products that are zero change nothing.
WIDE void multiply_tile(const Meeting &m) {
  double a[16][16];
  Row b[16], sums[16] = {};
  for (int lane = 0; lane < 32; lane++) {
    const MmaIn &in = *(const MmaIn *)m.in[lane];
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; i++) {
      double *pair = &a[g + i % 2 * 8][2 * t + i / 2 * 8];
      pair[0] = low_half(in.a[i]);
      pair[1] = high_half(in.a[i]);
    }
    for (int i = 0; i < 2; i++) {
      b[2 * t + 8 * i][g] = low_half(in.b[i]);
      b[2 * t + 8 * i + 1][g] = high_half(in.b[i]);
    }
  }
  for (int row = 0; row < 16; row++)
    for (int k = 0; k < 16; k++) sums[row] += a[row][k] * b[k];
  for (int lane = 0; lane < 32; lane++) {
    const float *c = ((const MmaIn *)m.in[lane])->c;
    float *d = (float *)m.out[lane];
    for (int i = 0; i < 4; i++) d[i] = (float)(c[i] + sums[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2]);
  }
}

// The open meeting that the current lane belongs to, or a new one.
Meeting &find_meeting(Operation operation, u32 mask, cc::Site site) {
  Warp &warp = warps[current->warp];
  for (u32 left = warp.open; left; left &= left - 1) {
    Meeting &m = warp.meetings[__builtin_ctz(left)];
    if (m.operation != operation || m.mask != mask || m.arrived >> current->lane & 1) continue;
    if (!same(m.site, site))
      fail("lanes of a warp meet in %s at different places: %s:%d and %s:%d", OPERATION_NAMES[operation], m.site.file,
           m.site.line, site.file, site.line);
    return m;
  }
  const u32 slot = __builtin_ctz(~warp.open);  // a lane is in one meeting at most, so one of the 32 is free
  Meeting &m = warp.meetings[slot];
  warp.open |= 1u << slot;
  m.operation = operation;
  m.mask = mask;
  m.arrived = 0;
  m.site = site;
  return m;
}

void close_meeting(Meeting &m) {
  Warp &warp = warps[current->warp];
  warp.open &= ~(1u << (&m - warp.meetings));
  if (m.operation == SHUFFLE) exchange(m);
  if (m.operation == BALLOT) count_votes(m);
  if (m.operation == MMA) multiply_tile(m);
  if (m.operation == SYNC_WARP && (m.arrived | warp.returned) == warp.lanes) warp.epoch++;
  make_ready(current->warp, m.arrived & ~(1u << current->lane));
}

// Waits until every lane of the mask has come and the results are there.
void meet(Operation operation, u32 mask, const void *in, void *out, cc::Site site) {
  const Warp &warp = warps[current->warp];
  const u32 lane = current->lane;
  if (!(mask >> lane & 1))
    fail("lane %u calls %s with mask %08x, which does not name it, at %s:%d", lane, OPERATION_NAMES[operation], mask,
         site.file, site.line);
  mask &= warp.lanes;  // lanes that never were are not waited for
  if (mask & warp.returned)
    fail("the mask %08x of %s names lanes that have returned (%08x) at %s:%d", mask, OPERATION_NAMES[operation],
         warp.returned, site.file, site.line);
  Meeting &m = find_meeting(operation, mask, site);
  m.in[lane] = in;
  m.out[lane] = out;
  m.arrived |= 1u << lane;
  if (m.arrived == m.mask) close_meeting(m);
  else wait(OPERATION_NAMES[operation], site);
}

// ---------------------------------------------------------------- shadow memory: who touched what last
struct Access {
  u32 block;              // its id + 1; 0: nobody
  u32 clock, epoch;       // of the block: fences and barriers so far
  u32 thread, warp_epoch;
};

// Who read a cell since the last barrier.
enum Readers : unsigned char { ONE_THREAD, ONE_WARP, SEVERAL_WARPS };

struct Cell {  // of two bytes
  Access write, read;
  bool write_atomic, read_atomic;
  Readers readers;
  bool in_flight;  // a cp.async of the block of `write` has not been waited for
};

struct Region {
  Address begin, end;
  const char *name;
  bool writable, shared;
  Cell *cells;
};

struct Release {  // a block's atomic write after a fence: what it did before has this clock at most
  u32 block, clock;
};

struct Memory {
  std::vector<Region> regions;
  size_t last_region;  // where the last access fell
  std::unordered_map<Address, std::vector<Release>> releases;  // by the address of the atomic
  // Of the current block:
  u32 clock, fence;                   // fence: the clock at the last one, 0 if there was none
  std::unordered_map<u32, u32> seen;  // block id: what that block did below this clock is ordered before now
};

enum Kind { READ = 0, WRITE = 1, ATOMIC = 2 };  // a bit set; volatile counts as atomic

Memory memory;

// Calls f(begin, end, name) for the parts of shared memory that the launch has.
template <class F> void each_shared_part(F f) {
  const Address dynamic = (Address)cc_dynamic_shared;
  if (dynamic > shared_begin) f(shared_begin, dynamic, "static shared memory");
  if (launch.shared_bytes) f(dynamic, dynamic + launch.shared_bytes, "dynamic shared memory");
  if (dynamic + MAX_DYNAMIC_BYTES < shared_end) f(dynamic + MAX_DYNAMIC_BYTES, shared_end, "static shared memory");
}

void add_region(Address begin, Address end, const char *name, bool writable, bool shared) {
  Cell *cells = (Cell *)calloc((end - begin) / 2 + 1, sizeof(Cell));  // pages that no kernel touches cost nothing
  if (!cells) abort();
  memory.regions.push_back({begin, end, name, writable, shared, cells});
}

void clear_memory() {
  for (const Region &region : memory.regions) free(region.cells);
  memory = Memory();
}

void set_up_memory() {
  clear_memory();
  if (!checking) return;
  each_shared_part([](Address begin, Address end, const char *name) { add_region(begin, end, name, true, true); });
  for (size_t i = 0; i < launch.num_buffers; i++) {
    const Buffer &buffer = launch.buffers[i];
    add_region(buffer.address, buffer.address + buffer.bytes, buffer.name, buffer.writable, false);
  }
}

// ---------------------------------------------------------------- the checks of one access
struct Attempt {
  Address address;
  size_t bytes;
  int kind;        // of Kind
  const void *pc;  // the return address of the hook
};

const char *verb(const Attempt &a) { return a.kind & ATOMIC ? "atomic" : a.kind & WRITE ? "write" : "read"; }

Region *find_region(Address address) {
  std::vector<Region> &all = memory.regions;
  const auto holds = [&](const Region &r) { return address >= r.begin && address < r.end; };
  if (memory.last_region < all.size() && holds(all[memory.last_region])) return &all[memory.last_region];
  for (size_t i = 0; i < all.size(); i++) {
    if (!holds(all[i])) continue;
    memory.last_region = i;
    return &all[i];
  }
  return nullptr;
}

bool within(Address address, const void *begin, size_t bytes) {
  return address >= (Address)begin && address < (Address)begin + bytes;
}

// The buffer that ends or begins closest to an address in no buffer.
const Region *nearest_buffer(Address address) {
  const auto distance = [&](const Region &r) { return address < r.begin ? r.begin - address : address - r.end; };
  const Region *nearest = nullptr;
  for (const Region &r : memory.regions)
    if (!r.shared && (!nearest || distance(r) < distance(*nearest))) nearest = &r;
  return nearest;
}

// An access that is in no region: fine in the module's constants.
void check_outside(const Attempt &a) {
  if (a.address >= module_begin && a.address < module_end) return;
  if (within(a.address, launch.stacks, MAX_THREADS * STACK_BYTES))
    fail_at(a.pc, "%s of %zu bytes in the local memory of another thread", verb(a), a.bytes);
  if (within(a.address, (void *)shared_begin, shared_end - shared_begin))
    fail_at(a.pc, "%s of %zu bytes at %zd of %u bytes of dynamic shared memory", verb(a), a.bytes,
            (ssize_t)(a.address - (Address)cc_dynamic_shared), launch.shared_bytes);
  const Region *near = nearest_buffer(a.address);
  if (!near) fail_at(a.pc, "%s of %zu bytes at %p; the kernel has no buffer", verb(a), a.bytes, (void *)a.address);
  fail_at(a.pc, "%s of %zu bytes out of bounds: at %zd of the %zu bytes of %s", verb(a), a.bytes,
          (ssize_t)(a.address - near->begin), (size_t)(near->end - near->begin), near->name);
}

// Whether all of the block has passed a barrier since, or the other block's access was released to this one.
bool lies_before_barrier(const Access &past, const Region &region) {
  if (!past.block) return true;
  if (past.block == block.id + 1) return past.epoch < block.epoch;
  if (region.shared) return true;  // each block has its own
  const auto seen = memory.seen.find(past.block - 1);
  return seen != memory.seen.end() && past.clock < seen->second;
}

// Whether an access by a thread, or the reads by several, certainly lie before what the current thread does now.
bool lies_before(const Access &past, Readers readers, const Region &region) {
  if (lies_before_barrier(past, region)) return true;
  if (past.block != block.id + 1 || past.thread / 32 != current->warp || readers == SEVERAL_WARPS) return false;
  if (past.warp_epoch < warps[current->warp].epoch) return true;
  return readers == ONE_THREAD && past.thread == current->thread;
}

[[noreturn]] void fail_race(const Attempt &a, const Access &past, const char *deed, const Region &region,
                            size_t offset) {
  if (past.block != block.id + 1)
    fail_at(a.pc, "race: %s of %s + %zu, %s by block %u with nothing to order the two", verb(a), region.name, offset,
            deed, past.block - 1);
  fail_at(a.pc, "race: %s of %s + %zu, %s by thread %u of this block with no barrier in between", verb(a),
          region.name, offset, deed, past.thread);
}

void check_cell(const Attempt &a, const Cell &cell, const Region &region, size_t offset) {
  const bool write = a.kind & WRITE, atomic = a.kind & ATOMIC;
  if (cell.in_flight && cell.write.block == block.id + 1)
    fail_at(a.pc, "%s of %s + %zu, where a cp.async is to arrive that nobody has waited for", verb(a), region.name,
            offset);
  if (!(atomic && cell.write_atomic) && !lies_before(cell.write, ONE_THREAD, region))
    fail_race(a, cell.write, "written", region, offset);
  if (write && !(atomic && cell.read_atomic) && !lies_before(cell.read, cell.readers, region))
    fail_race(a, cell.read, "read", region, offset);
}

Readers readers_with(const Cell &cell, const Access &now, const Region &region) {
  const Access &past = cell.read;
  if (lies_before_barrier(past, region)) return ONE_THREAD;
  const bool same_warp = past.block == now.block && past.thread / 32 == now.thread / 32;
  if (!same_warp || cell.readers == SEVERAL_WARPS) return SEVERAL_WARPS;
  if (past.warp_epoch < now.warp_epoch) return ONE_THREAD;
  return cell.readers == ONE_WARP || past.thread != now.thread ? ONE_WARP : ONE_THREAD;
}

void note(const Attempt &a, Cell &cell, const Region &region) {
  const Access now = {block.id + 1, memory.clock, block.epoch, current->thread, warps[current->warp].epoch};
  if (a.kind & WRITE) {
    cell.write = now;
    cell.write_atomic = a.kind & ATOMIC;
    cell.in_flight = false;
  } else {
    cell.readers = readers_with(cell, now, region);
    cell.read = now;
    cell.read_atomic = a.kind & ATOMIC;
  }
}

void check(const Attempt &a, size_t alignment) {
  if (!current || !checking) return;
  if (a.address % alignment) fail_at(a.pc, "misaligned %s of %zu bytes at %p", verb(a), a.bytes, (void *)a.address);
  if (within(a.address, current->stack, STACK_BYTES)) return;  // its own local variables
  const Region *region = find_region(a.address);
  if (!region) return check_outside(a);
  const size_t offset = a.address - region->begin;
  if (a.address + a.bytes > region->end)
    fail_at(a.pc, "%s of %zu bytes out of bounds: at %zu of the %zu bytes of %s", verb(a), a.bytes, offset,
            (size_t)(region->end - region->begin), region->name);
  if (a.kind & WRITE && !region->writable) fail_at(a.pc, "write to %s + %zu, which is const", region->name, offset);
  if (a.kind == WRITE && a.bytes == 1) return;  // its neighbour in the cell may be another thread's
  for (size_t i = offset / 2; i <= (offset + a.bytes - 1) / 2; i++) {
    check_cell(a, region->cells[i], *region, i * 2);
    note(a, region->cells[i], *region);
  }
}

void check(const void *address, size_t bytes, int kind, const void *pc, size_t alignment = 1) {
  check(Attempt{(Address)address, bytes, kind, pc}, alignment);
}

void mark_in_flight(const Copy &copy, bool in_flight) {
  const Region *region = checking ? find_region((Address)copy.to) : nullptr;
  if (!region) return;
  const size_t first = ((Address)copy.to - region->begin) / 2;
  for (size_t i = first; i < first + copy.bytes / 2; i++) region->cells[i].in_flight = in_flight;
}

// An atomic learns what other blocks released at its address, and releases what its block did before the last fence.
void synchronize(Address address) {
  if (within(address, (void *)shared_begin, shared_end - shared_begin)) return;  // each block has its own
  std::vector<Release> &releases = memory.releases[address];
  for (const Release &release : releases) {
    u32 &seen = memory.seen[release.block];
    seen = std::max(seen, release.clock);
  }
  if (!memory.fence) return;
  if (releases.empty() || releases.back().block != block.id) releases.push_back({block.id, 0});
  releases.back().clock = memory.fence;
}

// ---------------------------------------------------------------- a block from its first thread to its last
// The life of a fiber.
void run_thread() {
  kernel(kernel_arguments);
  Warp &warp = warps[current->warp];
  warp.returned |= 1u << current->lane;
  block.alive--;
  for (u32 left = warp.open; left; left &= left - 1) {
    const Meeting &m = warp.meetings[__builtin_ctz(left)];
    if (!(m.mask >> current->lane & 1)) continue;
    fail("returns while other lanes wait for it in %s at %s:%d", OPERATION_NAMES[m.operation], m.site.file,
         m.site.line);
  }
  if (block.at_barrier && block.at_barrier == block.alive) open_barrier();
  pause();
  __builtin_unreachable();
}

void start_thread(u32 thread, uint3 index) {
  Fiber &fiber = fibers[thread];
  fiber.thread = thread;
  fiber.lane = thread % 32;
  fiber.warp = thread / 32;
  fiber.index = index;
  fiber.waits_for = nullptr;
  fiber.copies.clear();
  fiber.groups = 0;
  prepare_stack(fiber);
}

void start_warp(u32 w) {
  const u32 lanes = std::min(block.threads - w * 32, 32u);
  Warp &warp = warps[w];
  warp.lanes = lanes == 32 ? ~0u : (1u << lanes) - 1;
  warp.returned = warp.ready = warp.at_barrier = warp.open = 0;
  warp.epoch = 0;
  make_ready(w, warp.lanes);
}

void start_block(u32 id) {
  const u32 threads = blockDim.x * blockDim.y * blockDim.z;
  block = Block();
  block.id = id;
  block.threads = block.alive = threads;
  blockIdx = {id % gridDim.x, id / gridDim.x % gridDim.y, id / gridDim.x / gridDim.y};
  u32 thread = 0;
  for (u32 z = 0; z < blockDim.z; z++)
    for (u32 y = 0; y < blockDim.y; y++)
      for (u32 x = 0; x < blockDim.x; x++) start_thread(thread++, {x, y, z});
  for (u32 w = 0; w * 32 < threads; w++) start_warp(w);
  memory.clock = 1;
  memory.fence = 0;
  memory.seen.clear();
  const auto fill_with_nan = [](Address begin, Address end, const char *) { memset((void *)begin, 0xFF, end - begin); };
  each_shared_part(fill_with_nan);
}

// Says how many threads wait where.
void report_deadlock() {
  char text[2048] = "";
  size_t n = 0;
  std::vector<bool> told(block.threads);
  for (u32 i = 0; i < block.threads; i++) {
    const Fiber &first = fibers[i];
    if (!first.waits_for || told[i]) continue;
    u32 count = 0;
    for (u32 j = i; j < block.threads; j++) {
      const Fiber &other = fibers[j];
      if (other.waits_for != first.waits_for || !same(other.site, first.site)) continue;
      told[j] = true;
      count++;
    }
    if (n < sizeof text - 512)
      n += snprintf(text + n, sizeof text - n, "; %u from thread %u on in %s at %s:%d", count, i, first.waits_for,
                    first.site.file, first.site.line);
  }
  report("deadlock in block (%u,%u,%u): %u of %u threads wait%s", blockIdx.x, blockIdx.y, blockIdx.z, block.alive,
         block.threads, text);
}

void run_block(u32 id) {
  start_block(id);
  enter(choose());
  switch_stack(&main_stack_pointer, current->stack_pointer);  // comes back when no thread can run
  current = nullptr;
  if (block.alive && !error[0]) report_deadlock();
}

void run_grid() {
  const u32 num_blocks = gridDim.x * gridDim.y * gridDim.z;
  std::vector<u32> order(num_blocks);
  for (u32 i = 0; i < num_blocks; i++) order[i] = i;
  if (launch.seed)
    for (u32 i = num_blocks; i > 1; i--) std::swap(order[i - 1], order[random_number() % i]);
  for (u32 id : order) {
    run_block(id);
    if (error[0]) return;
  }
}

// ---------------------------------------------------------------- crashes and endless loops
const int SIGNALS[] = {SIGSEGV, SIGBUS, SIGFPE, SIGVTALRM};
constexpr int NUM_SIGNALS = sizeof SIGNALS / sizeof *SIGNALS;
pthread_t launching_thread;
sigjmp_buf before_launch;
Address crash_address;

void on_signal(int signal, siginfo_t *info, void *) {
  if (!pthread_equal(pthread_self(), launching_thread)) {  // the timer's signal may reach any thread of the process
    pthread_kill(launching_thread, signal);
    return;
  }
  crash_address = info->si_code == SI_KERNEL ? 0 : (Address)info->si_addr;
  siglongjmp(before_launch, signal);
}

void report_signal(int signal) {
  if (signal == SIGVTALRM) report("still running after %u CPU seconds: an endless loop?", launch.cpu_seconds);
  else if (signal == SIGFPE) report("integer division by zero");
  else if (current && within(crash_address, current->stack, GUARD_BYTES)) report("the thread's stack is full");
  else report("crash: access to %p%s", (void *)crash_address, crash_address ? "" : " or misaligned access");
}

// Runs the grid with our signal handlers and a timer of CPU time (wall time would depend on the machine's load).
void run_guarded() {
  static char signal_stack[65536];
  stack_t stack = {signal_stack, 0, sizeof signal_stack}, old_stack;
  struct sigaction action = {}, old_actions[NUM_SIGNALS];
  action.sa_sigaction = on_signal;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  itimerval timer = {{0, 0}, {(time_t)launch.cpu_seconds, 0}}, off = {};

  launching_thread = pthread_self();
  sigaltstack(&stack, &old_stack);
  for (int i = 0; i < NUM_SIGNALS; i++) sigaction(SIGNALS[i], &action, &old_actions[i]);
  setitimer(ITIMER_VIRTUAL, &timer, nullptr);
  if (const int signal = sigsetjmp(before_launch, 1)) report_signal(signal);
  else run_grid();
  setitimer(ITIMER_VIRTUAL, &off, nullptr);
  for (int i = 0; i < NUM_SIGNALS; i++) sigaction(SIGNALS[i], &old_actions[i], nullptr);
  sigaltstack(&old_stack, nullptr);
  current = nullptr;
}

// Finds where the loader put this module and this thread's copy of its thread-local (that is, shared) memory.
int find_module(dl_phdr_info *info, size_t, void *) {
  Address end = 0, own = (Address)&find_module, tls_bytes = 0;
  bool is_own = false;
  for (int i = 0; i < info->dlpi_phnum; i++) {
    const auto &header = info->dlpi_phdr[i];
    const Address begin = info->dlpi_addr + header.p_vaddr;
    if (header.p_type == PT_TLS) tls_bytes = header.p_memsz;
    if (header.p_type != PT_LOAD) continue;
    is_own |= own >= begin && own < begin + header.p_memsz;
    end = std::max(end, (Address)(begin + header.p_memsz));
  }
  if (!is_own) return 0;
  module_begin = info->dlpi_addr;
  module_end = end;
  shared_begin = (Address)info->dlpi_tls_data;
  shared_end = shared_begin + tls_bytes;
  return 1;
}
}  // namespace

// ---------------------------------------------------------------- what device.h declares
namespace cc {
unsigned lane() { return current->lane; }

void sync_block(Site site) {
  if (!block.at_barrier) block.site = site;
  else if (!same(block.site, site))
    fail("threads of one block meet at different barriers: %s:%d and %s:%d", block.site.file, block.site.line,
         site.file, site.line);
  if (++block.at_barrier == block.alive) return open_barrier();
  warps[current->warp].at_barrier |= 1u << current->lane;
  wait("__syncthreads", site);
}

void sync_warp(unsigned mask, Site site) { meet(SYNC_WARP, mask, nullptr, nullptr, site); }

uint64_t shuffle(unsigned mask, uint64_t value, int source, Site site) {
  const ShuffleIn in = {value, source};
  uint64_t out;
  meet(SHUFFLE, mask, &in, &out, site);
  return out;
}

unsigned ballot(unsigned mask, bool vote, Site site) {
  unsigned votes;
  meet(BALLOT, mask, &vote, &votes, site);
  return votes;
}

void mma(float *d, const unsigned *a, const unsigned *b, const float *c, Site site) {
  if (warps[current->warp].lanes != ~0u) fail("mma by a warp of less than 32 lanes at %s:%d", site.file, site.line);
  const MmaIn in = {a, b, c};
  meet(MMA, ~0u, &in, d, site);
}

void fence() { memory.fence = ++memory.clock; }

void atomic_access(const void *address, size_t bytes, const void *pc) {
  if (!checking) return;
  check(address, bytes, WRITE | ATOMIC, pc, bytes);
  synchronize((Address)address);
}

// The bytes arrive when they are waited for, and not before: who reads too early finds what was there. The checker
// takes the copy for a write here and once more on arrival, so that no barrier in between hides a race with either.
void cp_async(void *shared, const void *global, unsigned bytes, unsigned valid_bytes) {
  const void *pc = __builtin_return_address(0);
  if ((Address)shared % bytes || (valid_bytes && (Address)global % bytes))
    fail_at(pc, "misaligned cp.async of %u bytes from %p to %p", bytes, global, shared);
  if (valid_bytes) check(global, valid_bytes, READ, pc);
  check(shared, bytes, WRITE, pc);
  current->copies.push_back(
      {(unsigned char *)shared, (const unsigned char *)global, bytes, valid_bytes, current->groups});
  mark_in_flight(current->copies.back(), true);
}

void cp_async_commit() { current->groups++; }

void cp_async_wait(unsigned groups_left) {
  size_t kept = 0;
  std::vector<Copy> &copies = current->copies;
  for (const Copy copy : copies) {
    if (copy.group + groups_left >= current->groups) {
      copies[kept++] = copy;
      continue;
    }
    mark_in_flight(copy, false);
    check(copy.to, copy.bytes, WRITE, __builtin_return_address(0));
    memcpy(copy.to, copy.from, copy.valid_bytes);
    memset(copy.to + copy.valid_bytes, 0, copy.bytes - copy.valid_bytes);
  }
  copies.resize(kept);
}
}  // namespace cc

// ---------------------------------------------------------------- what __init__.py calls
// The stacks of all threads, each above a page that must not be touched. A process has them once, for all modules: the
// number of such pages is limited. NULL if there is no memory.
CC_EXPORT unsigned char *cc_allocate_stacks() {
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void *memory = mmap(nullptr, MAX_THREADS * STACK_BYTES, PROT_READ | PROT_WRITE, flags, -1, 0);
  if (memory == MAP_FAILED) return nullptr;
  unsigned char *stacks = (unsigned char *)memory;
  for (u32 i = 0; i < MAX_THREADS; i++) mprotect(stacks + i * STACK_BYTES, GUARD_BYTES, PROT_NONE);
  return stacks;
}

// Runs a kernel. NULL, or what went wrong.
CC_EXPORT const char *cc_launch(void (*function)(void **), void **arguments, const Launch *settings) {
  launch = *settings;
  kernel = function;
  kernel_arguments = arguments;
  random_state = launch.seed * 2654435761u | 1;
  error[0] = 0;
  gridDim = {launch.grid[0], launch.grid[1], launch.grid[2]};
  blockDim = {launch.block[0], launch.block[1], launch.block[2]};
  *(volatile unsigned char *)cc_dynamic_shared = 0;  // makes the loader allocate this thread's copy
  dl_iterate_phdr(find_module, nullptr);
  set_up_memory();
  run_guarded();
  clear_memory();
  return error[0] ? error : nullptr;
}

// ---------------------------------------------------------------- what the compiler calls in mode check
#define HOOK(NAME, ...) extern "C" CC_INTERNAL void NAME(__VA_ARGS__)
#define PC __builtin_return_address(0)
#define ACCESSES(N)                                                                             \
  HOOK(__tsan_read##N, void *p) { check(p, N, READ, PC, N); }                                   \
  HOOK(__tsan_write##N, void *p) { check(p, N, WRITE, PC, N); }                                 \
  HOOK(__tsan_unaligned_read##N, void *p) { check(p, N, READ, PC); }                            \
  HOOK(__tsan_unaligned_write##N, void *p) { check(p, N, WRITE, PC); }                          \
  HOOK(__tsan_volatile_read##N, void *p) { check(p, N, READ | ATOMIC, PC, N); }                 \
  HOOK(__tsan_volatile_write##N, void *p) { check(p, N, WRITE | ATOMIC, PC, N); }
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)
HOOK(__tsan_read_range, void *p, size_t bytes) { check(p, bytes, READ, PC); }
HOOK(__tsan_write_range, void *p, size_t bytes) { check(p, bytes, WRITE, PC); }
HOOK(__tsan_init) { checking = true; }
HOOK(__tsan_func_entry, void *) {}
HOOK(__tsan_func_exit) {}

struct Location {
  const char *file;
  u32 line, column;
};
struct TypeMismatch {
  Location location;
  void *type;
  unsigned char log2_alignment, kind;
};
HOOK(__ubsan_handle_out_of_bounds, Location *at, Address index) {
  fail("index %zd is out of bounds of its array at %s:%u", (ssize_t)index, at->file, at->line);
}
HOOK(__ubsan_handle_shift_out_of_bounds, Location *at, Address, Address count) {
  fail("shift by %zd at %s:%u", (ssize_t)count, at->file, at->line);
}
HOOK(__ubsan_handle_type_mismatch_v1, TypeMismatch *what, Address address) {
  fail("misaligned access: %p is no multiple of %d at %s:%u", (void *)address, 1 << what->log2_alignment,
       what->location.file, what->location.line);
}
