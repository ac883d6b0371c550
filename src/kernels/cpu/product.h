// Small matrix products C += A B out of packed operands, register block by register block.
//
// Operands consist of 32-bit units: one fp32 element, or a pair of bf16 elements that are neighbours along the
// dimension summed over. A unit of A is broadcast and multiplied with a vector of B.
#pragma once

#include "vector.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace {

typedef uint32_t Unit;

// A number as a type, to choose a template by an argument.
template <int kValue>
struct Number {
  static constexpr int value = kValue;
};

// Attention's scores and their gradients are computed for two keys and this many queries at a time.
constexpr int kSide = 32;
constexpr int kSideVecs = kSide / kLanes;
// Queries in a block, and keys.
constexpr int kBlock = 64;

// fp32 operands.
struct Singles {
  // Elements in a unit.
  static constexpr int kPer = 1;

  static BBT_INLINE Vec multiply_add(Unit a, BitVec b, Vec c) {
    float value;
    __builtin_memcpy(&value, &a, sizeof value);
    return broadcast(value) * reinterpret_cast<Vec>(b) + c;
  }

  // One row of the caller's, `dim` elements and zeros up to `padded`.
  template <class Dtype>
  static void pack_row(const typename Dtype::Element* from, int dim, int padded, Unit* to) {
    float* row = reinterpret_cast<float*>(to);
    int i = 0;
    for (; i + kLanes <= dim; i += kLanes) store(row + i, Dtype::load_row(from + i));
    for (; i < padded; ++i) row[i] = i < dim ? Dtype::to_float(from[i]) : 0;
  }

  // A block of packed rows, made the operand B of a product that sums over the rows.
  static void pack_pairs(const Unit* rows, int padded, Unit* to) {
    if (to != rows) __builtin_memcpy(to, rows, sizeof(Unit) * kBlock * padded);
  }

  // Two keys' values for kSide queries, into an operand A [keys, queries] of a product that sums over the keys …
  static BBT_INLINE void store_columns(Unit* to, int key, int query, const Vec (&x)[2][kSideVecs]) {
    for (int i = 0; i < 2; ++i) {
      for (int j = 0; j < kSideVecs; ++j) {
        store_bits(to + (key + i) * kBlock + query + j * kLanes, reinterpret_cast<BitVec>(x[i][j]));
      }
    }
  }

  // … or over the queries: the same.
  static BBT_INLINE void store_rows(Unit* to, int key, int query, const Vec (&x)[2][kSideVecs]) {
    store_columns(to, key, query, x);
  }
};

#if defined(__AVX512BF16__)
// bf16 operands, two to a unit, the lower half first; products and sums in fp32.
struct Pairs {
  static constexpr int kPer = 2;

  static BBT_INLINE Vec multiply_add(Unit a, BitVec b, Vec c) {
    const __m512i pair = _mm512_set1_epi32(static_cast<int>(a));
    return (Vec)_mm512_dpbf16_ps((__m512)c, (__m512bh)pair, (__m512bh)b);
  }

  template <class Dtype>
  static void pack_row(const uint16_t* from, int dim, int padded, Unit* to) {
    __builtin_memcpy(to, from, sizeof(uint16_t) * dim);
    __builtin_memset(reinterpret_cast<uint16_t*>(to) + dim, 0, sizeof(uint16_t) * (padded - dim));
  }

  static void pack_pairs(const Unit* rows, int padded, Unit* to) {
    const int units = padded / 2;
    for (int row = 0; row < kBlock; row += 2) {
      for (int i = 0; i < units; i += kLanes) {
        interleave(load_bits(rows + row * units + i), load_bits(rows + (row + 1) * units + i),
                   to + row / 2 * padded + 2 * i);
      }
    }
  }

  static BBT_INLINE void store_columns(Unit* to, int key, int query, const Vec (&x)[2][kSideVecs]) {
    interleave(round(x[0]), round(x[1]), to + key / 2 * kBlock + query);
  }

  static BBT_INLINE void store_rows(Unit* to, int key, int query, const Vec (&x)[2][kSideVecs]) {
    for (int i = 0; i < 2; ++i) store_bits(to + ((key + i) * kBlock + query) / 2, round(x[i]));
  }

 private:
  static BBT_INLINE BitVec round(const Vec (&x)[2]) {
    return (BitVec)_mm512_cvtne2ps_pbh((__m512)x[1], (__m512)x[0]);
  }

