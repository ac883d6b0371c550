// AdamW over moments of 8 bits. Included by one file per instruction set.
//
// A block's moments are made fp32, stepped, used, and only then rounded to 8 bits again: the update knows nothing of
// this step's rounding.
#pragma once

#include "adamw8bit.h"
#include "vector.h"

namespace {

using bbt::adamw8bit::CodeBook;
using bbt::adamw8bit::kBlock;
using bbt::adamw8bit::Problem;

BBT_INLINE void dequantize(const uint8_t* codes, const float* values, float* to) {
  for (int64_t i = 0; i < kBlock; ++i) to[i] = values[codes[i]];
}

// Of numbers that are not negative.
BBT_INLINE float largest(Vec x) {
  for (int n = kLanes / 2; n > 0; n /= 2) x = larger(__builtin_shuffle(x, iota() ^ n), x);
  return x[0];
}

// What a block's values are divided by before they are rounded.
BBT_INLINE float divisor(float absmax) { return absmax > 0 ? absmax : 1; }

// Rounds to values of the book times the block's largest magnitude, which is returned. `x` is overwritten.
BBT_INLINE float quantize(float* x, const CodeBook& book, uint8_t* codes) {
  Vec most = {};
  for (int64_t i = 0; i < kBlock; i += kLanes) most = larger(magnitude(load(x + i)), most);
  const float absmax = largest(most);
  int32_t places[kBlock];
  for (int64_t i = 0; i < kBlock; i += kLanes) {
    const Vec place = (load(x + i) / divisor(absmax) + 1.0f) * 32767.5f + 0.5f;
    store_bits(places + i, reinterpret_cast<BitVec>(__builtin_convertvector(place, IntVec)) & 0xffff);
  }
  for (int64_t i = 0; i < kBlock; ++i) codes[i] = book.nearest[places[i]];
  return absmax;
}

// A whole block, the `index`-th.
BBT_INLINE void step_block(const Problem& p, int64_t index, float* param, const float* grad, uint8_t* first,
                           uint8_t* second) {
  float m[kBlock], v[kBlock];
  dequantize(first, p.first.book.values, m);
  dequantize(second, p.second.book.values, v);
  const float kept1 = p.first.absmax[index] * p.beta1, kept2 = p.second.absmax[index] * p.beta2;
  for (int64_t i = 0; i < kBlock; i += kLanes) {
    const Vec g = load(grad + i);
    const Vec mean = load(m + i) * kept1 + g * p.rest1;
    const Vec square = load(v + i) * kept2 + g * g * p.rest2;
    store(m + i, mean);
    store(v + i, square);
    store(param + i, load(param + i) * p.keep - p.rate * mean / (square_root(square) * p.scale + p.eps));
  }
  p.first.absmax[index] = quantize(m, p.first.book, first);
  p.second.absmax[index] = quantize(v, p.second.book, second);
}

void step(const Problem& p, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    const int64_t at = block * kBlock, n = p.n - at;
    float *const param = p.param + at;
    const float *const grad = p.grad + at;
    uint8_t *const first = p.first.codes + at, *const second = p.second.codes + at;
    if (n >= kBlock) {
      step_block(p, block, param, grad, first, second);
      continue;
    }
    // The rest, made a whole block with what is as good as zero: never its largest.
    float params[kBlock] = {}, grads[kBlock] = {};
    uint8_t firsts[kBlock], seconds[kBlock];
    __builtin_memset(firsts, p.first.book.nearest[1 << 15], sizeof firsts);
    __builtin_memset(seconds, p.second.book.nearest[1 << 15], sizeof seconds);
    __builtin_memcpy(params, param, n * sizeof(float));
    __builtin_memcpy(grads, grad, n * sizeof(float));
    __builtin_memcpy(firsts, first, n);
    __builtin_memcpy(seconds, second, n);
    step_block(p, block, params, grads, firsts, seconds);
    __builtin_memcpy(param, params, n * sizeof(float));
    __builtin_memcpy(first, firsts, n);
    __builtin_memcpy(second, seconds, n);
  }
}

}  // namespace
