// A CUDA library of bitsandbytes that computes nothing and records how it is called. With OTHER_ARGUMENTS its function
// takes others, as that of another version may.
#include "bitsandbytes.h"

extern "C" {
int fake_calls = 0;
Call fake_call[kRoom];
}

#ifdef OTHER_ARGUMENTS

extern "C" void cadam_8bit_blockwise_grad_fp32(float*, float*, unsigned char*, unsigned char*, float, float, float, int,
                                               float, float*, float*, float*, float*, float, float, bool, int) {}

#else

// Exported by the real one, too.
void adam_8bit_blockwise_grad_fp32(float* p, float* g, unsigned char* state1, unsigned char* state2, float beta1,
                                   float beta2, float beta3, float alpha, float eps, int step, float lr, float* qmap1,
                                   float* qmap2, float* absmax1, float* absmax2, float weight_decay,
                                   const float gnorm_scale, bool skip_zeros, int n) {
  const Call call = {p,     g,     state1, state2, qmap1,        qmap2,       absmax1, absmax2, beta1,     beta2,
                     beta3, alpha, eps,    lr,     weight_decay, gnorm_scale, step,    n,       skip_zeros};
  if (fake_calls < kRoom) fake_call[fake_calls] = call;
  ++fake_calls;
}

extern "C" void cadam_8bit_blockwise_grad_fp32(float* p, float* g, unsigned char* state1, unsigned char* state2,
                                               float beta1, float beta2, float beta3, float alpha, float eps, int step,
                                               float lr, float* qmap1, float* qmap2, float* absmax1, float* absmax2,
                                               float weight_decay, const float gnorm_scale, bool skip_zeros, int n) {
  adam_8bit_blockwise_grad_fp32(p, g, state1, state2, beta1, beta2, beta3, alpha, eps, step, lr, qmap1, qmap2, absmax1,
                                absmax2, weight_decay, gnorm_scale, skip_zeros, n);
}

#endif
