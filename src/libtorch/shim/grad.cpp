// What tch does not bind: a tensor's gradient as something to set.
#include "shim.h"

#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/variable.h>

extern "C" char* bbt_set_grad(at::Tensor* tensor, at::Tensor* grad) {
  return bbt::guarded([&] { tensor->mutable_grad() = *grad; });
}

extern "C" char* bbt_tensor_version(at::Tensor* tensor, int64_t* version) {
  return bbt::guarded([&] { *version = tensor->_version(); });
}
