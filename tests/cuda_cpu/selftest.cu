// selftest -- one kernel for each part of the emulator. tests/test_cuda_cpu.py knows the right answers.

// out (9, 32): a warp's shuffles, one a row.
extern "C" __global__ void __launch_bounds__(32) shuffles(int *out) {
  const int lane = threadIdx.x, value = lane * 10;
  out[0 * 32 + lane] = __shfl_sync(0xffffffffu, value, 5);
  out[1 * 32 + lane] = __shfl_sync(0xffffffffu, value, lane + 1, 8);
  out[2 * 32 + lane] = __shfl_xor_sync(0xffffffffu, value, 3);
  out[3 * 32 + lane] = __shfl_xor_sync(0xffffffffu, value, 12, 8);
  out[4 * 32 + lane] = __shfl_down_sync(0xffffffffu, value, 4);
  out[5 * 32 + lane] = __shfl_down_sync(0xffffffffu, value, 3, 16);
  out[6 * 32 + lane] = __shfl_up_sync(0xffffffffu, value, 2, 8);
  out[7 * 32 + lane] = (int)(__shfl_sync(0xffffffffu, (unsigned long long)value << 32, 7) >> 32);
  if (lane < 16) out[8 * 32 + lane] = __shfl_xor_sync(0x0000ffffu, value, 1);  // two halves go separate ways
  else out[8 * 32 + lane] = __shfl_sync(0xffff0000u, value, 31);
}

// out (3, 32): ballot, any, all.
extern "C" __global__ void __launch_bounds__(32) votes(unsigned *out, int limit) {
  const int lane = threadIdx.x;
  out[0 * 32 + lane] = __ballot_sync(0xffffffffu, lane % 3 == 0);
  out[1 * 32 + lane] = __any_sync(0xffffffffu, lane == limit);
  out[2 * 32 + lane] = __all_sync(0xffffffffu, lane < limit);
}

// out (6, n): what each function makes of x[i].
extern "C" __global__ void bits(unsigned *out, const unsigned *x, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  out[0 * n + i] = __popc(x[i]);
  out[1 * n + i] = __clz((int)x[i]);
  out[2 * n + i] = __ffs((int)x[i]);
  out[3 * n + i] = __brev(x[i]);
  out[4 * n + i] = __umulhi(x[i], 0x9E3779B9u);
  out[5 * n + i] = (unsigned)__umul64hi((unsigned long long)x[i] << 32, 0x9E3779B97F4A7C15ull);
}

// rounded (n,), back (n,): float32 to bfloat16 and back.
extern "C" __global__ void round_bf16(cc::bf16 *rounded, float *back, const float *x, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  rounded[i].bits = (unsigned short)cc::pack_bf16(x[i], 0.f);
  back[i] = __uint_as_float((unsigned)rounded[i].bits << 16);
}

// out (6, n): what each function makes of x[i] > 0.
extern "C" __global__ void functions(float *out, const float *x, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  out[0 * n + i] = rsqrtf(x[i]);
  out[1 * n + i] = exp2f(x[i]);
  out[2 * n + i] = __expf(-x[i]);
  out[3 * n + i] = __logf(x[i]);
  out[4 * n + i] = __fdividef(1.0f, x[i]);
  out[5 * n + i] = (float)(exp(-(double)x[i]) + log((double)x[i]));
}

// Any block shape. counts (6,): add, max, or, exchange, compare-and-swap (the winner adds 10), inc;
// wide (2,): 64-bit max and add.
extern "C" __global__ void atomics(int *counts, unsigned long long *wide) {
  const int i = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  atomicAdd(counts + 0, i);
  atomicMax(counts + 1, i);
  atomicOr(counts + 2, 1 << i % 8);
  atomicExch(counts + 3, 3);
  if (atomicCAS(counts + 4, 0, 1) == 0) atomicAdd(counts + 4, 10);
  atomicInc((unsigned *)counts + 5, 4);
  atomicMax(wide + 0, (unsigned long long)i << 40);
  atomicAdd(wide + 1, 1ull << 32);
}

