// ptx.cuh -- every instruction that C++ cannot spell, one wrapper each, with a C++ twin for machines without a card.
//
// CUDA_CPU is set when the kernels are compiled for a CPU (tests/cuda_cpu); the twins then stand for the instructions.
// What a wrapper does on a card is not executed there: change this file only together with a run on a card.
#pragma once

// A bfloat16, the upper half of a float32. cuda_bf16.h has one too, but not every machine has cuda_bf16.h.
#ifdef CUDA_CPU
typedef cc::bf16 bf16;
#else
struct __align__(2) bf16 {
  unsigned short bits;
};
#endif

// Two numbers as bfloat16 (to nearest, ties to even): `low` in the lower half of the word, which is the first in memory.
__device__ __forceinline__ unsigned pack_bf16(float low, float high) {
#ifdef CUDA_CPU
  return cc::pack_bf16(low, high);
#else
  unsigned v;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
  return v;
#endif
}

// 16 bytes of weights. Read once, so not kept in L1; the next 256 bytes are fetched into L2. A plain load on purpose:
// the compiler moves read-only loads (.nc, __ldg, const __restrict__) below pdl_wait, and the prefetch is gone.
__device__ __forceinline__ uint4 load_weights(const uint4 *p) {
#ifdef CUDA_CPU
  return *p;
#else
  uint4 v;
  asm volatile("ld.global.L1::no_allocate.L2::256B.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
  return v;
#endif
}

// 16 bytes that an earlier kernel wrote: coherent, and never moved above pdl_wait.
__device__ __forceinline__ uint4 load_activations(const uint4 *p) {
#ifdef CUDA_CPU
  return *p;
#else
  uint4 v;
  asm volatile("ld.global.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
  return v;
#endif
}

// 16 bytes from global to shared memory without a register in between; zeros where `ok` is false.
__device__ __forceinline__ void cp_async16(void *shared, const void *global, bool ok) {
#ifdef CUDA_CPU
  cc::cp_async(shared, global, 16, ok ? 16 : 0);
#else
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"((unsigned)__cvta_generic_to_shared(shared)),
               "l"(global), "r"(ok ? 16 : 0) : "memory");
#endif
}

__device__ __forceinline__ void cp_async_commit() {
#ifdef CUDA_CPU
  cc::cp_async_commit();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most N of the committed groups are still on their way.
template <int N> __device__ __forceinline__ void cp_async_wait() {
#ifdef CUDA_CPU
  cc::cp_async_wait(N);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

// d += a * b on the tensor cores: a (16, 16) row-major, b (16, 8) column-major, bf16 in, float32 sums.
// Lane l holds of d rows l/4 and l/4 + 8, columns l%4*2 and l%4*2 + 1.
__device__ __forceinline__ void mma_bf16(float (&d)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0,
                                         unsigned b1) {
#ifdef CUDA_CPU
  const unsigned a[4] = {a0, a1, a2, a3}, b[2] = {b0, b1};
  cc::mma_m16n8k16(d, a, b, d);
#else
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#endif
}

// Programmatic dependent launch (compute capability 9.0; nothing below it): lets the next kernel of the stream start.
__device__ __forceinline__ void pdl_launch() {
#if !defined(CUDA_CPU) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Waits until the kernels before this one are complete and their writes visible. Every block of every kernel calls it
// before it reads or writes anything but weights.
__device__ __forceinline__ void pdl_wait() {
#if !defined(CUDA_CPU) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
