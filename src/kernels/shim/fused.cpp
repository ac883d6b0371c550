// The layers of a BitLinear network as autograd functions, on any device that has a table of fused kernels.
#include "fused.h"
#include "kernels.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/abs.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/le.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/where.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <tuple>

namespace bbt::fused {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

const Kernels& kernels(const Tensor& tensor) {
  const at::Device device = tensor.device();
  TORCH_CHECK(device.is_cpu() || device.is_cuda(), "no fused kernels on device ", device);
  return device.is_cpu() ? kCpu : kCuda;
}

// The scope of a backward pass: it has no derivative of its own, autocast does not reach inside, and the CPU's kernels are
// those of the forward pass.
struct BackwardScope {
  BackwardScope(AutogradContext* ctx, const char* name) : no_autocast(c10::autocast_dispatch_keyset) {
    TORCH_CHECK(!at::GradMode::is_enabled(), name, " has no second derivative");
    use_cpu_features({static_cast<uint32_t>(ctx->saved_data["features"].toInt())});
  }
  c10::impl::ExcludeDispatchKeyGuard no_autocast;
};

void save_features(AutogradContext* ctx) {
  ctx->saved_data["features"] = static_cast<int64_t>(cpu_features_in_use().bits);
}

// [..., D] -> [N, D]
Tensor flat(const Tensor& x) {
  return x.reshape({x.numel() / std::max<int64_t>(x.size(-1), 1), x.size(-1)}).contiguous();
}

Tensor joined(const variable_list& tensors, int64_t dim) {
  return tensors.size() == 1 ? tensors[0] : at::cat(tensors, dim);
}

// What backward's products are computed in: the CPU's own of fp16 are slow, and bf16 would be less than fp16 promises.
at::ScalarType product_dtype(const Tensor& dy) {
  return dy.device().is_cpu() && dy.scalar_type() == at::kHalf ? at::kFloat : dy.scalar_type();
}

struct BitLinear : torch::autograd::Function<BitLinear> {
  // What is saved: the activations' codes and scales, each weight's codes and gamma, what the prologue's backward
  // reads, and each weight itself where its gradient is clipped.
  static constexpr size_t kPerWeight = 2, kFirstCodes = 2;

  static size_t prologue_inputs(Prologue prologue) { return prologue == Prologue::kRmsNorm ? 2 : 1; }

