// int8 per token, as src/quantization/act_quant.rs has it: divisions and roundings are IEEE's.
#pragma once

#include "device.h"

namespace bbt::cuda {

// Below this a scale counts as zero.
constexpr float kSmallestScale = 1e-8f;

// Not finite x / scale: 0. The scale is then NaN or infinite, and 0 times that is NaN, as every value of the row.
inline signed char code(float x, float scale) {
  const float q = rintf(__fdiv_rn(x, scale));
  return q != q ? 0 : static_cast<signed char>(fminf(fmaxf(q, -127.0f), 127.0f));
}

// The block quantizes a row: values(i, v) puts those from i on into the array v.
template <typename Values>
void quantize_row(bool packed, long long d, const Values& values, signed char* codes, float* scale) {
  float largest = 0;
  each(packed, d, [&](long long i, auto width) {
    float v[decltype(width)::value];
    values(i, v);
    for (float x : v) largest = Max()(largest, fabsf(x));
  });
  largest = over_block(largest, Max());
  const float step = __fdiv_rn(Max()(largest, kSmallestScale), 127.0f);
  if (threadIdx.x == 0) *scale = step;
  each(packed, d, [&](long long i, auto width) {
    constexpr int N = decltype(width)::value;
    float v[N];
    values(i, v);
    Pack<signed char, N> pack;
    for (int k = 0; k < N; ++k) pack.values[k] = code(v[k], step);
    *reinterpret_cast<Pack<signed char, N>*>(codes + i) = pack;
  });
}

}  // namespace bbt::cuda
