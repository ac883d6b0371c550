// Cross-entropy of rows of logits, and its gradient.
#include "device.h"

namespace bbt::cuda {

template <typename T>
void cross_entropy(const CrossEntropy& a) {
  const T* logits = static_cast<const T*>(a.logits) + blockIdx.x * a.d;
  const bool packs = packed(a.d, a.logits);
  float largest = __uint_as_float(0xff800000);  // -inf
  each(packs, a.d, [&](long long i, auto width) {
    float v[decltype(width)::value];
    load(logits + i, v);
    for (float x : v) largest = Max()(largest, x);
  });
  largest = over_block(largest, Max());
  float sum = 0;
  each(packs, a.d, [&](long long i, auto width) {
    float v[decltype(width)::value];
    load(logits + i, v);
    for (float x : v) sum += expf(x - largest);
  });
  sum = over_block(sum, Add());
  if (threadIdx.x != 0) return;
  const float log_sum = largest + logf(sum);
  const long long target = a.targets[blockIdx.x];
  a.log_sums[blockIdx.x] = log_sum;
  // A target that is none has no loss, and must not read elsewhere.
  const bool known = 0 <= target && target < a.d;
  a.losses[blockIdx.x] = known ? log_sum - to_float(logits[target]) : __uint_as_float(0x7fc00000);
}

inline void sum(const Sum& a) {
  float sum = 0;
  for (long long i = threadIdx.x; i < a.n; i += blockDim.x) sum += a.values[i];
  sum = over_block(sum, Add());
  if (threadIdx.x == 0) *a.sum = sum;
}

template <typename T>
void cross_entropy_backward(const CrossEntropyBackward& a) {
  const long long begin = blockIdx.x * a.d;
  const T* logits = static_cast<const T*>(a.logits) + begin;
  T* dlogits = static_cast<T*>(a.dlogits) + begin;
  const float log_sum = a.log_sums[blockIdx.x], factor = *a.factor;
  const long long target = a.targets[blockIdx.x];
  each(packed(a.d, a.logits, a.dlogits), a.d, [&](long long i, auto width) {
    constexpr int N = decltype(width)::value;
    float v[N];
    load(logits + i, v);
    for (int k = 0; k < N; ++k) v[k] = (expf(v[k] - log_sum) - (i + k == target ? 1.0f : 0.0f)) * factor;
    store(dlogits + i, v);
  });
}

}  // namespace bbt::cuda

BBT_KERNELS(cross_entropy, CrossEntropy)
BBT_KERNEL(sum, , Sum)
BBT_KERNELS(cross_entropy_backward, CrossEntropyBackward)
