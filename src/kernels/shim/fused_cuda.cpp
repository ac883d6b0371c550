// The fused kernels on CUDA: outputs, checks and launches. What is computed is in kernels/cuda/, and products in
// libtorch (cuBLASLt).
#include "fused.h"

#include "../cuda/arguments.h"
#include "cuda_launch.h"

#include <ATen/ops/_int_mm.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <string>

namespace {

namespace cuda = bbt::cuda;
using bbt::fused::Rows;
using bbt::fused::TernaryWeight;

// cuBLASLt's int8 products want their sizes to be multiples of this. at::_int_mm wants more than 16 rows, too.
constexpr int64_t kMultiple = 16;
constexpr int64_t kFewestRows = 32;

std::string ending(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat:
      return "_float";
    case at::kHalf:
      return "_half";
    case at::kBFloat16:
      return "_bfloat16";
    default:
      TORCH_CHECK(false, "the fused kernels take float32, float16 and bfloat16, not ", dtype);
  }
}

std::string ending(at::ScalarType first, at::ScalarType second) {
  return ending(first) + ending(second);
}

// That the kernel may read `tensor` as what it takes it for.
void check(const char* name, const at::Tensor& tensor, at::Device device, at::IntArrayRef sizes) {
  TORCH_CHECK(tensor.device() == device, name, " is on ", tensor.device(), ", not on ", device);
  TORCH_CHECK(tensor.sizes() == sizes, name, " is ", tensor.sizes(), ", not ", sizes);
  TORCH_CHECK(tensor.is_contiguous(), name, " is not contiguous");
}

void check(const char* name, const at::Tensor& tensor, at::Device device, at::IntArrayRef sizes,
           at::ScalarType dtype) {
  check(name, tensor, device, sizes);
  TORCH_CHECK(tensor.scalar_type() == dtype, name, " is ", tensor.scalar_type(), ", not ", dtype);
}

// [N, D]: its sizes.
std::pair<int64_t, int64_t> rows(const char* name, const at::Tensor& tensor) {
  TORCH_CHECK(tensor.dim() == 2, name, " is ", tensor.sizes(), ", not [N, D]");
  check(name, tensor, tensor.device(), tensor.sizes());
  return {tensor.size(0), tensor.size(1)};
}

Rows new_rows(const at::Tensor& like, int64_t n, int64_t d) {
  return {at::empty({n, d}, like.options().dtype(at::kChar)), at::empty({n}, like.options().dtype(at::kFloat))};
}

signed char* codes(const at::Tensor& tensor) {
  return reinterpret_cast<signed char*>(tensor.data_ptr<int8_t>());
}

const long long* int64s(const at::Tensor& tensor) {
  static_assert(sizeof(long long) == sizeof(int64_t));
  return reinterpret_cast<const long long*>(tensor.data_ptr<int64_t>());
}

// The next multiple of kMultiple.
int64_t padded(int64_t size) {
  return (size + kMultiple - 1) / kMultiple * kMultiple;
}

// Zeros below and to the right, which add nothing to a product.
at::Tensor pad(const at::Tensor& matrix, int64_t height, int64_t width) {
  const int64_t below = height - matrix.size(0), right = width - matrix.size(1);
  return below == 0 && right == 0 ? matrix : at::constant_pad_nd(matrix, {0, right, 0, below});
}

TernaryWeight quantize_weight(const at::Tensor& w) {
  const auto [out, in] = rows("weight", w);
  check("weight", w, w.device(), w.sizes(), at::kFloat);
  const auto weight = TernaryWeight{out, at::empty_like(w, at::kChar), at::empty({}, w.options()), {}};
  const int blocks = cuda::ternary_blocks(out * in);
  const auto partial = at::empty({blocks}, w.options());
  const cuda::Ternary arguments = {w.data_ptr<float>(), partial.data_ptr<float>(), codes(weight.codes),
                                   weight.gamma.data_ptr<float>(), out * in};
  cuda::launch(w.device(), "ternary_sum", blocks, cuda::kMaxThreads, &arguments);
  cuda::launch(w.device(), "ternary_round", blocks, cuda::kMaxThreads, &arguments);
  const auto packed = pad(weight.codes, padded(out), padded(in));
  return {out, weight.codes, weight.gamma, packed.is_same(weight.codes) ? at::Tensor() : packed};
}

Rows quantize(const at::Tensor& x) {
  const auto [n, d] = rows("x", x);
  const auto result = new_rows(x, n, d);
  const cuda::Quantize arguments = {x.data_ptr(), codes(result.codes), result.scales.data_ptr<float>(), d};
  cuda::launch(x.device(), "quantize" + ending(x.scalar_type()), n, cuda::row_threads(d), &arguments);
  return result;
}

