// Rows times their scales: of integer products, of codes, and of gradients.
#include "device.h"

namespace bbt::cuda {

template <typename T>
void rescale(const Rescale& a) {
  const int* sums = a.sums + blockIdx.x * a.stride;
  T* y = static_cast<T*>(a.y) + blockIdx.x * a.d;
  const float scale = a.scales[blockIdx.x] * *a.gamma;
  each(packed(a.d, a.sums, a.y) && a.stride % kPack == 0, a.d, [&](long long i, auto width) {
    float v[decltype(width)::value];
    load(sums + i, v);
    for (float& value : v) value *= scale;
    store(y + i, v);
  });
}

template <typename X, typename T>
void scale_rows(const ScaleRows& a) {
  constexpr int kPacks = sizeof(X) == 1 ? kCodePack : kPack;
  const X* x = static_cast<const X*>(a.x) + blockIdx.x * a.d;
  T* y = static_cast<T*>(a.y) + blockIdx.x * a.d;
  const float scale = a.scales[blockIdx.x];
  each<kPacks>(packed<kPacks>(a.d, a.x, a.y), a.d, [&](long long i, auto width) {
    float v[decltype(width)::value];
    load(x + i, v);
    for (float& value : v) value *= scale;
    store(y + i, v);
  });
}

}  // namespace bbt::cuda

BBT_KERNELS(rescale, Rescale)
BBT_KERNELS_2(scale_rows, ScaleRows)
BBT_KERNEL(scale_rows, _int8_float, ScaleRows, <signed char, float>)
BBT_KERNEL(scale_rows, _int8_half, ScaleRows, <signed char, bbt::cuda::Half>)
BBT_KERNEL(scale_rows, _int8_bfloat16, ScaleRows, <signed char, bbt::cuda::BFloat16>)
