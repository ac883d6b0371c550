// Vectors of fp32 as wide as the instruction set that this is compiled for has them, by the compiler's vector
// extension. Everything is in an unnamed namespace: what one instruction set's file compiles, no other may link to.
#pragma once

#include "features.h"

#include <cstddef>
#include <cstdint>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define BBT_LANES 16
#elif defined(__AVX2__)
#define BBT_LANES 8
#else
#define BBT_LANES 4
#endif

namespace {

// What this file is compiled for: its kernels need a CPU that has all of it.
constexpr bbt::CpuFeatures compiled_for() {
  uint32_t bits = 0;
  [[maybe_unused]] const auto add = [&](bbt::CpuFeature feature) { bits |= uint32_t{1} << static_cast<int>(feature); };
#if defined(__AVX2__)
  add(bbt::CpuFeature::kAvx2);
#endif
#if defined(__FMA__)
  add(bbt::CpuFeature::kFma);
#endif
#if defined(__AVX512F__)
  add(bbt::CpuFeature::kAvx512F);
#endif
#if defined(__AVX512BW__)
  add(bbt::CpuFeature::kAvx512Bw);
#endif
#if defined(__AVX512DQ__)
  add(bbt::CpuFeature::kAvx512Dq);
#endif
#if defined(__AVX512VL__)
  add(bbt::CpuFeature::kAvx512Vl);
#endif
#if defined(__AVX512VNNI__)
  add(bbt::CpuFeature::kAvx512Vnni);
#endif
#if defined(__AVX512VBMI__)
  add(bbt::CpuFeature::kAvx512Vbmi);
#endif
#if defined(__AVX512BF16__)
  add(bbt::CpuFeature::kAvx512Bf16);
#endif
#if defined(__AVXVNNI__)
  add(bbt::CpuFeature::kAvxVnni);
#endif
  return {bits};
}

constexpr int kLanes = BBT_LANES;

typedef float Vec __attribute__((vector_size(4 * BBT_LANES)));
typedef int32_t IntVec __attribute__((vector_size(4 * BBT_LANES)));
typedef uint32_t BitVec __attribute__((vector_size(4 * BBT_LANES)));
typedef uint16_t HalfVec __attribute__((vector_size(2 * BBT_LANES)));
typedef int8_t ByteVec __attribute__((vector_size(BBT_LANES)));

// The same anywhere in memory.
typedef float LooseVec __attribute__((vector_size(4 * BBT_LANES), aligned(4), may_alias));
typedef uint32_t LooseBitVec __attribute__((vector_size(4 * BBT_LANES), aligned(4), may_alias));
typedef uint16_t LooseHalfVec __attribute__((vector_size(2 * BBT_LANES), aligned(2), may_alias));
typedef int8_t LooseByteVec __attribute__((vector_size(BBT_LANES), aligned(1), may_alias));

#define BBT_INLINE inline __attribute__((always_inline))

BBT_INLINE Vec load(const float* p) { return *reinterpret_cast<const LooseVec*>(p); }
BBT_INLINE void store(float* p, Vec x) { *reinterpret_cast<LooseVec*>(p) = x; }
BBT_INLINE BitVec load_bits(const void* p) { return *static_cast<const LooseBitVec*>(p); }
BBT_INLINE void store_bits(void* p, BitVec x) { *static_cast<LooseBitVec*>(p) = x; }
BBT_INLINE Vec broadcast(float x) { return x - Vec{}; }

BBT_INLINE Vec larger(Vec a, Vec b) { return a > b ? a : b; }

// |x|; not a number stays so.
BBT_INLINE Vec magnitude(Vec x) { return reinterpret_cast<Vec>(reinterpret_cast<BitVec>(x) & 0x7fffffff); }

BBT_INLINE Vec square_root(Vec x) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec>(_mm512_maskz_sqrt_ps(0xffff, reinterpret_cast<__m512>(x)));
#elif defined(__AVX2__)
  return reinterpret_cast<Vec>(_mm256_sqrt_ps(reinterpret_cast<__m256>(x)));
#elif defined(__SSE2__)
  return reinterpret_cast<Vec>(_mm_sqrt_ps(reinterpret_cast<__m128>(x)));
#else
  for (int i = 0; i < kLanes; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}

// To the nearest integer, ties to even, for |x| below 2^22.
BBT_INLINE Vec round_to_even(Vec x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23, beside which there is no room for a fraction.
  return (x + kRound) - kRound;
}

BBT_INLINE float sum(Vec x) {
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += x[i];
  return total;
}

// 0, 1, 2, …
BBT_INLINE IntVec iota() {
  IntVec x;
  for (int i = 0; i < kLanes; ++i) x[i] = i;
  return x;
}

// 2^x for x <= 0, to 1e-7 of itself; 0 below the smallest normal number.
BBT_INLINE Vec exp2_of_negative(Vec x) {
  // Adding 1.5 * 2^23 rounds to an integer, which then stands in the lowest bits; 127 is the exponent's bias.
  constexpr float kRound = 12582912.0f + 127.0f;
  const Vec shifted = x + kRound;
  const Vec f = x - (shifted - kRound);
  // Minimax polynomial of 2^f on [-0.5, 0.5].
  Vec p = f * 1.534581242594868e-4f + 1.3399930903688073e-3f;
  p = p * f + 9.618489071726799e-3f;
  p = p * f + 5.550328642129898e-2f;
  p = p * f + 2.4022646248340607e-1f;
  p = p * f + 6.931471824645996e-1f;
  p = p * f + 1.0f;
  const Vec power = reinterpret_cast<Vec>(reinterpret_cast<BitVec>(shifted) << 23);
  return x < -126.0f ? Vec{} : p * power;
}

BBT_INLINE Vec from_bfloat16(HalfVec x) {
  return reinterpret_cast<Vec>(__builtin_convertvector(x, BitVec) << 16);
}

// Rounds to nearest, ties to even; not a number stays so.
BBT_INLINE HalfVec to_bfloat16(Vec x) {
  const BitVec bits = reinterpret_cast<BitVec>(x);
  const BitVec rounded = (bits + (0x7fff + ((bits >> 16) & 1))) >> 16;
  const BitVec result = x == x ? rounded : BitVec{} + 0x7fc0;
  return __builtin_convertvector(result, HalfVec);
}

BBT_INLINE Vec from_half(HalfVec x) {
  const BitVec bits = __builtin_convertvector(x, BitVec);
  // The exponent's bias is 15, not 127; multiplying also makes subnormal numbers normal.
  const Vec value = reinterpret_cast<Vec>((bits & 0x7fff) << 13) * 0x1p112f;
  const BitVec special = (bits & 0x7c00) == 0x7c00 ? BitVec{} + 0x7f800000 : BitVec{};
  return reinterpret_cast<Vec>(reinterpret_cast<BitVec>(value) | special | (bits & 0x8000) << 16);
}

// Rounds to nearest, ties to even; not a number stays so.
BBT_INLINE HalfVec to_half(Vec x) {
  // What is too large becomes infinite in the first product.
  const Vec value = (magnitude(x) * 0x1p112f) * 0x1p-110f;
  const BitVec bits = reinterpret_cast<BitVec>(x), twice = bits + bits, sign = (bits >> 16) & 0x8000;
  // Added to a number whose last bit is what the result's last bit stands for, the value is rounded to it.
  const BitVec exponent = twice & 0xff000000, smallest = BitVec{} + 0x71000000;
  const Vec base = reinterpret_cast<Vec>(((exponent > smallest ? exponent : smallest) >> 1) + 0x07800000) + value;
  const BitVec rounded = reinterpret_cast<BitVec>(base);
  const BitVec result = ((rounded >> 13) & 0x7c00) + (rounded & 0xfff);
  return __builtin_convertvector(sign | (twice > 0xff000000 ? BitVec{} + 0x7e00 : result), HalfVec);
}

BBT_INLINE float from_bfloat16(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

// The dtype of the caller's tensors: how a row of them is read and written.
struct Float {
  typedef float Element;
  static BBT_INLINE float to_float(float x) { return x; }
  static BBT_INLINE Vec load_row(const float* p) { return load(p); }
  static BBT_INLINE void store_row(float* p, Vec x) { store(p, x); }
};

struct BFloat16 {
  typedef uint16_t Element;
  static BBT_INLINE float to_float(uint16_t x) { return from_bfloat16(x); }
  static BBT_INLINE Vec load_row(const uint16_t* p) {
    return from_bfloat16(*reinterpret_cast<const LooseHalfVec*>(p));
  }
  static BBT_INLINE void store_row(uint16_t* p, Vec x) { *reinterpret_cast<LooseHalfVec*>(p) = to_bfloat16(x); }
};

struct Half {
  typedef uint16_t Element;
  static BBT_INLINE Vec load_row(const uint16_t* p) { return from_half(*reinterpret_cast<const LooseHalfVec*>(p)); }
  static BBT_INLINE void store_row(uint16_t* p, Vec x) { *reinterpret_cast<LooseHalfVec*>(p) = to_half(x); }
};

// Small integers; what is stored is one.
struct Int8 {
  typedef int8_t Element;
  static BBT_INLINE Vec load_row(const int8_t* p) {
    return __builtin_convertvector(*reinterpret_cast<const LooseByteVec*>(p), Vec);
  }
  static BBT_INLINE void store_row(int8_t* p, Vec x) {
    const IntVec integers = __builtin_convertvector(x, IntVec);
    *reinterpret_cast<LooseByteVec*>(p) = __builtin_convertvector(integers, ByteVec);
  }
};

// One stage of transposing kLanes x kLanes words: exchanges the off-diagonal quarters of every square of 2 * kHalf.
template <int kHalf>
BBT_INLINE void transpose_stage(BitVec* rows) {
  BitVec low, high;
  for (int i = 0; i < kLanes; ++i) {
    low[i] = i & kHalf ? kLanes + i - kHalf : i;
    high[i] = i & kHalf ? kLanes + i : i + kHalf;
  }
  for (int i = 0; i < kLanes; ++i) {
    if (i & kHalf) continue;
    const BitVec a = rows[i], b = rows[i + kHalf];
    rows[i] = __builtin_shuffle(a, b, low);
    rows[i + kHalf] = __builtin_shuffle(a, b, high);
  }
}

// to[c][r] = from[r][c] for kLanes rows and columns of words.
BBT_INLINE void transpose(const uint32_t* from, ptrdiff_t from_stride, uint32_t* to, ptrdiff_t to_stride) {
  BitVec rows[kLanes];
  for (int i = 0; i < kLanes; ++i) rows[i] = load_bits(from + i * from_stride);
  if constexpr (kLanes > 8) transpose_stage<8>(rows);
  if constexpr (kLanes > 4) transpose_stage<4>(rows);
  transpose_stage<2>(rows);
  transpose_stage<1>(rows);
  for (int i = 0; i < kLanes; ++i) store_bits(to + i * to_stride, rows[i]);
}

}  // namespace
