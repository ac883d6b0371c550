// What tch does not bind: a tensor's gradient as something to set.
#include "shim.h"

#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/variable.h>

extern "C" char* bbt_set_grad(const at::Tensor* tensor, const at::Tensor* grad) {
  return bbt::guarded([&] { tensor->mutable_grad() = *grad; });
}

extern "C" char* bbt_mark_written(const at::Tensor* const* tensors, size_t n) {
  return bbt::guarded([&] {
    for (size_t i = 0; i < n; ++i) torch::autograd::impl::bump_version(*tensors[i]);
  });
}

extern "C" int bbt_is_grad_enabled() {
  return at::GradMode::is_enabled();
}

extern "C" char* bbt_tensor_version(const at::Tensor* tensor, int64_t* version) {
  return bbt::guarded([&] { *version = tensor->_version(); });
}
