// Rows times their scales: of integer products, and of gradients.
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

template <typename DY, typename T>
void scale_rows(const ScaleRows& a) {
  const DY* dy = static_cast<const DY*>(a.dy) + blockIdx.x * a.d;
  T* y = static_cast<T*>(a.y) + blockIdx.x * a.d;
  const float scale = a.scales[blockIdx.x];
  each(packed(a.d, a.dy, a.y), a.d, [&](long long i, auto width) {
    float v[decltype(width)::value];
    load(dy + i, v);
    for (float& value : v) value *= scale;
    store(y + i, v);
  });
}

}  // namespace bbt::cuda

BBT_KERNELS(rescale, Rescale)
BBT_KERNELS_2(scale_rows, ScaleRows)
