// faulty -- kernels with one bug each. tests/test_cuda_cpu.py knows in which mode the emulator must notice it.
// All are meant to swap neighbours, out[i] = in[i ^ 1], each in its own way. With -DREPAIRED they do.
// launch  grid 2, block 64, 256 bytes of dynamic shared memory
// shapes  out, in, scratch (128,) int32; ticket (1,) is 0 before and after
#ifdef REPAIRED
#define FAULTY(wrong, right) right
#else
#define FAULTY(wrong, right) wrong
#endif
#define KERNEL(NAME) extern "C" __global__ void NAME(int *out, const int *in, volatile int *scratch, unsigned *ticket)
#define THREAD const int t = threadIdx.x, i = blockIdx.x * 64 + t

KERNEL(correct) {
  THREAD;
  out[i] = in[i ^ 1];
}

// ---------------------------------------------------------------- threads that do not wait for each other
KERNEL(missing_barrier) {
  __shared__ int values[64];
  THREAD;
  values[t ^ 32] = in[i ^ 32];  // by the other warp
  FAULTY(, __syncthreads());
  out[i] = values[t ^ 1];
}

KERNEL(missing_barrier_before_reuse) {
  __shared__ int values[64];
  THREAD;
  values[t] = in[i];
  __syncthreads();
  const int other_half = values[t ^ 33];
  FAULTY(, __syncthreads());
  values[t] = other_half;
  __syncthreads();
  out[i] = values[t ^ 32];
}

KERNEL(missing_syncwarp) {
  __shared__ int values[64];
  THREAD;
  values[t] = in[i];
  FAULTY(, __syncwarp());
  out[i] = values[t ^ 1];
}

KERNEL(two_blocks_write_one_cell) {
  THREAD;
  out[FAULTY(t, i)] = in[i ^ 1];
}

KERNEL(missing_fence_before_ticket) {
  __shared__ bool is_last;
  THREAD;
  int *partials = (int *)scratch;
  partials[i] = in[i ^ 1];
  FAULTY(, __threadfence());
  __syncthreads();
  if (t == 0) is_last = atomicInc(ticket, 1) == 1;
  __syncthreads();
  if (is_last)
    for (int j = t; j < 128; j += 64) out[j] = partials[j];
}

KERNEL(copy_read_before_it_arrives) {
  __shared__ int4 values[64];
  THREAD;
  cc::cp_async(&values[t], in + i / 4 * 4, 16, 16);
  cc::cp_async_commit();
  FAULTY(, cc::cp_async_wait(0));
  out[i] = ((const int *)&values[t])[i % 4 ^ 1];
}

// ---------------------------------------------------------------- threads that part where they must not
KERNEL(divergent_shuffle) {
  THREAD;
  int value = in[i];
  if (FAULTY(t % 2, true)) value = __shfl_xor_sync(0xffffffffu, value, 1);
  out[i] = value;
}

KERNEL(shuffle_after_some_lanes_returned) {
  THREAD;
  if (FAULTY(t % 32 == 0, false)) return;
  out[i] = __shfl_xor_sync(0xffffffffu, in[i], 1);
}

KERNEL(shuffle_without_own_lane) {
  THREAD;
  out[i] = __shfl_xor_sync(FAULTY(0x0000ffffu, 0xffffffffu), in[i], 1);
}

KERNEL(two_different_barriers) {
  __shared__ int values[64];
  THREAD;
  values[t ^ 32] = in[i ^ 32];
  if (FAULTY(t < 32, false)) __syncthreads();
  else
    __syncthreads();
  out[i] = values[t ^ 1];
}

KERNEL(deadlock) {
  THREAD;
  const int value = in[i ^ 1];
  if (FAULTY(t == 3, false)) __syncthreads();
  __syncwarp();
  out[i] = value;
}

KERNEL(endless_loop) {
  THREAD;
  scratch[i] = 0;
  while (FAULTY(scratch[i] == 0, false)) continue;
  out[i] = in[i ^ 1];
}

// ---------------------------------------------------------------- addresses
KERNEL(reads_past_the_end) {
  THREAD;
  out[i] = in[(i ^ 1) + FAULTY(i / 126, 0)];
}

KERNEL(writes_past_dynamic_shared_memory) {
  extern __shared__ __align__(16) unsigned char memory[];
  THREAD;
  int *values = (int *)memory;
  values[t + FAULTY(1, 0)] = in[i];
  __syncthreads();
  out[i] = values[(t ^ 1) + FAULTY(1, 0)];
}

KERNEL(writes_past_static_shared_memory) {
  __shared__ int values[FAULTY(63, 64)];
  THREAD;
  values[t] = in[i];
  __syncthreads();
  out[i] = values[t ^ 1];
}

KERNEL(writes_to_const) {
  THREAD;
  out[i] = in[i ^ 1];
  FAULTY(const_cast<int *>(in)[i] = 0, );
}

KERNEL(misaligned_load) {
  THREAD;
  const int first = FAULTY(i / 2 * 2, i / 4 * 4);
  const int4 four = *(const int4 *)(in + first);
  out[i] = (i ^ 1) - first == 0 ? four.x : (i ^ 1) - first == 1 ? four.y : (i ^ 1) - first == 2 ? four.z : four.w;
}

KERNEL(reads_local_memory_of_another_thread) {
  __shared__ const int *addresses[64];
  THREAD;
  const int value = in[i];
  addresses[t] = &value;
  __syncthreads();
  out[i] = FAULTY(*addresses[t ^ 1], in[i ^ 1]);
}

KERNEL(null_pointer) {
  THREAD;
  const int *values = FAULTY(ticket[0] ? in : nullptr, in);
  out[i] = values[i ^ 1];
}

// ---------------------------------------------------------------- values
KERNEL(uninitialised_local) {
  THREAD;
  int offset;
  if (in[i] != in[FAULTY(0, i ^ 1)]) offset = 0;  // in[0] is equal to in[0]
  out[i] = in[i ^ 1] + offset;
}

KERNEL(shared_memory_read_before_written) {
  __shared__ int values[64];
  THREAD;
  if (t != FAULTY(5, 64)) values[t] = in[i];
  __syncthreads();
  out[i] = values[t ^ 1];
}

KERNEL(output_never_written) {
  THREAD;
  if (i != FAULTY(100, 128)) out[i] = in[i ^ 1];
}

KERNEL(shift_past_the_word) {
  THREAD;
  const int one = 1 << (t / 64 + FAULTY(32, 0));
  out[i] = in[i ^ one];
}

KERNEL(division_by_zero) {
  THREAD;
  out[i] = in[i ^ 1] / FAULTY((int)ticket[0], 1);
}
