// Fused kernels of a BitLinear network, one table per kind of device. fused.cpp makes autograd functions of them;
// fused_cpu.cpp and fused_cuda.cpp fill the tables.
//
// Everywhere N is the number of tokens. Values are computed in fp32, whatever the tensors' dtype is: fp32, bf16 or
// fp16. Tensors are contiguous unless said otherwise, and the results are new. No kernel waits for the device.
#pragma once

#include <ATen/core/Tensor.h>

#include "numbers.h"

#include <utility>

namespace bbt::fused {

// Activations, quantized per token: x ~ codes * scales[:, None].
struct Rows {
  at::Tensor codes;   // int8 [N, D], within -127 .. 127
  at::Tensor scales;  // fp32 [N]: max |x| / 127, at least 1e-8 / 127
};

// A ternary weight: w ~ codes * gamma.
struct TernaryWeight {
  int64_t out;
  at::Tensor codes;   // int8 [out, in], -1, 0 or 1; undefined where only product() is wanted and `packed` is there
  at::Tensor gamma;   // fp32 []: mean |w|, at least 1e-8
  at::Tensor packed;  // the codes as the device's product() reads them; undefined where those are `codes`
};

// The kernels of one kind of device.
struct Kernels {
  // `w`: fp32 [out, in].
  TernaryWeight (*quantize_weight)(const at::Tensor& w);

  // `x`: [N, D].
  Rows (*quantize)(const at::Tensor& x);

  // quantize(x * rstd * weight) where rstd = 1 / sqrt(mean(x^2) + eps). `x`: [N, D], `weight`: fp32 [D]. `rstd`: out,
  // fp32 [N].
  Rows (*rms_norm_quantize)(const at::Tensor& x, const at::Tensor& weight, double eps, at::Tensor& rstd);

  // The gradients of x (in its dtype) and of the weight (fp32) under that of the normed rows, `dy`: [N, D].
  std::pair<at::Tensor, at::Tensor> (*rms_norm_backward)(const at::Tensor& dy, const at::Tensor& x,
                                                         const at::Tensor& weight, const at::Tensor& rstd);

  // quantize(silu(gate) * up). `gate_up`: [N, 2 D], the gate first.
  Rows (*swiglu_quantize)(const at::Tensor& gate_up);

  // The gradient of gate_up, in its dtype, under that of the product, `dy`: [N, D].
  at::Tensor (*swiglu_backward)(const at::Tensor& dy, const at::Tensor& gate_up);

  // x w^T, [N, out] in `dtype`: the integers' product, exact in int32, times the row's scale and gamma.
  at::Tensor (*product)(const Rows& x, const TernaryWeight& w, at::ScalarType dtype);

  // x * scales[:, None] in `dtype`. `x`: [N, D], also int8: codes and their scales make the operands of backward.
  at::Tensor (*scale_rows)(const at::Tensor& x, const at::Tensor& scales, at::ScalarType dtype);

  // Rotary positions, half-split: (a, b) -> (a cos - b sin, a sin + b cos) where a and b are the halves of D; with
  // `inverse` the sine's sign is the other one, which is the gradient. `x`: [B, T, H, D], any strides but D's, which is
  // 1; `cos`, `sin`: fp32 [T, D / 2]. The result is contiguous.
  at::Tensor (*rope)(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin, bool inverse);

  // The sum over rows of -log softmax(logits)[target], fp32 [], and fp32 [N]: each row's log of the sum of exponentials.
  // `logits`: [N, V], `targets`: int64 [N].
  std::pair<at::Tensor, at::Tensor> (*cross_entropy)(const at::Tensor& logits, const at::Tensor& targets);

  // (softmax(logits) - one_hot(targets)) * factor, in the logits' dtype. `factor`: fp32 [].
  at::Tensor (*cross_entropy_backward)(const at::Tensor& logits, const at::Tensor& targets, const at::Tensor& log_sums,
                                       const at::Tensor& factor);
};

extern const Kernels kCpu;
extern const Kernels kCuda;

// The features by which kCpu chooses its kernels on this thread.
void use_cpu_features(CpuFeatures features);
CpuFeatures cpu_features_in_use();

}  // namespace bbt::fused
