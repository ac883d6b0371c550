// Activations to int8.
#include "quantize.h"

namespace bbt::cuda {

template <typename T>
void quantize(const Quantize& a) {
  const long long begin = blockIdx.x * a.d;
  const T* x = static_cast<const T*>(a.x) + begin;
  const auto values = [&](long long i, auto& v) { load(x + i, v); };
  quantize_row(packed(a.d, a.x, a.codes), a.d, values, a.codes + begin, a.scales + blockIdx.x);
}

}  // namespace bbt::cuda

BBT_KERNELS(quantize, Quantize)
