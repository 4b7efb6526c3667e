// device.h -- CUDA C++ as a host compiler understands it: a .cu file is compiled as C++17 with this header before it.
//
// A CUDA thread is a fiber of runtime.cpp; all of them share one thread of the operating system, so a launch is
// deterministic. Shared memory is thread-local memory of the module: `thread_local` is the one storage class that C++
// allows both for `__shared__ T x[N];` inside a function (it implies static) and for `extern __shared__ T x[];`.
// What a kernel can only say in PTX goes through kernels/ptx.cuh, which has a branch for CUDA_CPU.
//
// Only what such kernels need is here. A name that is missing is a compile error: add it here.
#pragma once
#define CUDA_CPU 1
#define __CUDA_ARCH__ 900
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <type_traits>
#include <utility>

#define CC_INTERNAL __attribute__((visibility("hidden")))
#define CC_EXPORT extern "C" __attribute__((visibility("default")))
#define CC_UNCHECKED __attribute__((no_sanitize("thread", "undefined"), noinline))

// ---------------------------------------------------------------- the language
#define __global__ __attribute__((visibility("default")))  // __init__.py finds kernels by this text
#define __shared__ thread_local                            // and dynamic shared memory by this one
#define __device__
#define __host__
#define __forceinline__ __inline__ __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

#define CC_VECTORS(T, NAME)                                                   \
  struct alignas(2 * sizeof(T)) NAME##2 { T x, y; };                          \
  struct NAME##3 { T x, y, z; };                                              \
  struct alignas(4 * sizeof(T)) NAME##4 { T x, y, z, w; };                    \
  inline NAME##2 make_##NAME##2(T x, T y) { return {x, y}; }                  \
  inline NAME##3 make_##NAME##3(T x, T y, T z) { return {x, y, z}; }          \
  inline NAME##4 make_##NAME##4(T x, T y, T z, T w) { return {x, y, z, w}; }
CC_VECTORS(int, int)
CC_VECTORS(unsigned, uint)
CC_VECTORS(float, float)

CC_INTERNAL extern uint3 threadIdx, blockIdx, blockDim, gridDim;  // set by the scheduler at every change of thread
constexpr int warpSize = 32;

// ---------------------------------------------------------------- what runtime.cpp does for a kernel
namespace cc {
// A place in the source. As a default argument it is the place of the call.
struct Site {
  const char *file;
  int line;
  static constexpr Site here(const char *file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};
#define CC_SITE cc::Site site = cc::Site::here()

CC_INTERNAL unsigned lane();
CC_INTERNAL void sync_block(Site);
CC_INTERNAL void sync_warp(unsigned mask, Site);
CC_INTERNAL uint64_t shuffle(unsigned mask, uint64_t value, int source, Site);
CC_INTERNAL unsigned ballot(unsigned mask, bool vote, Site);
CC_INTERNAL void mma(float *d, const unsigned *a, const unsigned *b, const float *c, Site);
CC_INTERNAL void fence();
CC_INTERNAL void atomic_access(const void *address, size_t bytes, const void *pc);
CC_INTERNAL void cp_async(void *shared, const void *global, unsigned bytes, unsigned valid_bytes);
CC_INTERNAL void cp_async_commit();
CC_INTERNAL void cp_async_wait(unsigned groups_left);

template <class To, class From> inline To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

template <class T> inline T shuffle_value(unsigned mask, T value, int source, Site site) {
  static_assert(sizeof(T) <= sizeof(uint64_t) && std::is_trivially_copyable_v<T>);
  uint64_t word = 0;
  memcpy(&word, &value, sizeof value);
  word = shuffle(mask, word, source, site);
  memcpy(&value, &word, sizeof value);
  return value;
}
}  // namespace cc

// ---------------------------------------------------------------- barriers, fences, shuffles, votes
inline void __syncthreads(CC_SITE) { cc::sync_block(site); }
inline void __syncwarp(unsigned mask = ~0u, CC_SITE) { cc::sync_warp(mask, site); }
inline void __threadfence() { cc::fence(); }
inline void __threadfence_system() { cc::fence(); }
inline void __threadfence_block() {}

// `width` cuts the warp into segments; a source outside the own segment is the lane itself.
template <class T> inline T __shfl_sync(unsigned mask, T value, int source, int width = 32, CC_SITE) {
  const int segment = cc::lane() & ~(width - 1);
  return cc::shuffle_value(mask, value, segment | (source & (width - 1)), site);
}
template <class T> inline T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, CC_SITE) {
  const int lane = cc::lane(), source = lane ^ lane_mask, last = lane | (width - 1);
  return cc::shuffle_value(mask, value, source > last ? lane : source, site);
}
template <class T> inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, CC_SITE) {
  const int lane = cc::lane(), source = lane + (int)delta, last = lane | (width - 1);
  return cc::shuffle_value(mask, value, source > last ? lane : source, site);
}
template <class T> inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, CC_SITE) {
  const int lane = cc::lane(), source = lane - (int)delta, first = lane & ~(width - 1);
  return cc::shuffle_value(mask, value, source < first ? lane : source, site);
}
inline unsigned __ballot_sync(unsigned mask, int vote, CC_SITE) { return cc::ballot(mask, vote, site); }
inline int __any_sync(unsigned mask, int vote, CC_SITE) { return cc::ballot(mask, vote, site) != 0; }
inline int __all_sync(unsigned mask, int vote, CC_SITE) { return cc::ballot(mask, !vote, site) == 0; }

