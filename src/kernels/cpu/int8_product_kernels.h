// Products of int8 activations and packed ternary weights, exact in int32. Included by one file per instruction set.
#pragma once

#include "int8_product.h"
#include "vector.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

using bbt::int8_product::Element;
using bbt::int8_product::kPanel;
using bbt::int8_product::Problem;

// Rows of a task: their codes stay in the first cache beside a panel of weights.
constexpr int64_t kTaskRows = 48;

// acc + the products of four unsigned bytes of `weights` and four signed ones of `codes`, lane by lane.
#if defined(__AVX512VNNI__)
BBT_INLINE IntVec multiply_add(IntVec acc, BitVec weights, int32_t codes) {
  return (IntVec)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)weights, _mm512_set1_epi32(codes));
}
#elif defined(__AVXVNNI__)
BBT_INLINE IntVec multiply_add(IntVec acc, BitVec weights, int32_t codes) {
  return (IntVec)_mm256_dpbusd_avx_epi32((__m256i)acc, (__m256i)weights, _mm256_set1_epi32(codes));
}
#elif defined(__AVX512BW__)
BBT_INLINE IntVec multiply_add(IntVec acc, BitVec weights, int32_t codes) {
  const __m512i pairs = _mm512_maddubs_epi16((__m512i)weights, _mm512_set1_epi32(codes));
  return acc + (IntVec)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
}
#elif defined(__AVX2__)
BBT_INLINE IntVec multiply_add(IntVec acc, BitVec weights, int32_t codes) {
  const __m256i pairs = _mm256_maddubs_epi16((__m256i)weights, _mm256_set1_epi32(codes));
  return acc + (IntVec)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}
#else
BBT_INLINE IntVec multiply_add(IntVec acc, BitVec weights, int32_t codes) {
  // fp32 holds such products and their sums exactly, and every CPU multiplies vectors of it.
  Vec sum = {};
  for (int i = 0; i < 4; ++i) {
    const Vec weight = __builtin_convertvector((IntVec)(weights >> (8 * i) & 0xff), Vec);
    sum += weight * static_cast<float>(static_cast<int8_t>(codes >> (8 * i)));
  }
  return acc + __builtin_convertvector(sum, IntVec);
}
#endif

// Rows and vectors of a register block.
#if BBT_LANES == 16
constexpr int kBlockRows = 6, kBlockVecs = 4;
#elif BBT_LANES == 8
constexpr int kBlockRows = 4, kBlockVecs = 2;
#else
constexpr int kBlockRows = 4, kBlockVecs = 1;
#endif

static_assert(kPanel % (kBlockVecs * kLanes) == 0 && kTaskRows % kBlockRows == 0);

void pack(const int8_t* codes, int64_t out, int64_t in, int64_t begin, int64_t end, uint8_t* packed) {
  const int64_t words = bbt::int8_product::words(in);
  for (int64_t panel = begin; panel < end; ++panel) {
    uint8_t* to = packed + panel * words * kPanel * 4;
    __builtin_memset(to, 0, words * kPanel * 4);
    for (int64_t o = 0; o < kPanel && panel * kPanel + o < out; ++o) {
      const int8_t* row = codes + (panel * kPanel + o) * in;
      for (int64_t i = 0; i < in; ++i) to[(i / 4 * kPanel + o) * 4 + i % 4] = static_cast<uint8_t>(row[i] + 1);
    }
  }
}

int64_t tasks(const Problem& p) { return (p.rows + kTaskRows - 1) / kTaskRows; }

size_t scratch(const Problem& p) { return kTaskRows * bbt::int8_product::words(p.in) * 4; }

template <class Dtype>
BBT_INLINE void store_part(typename Dtype::Element* to, Vec x, int64_t n) {
  if (n >= kLanes) return Dtype::store_row(to, x);
  typename Dtype::Element part[kLanes];
  Dtype::store_row(part, x);
  __builtin_memcpy(to, part, sizeof(typename Dtype::Element) * n);
}

