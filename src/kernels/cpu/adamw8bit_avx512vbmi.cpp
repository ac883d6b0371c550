// AdamW over moments of 8 bits, where a vector of bytes can be looked up at once: the same bits as with AVX-512 alone.
#include "adamw8bit_kernels.h"

#include "adamw8bit_lookup.h"

namespace {

using bbt::adamw8bit::Lookup;

// Values whose codes fill a vector.
constexpr int64_t kGroup = 64;

BBT_INLINE __m512i bytes(const void* p) { return _mm512_loadu_si512(p); }

// In one instruction.
BBT_INLINE Vec larger_number(Vec a, Vec b) {
  return reinterpret_cast<Vec>(
      _mm512_maskz_max_ps(0xffff, reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
}

constexpr __mmask64 kAll = ~__mmask64{0};

// table[i & 127].
BBT_INLINE __m512i look_up_128(const uint8_t* table, __m512i i) {
  return _mm512_permutex2var_epi8(bytes(table), i, bytes(table + 64));
}

// table[i]; `upper` is the highest bit of each i.
BBT_INLINE __m512i look_up_256(const uint8_t* table, __m512i i, __mmask64 upper) {
  return _mm512_mask_mov_epi8(look_up_128(table, i), upper, look_up_128(table + 128, i));
}

// The values of kGroup codes. The bytes of a value are looked up apart and put together within quarters of a vector.
BBT_INLINE void dequantize_group(const uint8_t* codes, const Lookup& book, Vec (&to)[4]) {
  // So that the i-th quarters of the four words of a quarter come to lie in the i-th vector.
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i code = _mm512_maskz_permutexvar_epi32(0xffff, order, bytes(codes));
  const __mmask64 upper = _mm512_movepi8_mask(code);
  __m512i byte[4];
  for (int b = 0; b < 4; ++b) byte[b] = look_up_256(book.values[b], code, upper);
  const __m512i low[] = {_mm512_unpacklo_epi8(byte[0], byte[1]), _mm512_unpackhi_epi8(byte[0], byte[1])};
  const __m512i high[] = {_mm512_unpacklo_epi8(byte[2], byte[3]), _mm512_unpackhi_epi8(byte[2], byte[3])};
  for (int half = 0; half < 2; ++half) {
    const __m512i words[] = {_mm512_unpacklo_epi16(low[half], high[half]),
                             _mm512_unpackhi_epi16(low[half], high[half])};
    for (int i = 0; i < 2; ++i) {
      to[2 * half + i] = reinterpret_cast<Vec>(words[i]);
    }
  }
}

// The places of 32 values divided by their block's largest: 16 bits each, in quarters that alternate.
BBT_INLINE __m512i places(const float* x, float divisor) {
  const auto place = [&](const float* x) {
    const Vec place = (load(x) / divisor + 1.0f) * 32767.5f + 0.5f;
    return reinterpret_cast<__m512i>(__builtin_convertvector(place, IntVec));
  };
  return _mm512_packus_epi32(place(x), place(x + kLanes));
}

// Of kGroup values, to be divided by `divisor`.
template <bool kHasSign>
BBT_INLINE void quantize_group(const float* x, const Lookup& book, float divisor, uint8_t* codes) {
  __m512i place[] = {places(x, divisor), places(x + 32, divisor)}, distance[2];
  // 2 m, and behind a minus 2 m + 1.
  for (int i = 0; i < 2; ++i) {
    distance[i] = _mm512_slli_epi16(place[i], 1);
    if (kHasSign) {
      const __m512i plus = _mm512_srai_epi16(place[i], 15);
      distance[i] = _mm512_ternarylogic_epi32(distance[i], plus, plus, 0xc3);
    }
  }
  // Where the lower byte of each value's 16 bits is, in two vectors whose quarters alternate.
  alignas(64) static constexpr uint8_t kLower[kGroup] = {
      0,  2,  4,  6,  16, 18, 20,  22,  32,  34,  36,  38,  48,  50,  52,  54,   //
      8,  10, 12, 14, 24, 26, 28,  30,  40,  42,  44,  46,  56,  58,  60,  62,   //
      64, 66, 68, 70, 80, 82, 84,  86,  96,  98,  100, 102, 112, 114, 116, 118,  //
      72, 74, 76, 78, 88, 90, 92,  94,  104, 106, 108, 110, 120, 122, 124, 126};
  const __m512i lower = bytes(kLower), upper = _mm512_or_si512(lower, _mm512_set1_epi8(1));
  const auto pick = [&](__m512i which, __m512i a, __m512i b) { return _mm512_permutex2var_epi8(a, which, b); };
  const __m512i low = pick(lower, distance[0], distance[1]), high = pick(upper, distance[0], distance[1]);
  // Of each 16 bits, those from the sixth and those from the third.
  const __m512i from = _mm512_set1_epi64(0x3336232613160306);
  const __m512i shifted[] = {_mm512_maskz_multishift_epi64_epi8(kAll, from, distance[0]),
                             _mm512_maskz_multishift_epi64_epi8(kAll, from, distance[1])};
  const __m512i middle = pick(lower, shifted[0], shifted[1]), near = pick(upper, shifted[0], shifted[1]);
  const __mmask64 second_half = _mm512_movepi8_mask(high);
  const __mmask64 is_far = _mm512_cmpge_epu8_mask(high, _mm512_set1_epi8(32));
  const __mmask64 is_middle = _mm512_cmpge_epu8_mask(high, _mm512_set1_epi8(4));
  const __mmask64 is_nearest =
      _mm512_mask_testn_epi8_mask(_mm512_testn_epi8_mask(high, high), low, _mm512_set1_epi8(-128));
  const auto choose = [&](__m512i near, __m512i middle, __m512i far) {
    return _mm512_mask_mov_epi8(_mm512_mask_mov_epi8(near, is_middle, middle), is_far, far);
  };
  const __m512i before = choose(look_up_128(book.before_near, near), look_up_128(book.before_middle, middle),
                                look_up_256(book.before_far, high, second_half));
  const __m512i step = choose(look_up_128(book.step_near, near), look_up_128(book.step_middle, middle),
                              look_up_256(book.step_far, high, second_half));
  const __mmask64 stepped = _mm512_cmpge_epu8_mask(low, step);
  __m512i k = _mm512_mask_sub_epi8(before, stepped, before, _mm512_set1_epi8(-1));
  k = _mm512_mask_mov_epi8(k, is_nearest, look_up_128(book.nearest, low));
  if (kHasSign) {
    const __mmask64 plus = _mm512_movepi8_mask(pick(upper, place[0], place[1]));
    const __m512i zero = _mm512_set1_epi8(127);
    // Nothing is as far below zero as the largest value is above.
    k = _mm512_mask_add_epi8(_mm512_subs_epu8(zero, k), plus, zero, k);
  }
  _mm512_storeu_si512(codes, k);
}

// The moments of a block between its step and their rounding, and the largest of each.
struct alignas(64) Block {
  float mean[kBlock], square[kBlock];
  float absmax1, absmax2;
};

// Two blocks ahead the CPU's own prefetching, which has six streams to follow, is late.
constexpr int64_t kAhead = 2 * kBlock;

BBT_INLINE void prefetch(const float* p) {
  for (int64_t i = 0; i < kGroup; i += kLanes) __builtin_prefetch(p + i);
}

// Steps parameters and moments, which are not rounded yet.
BBT_INLINE void advance(const Problem& p, int64_t index, Block& block) {
  const Lookup &book1 = *p.first.book.lookup, &book2 = *p.second.book.lookup;
  // Not read again behind every store.
  const float rest1 = p.rest1, rest2 = p.rest2;
  const float keep = p.keep, rate = p.rate, scale = p.scale, eps = p.eps;
  const float kept1 = p.first.absmax[index] * p.beta1, kept2 = p.second.absmax[index] * p.beta2;
  Vec most1 = {}, most2 = {};
  for (int64_t group = 0; group < kBlock; group += kGroup) {
    const int64_t from = index * kBlock + group;
    prefetch(p.param + from + kAhead);
    prefetch(p.grad + from + kAhead);
    __builtin_prefetch(p.first.codes + from + kAhead);
    __builtin_prefetch(p.second.codes + from + kAhead);
    Vec means[4], squares[4];
    dequantize_group(p.first.codes + from, book1, means);
    dequantize_group(p.second.codes + from, book2, squares);
    for (int i = 0; i < 4; ++i) {
      float* const param = p.param + from + i * kLanes;
      const Vec g = load(p.grad + from + i * kLanes);
      const Vec mean = means[i] * kept1 + g * rest1;
      const Vec square = squares[i] * kept2 + g * g * rest2;
      store(block.mean + group + i * kLanes, mean);
      store(block.square + group + i * kLanes, square);
      most1 = larger_number(magnitude(mean), most1);
      most2 = larger_number(square, most2);
      store(param, load(param) * keep - rate * mean / (square_root(square) * scale + eps));
    }
  }
  block.absmax1 = largest(most1);
  block.absmax2 = largest(most2);
}

BBT_INLINE void round_block(const Problem& p, int64_t index, const Block& block) {
  p.first.absmax[index] = block.absmax1;
  p.second.absmax[index] = block.absmax2;
  for (int64_t group = 0; group < kBlock; group += kGroup) {
    const int64_t to = index * kBlock + group;
    quantize_group<true>(block.mean + group, *p.first.book.lookup, divisor(block.absmax1), p.first.codes + to);
    quantize_group<false>(block.square + group, *p.second.book.lookup, divisor(block.absmax2), p.second.codes + to);
  }
}

void step_by_bytes(const Problem& p, int64_t begin, int64_t end) {
  const int64_t whole = p.n / kBlock < end ? p.n / kBlock : end;
  Block block;
  for (int64_t index = begin; index < whole; ++index) {
    advance(p, index, block);
    round_block(p, index, block);
  }
  step(p, whole, end);
}

}  // namespace

constexpr bbt::adamw8bit::Kernels bbt::adamw8bit::kAvx512Vbmi = {
    .name = "avx512vbmi", .needs = compiled_for(), .needs_lookup = true, .step = step_by_bytes};