// ---------------------------------------------------------------- atomics, loads
// One thread of the operating system runs all, so a plain read and write is atomic. The checker is told that it is.
#define CC_ATOMIC(NAME, NEW)                                                        \
  template <class T> CC_UNCHECKED T NAME(T *address, std::common_type_t<T> value) { \
    cc::atomic_access(address, sizeof(T), __builtin_return_address(0));             \
    const T old = *address;                                                         \
    *address = NEW;                                                                 \
    return old;                                                                     \
  }
CC_ATOMIC(atomicAdd, old + value)
CC_ATOMIC(atomicExch, value)
CC_ATOMIC(atomicMax, old > value ? old : value)
CC_ATOMIC(atomicOr, old | value)
CC_ATOMIC(atomicInc, old >= value ? 0 : old + 1)
template <class T>
CC_UNCHECKED T atomicCAS(T *address, std::common_type_t<T> expected, std::common_type_t<T> value) {
  cc::atomic_access(address, sizeof(T), __builtin_return_address(0));
  const T old = *address;
  if (old == expected) *address = value;
  return old;
}
template <class T> inline T __ldcg(const T *address) { return *address; }

// ---------------------------------------------------------------- numbers (exact where the card approximates)
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return (float)(1.0 / sqrt((double)x)); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __int_as_float(int i) { return cc::bits<float>(i); }
inline int __float_as_int(float f) { return cc::bits<int>(f); }
inline float __uint_as_float(unsigned i) { return cc::bits<float>(i); }
inline unsigned __float_as_uint(float f) { return cc::bits<unsigned>(f); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((uint64_t)a * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return (unsigned long long)((unsigned __int128)a * b >> 64);
}
inline unsigned __brev(unsigned x) {
  unsigned reversed = 0;
  for (int i = 0; i < 32; i++) reversed |= (x >> i & 1) << (31 - i);
  return reversed;
}
template <class A, class B> using CcCommon =
    std::enable_if_t<std::is_arithmetic_v<A> && std::is_arithmetic_v<B>, std::common_type_t<A, B>>;
template <class A, class B> inline CcCommon<A, B> min(A a, B b) { return b < a ? b : a; }
template <class A, class B> inline CcCommon<A, B> max(A a, B b) { return a < b ? b : a; }

// ---------------------------------------------------------------- what kernels/ptx.cuh calls instead of an instruction
namespace cc {
struct alignas(2) bf16 { unsigned short bits; };  // a bfloat16, the upper half of a float32

inline unsigned to_bf16(float f) {
  const unsigned u = bits<unsigned>(f);
  return f != f ? 0x7FFF : (u + 0x7FFF + (u >> 16 & 1)) >> 16;  // to nearest, ties to even
}
inline unsigned pack_bf16(float low, float high) { return to_bf16(low) | to_bf16(high) << 16; }

inline void mma_m16n8k16(float *d, const unsigned *a, const unsigned *b, const float *c, CC_SITE) { mma(d, a, b, c, site); }

// ---------------------------------------------------------------- how __init__.py calls a kernel
struct Parameter {
  int pointer, writable;  // a pointer; to what is not const
  int kind, bytes;        // of the value or, for a pointer, of the item: (f)loat, (i)nteger, (s)truct or (v)oid
};

template <class T> constexpr int kind_of() {
  if (std::is_void_v<T>) return 'v';
  if (std::is_floating_point_v<T>) return 'f';
  return std::is_integral_v<T> || std::is_same_v<T, cc::bf16> ? 'i' : 's';  // bf16 is uint16 in NumPy
}

template <class T> constexpr Parameter describe() {
  using Pointee = std::remove_pointer_t<T>;
  using Value = std::remove_cv_t<Pointee>;
  using Sized = std::conditional_t<std::is_void_v<Value>, char, Value>;
  const bool pointer = std::is_pointer_v<T>;
  return {pointer, pointer && !std::is_const_v<Pointee>, kind_of<Value>(), sizeof(Sized)};
}

template <class... P> int describe_all(void (*)(P...), const Parameter **list) {
  static const Parameter all[] = {describe<P>()..., {}};
  *list = all;
  return sizeof...(P);
}

template <class... P, size_t... I>
CC_UNCHECKED void call(void (*kernel)(P...), void **arguments, std::index_sequence<I...>) {
  kernel(*(P *)arguments[I]...);
}
template <class... P> void call(void (*kernel)(P...), void **arguments) {
  call(kernel, arguments, std::index_sequence_for<P...>());
}
}  // namespace cc

#define CC_KERNEL(NAME)                                                                                              \
  CC_EXPORT void cc_run_##NAME(void **arguments) { cc::call(NAME, arguments); }                                      \
  CC_EXPORT int cc_parameters_##NAME(const cc::Parameter **list) { return cc::describe_all(NAME, list); }