Rows rms_norm_quantize(const at::Tensor& x, const at::Tensor& weight, double eps, at::Tensor& rstd) {
  const auto [n, d] = rows("x", x);
  check("weight", weight, x.device(), {d}, at::kFloat);
  const auto result = new_rows(x, n, d);
  rstd = at::empty_like(result.scales);
  const cuda::RmsNormQuantize arguments = {
      x.data_ptr(), weight.data_ptr<float>(), codes(result.codes), result.scales.data_ptr<float>(),
      rstd.data_ptr<float>(), static_cast<float>(eps), d};
  cuda::launch(x.device(), "rms_norm_quantize" + ending(x.scalar_type()), n, cuda::row_threads(d), &arguments);
  return result;
}

std::pair<at::Tensor, at::Tensor> rms_norm_backward(const at::Tensor& dy, const at::Tensor& x,
                                                    const at::Tensor& weight, const at::Tensor& rstd) {
  const auto [n, d] = rows("x", x);
  check("dy", dy, x.device(), {n, d});
  check("weight", weight, x.device(), {d}, at::kFloat);
  check("rstd", rstd, x.device(), {n}, at::kFloat);
  const auto dx = at::empty_like(x), dweight = at::empty_like(weight);
  const int64_t rows_each = cuda::rms_norm_rows(n);
  const int64_t blocks = (n + rows_each - 1) / rows_each;
  const auto partial = at::empty({blocks, d}, weight.options());
  const cuda::RmsNormBackward arguments = {
      dy.data_ptr(), x.data_ptr(), weight.data_ptr<float>(), rstd.data_ptr<float>(), dx.data_ptr(),
      partial.data_ptr<float>(), n, d, rows_each};
  const auto name = "rms_norm_backward" + ending(dy.scalar_type(), x.scalar_type());
  cuda::launch(x.device(), name, blocks, cuda::row_threads(d), &arguments);
  const cuda::SumColumns sum = {partial.data_ptr<float>(), dweight.data_ptr<float>(), blocks, d};
  cuda::launch(x.device(), "sum_columns", (d + 31) / 32, cuda::kSumThreads, &sum);
  return {dx, dweight};
}

Rows swiglu_quantize(const at::Tensor& gate_up) {
  const auto [n, twice_d] = rows("gate_up", gate_up);
  const int64_t d = twice_d / 2;
  check("gate_up", gate_up, gate_up.device(), {n, 2 * d});
  const auto result = new_rows(gate_up, n, d);
  const cuda::SwiGluQuantize arguments = {gate_up.data_ptr(), codes(result.codes), result.scales.data_ptr<float>(), d};
  cuda::launch(gate_up.device(), "swiglu_quantize" + ending(gate_up.scalar_type()), n, cuda::row_threads(d),
               &arguments);
  return result;
}

at::Tensor swiglu_backward(const at::Tensor& dy, const at::Tensor& gate_up) {
  const auto [n, d] = rows("dy", dy);
  check("gate_up", gate_up, dy.device(), {n, 2 * d});
  const auto dgate_up = at::empty_like(gate_up);
  const cuda::SwiGluBackward arguments = {dy.data_ptr(), gate_up.data_ptr(), dgate_up.data_ptr(), d};
  const auto name = "swiglu_backward" + ending(dy.scalar_type(), gate_up.scalar_type());
  cuda::launch(dy.device(), name, n, cuda::row_threads(d), &arguments);
  return dgate_up;
}

at::Tensor product(const Rows& x, const TernaryWeight& w, at::ScalarType dtype) {
  const auto [n, in] = rows("codes", x.codes);
  const auto device = x.codes.device();
  const int64_t out = w.out;
  check("scales", x.scales, device, {n}, at::kFloat);
  check("gamma", w.gamma, device, {}, at::kFloat);
  const auto y = at::empty({n, out}, x.scales.options().dtype(dtype));
  if (n == 0) return y;
  const auto& weight = w.packed.defined() ? w.packed : w.codes;
  const bool as_is = !w.packed.defined();
  check("weight", weight, device, {as_is ? out : padded(out), as_is ? in : padded(in)}, at::kChar);
  const auto sums = at::_int_mm(pad(x.codes, std::max(n, kFewestRows), weight.size(1)), weight.t());
  const cuda::Rescale arguments = {sums.data_ptr<int>(), x.scales.data_ptr<float>(), w.gamma.data_ptr<float>(),
                                   y.data_ptr(), out, sums.size(1)};
  cuda::launch(device, "rescale" + ending(dtype), n, cuda::row_threads(out), &arguments);
  return y;
}

