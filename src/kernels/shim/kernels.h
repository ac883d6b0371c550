// The C interface to bbt's own kernels. Its conventions are those of libtorch/shim/shim.h; ffi.rs declares the same
// functions, and a test compares the two.
//
// `features` are the bits of the CpuFeatures by which the CPU's kernels are chosen; on another device they are not read.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../../libtorch/shim/guard.h"
#include "numbers.h"

extern "C" {

// cpu_kernels.cpp. The name of the kernels that are chosen, which lives as long as the process.
const char* bbt_cpu_kernel(uint32_t features, bbt::CpuOperation operation);

// attention.cpp
char* bbt_causal_attention(uint32_t features, const at::Tensor* q, const at::Tensor* k, const at::Tensor* v,
                           at::Tensor** out);

// fused.cpp
// Stores three new tensors; `*packed` stays nullptr where the device's product reads `*codes`.
char* bbt_ternary_weight(uint32_t features, const at::Tensor* w, at::Tensor** codes, at::Tensor** gamma,
                         at::Tensor** packed);
// `norm_weight` and `eps` are read for kRmsNorm only. `weights` holds four tensors for each of the `n` weights: the one
// that gets the gradient, its codes, its gamma, and the packed codes or nullptr. Without a backward pass the first may
// be nullptr, and so may the codes where there are packed ones. Weight i has `outs[i]` rows. `dtype` is that of the
// outputs. `outputs` has room for `n` new tensors, `scales` for one: the scale of each row of activations.
char* bbt_bit_linear(uint32_t features, const at::Tensor* x, bbt::Prologue prologue,
                     const at::Tensor* norm_weight, double eps, const at::Tensor* const* weights, const int64_t* outs,
                     size_t n, int clipped, bbt::Dtype dtype, at::Tensor** outputs, at::Tensor** scales);
char* bbt_rope(uint32_t features, const at::Tensor* x, const at::Tensor* cos, const at::Tensor* sin,
               at::Tensor** out);
char* bbt_cross_entropy_mean(uint32_t features, const at::Tensor* logits, const at::Tensor* targets,
                             at::Tensor** out);

// adamw8bit.cpp. Lists of `n` tensors on one device: uint8 `codes` and fp32 `absmax` of the first and of the second
// moment. A code book is two tensors, as in cpu/adamw8bit.h.
char* bbt_adamw8bit(uint32_t features, const at::Tensor* const* params, const at::Tensor* const* grads,
                    const at::Tensor* const* codes1, const at::Tensor* const* absmax1, const at::Tensor* const* codes2,
                    const at::Tensor* const* absmax2, const at::Tensor* const* steps, size_t n,
                    const at::Tensor* const* book1, const at::Tensor* const* book2, double lr, double beta1,
                    double beta2, double weight_decay, double eps, const at::Tensor* found_inf);

// bitsandbytes.cpp. Stores the path of the library whose kernel is used on CUDA in `*path`, or in `*why` why there is
// none, and nullptr in the other one. The caller frees the text with bbt_free_message.
char* bbt_bitsandbytes(char** path, char** why);

// cuda_launch.cpp. Writes the driver's name of CUDA device `index`, at most `size` bytes including the NUL.
char* bbt_cuda_name(int index, char* name, int size);

// nvrtc.cpp. Compiles the CUDA kernels for `architecture`, such as "sm_90", or finds them in the folder `cache`. Stores
// their size in `*bytes`.
char* bbt_cuda_kernels(const char* architecture, const char* cache, size_t* bytes);

}  // extern "C"