  // 32 units out of the bf16 elements of `a` and `b` in turn.
  static BBT_INLINE void interleave(BitVec a, BitVec b, Unit* to) {
    IntVec low, high;
    for (int i = 0; i < 16; ++i) {
      low[i] = (32 + i) << 16 | i;
      high[i] = (48 + i) << 16 | (16 + i);
    }
    store_bits(to, (BitVec)_mm512_permutex2var_epi16((__m512i)a, (__m512i)low, (__m512i)b));
    store_bits(to + kLanes, (BitVec)_mm512_permutex2var_epi16((__m512i)a, (__m512i)high, (__m512i)b));
  }
};
#endif

// In what order A lies: unit (row, step) at row * stride + step, or at step * stride + row.
enum class Order { kRows, kColumns };

// For products with a triangular A, what of the sum over k is left out, because A is zero there.
enum class Sum { kAll, kFromRow, kUpToRow };

template <class Compute, int kRows, int kVecs, Order kOrder, bool kAccumulate>
BBT_INLINE void multiply_block(const Unit* a, ptrdiff_t a_stride, const Unit* b, ptrdiff_t b_stride, ptrdiff_t steps,
                               float* c, ptrdiff_t c_stride) {
  Vec acc[kRows][kVecs];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kVecs; ++j) {
      if constexpr (kAccumulate) {
        acc[i][j] = load(c + i * c_stride + j * kLanes);
      } else {
        acc[i][j] = Vec{};
      }
    }
  }
  for (ptrdiff_t step = 0; step < steps; ++step) {
    BitVec vecs[kVecs];
#pragma GCC unroll 8
    for (int j = 0; j < kVecs; ++j) vecs[j] = load_bits(b + j * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const Unit unit = kOrder == Order::kRows ? a[i * a_stride] : a[i];
#pragma GCC unroll 8
      for (int j = 0; j < kVecs; ++j) acc[i][j] = Compute::multiply_add(unit, vecs[j], acc[i][j]);
    }
    a += kOrder == Order::kRows ? 1 : a_stride;
    b += b_stride;
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kVecs; ++j) store(c + i * c_stride + j * kLanes, acc[i][j]);
  }
}

// Rows and vectors of a register block: as many accumulators as hide the latency of two units.
#if BBT_LANES == 16
constexpr int kWideVecs = 4;
#else
constexpr int kWideVecs = 2;
#endif

// C[rows, cols] (+)= A[rows, inner] B[inner, cols]. `rows` is a multiple of 8, `cols` of kLanes, `inner` (in elements)
// of Compute::kPer. B lies as [inner / kPer, b_stride], in units.
template <class Compute, Order kOrder, Sum kSum, bool kAccumulate>
void multiply(const Unit* a, ptrdiff_t a_stride, const Unit* b, ptrdiff_t b_stride, float* c, ptrdiff_t c_stride,
              int rows, int cols, int inner) {
  const auto block = [&](auto block_rows, auto block_vecs, int col) {
    constexpr int kRows = decltype(block_rows)::value, kVecs = decltype(block_vecs)::value;
    for (int row = 0; row < rows; row += kRows) {
      const int first = kSum == Sum::kFromRow ? row / Compute::kPer : 0;
      const int last = (kSum == Sum::kUpToRow ? row + kRows : inner) / Compute::kPer;
      const Unit* a_row = kOrder == Order::kRows ? a + row * a_stride + first : a + row + first * a_stride;
      multiply_block<Compute, kRows, kVecs, kOrder, kAccumulate>(a_row, a_stride, b + first * b_stride + col, b_stride,
                                                                 last - first, c + row * c_stride + col, c_stride);
    }
  };
  int col = 0;
  for (; col + kWideVecs * kLanes <= cols; col += kWideVecs * kLanes) block(Number<4>{}, Number<kWideVecs>{}, col);
  if constexpr (kWideVecs > 2) {
    if (col + 3 * kLanes <= cols) {
      block(Number<4>{}, Number<3>{}, col);
      col += 3 * kLanes;
    }
    if (col + 2 * kLanes <= cols) {
      block(Number<8>{}, Number<2>{}, col);
      col += 2 * kLanes;
    }
  }
  if (col < cols) block(Number<8>{}, Number<1>{}, col);
}

}  // namespace
