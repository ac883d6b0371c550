// Activation checkpointing: an autograd function that keeps only its input and calls back to compute
// its output again during backward, as torch.utils.checkpoint (use_reentrant=True) does.
#include "shim.h"

#include <ATen/autocast_mode.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/custom_class.h>

namespace {

// The autocast state of one device type, taken at forward and put back around the recomputation:
// backward runs outside the region, possibly on another thread.
struct AutocastState {
  explicit AutocastState(at::DeviceType device)
      : device(device),
        enabled(at::autocast::is_autocast_enabled(device)),
        dtype(at::autocast::get_autocast_dtype(device)),
        cache(at::autocast::is_autocast_cache_enabled()) {}

  void restore() const {
    at::autocast::set_autocast_enabled(device, enabled);
    at::autocast::set_autocast_dtype(device, dtype);
    at::autocast::set_autocast_cache_enabled(cache);
  }

  at::DeviceType device;
  bool enabled;
  at::ScalarType dtype;
  bool cache;
};

// Puts `state` in force for a scope. The cast cache stays off: what is cast without gradients in
// forward must not be found, without its gradient, by the recomputation.
struct AutocastScope {
  explicit AutocastScope(const AutocastState& state) : outer(state.device) {
    state.restore();
    at::autocast::set_autocast_cache_enabled(false);
  }
  ~AutocastScope() { outer.restore(); }
  AutocastState outer;
};

struct Closure : torch::CustomClassHolder {
  Closure(bbt_recompute call, bbt_drop drop, void* closure, AutocastState autocast)
      : call(call), drop(drop), closure(closure), autocast(autocast) {}
  ~Closure() override { drop(closure); }

  at::Tensor operator()(at::Tensor input) {
    AutocastScope scope(autocast);
    at::Tensor* output = nullptr;
    char* error = call(closure, &input, &output);
    if (error != nullptr) {
      std::string text(error);
      std::free(error);
      throw std::runtime_error(text);
    }
    at::Tensor result = std::move(*output);
    delete output;
    return result;
  }

  bbt_recompute call;
  bbt_drop drop;
  void* closure;
  AutocastState autocast;
};

struct Recompute : torch::autograd::Function<Recompute> {
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& input,
                            c10::intrusive_ptr<Closure> closure) {
    ctx->save_for_backward({input});
    ctx->saved_data["closure"] = c10::IValue::make_capsule(closure);
    // Function::apply has turned gradients off: nothing inside is kept.
    return (*closure)(input);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list grads) {
    const at::Tensor saved = ctx->get_saved_variables()[0];
    at::Tensor input = saved.detach();
    input.set_requires_grad(saved.requires_grad());
    auto closure = c10::static_intrusive_pointer_cast<Closure>(ctx->saved_data["closure"].toCapsule());
    at::Tensor output;
    {
      at::AutoGradMode on(true);
      output = (*closure)(input);
    }
    torch::autograd::backward({output}, {grads[0]});
    return {input.grad(), at::Tensor()};
  }
};

}  // namespace

extern "C" char* bbt_recompute_in_backward(bbt_recompute call, bbt_drop drop, void* closure,
                                           const at::Tensor* input, at::Tensor** output) {
  return bbt::guarded([&] {
    auto owned =
        c10::make_intrusive<Closure>(call, drop, closure, AutocastState(input->device().type()));
    *output = new at::Tensor(Recompute::apply(*input, owned));
  });
}
