// SwiGLU (Shazeer 2020, arXiv 2002.05202) into int8, and its gradient.
#include "quantize.h"

namespace bbt::cuda {

template <typename T>
void swiglu_quantize(const SwiGluQuantize& a) {
  const T* gate = static_cast<const T*>(a.gate_up) + 2 * a.d * blockIdx.x;
  const auto values = [&](long long i, auto& v) {
    constexpr int N = sizeof(v) / sizeof(float);
    float up[N];
    load(gate + i, v);
    load(gate + a.d + i, up);
    for (int k = 0; k < N; ++k) v[k] = v[k] / (1 + expf(-v[k])) * up[k];
  };
  quantize_row(packed(a.d, a.gate_up, a.codes), a.d, values, a.codes + blockIdx.x * a.d, a.scales + blockIdx.x);
}

// With s = 1 / (1 + exp(-gate)): dgate = dy up s (1 + gate (1 - s)), dup = dy gate s.
template <typename DY, typename T>
void swiglu_backward(const SwiGluBackward& a) {
  const DY* dy = static_cast<const DY*>(a.dy) + blockIdx.x * a.d;
  const T* gate = static_cast<const T*>(a.gate_up) + 2 * a.d * blockIdx.x;
  T* dgate = static_cast<T*>(a.dgate_up) + 2 * a.d * blockIdx.x;
  each(packed(a.d, a.dy, a.gate_up, a.dgate_up), a.d, [&](long long i, auto width) {
    constexpr int N = decltype(width)::value;
    float d[N], g[N], u[N];
    load(dy + i, d);
    load(gate + i, g);
    load(gate + a.d + i, u);
    for (int k = 0; k < N; ++k) {
      const float s = 1 / (1 + expf(-g[k]));
      const float dup = d[k] * g[k] * s;
      g[k] = d[k] * u[k] * s * (1 + g[k] * (1 - s));
      u[k] = dup;
    }
    store(dgate + i, g);
    store(dgate + a.d + i, u);
  });
}

}  // namespace bbt::cuda

BBT_KERNELS(swiglu_quantize, SwiGluQuantize)
BBT_KERNELS_2(swiglu_backward, SwiGluBackward)