  // `inputs`: x, the norm's weight where there is one, then each weight. `scales`: out, the activations'.
  static variable_list forward(AutogradContext* ctx, const at::TensorList& inputs, Prologue prologue, double eps,
                               const std::vector<TernaryWeight>& ternary, bool clipped, at::ScalarType dtype,
                               Tensor* scales) {
    const Kernels& kernel = kernels(inputs[0]);
    const Tensor x = flat(inputs[0]);
    Rows rows;
    variable_list of_prologue;
    switch (prologue) {
      case Prologue::kNone:
        rows = kernel.quantize(x);
        break;
      case Prologue::kRmsNorm: {
        Tensor rstd;
        rows = kernel.rms_norm_quantize(x, inputs[1], eps, rstd);
        of_prologue = {inputs[0], inputs[1], rstd};
        break;
      }
      case Prologue::kSwiGlu:
        rows = kernel.swiglu_quantize(x);
        of_prologue = {inputs[0]};
        break;
    }
    *scales = rows.scales;
    std::vector<int64_t> size = inputs[0].sizes().vec();
    ctx->saved_data["size"] = size;
    ctx->saved_data["x dtype"] = static_cast<int64_t>(inputs[0].scalar_type());
    ctx->saved_data["prologue"] = static_cast<int64_t>(prologue);
    ctx->saved_data["clipped"] = clipped;
    save_features(ctx);
    variable_list outputs, saved = {rows.codes, rows.scales};
    for (const TernaryWeight& weight : ternary) {
      size.back() = weight.out;
      outputs.push_back(kernel.product(rows, weight, dtype).view(size));
      saved.insert(saved.end(), {weight.codes, weight.gamma});
    }
    saved.insert(saved.end(), of_prologue.begin(), of_prologue.end());
    if (clipped) saved.insert(saved.end(), inputs.begin() + prologue_inputs(prologue), inputs.end());
    ctx->save_for_backward(saved);
    return outputs;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const BackwardScope scope(ctx, "bit linear");
    const auto saved = ctx->get_saved_variables();
    const auto prologue = static_cast<Prologue>(ctx->saved_data["prologue"].toInt());
    const size_t first = prologue_inputs(prologue), n = grads.size();
    const Tensor *of_weights = &saved[kFirstCodes], *of_prologue = of_weights + kPerWeight * n;
    const Kernels& kernel = kernels(grads[0]);

    // The weights as one, their outputs side by side: one product sums over all.
    const at::ScalarType dtype = product_dtype(grads[0]);
    variable_list dys, codes, gammas;
    bool needs_weights = false;
    for (size_t i = 0; i < n; ++i) {
      dys.push_back(flat(grads[i]).to(dtype));
      codes.push_back(of_weights[kPerWeight * i]);
      gammas.push_back(of_weights[kPerWeight * i + 1].expand({codes[i].size(0)}));
      needs_weights |= ctx->needs_input_grad(first + i);
    }
    const Tensor dy = joined(dys, 1);

    variable_list results(first + n);
    if (ctx->needs_input_grad(0) || (prologue == Prologue::kRmsNorm && ctx->needs_input_grad(1))) {
      Tensor dx = at::mm(dy, kernel.scale_rows(joined(codes, 0), at::cat(gammas), dtype));
      if (prologue == Prologue::kRmsNorm) {
        std::tie(dx, results[1]) = kernel.rms_norm_backward(dx, flat(of_prologue[0]), of_prologue[1], of_prologue[2]);
      } else if (prologue == Prologue::kSwiGlu) {
        dx = kernel.swiglu_backward(dx, flat(of_prologue[0]));
      }
      const auto x_dtype = static_cast<at::ScalarType>(ctx->saved_data["x dtype"].toInt());
      results[0] = dx.to(x_dtype).view(ctx->saved_data["size"].toIntVector());
    }
    if (needs_weights) {
      const Tensor dweights = at::mm(dy.t(), kernel.scale_rows(saved[0], saved[1], dtype));
      int64_t row = 0;
      for (size_t i = 0; i < n; row += codes[i++].size(0)) {
        if (!ctx->needs_input_grad(first + i)) continue;
        // Gradients of several weights must not share memory.
        Tensor dweight = dweights.narrow(0, row, codes[i].size(0)).to(at::kFloat, false, /*copy=*/n > 1);
        if (ctx->saved_data["clipped"].toBool()) {
          const Tensor &weight = saved[saved.size() - n + i], &gamma = of_weights[kPerWeight * i + 1];
          dweight = at::where(at::le(at::abs(weight), gamma), dweight, 0.0);
        }
        results[first + i] = dweight;
      }
    }
    // None for the arguments that are no tensors.
    results.resize(results.size() + 6);
    return results;
  }
};

// x as rope() reads it.
Tensor readable(const Tensor& x) { return x.stride(3) == 1 ? x : x.contiguous(); }

struct Rope : torch::autograd::Function<Rope> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& cos, const Tensor& sin) {
    ctx->save_for_backward({cos, sin});
    save_features(ctx);
    return kernels(x).rope(readable(x), cos, sin, false);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const BackwardScope scope(ctx, "rope");
    const auto saved = ctx->get_saved_variables();
    return {kernels(grads[0]).rope(readable(grads[0]), saved[0], saved[1], true), Tensor(), Tensor()};
  }
};