at::Tensor scale_rows(const at::Tensor& x, const at::Tensor& scales, at::ScalarType dtype) {
  const auto [n, d] = rows("x", x);
  check("scales", scales, x.device(), {n}, at::kFloat);
  const auto y = at::empty({n, d}, x.options().dtype(dtype));
  const cuda::ScaleRows arguments = {x.data_ptr(), scales.data_ptr<float>(), y.data_ptr(), d};
  const bool coded = x.scalar_type() == at::kChar;
  const auto name = "scale_rows" + (coded ? "_int8" : ending(x.scalar_type())) + ending(dtype);
  cuda::launch(x.device(), name, n, cuda::row_threads(d, coded ? cuda::kCodePack : cuda::kPack), &arguments);
  return y;
}

at::Tensor rope(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin, bool inverse) {
  TORCH_CHECK(x.dim() == 4 && x.size(3) % 2 == 0, "x is ", x.sizes(), ", not [B, T, H, D] with an even D");
  TORCH_CHECK(x.stride(3) == 1 || x.numel() == 0, "x's strides are ", x.strides(), ": the last is not 1");
  const int64_t length = x.size(1), heads = x.size(2), half = x.size(3) / 2;
  check("cos", cos, x.device(), {length, half}, at::kFloat);
  check("sin", sin, x.device(), {length, half}, at::kFloat);
  TORCH_CHECK(heads * half <= INT32_MAX, "x is ", x.sizes(), ": too many values for a token");
  const auto y = at::empty(x.sizes(), x.options());
  const cuda::Rope arguments = {x.data_ptr(), cos.data_ptr<float>(), sin.data_ptr<float>(), y.data_ptr(),
                                x.stride(0), x.stride(1), x.stride(2), length,
                                static_cast<int>(heads), static_cast<int>(half), inverse ? -1.0f : 1.0f};
  cuda::launch(x.device(), "rope" + ending(x.scalar_type()), x.size(0) * length, cuda::row_threads(heads * half),
               &arguments);
  return y;
}

std::pair<at::Tensor, at::Tensor> cross_entropy(const at::Tensor& logits, const at::Tensor& targets) {
  const auto [n, v] = rows("logits", logits);
  check("targets", targets, logits.device(), {n}, at::kLong);
  const auto fp32 = logits.options().dtype(at::kFloat);
  const auto log_sums = at::empty({n}, fp32), losses = at::empty({n}, fp32), sum = at::empty({}, fp32);
  const cuda::CrossEntropy arguments = {logits.data_ptr(), int64s(targets), losses.data_ptr<float>(),
                                        log_sums.data_ptr<float>(), v};
  cuda::launch(logits.device(), "cross_entropy" + ending(logits.scalar_type()), n, cuda::row_threads(v), &arguments);
  const cuda::Sum total = {losses.data_ptr<float>(), sum.data_ptr<float>(), n};
  cuda::launch(logits.device(), "sum", 1, cuda::kMaxThreads, &total);
  return {sum, log_sums};
}

at::Tensor cross_entropy_backward(const at::Tensor& logits, const at::Tensor& targets, const at::Tensor& log_sums,
                                  const at::Tensor& factor) {
  const auto [n, v] = rows("logits", logits);
  check("targets", targets, logits.device(), {n}, at::kLong);
  check("log_sums", log_sums, logits.device(), {n}, at::kFloat);
  check("factor", factor, logits.device(), {}, at::kFloat);
  const auto dlogits = at::empty_like(logits);
  const cuda::CrossEntropyBackward arguments = {logits.data_ptr(), int64s(targets), log_sums.data_ptr<float>(),
                                                factor.data_ptr<float>(), dlogits.data_ptr(), v};
  cuda::launch(logits.device(), "cross_entropy_backward" + ending(logits.scalar_type()), n, cuda::row_threads(v),
               &arguments);
  return dlogits;
}

}  // namespace

const bbt::fused::Kernels bbt::fused::kCuda = {
    .quantize_weight = quantize_weight,
    .quantize = quantize,
    .rms_norm_quantize = rms_norm_quantize,
    .rms_norm_backward = rms_norm_backward,
    .swiglu_quantize = swiglu_quantize,
    .swiglu_backward = swiglu_backward,
    .product = product,
    .scale_rows = scale_rows,
    .rope = rope,
    .cross_entropy = cross_entropy,
    .cross_entropy_backward = cross_entropy_backward,
};
