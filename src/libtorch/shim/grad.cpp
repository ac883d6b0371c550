// What tch does not bind: a tensor's gradient as something to set.
#include "shim.h"

extern "C" char* bbt_set_grad(at::Tensor* tensor, at::Tensor* grad) {
  return bbt::guarded([&] { tensor->mutable_grad() = *grad; });
}
