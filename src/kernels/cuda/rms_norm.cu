// RMSNorm (Zhang & Sennrich 2019, arXiv 1910.07467) into int8, and its gradients.
#include "quantize.h"

namespace bbt::cuda {

template <typename T>
void rms_norm_quantize(const RmsNormQuantize& a) {
  const long long begin = blockIdx.x * a.d;
  const T* x = static_cast<const T*>(a.x) + begin;
  const bool packs = packed(a.d, a.x, a.weight, a.codes);
  float squares = 0;
  each(packs, a.d, [&](long long i, auto width) {
    float v[decltype(width)::value];
    load(x + i, v);
    for (float value : v) squares += value * value;
  });
  squares = over_block(squares, Add());
  const float rstd = __fdiv_rn(1.0f, __fsqrt_rn(squares / static_cast<float>(a.d) + a.eps));
  if (threadIdx.x == 0) a.rstd[blockIdx.x] = rstd;
  const auto values = [&](long long i, auto& v) {
    constexpr int N = sizeof(v) / sizeof(float);
    float w[N];
    load(x + i, v);
    load(a.weight + i, w);
    for (int k = 0; k < N; ++k) v[k] = v[k] * rstd * w[k];
  };
  quantize_row(packs, a.d, values, a.codes + begin, a.scales + blockIdx.x);
}

// Where d is no more, a block's part of the weight's gradient is added up in shared memory, else in `partial` itself.
constexpr int kSharedColumns = 8192;

// With g = dy weight and h = x rstd: dx = rstd (g - h mean(g h)), dweight = the sum of dy h over rows.
template <typename DY, typename T>
void rms_norm_backward(const RmsNormBackward& a) {
  alignas(16) __shared__ float shared[kSharedColumns];
  const bool packs = packed(a.d, a.dy, a.x, a.weight, a.dx, a.partial);
  float* const partial = a.partial + blockIdx.x * a.d;
  // A thread has the same columns in every row, so that nobody else touches its sums.
  float* const sums = a.d <= kSharedColumns ? shared : partial;
  each(packs, a.d, [&](long long i, auto width) {
    const float zeros[decltype(width)::value] = {};
    store(sums + i, zeros);
  });
  const long long first = blockIdx.x * a.rows;
  const long long end = first + a.rows < a.n ? first + a.rows : a.n;
  for (long long row = first; row < end; ++row) {
    const DY* dy = static_cast<const DY*>(a.dy) + row * a.d;
    const T* x = static_cast<const T*>(a.x) + row * a.d;
    T* dx = static_cast<T*>(a.dx) + row * a.d;
    const float rstd = a.rstd[row];
    float dot = 0;
    each(packs, a.d, [&](long long i, auto width) {
      constexpr int N = decltype(width)::value;
      float g[N], w[N], v[N];
      load(dy + i, g);
      load(a.weight + i, w);
      load(x + i, v);
      for (int k = 0; k < N; ++k) dot += g[k] * w[k] * (v[k] * rstd);
    });
    const float mean = over_block(dot, Add()) / static_cast<float>(a.d);
    each(packs, a.d, [&](long long i, auto width) {
      constexpr int N = decltype(width)::value;
      float g[N], w[N], v[N], sum[N];
      load(dy + i, g);
      load(a.weight + i, w);
      load(x + i, v);
      load(sums + i, sum);
      for (int k = 0; k < N; ++k) {
        const float h = v[k] * rstd;
        sum[k] += g[k] * h;
        v[k] = rstd * (g[k] * w[k] - h * mean);
      }
      store(sums + i, sum);
      store(dx + i, v);
    });
  }
  if (sums == partial) return;
  each(packs, a.d, [&](long long i, auto width) {
    float sum[decltype(width)::value];
    load(sums + i, sum);
    store(partial + i, sum);
  });
}

// A warp for every eighth row of 32 columns, then the eight in order.
inline void sum_columns(const SumColumns& a) {
  constexpr int kWarps = kSumThreads / 32;
  __shared__ float warps[kWarps][32];
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const long long column = blockIdx.x * 32LL + lane;
  float sum = 0;
  if (column < a.d) {
    for (long long row = warp; row < a.n; row += kWarps) sum += a.partial[row * a.d + column];
  }
  warps[warp][lane] = sum;
  __syncthreads();
  if (warp != 0 || column >= a.d) return;
  for (int other = 1; other < kWarps; ++other) sum += warps[other][lane];
  a.sum[column] = sum;
}

}  // namespace bbt::cuda

BBT_KERNELS(rms_norm_quantize, RmsNormQuantize)
BBT_KERNELS_2(rms_norm_backward, RmsNormBackward)
BBT_KERNEL(sum_columns, , SumColumns)
