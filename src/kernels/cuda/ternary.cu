// Ternary weights, as src/quantization/ternary_quant.rs has them.
#include "quantize.h"

namespace bbt::cuda {

inline long long grid_thread() {
  return blockIdx.x * static_cast<long long>(blockDim.x) + threadIdx.x;
}

inline long long grid_threads() {
  return gridDim.x * static_cast<long long>(blockDim.x);
}

inline void ternary_sum(const Ternary& a) {
  float sum = 0;
  each(packed(a.n, a.w), a.n, grid_thread(), grid_threads(), [&](long long i, auto width) {
    float v[decltype(width)::value];
    load(a.w + i, v);
    for (float w : v) sum += fabsf(w);
  });
  sum = over_block(sum, Add());
  if (threadIdx.x == 0) a.partial[blockIdx.x] = sum;
}

// Each block adds up the same parts in the same order, so that no other has to be waited for.
inline void ternary_round(const Ternary& a) {
  float sum = 0;
  for (unsigned block = threadIdx.x; block < gridDim.x; block += blockDim.x) sum += a.partial[block];
  sum = over_block(sum, Add());
  const float gamma = Max()(__fdiv_rn(sum, static_cast<float>(a.n)), kSmallestScale);
  if (blockIdx.x == 0 && threadIdx.x == 0) *a.gamma = gamma;
  each(packed(a.n, a.w, a.codes), a.n, grid_thread(), grid_threads(), [&](long long i, auto width) {
    constexpr int N = decltype(width)::value;
    float v[N];
    load(a.w + i, v);
    Pack<signed char, N> pack;
    for (int k = 0; k < N; ++k) {
      const float q = __fdiv_rn(v[k], gamma);
      // gamma is then NaN or infinite, and with it every product of the weight.
      pack.values[k] = q != q ? 0 : static_cast<signed char>(rintf(fminf(fmaxf(q, -1.0f), 1.0f)));
    }
    *reinterpret_cast<Pack<signed char, N>*>(a.codes + i) = pack;
  });
}

}  // namespace bbt::cuda

BBT_KERNEL(ternary_sum, , Ternary)
BBT_KERNEL(ternary_round, , Ternary)
