// The interface between attention.cpp, which knows tensors and threads, and the kernels, which know neither. Each
// instruction set has a file of kernels that is compiled with its flags.
#pragma once

#include "features.h"

#include <cstddef>
#include <cstdint>

namespace bbt::attention {

// A tensor [B, H, T, D] of the caller, with its strides in elements; that of D is 1.
struct View {
  void* data;
  int64_t batch, head, row;
};

// Everything that forward and backward read and write.
struct Problem {
  int64_t batch, heads, kv_heads, length, dim;
  // 1 / sqrt(dim).
  float scale;
  View q, k, v, out;
  // [B, H, T]: the logarithm of the sum of exp(scale * score) over a query's keys, divided by `scale`.
  float* lse;

  // Backward only.
  View dout, dq, dk, dv;
  // The key blocks of one head are dealt out to this many tasks; it depends on the shapes alone, so that the order of
  // every sum does, too.
  int64_t splits;
  // [splits, B, H, partial_size()] in fp32: what each task adds to the gradient of the queries. Where splits is 1,
  // null: the only task writes the gradient itself.
  float* partial;
};

// The kernels of one instruction set for one dtype. Tasks are numbered from 0 and may run in any order and on any
// thread; a call does those from `begin` to `end`, in a scratch of its own, aligned to 64 bytes.
struct Kernels {
  // As doctor prints it, and the features without which it cannot run.
  const char* name;
  CpuFeatures needs;

  // Tasks: B * H * blocks of queries.
  int64_t (*forward_tasks)(const Problem&);
  size_t (*forward_scratch)(const Problem&);
  void (*forward)(const Problem&, int64_t begin, int64_t end, void* scratch);
  // Tasks: B * Hkv * splits.
  size_t (*backward_scratch)(const Problem&);
  void (*backward)(const Problem&, int64_t begin, int64_t end, void* scratch);
  // Sums the partial gradients of the queries. Tasks: B * H.
  int64_t (*partial_size)(const Problem&);
  void (*reduce)(const Problem&, int64_t begin, int64_t end);
};

extern const Kernels kAvx512Bf16;
extern const Kernels kAvx512Float, kAvx512BFloat16;
extern const Kernels kAvx2Float, kAvx2BFloat16;
extern const Kernels kPortableFloat, kPortableBFloat16;

// The best first.
#if defined(__x86_64__)
constexpr const Kernels* kFloatKernels[] = {&kAvx512Float, &kAvx2Float, &kPortableFloat};
constexpr const Kernels* kBFloat16Kernels[] = {&kAvx512Bf16, &kAvx512BFloat16, &kAvx2BFloat16, &kPortableBFloat16};
#else
constexpr const Kernels* kFloatKernels[] = {&kPortableFloat};
constexpr const Kernels* kBFloat16Kernels[] = {&kPortableBFloat16};
#endif

}  // namespace bbt::attention
