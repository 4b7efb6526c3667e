// common.cuh -- what several kernels share: the model's dimensions, bf16 halves, sums over lanes, the last of several blocks.
//
// A module is compiled for one model: -DHIDDEN -DINTER -DHEADS -DKV_HEADS -DHEAD_DIM -DVOCAB -DBLOCK_SIZE.
#pragma once
#include "ptx.cuh"

constexpr int GROUP = HEADS / KV_HEADS;             // query heads that share one KV head
constexpr int Q_SIZE = HEADS * HEAD_DIM, KV_SIZE = KV_HEADS * HEAD_DIM;
static_assert(HIDDEN % 32 == 0 && INTER % 32 == 0 && HEAD_DIM % 32 == 0 && BLOCK_SIZE == 16, "see CudaBackend.why_not");

// The two bf16 values of a 32-bit word as float32.
__device__ __forceinline__ float low_half(unsigned v) { return __uint_as_float(v << 16); }
__device__ __forceinline__ float high_half(unsigned v) { return __uint_as_float(v & 0xffff0000u); }

// Sum over the four lanes of a quad, the same bits in each.
__device__ __forceinline__ float quad_sum(float v) {
  v += __shfl_xor_sync(0xffffffffu, v, 1);
  return v + __shfl_xor_sync(0xffffffffu, v, 2);
}

// True in all threads of the last of `blocks` blocks to come here, which then sees what all of them wrote.
__device__ __forceinline__ bool is_last_block(unsigned *ticket, int blocks) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicInc(ticket, blocks - 1) == blocks - 1;
  __syncthreads();
  if (last) __threadfence();
  return last;
}
