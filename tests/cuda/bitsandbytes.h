// What the library of bitsandbytes.cpp records.
#pragma once

struct Call {
  const void *param, *grad, *state1, *state2, *qmap1, *qmap2, *absmax1, *absmax2;
  float beta1, beta2, beta3, alpha, eps, lr, weight_decay, gnorm_scale;
  int step, n;
  bool skip_zeros;
};
constexpr int kRoom = 8;
