// fused_cuda.cpp and its kernels, in emulation, and fused.cpp's layers of them, against libtorch's operators: in fp64
// where values are rounded anyhow, bit for bit where they are not. Prints what is wrong; the exit
// status says whether anything is.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>

#include "../../src/kernels/shim/numbers.h"

// One translation unit: libtorch's headers are most of what the compiler reads. The emulation's tensors are the CPU's,
// for which fused.cpp is to take the table of CUDA.
#define kCpu kCuda
#include "../../src/kernels/shim/fused.cpp"
#undef kCpu
#include "../../src/kernels/shim/fused_cuda.cpp"
#include "expect.h"

#include <cmath>
#include <cstdio>
#include <limits>
#include <memory>
#include <string>
#include <vector>

namespace {

using at::Tensor;
using bbt::fused::kCuda;
using bbt::fused::Rows;
using bbt::fused::TernaryWeight;

const at::ScalarType kDtypes[] = {at::kFloat, at::kHalf, at::kBFloat16};

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();

// The unit of the last place, relative.
double unit(at::ScalarType dtype) {
  return dtype == at::kFloat ? 1e-6 : dtype == at::kHalf ? std::pow(2.0, -10) : std::pow(2.0, -7);
}

// By no element is `actual` further off than `tolerance` of its own size and of the largest one's.
void close(const Tensor& actual, const Tensor& exact, double tolerance, const std::string& what) {
  if (actual.sizes() != exact.sizes()) return expect(false, what + ": another shape");
  if (exact.numel() == 0) return expect(true, what);
  const auto bound = (exact.abs() + 0.1 * exact.abs().max()) * tolerance + 1e-30;
  const double error = ((actual.to(at::kDouble) - exact).abs() / bound).max().item<double>();
  expect(error <= 1, text(what, ": ", error, " times the tolerance"));
}

void same(const Tensor& actual, const Tensor& expected, const std::string& what) {
  expect(actual.scalar_type() == expected.scalar_type() && at::equal(actual, expected), what);
}

Tensor exact(const Tensor& x) {
  return x.to(at::kDouble);
}

// Random, aligned to 16 bytes or to nothing.
Tensor random(at::IntArrayRef sizes, at::ScalarType dtype, bool aligned = true) {
  const int64_t numel = c10::multiply_integers(sizes);
  return at::randn({numel + 1}, at::kFloat).to(dtype).narrow(0, aligned ? 0 : 1, numel).view(sizes);
}

struct Shape {
  int64_t n, d;
  bool aligned;
};

std::vector<Shape> shapes() {
  return {{0, 16, true}, {1, 1, true},   {3, 8, true},    {2, 8, false},    {5, 40, true},  {2, 257, true},
          {9, 64, true}, {3, 512, true}, {17, 320, true}, {20, 96, false}, {2, 4104, true}, {1, 4999, true}};
}

// act_quant.rs, its codes and scales.
Rows act_quant(const Tensor& x) {
  const auto scale = x.abs().amax({-1}, true).clamp_min(1e-8) / 127.0;
  return {(x / scale).round().clamp(-127, 127), scale.squeeze(-1)};
}

// Codes and scales against the exact values that they stand for.
void quantized(const Rows& rows, const Tensor& y, const std::string& what) {
  expect(rows.codes.scalar_type() == at::kChar && rows.scales.scalar_type() == at::kFloat, what + ": dtypes");
  if (y.numel() == 0) return expect(rows.codes.sizes() == y.sizes(), what + ": shape");
  const auto scale = y.abs().amax({-1}).clamp_min(1e-8) / 127.0;
  close(rows.scales, scale, 1e-5, what + ": scales");
  const double off = (exact(rows.codes) - y / scale.unsqueeze(-1)).abs().max().item<double>();
  // Half a step, and what the rounding of a code up to 127 adds.
  expect(off <= 0.5 + 127 * 1e-5, text(what, ": ", off, " steps off"));
}

void test_quantize() {
  for (const auto dtype : kDtypes) {
    for (const auto& [n, d, aligned] : shapes()) {
      const auto x = random({n, d}, dtype, aligned) * std::exp(at::randn({}).item<double>());
      const auto what = text("quantize ", dtype, " ", n, " x ", d);
      const auto rows = kCuda.quantize(x);
      if (n == 0) {
        expect(rows.codes.sizes() == x.sizes(), what);
        continue;
      }
      const auto expected = act_quant(x.to(at::kFloat));
      same(rows.codes, expected.codes.to(at::kChar), what + ": codes");
      same(rows.scales, expected.scales, what + ": scales");
    }
  }
  // Ties, which go to even: the scale is exactly 1.
  const auto ties = at::cat({at::tensor({127.0f}), at::arange(-63.5, 64.0, 1.0).to(at::kFloat)}).view({1, -1});
  same(kCuda.quantize(ties).codes, act_quant(ties).codes.to(at::kChar), "quantize: ties");
  const auto zeros = kCuda.quantize(at::zeros({2, 24}));
  expect(zeros.codes.abs().max().item<int>() == 0 && zeros.scales.min().item<float>() > 0, "quantize: zeros");
  // What is not finite makes its row NaN, and no other.
  for (const float bad : {kNaN, kInf, -kInf}) {
    for (const int64_t d : {16, 33, 600}) {
      const auto x = at::randn({3, d});
      x[1][d / 2] = bad;
      const auto rows = kCuda.quantize(x);
      const auto w = kCuda.quantize_weight(at::randn({8, d}));
      const auto nans = kCuda.product(rows, w, at::kFloat).isnan().sum(1);
      same(nans, at::tensor({0, 8, 0}, at::kLong), text("quantize: a row with ", bad));
    }
  }
}

void test_rms_norm() {
  for (const auto dtype : kDtypes) {
    for (const auto& [n, d, aligned] : shapes()) {
      const auto what = text("rms_norm ", dtype, " ", n, " x ", d);
      const auto x = random({n, d}, dtype, aligned);
      const auto weight = random({d}, at::kFloat);
      const double eps = 1e-5;
      Tensor rstd;
      const auto rows = kCuda.rms_norm_quantize(x, weight, eps, rstd);
      const auto exact_rstd = (exact(x).square().mean({-1}) + eps).rsqrt();
      close(rstd, exact_rstd, 1e-6, what + ": rstd");
      const auto normed = exact(x) * exact_rstd.unsqueeze(-1);
      quantized(rows, normed * exact(weight), what);
      for (const auto dy_dtype : kDtypes) {
        const auto dy = random({n, d}, dy_dtype, aligned);
        const auto [dx, dweight] = kCuda.rms_norm_backward(dy, x, weight, rstd);
        const auto g = exact(dy) * exact(weight);
        const auto exact_dx = exact_rstd.unsqueeze(-1) * (g - normed * (g * normed).mean({-1}, true));
        const auto of = text(what, " under ", dy_dtype);
        expect(dx.scalar_type() == dtype && dweight.scalar_type() == at::kFloat, of + ": dtypes");
        // A lone value's norm does not change with it.
        close(dx, exact_dx, d == 1 ? kInf : 20 * unit(dtype), of + ": dx");
        close(dweight, (exact(dy) * normed).sum(0), 1e-4, of + ": dweight");
        const auto again = kCuda.rms_norm_backward(dy, x, weight, rstd);
        same(again.second, dweight, of + ": the same sums twice");
      }
    }
  }
  // More columns than shared memory holds, and more rows than blocks of eight.
  for (const auto& [n, d] : {std::pair<int64_t, int64_t>{9, 8200}, {3, 8193}, {4200, 4}}) {
    const auto x = random({n, d}, at::kFloat), dy = random({n, d}, at::kBFloat16), weight = random({d}, at::kFloat);
    Tensor rstd;
    kCuda.rms_norm_quantize(x, weight, 1e-6, rstd);
    const auto [dx, dweight] = kCuda.rms_norm_backward(dy, x, weight, rstd);
    const auto normed = exact(x) * (exact(x).square().mean({-1}, true) + 1e-6).rsqrt();
    close(dweight, (exact(dy) * normed).sum(0), 1e-4, text("rms_norm ", n, " x ", d, ": dweight"));
  }
}

void test_swiglu() {
  for (const auto dtype : kDtypes) {
    for (const auto& [n, d, aligned] : shapes()) {
      const auto what = text("swiglu ", dtype, " ", n, " x ", d);
      const auto gate_up = random({n, 2 * d}, dtype, aligned) * 3;
      const auto gate = exact(gate_up).narrow(1, 0, d), up = exact(gate_up).narrow(1, d, d);
      quantized(kCuda.swiglu_quantize(gate_up), at::silu(gate) * up, what);
      for (const auto dy_dtype : kDtypes) {
        const auto dy = random({n, d}, dy_dtype, aligned);
        const auto s = gate.sigmoid();
        const auto dgate = exact(dy) * up * s * (1 + gate * (1 - s)), dup = exact(dy) * gate * s;
        const auto dgate_up = kCuda.swiglu_backward(dy, gate_up);
        expect(dgate_up.scalar_type() == dtype, what + ": dtype");
        close(dgate_up, at::cat({dgate, dup}, 1), 5 * unit(dtype), text(what, " under ", dy_dtype));
      }
    }
  }
  // Where exp overflows, the product is 0 and its slope, too.
  const auto far = at::tensor({-200.0f, 200.0f, 1.0f, 1.0f}).view({1, 4});
  const auto slopes = at::tensor({0.0f, 1.0f, 0.0f, 200.0f}).view({1, 4});
  same(kCuda.swiglu_backward(at::ones({1, 2}), far), slopes, "swiglu: far");
}

void test_ternary() {
  for (const auto& [out, in] : {std::pair<int64_t, int64_t>{1, 1}, {16, 32}, {3, 7}, {40, 24}, {96, 130}, {10, 1000}}) {
    for (const bool aligned : {true, false}) {
      const auto w = random({out, in}, at::kFloat, aligned);
      const auto what = text("ternary ", out, " x ", in);
      const auto weight = kCuda.quantize_weight(w);
      close(weight.gamma, exact(w).abs().mean(), 1e-6, what + ": gamma");
      same(weight.codes, (w / weight.gamma).clamp(-1, 1).round().to(at::kChar), what + ": codes");
      same(kCuda.quantize_weight(w).gamma, weight.gamma, what + ": the same sum twice");
    }
  }
  const auto half = at::tensor({1.0f, -1.0f, 0.5f, -0.5f, 2.0f, -1.0f}).view({2, 3});  // gamma 1: ties go to 0
  same(kCuda.quantize_weight(half).codes, at::tensor({1, -1, 0, 0, 1, -1}, at::kChar).view({2, 3}), "ternary: ties");
  expect(kCuda.quantize_weight(at::zeros({8, 8})).gamma.item<float>() == 1e-8f, "ternary: zeros");
  const auto bad = at::randn({16, 16});
  bad[3][5] = kNaN;
  const auto y = kCuda.product(kCuda.quantize(at::randn({2, 16})), kCuda.quantize_weight(bad), at::kBFloat16);
  expect(y.isnan().all().item<bool>(), "ternary: NaN");
}

void test_product() {
  for (const auto dtype : kDtypes) {
    for (const int64_t n : {0, 1, 16, 33}) {
      for (const auto& [out, in] : {std::pair<int64_t, int64_t>{16, 32}, {8, 24}, {31, 65}, {600, 16}, {256, 1}}) {
        const auto rows = kCuda.quantize(at::randn({n, in}));
        const auto weight = kCuda.quantize_weight(at::randn({out, in}));
        const auto y = kCuda.product(rows, weight, dtype);
        const auto expected = exact(rows.codes).matmul(exact(weight.codes).t()) * exact(rows.scales).unsqueeze(-1) *
                              exact(weight.gamma);
        const auto what = text("product ", dtype, " ", n, " x ", in, " x ", out);
        expect(y.scalar_type() == dtype, what + ": dtype");
        close(y, expected, unit(dtype), what);
        const auto& read = weight.packed.defined() ? weight.packed : weight.codes;
        expect(read.size(0) % 16 == 0 && read.size(1) % 16 == 0, what + ": sizes that cuBLASLt takes");
      }
    }
  }
}

void test_scale_rows() {
  for (const auto from : kDtypes) {
    for (const auto to : kDtypes) {
      for (const auto& [n, d, aligned] : shapes()) {
        const auto dy = random({n, d}, from, aligned);
        const auto scales = at::rand({n});
        const auto expected = (dy.to(at::kFloat) * scales.unsqueeze(-1)).to(to);
        same(kCuda.scale_rows(dy, scales, to), expected, text("scale_rows ", from, " ", to, " ", n, " x ", d));
      }
    }
  }
  // Codes, of which the first or the middle one of a row begins a pack, or none does.
  for (const auto to : kDtypes) {
    for (const auto& [n, d, aligned] : shapes()) {
      const auto codes = at::randint(-127, 128, {n * d + 1}, at::kChar).narrow(0, aligned ? 0 : 1, n * d).view({n, d});
      const auto scales = at::randn({n}).exp();
      if (n > 2) scales[1] = kNaN;
      const auto expected = (codes.to(at::kFloat) * scales.unsqueeze(-1)).to(to);
      const auto y = kCuda.scale_rows(codes, scales, to);
      const bool equal = y.sizes() == codes.sizes() && at::allclose(exact(y), exact(expected), 0, 0, true);
      expect(equal && y.scalar_type() == to, text("scale_rows int8 ", to, " ", n, " x ", d));
    }
  }
  // Values that bf16 and fp16 round in their own ways.
  const auto special = at::tensor({kNaN, kInf, -kInf, 3.4e38f, 65519.0f, 65520.0f, 1e-7f, -0.0f}).view({1, 8});
  for (const auto to : kDtypes) {
    const auto y = kCuda.scale_rows(special, at::ones({1}), to);
    expect(at::allclose(y.to(at::kDouble), special.to(to).to(at::kDouble), 0, 0, true), text("special values to ", to));
  }
}

void test_rope() {
  for (const auto dtype : kDtypes) {
    for (const auto& [heads, d] : {std::pair<int64_t, int64_t>{3, 16}, {2, 10}, {1, 64}, {5, 128}}) {
      const int64_t b = 2, t = 5;
      const auto cos = at::randn({t, d / 2}), sin = at::randn({t, d / 2});
      // Contiguous, [B, H, T, D] turned, and parts of a wider tensor: heads, columns, misaligned columns.
      const Tensor inputs[] = {
          at::randn({b, t, heads, d}).to(dtype), at::randn({b, heads, t, d}).to(dtype).transpose(1, 2),
          at::randn({b, t, heads + 2, d}).to(dtype).narrow(2, 1, heads),
          at::randn({b, t, heads, d + 3}).to(dtype).narrow(3, 0, d),
          at::randn({b, t, heads, d + 8}).to(dtype).narrow(3, 1, d), at::randn({0, t, heads, d}).to(dtype),
          at::zeros({}).to(dtype).expand({0, t, heads, d})};
      for (const auto& x : inputs) {
        for (const bool inverse : {false, true}) {
          const auto y = kCuda.rope(x, cos, sin, inverse);
          const auto p = exact(x).narrow(3, 0, d / 2), q = exact(x).narrow(3, d / 2, d / 2);
          const auto c = exact(cos).unsqueeze(1), s = exact(sin).unsqueeze(1) * (inverse ? -1 : 1);
          const auto what = text("rope ", dtype, " ", x.sizes(), " strides ", x.strides());
          expect(y.is_contiguous() && y.scalar_type() == dtype, what + ": layout");
          close(y, at::cat({p * c - q * s, p * s + q * c}, -1), 2 * unit(dtype), what);
        }
      }
    }
  }
}

void test_cross_entropy() {
  for (const auto dtype : kDtypes) {
    for (const auto& [n, v, aligned] : shapes()) {
      const auto what = text("cross_entropy ", dtype, " ", n, " x ", v);
      const auto logits = random({n, v}, dtype, aligned) * 5;
      const auto targets = at::randint(v, {n}, at::kLong);
      const auto [sum, log_sums] = kCuda.cross_entropy(logits, targets);
      const auto exact_log_sums = exact(logits).logsumexp({-1});
      const auto chosen = exact(logits).gather(-1, targets.unsqueeze(-1)).squeeze(-1);
      close(log_sums, exact_log_sums, 1e-5, what + ": log_sums");
      const double error = std::abs(sum.item<double>() - (exact_log_sums - chosen).sum().item<double>());
      expect(sum.dim() == 0 && error <= 1e-5 * (1 + n), text(what, ": the sum is ", error, " off"));
      const auto factor = at::rand({});
      const auto dlogits = kCuda.cross_entropy_backward(logits, targets, log_sums, factor);
      const auto one_hot = at::zeros({n, v}, at::kDouble).scatter(-1, targets.unsqueeze(-1), 1.0);
      expect(dlogits.scalar_type() == dtype, what + ": dtype");
      const auto expected = (exact(logits).softmax(-1) - one_hot) * exact(factor);
      close(dlogits, expected, 4 * unit(dtype) + 1e-5, what + ": gradient");
    }
  }
  const auto logits = at::randn({3, 256}) + 1e4;  // exp would overflow
  const auto targets = at::tensor({0, 255, 7}, at::kLong);
  const auto sum = kCuda.cross_entropy(logits, targets).first.item<double>();
  const auto expected = at::cross_entropy_loss(exact(logits), targets, {}, at::Reduction::Sum).item<double>();
  expect(std::abs(sum - expected) < 1e-2, "cross_entropy: large logits");
  for (const int64_t target : {int64_t{-100}, int64_t{256}}) {
    const auto loss = kCuda.cross_entropy(logits, at::full({3}, target, at::kLong)).first;
    expect(std::isnan(loss.item<float>()), text("cross_entropy: target ", target));
  }
  const auto bad = logits.clone();
  bad[1][3] = kNaN;
  expect(std::isnan(kCuda.cross_entropy(bad, targets).first.item<float>()), "cross_entropy: NaN");
}

// What does not fit is an error, not a wrong read.
void test_refusals() {
  const auto refused = [](const char* what, const auto& call) {
    try {
      call();
      expect(false, text(what, " is taken"));
    } catch (const c10::Error&) {
      expect(true, what);
    }
  };
  const auto x = at::randn({4, 16}), weight = at::randn({16});
  Tensor rstd;
  refused("fp64", [&] { kCuda.quantize(x.to(at::kDouble)); });
  refused("int8 to quantize", [&] { kCuda.quantize(x.to(at::kChar)); });
  refused("int64 to scale", [&] { kCuda.scale_rows(x.to(at::kLong), at::ones({4}), at::kFloat); });
  refused("a transposed x", [&] { kCuda.quantize(x.t()); });
  refused("a vector", [&] { kCuda.quantize(weight); });
  refused("another weight", [&] { kCuda.rms_norm_quantize(x, at::randn({17}), 1e-5, rstd); });
  refused("a weight of bf16", [&] { kCuda.rms_norm_quantize(x, weight.to(at::kBFloat16), 1e-5, rstd); });
  refused("an odd gate_up", [&] { kCuda.swiglu_quantize(at::randn({4, 15})); });
  refused("another dy", [&] { kCuda.swiglu_backward(at::randn({3, 8}), x); });
  refused("a weight with another input", [&] {
    kCuda.product(kCuda.quantize(x), kCuda.quantize_weight(at::randn({8, 24})), at::kFloat);
  });
  refused("an odd head", [&] { kCuda.rope(at::randn({1, 2, 3, 5}), at::ones({2, 2}), at::ones({2, 2}), false); });
  refused("int32 targets", [&] { kCuda.cross_entropy(x, at::zeros({4}, at::kInt)); });
}

}  // namespace

#include "layers.h"

int main() {
  auto generator = at::detail::getDefaultCPUGenerator();
  const uint64_t seed = generator.seed();
  test_quantize();
  test_rms_norm();
  test_swiglu();
  test_ternary();
  test_product();
  test_scale_rows();
  test_rope();
  test_cross_entropy();
  test_refusals();
  test_layers();
  test_rope_layer();
  test_cross_entropy_layer();
  std::printf("%d of %d checks failed, seed %llu\n", failures, checks, static_cast<unsigned long long>(seed));
  return failures == 0 ? 0 : 1;
}
