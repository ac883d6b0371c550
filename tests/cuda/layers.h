// The autograd functions of fused.cpp over the emulated table, through the C interface: run.cpp includes this.
#pragma once

// Backward must run with what forward was told.
bbt::CpuFeatures chosen;
void bbt::fused::use_cpu_features(CpuFeatures features) { chosen = features; }
bbt::CpuFeatures bbt::fused::cpu_features_in_use() { return chosen; }

namespace {

using bbt::Prologue;

void succeed(char* error, const std::string& what) {
  expect(error == nullptr, text(what, ": ", error == nullptr ? "" : error));
  std::free(error);
}

Tensor owned(Tensor* tensor) {
  const std::unique_ptr<Tensor> owner(tensor);
  return *owner;
}

struct Layer {
  at::ScalarType x_dtype, dtype;
  Prologue prologue;
  bool clipped;
  // Which of its inputs want gradients, and how many of its outputs are used.
  bool x_grad, weight_grad;
  size_t weights, used;
  int64_t batch;
};

void test_layer(const Layer& layer) {
  const auto what = text("bit_linear ", layer.x_dtype, " ", layer.dtype, " prologue ", static_cast<int>(layer.prologue), " clipped ",
                         layer.clipped, " grads ", layer.x_grad, layer.weight_grad, " used ", layer.used, " of ",
                         layer.weights, " batch ", layer.batch);
  const int64_t time = 5, in = 24, width = layer.prologue == Prologue::kSwiGlu ? 2 * in : in;
  // Another layout than the kernels': [B, T, D] that lies as [T, B, D].
  auto x = at::randn({time, layer.batch, width}).to(layer.x_dtype).transpose(0, 1).set_requires_grad(layer.x_grad);
  auto norm = at::randn({in}).set_requires_grad(layer.prologue == Prologue::kRmsNorm);
  const double eps = 1e-5;
  std::vector<Tensor> weights, dys;
  std::vector<TernaryWeight> ternary;
  std::vector<const Tensor*> given;
  std::vector<int64_t> outs;
  for (size_t i = 0; i < layer.weights; ++i) {
    const int64_t out = 16 + 9 * static_cast<int64_t>(i);
    // The second one is frozen.
    weights.push_back(at::randn({out, in}).set_requires_grad(layer.weight_grad && i != 1));
    ternary.push_back(kCuda.quantize_weight(weights[i].detach()));
    dys.push_back(at::randn({time, layer.batch, out}).to(layer.dtype).transpose(0, 1));
  }
  for (size_t i = 0; i < layer.weights; ++i) {
    const TernaryWeight& own = ternary[i];
    outs.push_back(own.out);
    given.insert(given.end(), {&weights[i], &own.codes, &own.gamma, own.packed.defined() ? &own.packed : nullptr});
  }
  std::vector<Tensor*> made(layer.weights);
  const auto dtype = layer.dtype == at::kFloat      ? bbt::Dtype::kFloat
                     : layer.dtype == at::kBFloat16 ? bbt::Dtype::kBFloat16
                                                    : bbt::Dtype::kHalf;
  Tensor* scales = nullptr;
  const Tensor* const norm_weight = layer.prologue == Prologue::kRmsNorm ? &norm : nullptr;
  succeed(bbt_bit_linear(3, &x, layer.prologue, norm_weight, eps, given.data(), outs.data(),
                         layer.weights, layer.clipped, dtype, made.data(), &scales),
          what);
  std::vector<Tensor> outputs;
  for (Tensor* output : made) outputs.push_back(owned(output));

  // Forward, by the kernels that are tested alone.
  const auto flat_x = x.detach().reshape({-1, width}).contiguous();
  Tensor rstd;
  const auto rows = layer.prologue == Prologue::kNone ? kCuda.quantize(flat_x)
                    : layer.prologue == Prologue::kRmsNorm ? kCuda.rms_norm_quantize(flat_x, norm.detach(), eps, rstd)
                                          : kCuda.swiglu_quantize(flat_x);
  same(owned(scales), rows.scales, what + ": scales");
  for (size_t i = 0; i < layer.weights; ++i) {
    const auto y = kCuda.product(rows, ternary[i], layer.dtype).view(outputs[i].sizes());
    const int64_t out = weights[i].size(0);
    expect(outputs[i].sizes() == at::IntArrayRef({layer.batch, time, out}), what + ": shape");
    same(outputs[i].detach(), y, what + ": forward");
  }

  // Backward, in fp64: straight through the roundings.
  auto x64 = exact(x.detach()).set_requires_grad(true), norm64 = exact(norm.detach()).set_requires_grad(true);
  const auto halves = x64.chunk(2, -1);
  const auto y64 = layer.prologue == Prologue::kNone ? x64 * 1
                   : layer.prologue == Prologue::kRmsNorm ? x64 * (x64.square().mean({-1}, true) + eps).rsqrt() * norm64
                                         : at::silu(halves[0]) * halves[1];
  Tensor loss, dy64 = at::zeros_like(y64);
  const double tolerance = 8 * std::max(unit(layer.dtype), unit(layer.x_dtype)) + 1e-5;
  const auto activations = exact(rows.codes) * exact(rows.scales).unsqueeze(-1);
  for (size_t i = 0; i < layer.used; ++i) {
    const auto part = (outputs[i] * dys[i]).sum();
    loss = loss.defined() ? loss + part : part;
    dy64 += exact(dys[i]).matmul(exact(ternary[i].codes) * exact(ternary[i].gamma));
  }
  chosen = {};
  loss.backward();
  expect(chosen.bits == 3, what + ": backward's CPU features are forward's");
  y64.backward(dy64);
  if (layer.x_grad) {
    expect(x.grad().scalar_type() == layer.x_dtype, what + ": dtype of dx");
    close(x.grad(), x64.grad(), tolerance, what + ": dx");
  } else {
    expect(!x.grad().defined(), what + ": no dx");
  }
  if (layer.prologue == Prologue::kRmsNorm) close(norm.grad(), norm64.grad(), tolerance, what + ": dnorm");
  for (size_t i = 0; i < layer.weights; ++i) {
    if (!weights[i].requires_grad()) {
      expect(!weights[i].grad().defined(), what + ": no dw");
      continue;
    }
    auto expected = exact(dys[i]).reshape({-1, dys[i].size(-1)}).t().matmul(activations) * (i < layer.used ? 1 : 0);
    if (layer.clipped) expected = expected * weights[i].detach().abs().le(ternary[i].gamma);
    expect(weights[i].grad().scalar_type() == at::kFloat, what + ": dtype of dw");
    close(weights[i].grad(), expected, tolerance, what + ": dw");
  }
}

void test_layers() {
  for (const auto prologue : {Prologue::kNone, Prologue::kRmsNorm, Prologue::kSwiGlu}) {
    for (const auto x_dtype : kDtypes) {
      for (const auto dtype : kDtypes) test_layer({x_dtype, dtype, prologue, false, true, true, 1, 1, 2});
    }
    test_layer({at::kFloat, at::kBFloat16, prologue, true, true, true, 3, 3, 2});
    test_layer({at::kFloat, at::kFloat, prologue, true, true, true, 3, 1, 2});
    test_layer({at::kFloat, at::kBFloat16, prologue, false, true, false, 2, 2, 2});
    if (prologue != Prologue::kNone) {
      test_layer({at::kBFloat16, at::kBFloat16, prologue, false, prologue == Prologue::kSwiGlu, true, 2, 2, 2});
    }
    test_layer({at::kFloat, at::kFloat, prologue, true, true, true, 2, 2, 0});
  }
  test_layer({at::kFloat, at::kBFloat16, Prologue::kNone, true, false, true, 2, 2, 2});
}

void test_rope_layer() {
  for (const auto dtype : kDtypes) {
    for (const int64_t b : {2, 0}) {
      const int64_t t = 5, heads = 3, d = 16;
      auto cos = at::randn({t, d / 2}), sin = at::randn({t, d / 2});
      const auto dy = at::randn({b, heads, t, d}).to(dtype).transpose(1, 2);
      // One gradient lies as its output does, one in another order, and one is a single number.
      for (const int gradient : {0, 1, 2}) {
        auto wide = at::randn({b, t, heads + 2, d}).to(dtype).set_requires_grad(true);
        auto x = wide.narrow(2, 1, heads);
        const auto what = text("rope's layer ", dtype, " ", x.sizes(), " gradient ", gradient);
        Tensor* made = nullptr;
        succeed(bbt_rope(0, &x, &cos, &sin, &made), what);
        const auto y = owned(made);
        const auto g = gradient == 0 ? dy.contiguous() : gradient == 1 ? dy : at::ones({}).to(dtype).expand(dy.sizes());
        y.backward(g);
        const auto p = exact(g).narrow(3, 0, d / 2), q = exact(g).narrow(3, d / 2, d / 2);
        const auto c = exact(cos).unsqueeze(1), s = exact(sin).unsqueeze(1);
        const auto dx = wide.grad().narrow(2, 1, heads);
        close(dx, at::cat({p * c + q * s, q * c - p * s}, -1), 2 * unit(dtype), what);
      }
    }
  }
}

void test_cross_entropy_layer() {
  for (const auto dtype : kDtypes) {
    for (const int64_t v : {64, 257}) {
      const auto what = text("cross entropy's layer ", dtype, " ", v);
      auto logits = at::randn({7, 3, v}).to(dtype).transpose(0, 1).set_requires_grad(true);
      auto targets = at::randint(v, {7, 3}, at::kLong).t();
      Tensor* made = nullptr;
      succeed(bbt_cross_entropy_mean(0, &logits, &targets, &made), what);
      const auto loss = owned(made);
      auto logits64 = exact(logits.detach()).set_requires_grad(true);
      const auto loss64 = at::cross_entropy_loss(logits64.reshape({-1, v}), targets.reshape(-1));
      close(loss.detach(), loss64.detach(), 1e-5, what);
      (loss * 1000).backward();
      (loss64 * 1000).backward();
      expect(loss.scalar_type() == at::kFloat && logits.grad().scalar_type() == dtype, what + ": dtypes");
      close(logits.grad(), logits64.grad(), 4 * unit(dtype) + 1e-5, what + ": gradient");
    }
  }
}

}  // namespace
