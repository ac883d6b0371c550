// AdamW over moments of 8 bits on CUDA, by our own kernel: a launch for each parameter.
#include "adamw8bit.h"

#include "../cuda/arguments.h"
#include "cuda_launch.h"

#include <ATen/ops/_foreach_add.h>
#include <ATen/ops/rsub.h>

namespace {

bbt::cuda::Moment8bit moment(const at::Tensor& codes, const at::Tensor& absmax, const at::Tensor& values,
                             const at::Tensor& nearest) {
  return {codes.data_ptr<uint8_t>(), absmax.data_ptr<float>(), values.data_ptr<float>(), nearest.data_ptr<uint8_t>()};
}

}  // namespace

void bbt::adamw8bit::step_cuda(const Step& step) {
  // The count goes on before the kernels read it, and by nothing where the step is skipped.
  at::_foreach_add_(step.steps, at::rsub(step.found_inf, 1));
  for (size_t i = 0; i < step.params.size(); ++i) {
    bbt::cuda::AdamW8bit arguments;
    arguments.param = step.params[i].data_ptr<float>();
    arguments.grad = step.grads[i].data_ptr<float>();
    arguments.first = moment(step.codes1[i], step.absmax1[i], step.values1, step.nearest1);
    arguments.second = moment(step.codes2[i], step.absmax2[i], step.values2, step.nearest2);
    arguments.step = step.steps[i].data_ptr<float>();
    arguments.found_inf = step.found_inf.data_ptr<float>();
    arguments.n = step.params[i].numel();
    arguments.lr = step.lr;
    arguments.beta1 = step.beta1;
    arguments.beta2 = step.beta2;
    arguments.decay1 = static_cast<float>(step.beta1);
    arguments.decay2 = static_cast<float>(step.beta2);
    arguments.rest1 = static_cast<float>(1 - step.beta1);
    arguments.rest2 = static_cast<float>(1 - step.beta2);
    arguments.keep = static_cast<float>(1 - step.lr * step.weight_decay);
    arguments.eps = static_cast<float>(step.eps);
    bbt::cuda::launch(step.params[i].device(), "adamw8bit", bbt::cuda::adamw8bit_blocks(arguments.n),
                      bbt::cuda::kAdamW8bitThreads, &arguments);
  }
}