struct CrossEntropyMean : torch::autograd::Function<CrossEntropyMean> {
  static Tensor forward(AutogradContext* ctx, const Tensor& logits, const Tensor& targets) {
    const Tensor flat_targets = targets.reshape(-1).contiguous();
    const auto [sum, log_sums] = kernels(logits).cross_entropy(flat(logits), flat_targets);
    ctx->save_for_backward({logits, flat_targets, log_sums});
    save_features(ctx);
    return sum.div(flat_targets.numel());
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const BackwardScope scope(ctx, "cross entropy");
    const auto saved = ctx->get_saved_variables();
    const Tensor dlogits = kernels(saved[0]).cross_entropy_backward(flat(saved[0]), saved[1], saved[2],
                                                                    grads[0].div(saved[1].numel()));
    return {dlogits.view(saved[0].sizes()), Tensor()};
  }
};

}  // namespace
}  // namespace bbt::fused

extern "C" char* bbt_ternary_weight(uint32_t features, const at::Tensor* w, at::Tensor** codes,
                                    at::Tensor** gamma, at::Tensor** packed) {
  return bbt::guarded([&] {
    bbt::fused::use_cpu_features({features});
    const at::NoGradGuard no_grad;
    const auto weight = bbt::fused::kernels(*w).quantize_weight(w->detach().contiguous());
    *codes = new at::Tensor(weight.codes);
    *gamma = new at::Tensor(weight.gamma);
    if (weight.packed.defined()) *packed = new at::Tensor(weight.packed);
  });
}

extern "C" char* bbt_bit_linear(uint32_t features, const at::Tensor* x, bbt::Prologue prologue,
                                const at::Tensor* norm_weight, double eps, const at::Tensor* const* weights,
                                const int64_t* outs, size_t n, int clipped, bbt::Dtype dtype, at::Tensor** outputs,
                                at::Tensor** scales) {
  return bbt::guarded([&] {
    constexpr at::ScalarType kDtypes[] = {at::kFloat, at::kBFloat16, at::kHalf};
    bbt::fused::use_cpu_features({features});
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    std::vector<at::Tensor> inputs = {*x};
    if (norm_weight != nullptr) inputs.push_back(*norm_weight);
    std::vector<bbt::fused::TernaryWeight> ternary;
    const auto or_undefined = [](const at::Tensor* tensor) { return tensor == nullptr ? at::Tensor() : *tensor; };
    for (size_t i = 0; i < n; ++i) {
      const at::Tensor* const* weight = weights + 4 * i;
      TORCH_CHECK(weight[0] != nullptr || !at::GradMode::is_enabled() || !x->requires_grad(),
                  "a weight that is kept for inference alone has no backward");
      if (weight[0] != nullptr) inputs.push_back(*weight[0]);
      ternary.push_back({outs[i], or_undefined(weight[1]), *weight[2], or_undefined(weight[3])});
    }
    at::Tensor of_rows;
    const auto results = bbt::fused::BitLinear::apply(at::TensorList(inputs), prologue, eps, ternary, clipped != 0,
                                                      kDtypes[static_cast<int>(dtype)], &of_rows);
    for (size_t i = 0; i < n; ++i) outputs[i] = new at::Tensor(results[i]);
    *scales = new at::Tensor(of_rows);
  });
}

extern "C" char* bbt_rope(uint32_t features, const at::Tensor* x, const at::Tensor* cos, const at::Tensor* sin,
                          at::Tensor** out) {
  return bbt::guarded([&] {
    bbt::fused::use_cpu_features({features});
    *out = new at::Tensor(bbt::fused::Rope::apply(*x, *cos, *sin));
  });
}

extern "C" char* bbt_cross_entropy_mean(uint32_t features, const at::Tensor* logits, const at::Tensor* targets,
                                        at::Tensor** out) {
  return bbt::guarded([&] {
    bbt::fused::use_cpu_features({features});
    *out = new at::Tensor(bbt::fused::CrossEntropyMean::apply(*logits, *targets));
  });
}
