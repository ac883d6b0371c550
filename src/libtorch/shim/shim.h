// The C interface to what libtorch has and tch does not bind.
//
// A tensor crosses as `at::Tensor*`, which is what tch's `C_tensor*` points to, numbers and enumerations (numbers.h) by
// value, and any other C++ object as a handle `void*`. A function that can fail returns nullptr, or a message that the
// caller frees with bbt_free_message. No exception crosses. ffi.rs declares the same functions; a test compares the two.
#pragma once

#include <cstddef>
#include <cstdint>

#include "guard.h"
#include "numbers.h"

extern "C" {

// Computes the output once more: returns nullptr and stores a new tensor in `*output`, or returns a message.
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

// grad.cpp. How often a tensor was written to in place (its version counter); counts one more write for each of `n`
// tensors; whether this thread records operations for backward; makes `grad` the gradient of `tensor`.
char* bbt_tensor_version(const at::Tensor* tensor, int64_t* version);
char* bbt_mark_written(const at::Tensor* const* tensors, size_t n);
int bbt_is_grad_enabled();
char* bbt_set_grad(const at::Tensor* tensor, const at::Tensor* grad);

// cuda_graph.cpp. The graph is a handle, which `_free` frees.
char* bbt_cuda_graph_begin(int device, void** graph);
char* bbt_cuda_graph_end(void* graph);
char* bbt_cuda_graph_replay(void* graph);
void bbt_cuda_graph_free(void* graph);

// host_copy.cpp. The copy is a handle, which `_free` frees.
char* bbt_host_copy_start(const at::Tensor* tensor, void** copy);
char* bbt_host_copy_wait(void* copy, at::Tensor** tensor);
void bbt_host_copy_free(void* copy);

// foreach.cpp. Lists of `n` tensors.
char* bbt_fused_adamw(const at::Tensor* const* params, const at::Tensor* const* grads,
                      const at::Tensor* const* exp_avgs, const at::Tensor* const* exp_avg_sqs,
                      const at::Tensor* const* steps, size_t n, double lr, double beta1, double beta2,
                      double weight_decay, double eps, const at::Tensor* found_inf);
char* bbt_foreach_norms(const at::Tensor* const* tensors, size_t n, at::Tensor** norms);
char* bbt_foreach_mul(const at::Tensor* const* tensors, size_t n, const at::Tensor* factor);
char* bbt_amp_unscale(const at::Tensor* const* grads, size_t n, const at::Tensor* found_inf,
                      const at::Tensor* inverse_scale);

// store.cpp. The store is a handle, which `_free` frees. Times are in milliseconds. `prefix` is put before every key
// unless it is empty. With `is_server` this process holds the store, at any free port if `port` is 0; otherwise it
// connects to the process that does.
char* bbt_store_new(const char* host, uint16_t port, int is_server, int64_t timeout_ms, const char* prefix,
                    void** store, uint16_t* actual_port);
void bbt_store_free(void* store);
char* bbt_store_set(void* store, const char* key, const uint8_t* value, size_t n);
// Waits until the key is set. The caller frees `*value` with free().
char* bbt_store_get(void* store, const char* key, int64_t timeout_ms, uint8_t** value, size_t* n);
char* bbt_store_add(void* store, const char* key, int64_t amount, int64_t* sum);
char* bbt_store_check(void* store, const char* key, int* present);

// process_group.cpp. `cuda_device` is -1 on the CPU. A collective returns when operations on the current stream may use
// its result.
char* bbt_process_group_new(void* store, int rank, int size, int nccl, int cuda_device, int64_t timeout_ms,
                            void** group);
char* bbt_process_group_shutdown(void* group);
void bbt_process_group_free(void* group);
// Replaces the tensor by the sum over ranks, or with `max` by the largest value.
char* bbt_all_reduce(void* group, const at::Tensor* tensor, int max);
char* bbt_broadcast(void* group, const at::Tensor* const* tensors, size_t n, int root);
// all_gather: `output` holds the `input` of every rank. reduce_scatter: `output` is this rank's part of the sum.
char* bbt_all_gather(void* group, const at::Tensor* output, const at::Tensor* input);
char* bbt_reduce_scatter(void* group, const at::Tensor* output, const at::Tensor* input);
char* bbt_barrier(void* group);

// reducer.cpp. The reducer is a handle, which `_free` frees.
char* bbt_reducer_new(void* group, const at::Tensor* const* params, size_t n, int64_t bucket_bytes, void** reducer);
void bbt_reducer_free(void* reducer);
char* bbt_reducer_rebuild_buckets(void* reducer);
char* bbt_reducer_prepare_for_forward(void* reducer);
char* bbt_reducer_prepare_for_backward(void* reducer);
char* bbt_reducer_measure_every(void* reducer, int steps);
char* bbt_reducer_times(void* reducer, int64_t* forward, int64_t* backward, int64_t* communication,
                        int64_t* overlap);

// memory.cpp. The memory of CUDA device `index`, in bytes.
char* bbt_cuda_memory(int index, uint64_t* free_bytes, uint64_t* total_bytes, uint64_t* peak_bytes);

}  // extern "C"
