// One step of AdamW over moments of 8 bits: what adamw8bit.cpp has checked, and by whose kernels it can be done.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

namespace bbt::adamw8bit {

// Of some parameters, at least one. All on one device and contiguous.
struct Step {
  // fp32.
  std::vector<at::Tensor> params, grads;
  // Of the first and the second moments: uint8 as the parameter, and fp32, one for each block of 256.
  std::vector<at::Tensor> codes1, absmax1, codes2, absmax2;
  // Taken so far: fp32 [].
  std::vector<at::Tensor> steps;
  // What the first and the second moments' codes stand for, fp32 [256]; the codes nearest to numbers, uint8 [65536].
  at::Tensor values1, nearest1, values2, nearest2;
  // fp32 []: where it is 1, nothing changes.
  at::Tensor found_inf;
  double lr, beta1, beta2, weight_decay, eps;
};

// adamw8bit_cuda.cpp, with kernels/cuda/adamw8bit.cu. Does not wait for the device.
void step_cuda(const Step& step);

// bitsandbytes.cpp: whether bitsandbytes' kernel is there, which then steps. Waits for the device. Both throw where
// BBT_BITSANDBYTES names one that cannot be used.
bool bitsandbytes_found();
void step_bitsandbytes(const Step& step);

}  // namespace bbt::adamw8bit
