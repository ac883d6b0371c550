// What the kernels share: dtypes, packs of values, sums over a block. NVRTC compiles this without any header of CUDA,
// which a user's machine need not have: conversions are bit operations and PTX.
#pragma once

#include "arguments.h"

namespace bbt::cuda {

struct Half {
  unsigned short bits;
};

struct BFloat16 {
  unsigned short bits;
};

#ifdef __CUDA_ARCH__
// The emulation has these two of its own.
inline float half_to_float(unsigned short bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

inline unsigned short float_to_half(float value) {
  unsigned short bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}
#endif

inline float to_float(float x) {
  return x;
}

inline float to_float(int x) {
  return static_cast<float>(x);
}

inline float to_float(signed char x) {
  return static_cast<float>(x);
}

inline float to_float(Half x) {
  return half_to_float(x.bits);
}

inline float to_float(BFloat16 x) {
  return __uint_as_float(static_cast<unsigned>(x.bits) << 16);
}

inline void assign(float& to, float x) {
  to = x;
}

inline void assign(Half& to, float x) {
  to.bits = float_to_half(x);
}

// To nearest, ties to even.
inline void assign(BFloat16& to, float x) {
  const unsigned bits = __float_as_uint(x);
  to.bits = static_cast<unsigned short>(x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// --- packs ------------------------------------------------------------------------------------------

// N values that are read or written at once, in words of 16 bytes at most.
template <typename T, int N>
struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Pack {
  T values[N];
};

template <typename T, int N>
void load(const T* from, float (&values)[N]) {
  const auto pack = *reinterpret_cast<const Pack<T, N>*>(from);
  for (int k = 0; k < N; ++k) values[k] = to_float(pack.values[k]);
}

template <typename T, int N>
void store(T* to, const float (&values)[N]) {
  Pack<T, N> pack;
  for (int k = 0; k < N; ++k) assign(pack.values[k], values[k]);
  *reinterpret_cast<Pack<T, N>*>(to) = pack;
}

template <int N>
struct Width {
  static constexpr int value = N;
};

// Whether rows of `d` values, of which each pointer is the first, may be read in packs of N.
template <int N = kPack, typename... Pointer>
bool packed(long long d, Pointer... first) {
  return d % N == 0 && ((reinterpret_cast<unsigned long long>(first) % 16 == 0) && ...);
}

// body(i, Width<N>()) for every N values of 0 .. d, Packs or 1, that are the work of thread `index` of `count`: the
// same ones at each call.
template <int Packs = kPack, typename Body>
void each(bool packed, long long d, long long index, long long count, const Body& body) {
  if (packed) {
    for (long long i = index * Packs; i < d; i += count * Packs) body(i, Width<Packs>());
  } else {
    for (long long i = index; i < d; i += count) body(i, Width<1>());
  }
}

// Those of this thread in its block.
template <int Packs = kPack, typename Body>
void each(bool packed, long long d, const Body& body) {
  each<Packs>(packed, d, threadIdx.x, blockDim.x, body);
}

// --- over a block -----------------------------------------------------------------------------------

struct Add {
  float operator()(float a, float b) const { return a + b; }
};

// The larger; NaN where either is.
struct Max {
  float operator()(float a, float b) const { return a != a || a > b ? a : b; }
};

// `value` of the warp's threads, combined. Every one of them calls it and gets the same.
template <typename Op>
float over_warp(float value, Op op) {
  for (int distance = 16; distance > 0; distance /= 2) value = op(value, __shfl_xor_sync(0xffffffffu, value, distance));
  return value;
}

// `value` of all threads, combined in one order. Every thread of the block calls it and gets the same.
template <typename Op>
float over_block(float value, Op op) {
  __shared__ float warps[kMaxThreads / 32];
  value = over_warp(value, op);
  // The result of the call before has been read.
  __syncthreads();
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  value = warps[0];
  for (unsigned warp = 1; warp < blockDim.x / 32; ++warp) value = op(value, warps[warp]);
  return value;
}

}  // namespace bbt::cuda

// A kernel by its name, and for each dtype, or for each two: NAME_float, NAME_float_bfloat16.
#ifndef BBT_KERNEL
#define BBT_KERNEL(name, ending, Arguments, ...)                            \
  extern "C" __global__ void __launch_bounds__(bbt::cuda::kMaxThreads)      \
      name##ending(const bbt::cuda::Arguments arguments) {                  \
    bbt::cuda::name __VA_ARGS__(arguments);                                 \
  }
#endif
#define BBT_KERNELS(name, Arguments)                              \
  BBT_KERNEL(name, _float, Arguments, <float>)                    \
  BBT_KERNEL(name, _half, Arguments, <bbt::cuda::Half>)           \
  BBT_KERNEL(name, _bfloat16, Arguments, <bbt::cuda::BFloat16>)
#define BBT_KERNELS_2(name, Arguments)                                                     \
  BBT_KERNEL(name, _float_float, Arguments, <float, float>)                                \
  BBT_KERNEL(name, _float_half, Arguments, <float, bbt::cuda::Half>)                       \
  BBT_KERNEL(name, _float_bfloat16, Arguments, <float, bbt::cuda::BFloat16>)               \
  BBT_KERNEL(name, _half_float, Arguments, <bbt::cuda::Half, float>)                       \
  BBT_KERNEL(name, _half_half, Arguments, <bbt::cuda::Half, bbt::cuda::Half>)              \
  BBT_KERNEL(name, _half_bfloat16, Arguments, <bbt::cuda::Half, bbt::cuda::BFloat16>)      \
  BBT_KERNEL(name, _bfloat16_float, Arguments, <bbt::cuda::BFloat16, float>)               \
  BBT_KERNEL(name, _bfloat16_half, Arguments, <bbt::cuda::BFloat16, bbt::cuda::Half>)      \
  BBT_KERNEL(name, _bfloat16_bfloat16, Arguments, <bbt::cuda::BFloat16, bbt::cuda::BFloat16>)
