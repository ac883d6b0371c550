// Operations over all parameters at once: the fused optimizer step, the gradient norm, scaling.
#include "shim.h"

#include <ATen/ops/_amp_foreach_non_finite_check_and_unscale.h>
#include <ATen/ops/_foreach_add.h>
#include <ATen/ops/_foreach_mul.h>
#include <ATen/ops/_foreach_norm.h>
#include <ATen/ops/_foreach_sub.h>
#include <ATen/ops/_fused_adamw.h>
#include <ATen/ops/stack.h>

// One step of torch.optim.AdamW(fused=True): see _fused_adamw in torch/optim/adam.py.
// Where found_inf is 1, nothing changes, the step counts included.
extern "C" char* bbt_fused_adamw(const at::Tensor* const* params, const at::Tensor* const* grads,
                                 const at::Tensor* const* exp_avgs, const at::Tensor* const* exp_avg_sqs,
                                 const at::Tensor* const* steps, size_t n, double lr, double beta1, double beta2,
                                 double weight_decay, double eps, const at::Tensor* found_inf) {
  return bbt::guarded([&] {
    auto state_steps = bbt::list(steps, n);
    at::_foreach_add_(state_steps, 1);
    at::_fused_adamw_(bbt::list(params, n), bbt::list(grads, n), bbt::list(exp_avgs, n),
                      bbt::list(exp_avg_sqs, n), {}, state_steps, lr, beta1, beta2, weight_decay, eps,
                      /*amsgrad=*/false, /*maximize=*/false, /*grad_scale=*/{}, *found_inf);
    at::_foreach_sub_(state_steps, std::vector<at::Tensor>(n, *found_inf));
  });
}

// The L2 norm of each tensor, in fp32 [n].
extern "C" char* bbt_foreach_norms(const at::Tensor* const* tensors, size_t n, at::Tensor** norms) {
  return bbt::guarded([&] { *norms = new at::Tensor(at::stack(at::_foreach_norm(bbt::list(tensors, n), 2))); });
}

extern "C" char* bbt_foreach_mul(const at::Tensor* const* tensors, size_t n, const at::Tensor* factor) {
  return bbt::guarded([&] { at::_foreach_mul_(bbt::list(tensors, n), *factor); });
}

extern "C" char* bbt_amp_unscale(const at::Tensor* const* grads, size_t n, const at::Tensor* found_inf,
                                 const at::Tensor* inverse_scale) {
  return bbt::guarded([&] {
    at::Tensor found = *found_inf;
    at::_amp_foreach_non_finite_check_and_unscale_(bbt::list(grads, n), found, *inverse_scale);
  });
}
