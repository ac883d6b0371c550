// The C interface of the wall: what libtorch has and tch does not bind.
//
// Conventions. Tensors cross as `at::Tensor*`, which is what tch's `C_tensor*` points to. Every function
// returns nullptr on success, or a message allocated with malloc that the caller frees with
// bbt_free_message. No C++ type and no exception crosses this interface.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <vector>

#include <ATen/core/Tensor.h>

namespace bbt {

inline char* message(const char* text) {
  return strdup(text == nullptr ? "unknown error" : text);
}

// Runs `body`, turning any exception into the message to return.
template <typename Body>
char* guarded(Body&& body) {
  try {
    body();
    return nullptr;
  } catch (const std::exception& error) {
    return message(error.what());
  } catch (...) {
    return message("unknown C++ exception");
  }
}

inline std::vector<at::Tensor> list(at::Tensor* const* tensors, size_t n) {
  std::vector<at::Tensor> out;
  out.reserve(n);
  for (size_t i = 0; i < n; ++i) out.push_back(*tensors[i]);
  return out;
}

}  // namespace bbt

extern "C" {

// Recomputes its output: returns a message or nullptr, with a new tensor in *output.
typedef char* (*bbt_recompute)(void* closure, at::Tensor* input, at::Tensor** output);
typedef void (*bbt_drop)(void* closure);

void bbt_free_message(char* text);

// autocast.cpp. `device`: 0 CPU, 1 CUDA. `dtype`: 0 fp16, 1 bf16.
char* bbt_autocast_enter(int device, int dtype);
char* bbt_autocast_exit(int device);

// recompute.cpp. Takes ownership of `closure`, also when it fails.
char* bbt_recompute_in_backward(bbt_recompute call, bbt_drop drop, void* closure, at::Tensor* input,
                                at::Tensor** output);

// attention.cpp. `isa`: 0 portable, 1 AVX2, 2 AVX-512, 3 AVX-512 with bf16.
char* bbt_causal_attention(int isa, at::Tensor* q, at::Tensor* k, at::Tensor* v, at::Tensor** out);

// foreach.cpp
char* bbt_fused_adamw(at::Tensor* const* params, at::Tensor* const* grads, at::Tensor* const* exp_avgs,
                      at::Tensor* const* exp_avg_sqs, at::Tensor* const* steps, size_t n, double lr,
                      double beta1, double beta2, double weight_decay, double eps, at::Tensor* found_inf);
char* bbt_foreach_norm(at::Tensor* const* tensors, size_t n, at::Tensor** norm);
char* bbt_foreach_mul(at::Tensor* const* tensors, size_t n, at::Tensor* factor);
char* bbt_amp_unscale(at::Tensor* const* grads, size_t n, at::Tensor* found_inf, at::Tensor* inverse_scale);

// memory.cpp. Bytes on CUDA device `index`.
char* bbt_cuda_memory(int index, uint64_t* free_bytes, uint64_t* total_bytes, uint64_t* peak_bytes);

}  // extern "C"
