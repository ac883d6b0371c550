// The C interface of the wall: what libtorch has and tch does not bind.
//
// Conventions. Tensors cross as `at::Tensor*`, which is what tch's `C_tensor*` points to. Numbers and enumerations
// (numbers.h) cross by value. Every function that can fail returns nullptr on success, or a message allocated with malloc
// that the caller frees with bbt_free_message. No other C++ type and no exception crosses this interface. Each declaration here has one in ffi.rs
// of the same types, and the other way round: a test sees to it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <vector>

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include "numbers.h"

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
  } catch (const c10::Error& error) {
    return message(error.what_without_backtrace());
  } catch (const std::exception& error) {
    return message(error.what());
  } catch (...) {
    return message("unknown C++ exception");
  }
}

inline std::vector<at::Tensor> list(const at::Tensor* const* tensors, size_t n) {
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

// autocast.cpp. `dtype`: kBFloat16 or kHalf.
char* bbt_autocast_enter(bbt::DeviceType device, bbt::Dtype dtype);
char* bbt_autocast_exit(bbt::DeviceType device);
// `*dtype` is kFloat where autocast is off.
char* bbt_autocast_dtype(bbt::DeviceType device, bbt::Dtype* dtype);

// recompute.cpp. Takes ownership of `closure`, also when it fails.
char* bbt_recompute_in_backward(bbt_recompute call, bbt_drop drop, void* closure, const at::Tensor* input,
                                at::Tensor** output);

// attention.cpp
char* bbt_causal_attention(bbt::CpuKernels kernels, const at::Tensor* q, const at::Tensor* k, const at::Tensor* v,
                           at::Tensor** out);

// fused.cpp. `kernels`: those of the CPU; other devices have no use for it.
// `*codes`, `*gamma`, `*packed`: new tensors; `*packed` may stay nullptr.
char* bbt_ternary_weight(bbt::CpuKernels kernels, const at::Tensor* w, at::Tensor** codes, at::Tensor** gamma,
                         at::Tensor** packed);
// kRmsNorm has `norm_weight` and `eps`; else they are not read. `weights` holds four tensors for each of `n` weights: the
// one that the gradient is of, its codes, its gamma, and packed or nullptr. For inference alone the first may be nullptr,
// and the second, too, where there is a third and fourth: a weight is then `outs[i]` rows. `dtype`: of the outputs.
// `outputs`: room for `n` new tensors, `scales` for one: those of the activations' rows.
char* bbt_bit_linear(bbt::CpuKernels kernels, const at::Tensor* x, bbt::Prologue prologue,
                     const at::Tensor* norm_weight, double eps, const at::Tensor* const* weights, const int64_t* outs,
                     size_t n, int clipped, bbt::Dtype dtype, at::Tensor** outputs, at::Tensor** scales);
char* bbt_rope(bbt::CpuKernels kernels, const at::Tensor* x, const at::Tensor* cos, const at::Tensor* sin,
               at::Tensor** out);
char* bbt_cross_entropy_mean(bbt::CpuKernels kernels, const at::Tensor* logits, const at::Tensor* targets,
                             at::Tensor** out);

// grad.cpp. How often the tensor was written to in place; one write more for each of several; whether this thread
// records operations for backward.
char* bbt_tensor_version(const at::Tensor* tensor, int64_t* version);
char* bbt_mark_written(const at::Tensor* const* tensors, size_t n);
int bbt_is_grad_enabled();

// cuda_graph.cpp. A handle `void*`, freed with `_free`.
char* bbt_cuda_graph_begin(int device, void** graph);
char* bbt_cuda_graph_end(void* graph);
char* bbt_cuda_graph_replay(void* graph);
void bbt_cuda_graph_free(void* graph);

// host_copy.cpp. A handle `void*`, freed with `_free`.
char* bbt_host_copy_start(const at::Tensor* tensor, void** copy);
char* bbt_host_copy_wait(void* copy, at::Tensor** tensor);
void bbt_host_copy_free(void* copy);

// foreach.cpp
char* bbt_fused_adamw(const at::Tensor* const* params, const at::Tensor* const* grads,
                      const at::Tensor* const* exp_avgs, const at::Tensor* const* exp_avg_sqs,
                      const at::Tensor* const* steps, size_t n, double lr, double beta1, double beta2,
                      double weight_decay, double eps, const at::Tensor* found_inf);
char* bbt_foreach_norms(const at::Tensor* const* tensors, size_t n, at::Tensor** norms);
char* bbt_foreach_mul(const at::Tensor* const* tensors, size_t n, const at::Tensor* factor);
char* bbt_amp_unscale(const at::Tensor* const* grads, size_t n, const at::Tensor* found_inf,
                      const at::Tensor* inverse_scale);

// adamw8bit.cpp. Lists of `n` tensors on one device: uint8 `codes`, fp32 `absmax` of the first and
// the second moment. A book is two tensors, as in kernels/cpu/adamw8bit.h.
char* bbt_adamw8bit(bbt::CpuKernels kernels, const at::Tensor* const* params, const at::Tensor* const* grads,
                    const at::Tensor* const* codes1, const at::Tensor* const* absmax1, const at::Tensor* const* codes2,
                    const at::Tensor* const* absmax2, const at::Tensor* const* steps, size_t n,
                    const at::Tensor* const* book1, const at::Tensor* const* book2, double lr, double beta1,
                    double beta2, double weight_decay, double eps, const at::Tensor* found_inf);

// bitsandbytes.cpp. Where bitsandbytes' kernel is used on CUDA: `*path`, the library that has it; else `*why` not. The
// other one is nullptr; what is not is freed with bbt_free_message.
char* bbt_bitsandbytes(char** path, char** why);

// grad.cpp. Makes `grad` the gradient of `tensor`.
char* bbt_set_grad(const at::Tensor* tensor, const at::Tensor* grad);

// store.cpp. A handle `void*` stands for a c10d object; `_free` drops it. Times in milliseconds. Keys are put
// behind `prefix` where it is not empty. With `is_server` this process holds the store; port 0: any free one.
char* bbt_store_new(const char* host, uint16_t port, int is_server, int64_t timeout_ms, const char* prefix,
                    void** store, uint16_t* actual_port);
void bbt_store_free(void* store);
char* bbt_store_set(void* store, const char* key, const uint8_t* value, size_t n);
// Waits for the key. The caller frees `*value` with free.
char* bbt_store_get(void* store, const char* key, int64_t timeout_ms, uint8_t** value, size_t* n);
char* bbt_store_add(void* store, const char* key, int64_t amount, int64_t* sum);
char* bbt_store_check(void* store, const char* key, int* present);

// process_group.cpp. `cuda_device` is -1 on the CPU. Collectives return once their result may be used on the
// current stream.
char* bbt_process_group_new(void* store, int rank, int size, int nccl, int cuda_device, int64_t timeout_ms,
                            void** group);
char* bbt_process_group_shutdown(void* group);
void bbt_process_group_free(void* group);
// The sum over ranks, or the largest; in place.
char* bbt_all_reduce(void* group, const at::Tensor* tensor, int max);
char* bbt_broadcast(void* group, const at::Tensor* const* tensors, size_t n, int root);
// `output` is as many times as long as `input` as there are ranks; reduce_scatter (sum): the other way round.
char* bbt_all_gather(void* group, const at::Tensor* output, const at::Tensor* input);
char* bbt_reduce_scatter(void* group, const at::Tensor* output, const at::Tensor* input);
char* bbt_barrier(void* group);

// reducer.cpp
char* bbt_reducer_new(void* group, const at::Tensor* const* params, size_t n, int64_t bucket_bytes, void** reducer);
void bbt_reducer_free(void* reducer);
char* bbt_reducer_rebuild_buckets(void* reducer);
char* bbt_reducer_prepare_for_forward(void* reducer);
char* bbt_reducer_prepare_for_backward(void* reducer);
char* bbt_reducer_measure_every(void* reducer, int steps);
char* bbt_reducer_times(void* reducer, int64_t* forward, int64_t* backward, int64_t* communication,
                        int64_t* overlap);

// memory.cpp. Bytes on CUDA device `index`.
char* bbt_cuda_memory(int index, uint64_t* free_bytes, uint64_t* total_bytes, uint64_t* peak_bytes);

// cuda_launch.cpp. What the driver calls CUDA device `index`, in at most `size` bytes, the NUL included.
char* bbt_cuda_name(int index, char* name, int size);

// nvrtc.cpp. Compiles bbt's CUDA kernels for `architecture`, "sm_90", or finds them in the folder `cache`. `bytes`: how
// large they are.
char* bbt_cuda_kernels(const char* architecture, const char* cache, size_t* bytes);

}  // extern "C"
