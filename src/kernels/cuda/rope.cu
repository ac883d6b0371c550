// Rotary positions (Su et al. 2021, arXiv 2104.09864), half-split.
#include "device.h"

namespace bbt::cuda {

template <typename T>
void rope(const Rope& a) {
  const long long b = blockIdx.x / a.length, t = blockIdx.x % a.length;
  const T* x = static_cast<const T*>(a.x) + b * a.stride_b + t * a.stride_t;
  const float *cos = a.cos + t * a.half, *sin = a.sin + t * a.half;
  T* y = static_cast<T*>(a.y) + static_cast<long long>(blockIdx.x) * a.heads * 2 * a.half;
  const bool packs = packed(a.half, a.x, a.cos, a.sin, a.y) && a.stride_b % kPack == 0 && a.stride_t % kPack == 0 &&
                     a.stride_h % kPack == 0;
  each(packs, a.heads * a.half, [&](long long i, auto width) {
    constexpr int N = decltype(width)::value;
    const int head = static_cast<int>(i) / a.half, column = static_cast<int>(i) % a.half;
    const T* from = x + head * a.stride_h + column;
    T* to = y + head * 2 * a.half + column;
    float first[N], second[N], c[N], s[N];
    load(from, first);
    load(from + a.half, second);
    load(cos + column, c);
    load(sin + column, s);
    for (int k = 0; k < N; ++k) {
      const float turned = first[k] * c[k] - second[k] * (a.sign * s[k]);
      second[k] = first[k] * (a.sign * s[k]) + second[k] * c[k];
      first[k] = turned;
    }
    store(to, first);
    store(to + a.half, second);
  });
}

}  // namespace bbt::cuda

BBT_KERNELS(rope, Rope)