// d (warps, 16, 8) = c + a (warps, 16, 16) * b (warps, 8, 16)^T, one tile a warp.
extern "C" __global__ void mma_tiles(float *d, const unsigned *a, const unsigned *b, const float *c) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int warp = (blockIdx.x * blockDim.x + threadIdx.x) / 32;
  a += warp * 128, b += warp * 64;
  const unsigned row_pairs[4] = {a[g * 8 + t], a[(g + 8) * 8 + t], a[g * 8 + t + 4], a[(g + 8) * 8 + t + 4]};
  const unsigned column_pairs[2] = {b[g * 8 + t], b[g * 8 + t + 4]};
  float sums[4];
  for (int i = 0; i < 4; i++) sums[i] = c[warp * 128 + (g + i / 2 * 8) * 8 + 2 * t + i % 2];
  cc::mma_m16n8k16(sums, row_pairs, column_pairs, sums);
  for (int i = 0; i < 4; i++) d[warp * 128 + (g + i / 2 * 8) * 8 + 2 * t + i % 2] = sums[i];
}

// y (tiles, columns, rows) = x (tiles, rows, columns) transposed; a block is one tile, dynamic shared memory holds it.
extern "C" __global__ void transpose(float *y, const float *x) {
  extern __shared__ __align__(16) unsigned char memory[];
  float *tile = (float *)memory;
  const int rows = blockDim.y, columns = blockDim.x, offset = blockIdx.x * rows * columns;
  const int row = threadIdx.y, column = threadIdx.x;
  tile[row * columns + column] = x[offset + row * columns + column];
  __syncthreads();
  const int i = row * columns + column;
  y[offset + i] = tile[i % rows * columns + i / rows];
}

// y (n,) = x (n,) * 2 through two stages of shared memory; 64 threads, 4 elements each a step, zeros past the end.
extern "C" __global__ void __launch_bounds__(64) pipeline(float *y, const float *x, int n) {
  __shared__ float4 stages[2][64];
  const int t = threadIdx.x, steps = (n + 255) / 256;
  for (int step = 0; step <= steps; step++) {
    if (step < steps) {
      const int i = step * 256 + t * 4;
      cc::cp_async(&stages[step % 2][t], i < n ? x + i : x, 16, i < n ? 16 : 0);
    }
    cc::cp_async_commit();
    if (step == 0) continue;
    cc::cp_async_wait(1);
    __syncthreads();
    const float4 v = stages[(step - 1) % 2][63 - t];
    const int i = (step - 1) * 256 + (63 - t) * 4;
    if (i < n) *(float4 *)(y + i) = make_float4(2 * v.x, 2 * v.y, 2 * v.z, 2 * v.w);
    __syncthreads();
  }
}

// total (1,) = sum of x (blocks * 32,): the last block to come adds up parts (blocks,). ticket is 0 before and after.
extern "C" __global__ void __launch_bounds__(32)
last_block_adds(float *total, float *parts, unsigned *ticket, const float *x) {
  float sum = x[blockIdx.x * 32 + threadIdx.x];
  for (int i = 16; i; i /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, i);
  unsigned place = 0;
  if (threadIdx.x == 0) {
    parts[blockIdx.x] = sum;
    __threadfence();
    place = atomicInc(ticket, gridDim.x - 1);
  }
  if (__shfl_sync(0xffffffffu, place, 0) < gridDim.x - 1 || threadIdx.x > 0) return;
  *total = 0.0f;
  for (unsigned i = 0; i < gridDim.x; i++) *total += __ldcg(parts + i);
}

// out (blocks, threads): in which order the threads came here.
extern "C" __global__ void arrivals(int *out, int *counter) {
  out[blockIdx.x * blockDim.x + threadIdx.x] = atomicAdd(counter, 1);
}

// y (n,) = *rows[n]: addresses in memory.
extern "C" __global__ void gather(float *y, const float *const *rows) { y[threadIdx.x] = *rows[threadIdx.x]; }

extern "C" __global__ void copy(float *y, const float *x, int n) {
  for (int i = threadIdx.x; i < n; i += blockDim.x) y[i] = x[i];
}

#define STATED(NAME, N) extern "C" __global__ void NAME(int *out) { out[threadIdx.x] = N; }
STATED(stated_by_macro, 7)