// One register block: the outputs of `rows` rows from `row` on and of the panel's vectors from `vec` on.
template <class Dtype>
BBT_INLINE void block(const Problem& p, const int32_t* codes, const int32_t* sums, int64_t row, int64_t rows,
                      int64_t panel, int64_t vec) {
  const int64_t words = bbt::int8_product::words(p.in);
  const uint8_t* weights = p.packed + (panel * words * kPanel + vec * kLanes) * 4;
  IntVec acc[kBlockRows][kBlockVecs] = {};
  for (int64_t word = 0; word < words; ++word) {
    BitVec vecs[kBlockVecs];
#pragma GCC unroll 8
    for (int j = 0; j < kBlockVecs; ++j) vecs[j] = load_bits(weights + j * kLanes * 4);
#pragma GCC unroll 8
    for (int i = 0; i < kBlockRows; ++i) {
      const int32_t code = codes[i * words + word];
#pragma GCC unroll 8
      for (int j = 0; j < kBlockVecs; ++j) acc[i][j] = multiply_add(acc[i][j], vecs[j], code);
    }
    weights += kPanel * 4;
  }
  const int64_t first = panel * kPanel + vec * kLanes;
#pragma GCC unroll 8
  for (int i = 0; i < kBlockRows; ++i) {
    if (i >= rows) break;
    const float factor = p.scales[row + i] * p.gamma;
    typename Dtype::Element* to = static_cast<typename Dtype::Element*>(p.result) + (row + i) * p.out + first;
#pragma GCC unroll 8
    for (int j = 0; j < kBlockVecs; ++j) {
      const int64_t left = p.out - first - j * kLanes;
      const Vec exact = __builtin_convertvector(acc[i][j] - sums[i], Vec);
      if (left > 0) store_part<Dtype>(to + j * kLanes, exact * factor, left);
    }
  }
}

template <class Dtype>
void product_as(const Problem& p, int64_t begin, int64_t end, void* scratch) {
  const int64_t words = bbt::int8_product::words(p.in), panels = bbt::int8_product::panels(p.out);
  int8_t* rows = static_cast<int8_t*>(scratch);
  int32_t sums[kTaskRows];
  for (int64_t task = begin; task < end; ++task) {
    const int64_t first = task * kTaskRows, left = p.rows - first, count = left < kTaskRows ? left : kTaskRows;
    __builtin_memset(rows, 0, kTaskRows * words * 4);
    for (int64_t row = 0; row < kTaskRows; ++row) {
      sums[row] = 0;
      if (row >= count) continue;
      const int8_t* codes = p.codes + (first + row) * p.in;
      __builtin_memcpy(rows + row * words * 4, codes, p.in);
      for (int64_t i = 0; i < p.in; ++i) sums[row] += codes[i];
    }
    for (int64_t panel = 0; panel < panels; ++panel) {
      for (int64_t row = 0; row < count; row += kBlockRows) {
        const int32_t* codes = reinterpret_cast<const int32_t*>(rows + row * words * 4);
        for (int64_t vec = 0; vec * kLanes < kPanel && panel * kPanel + vec * kLanes < p.out; vec += kBlockVecs) {
          block<Dtype>(p, codes, sums + row, first + row, count - row, panel, vec);
        }
      }
    }
  }
}

void product(const Problem& p, int64_t begin, int64_t end, void* scratch) {
  switch (p.element) {
    case Element::kFloat:
      return product_as<Float>(p, begin, end, scratch);
    case Element::kBFloat16:
      return product_as<BFloat16>(p, begin, end, scratch);
    case Element::kHalf:
      return product_as<Half>(p, begin, end, scratch);
  }
}

constexpr bbt::int8_product::Kernels kernels(const char* name) {
  return {
      .name = name,
      .needs = compiled_for(),
      .pack = pack,
      .tasks = tasks,
      .scratch = scratch,
      .product = product,
  };
}

}  // namespace
