// The interface between shim/adamw8bit.cpp, which knows tensors and threads, and AdamW with 8-bit moments, which knows
// neither. Each instruction set has a file of kernels that is compiled with its flags.
#pragma once

#include "features.h"

#include <cstddef>
#include <cstdint>

namespace bbt::adamw8bit {

// Neighbours that share one scale.
constexpr int64_t kBlock = 256;

struct Lookup;

// The values that 8 bits stand for, ascending, and how one is found.
struct CodeBook {
  // [256]
  const float* values;
  // The codes of the values nearest to 65536 numbers from -1 to 1, evenly spaced.
  const uint8_t* nearest;
  // The same in the form that some kernels need; null for the others.
  const Lookup* lookup;
};

// A moment of one parameter: values[code] * absmax.
struct Moment {
  uint8_t* codes;
  // One per block.
  float* absmax;
  CodeBook book;
};

struct Problem {
  int64_t n;
  float* param;
  const float* grad;
  Moment first, second;
  float beta1, beta2;
  // 1 - beta, rounded once.
  float rest1, rest2;
  // 1 - lr * weight_decay.
  float keep;
  // lr / (1 - beta1^t), 1 / sqrt(1 - beta2^t).
  float rate, scale;
  float eps;
};

// The kernels of one instruction set.
struct Kernels {
  // As doctor prints it, and the features without which it cannot run.
  const char* name;
  CpuFeatures needs;
  // Whether step() reads CodeBook::lookup, which not every code book can have.
  bool needs_lookup;

  // One step of the blocks from `begin` to `end`, which do not depend on each other.
  void (*step)(const Problem&, int64_t begin, int64_t end);
};

extern const Kernels kAvx512Vbmi, kAvx512, kAvx2, kPortable;

// The best first.
#if defined(__x86_64__)
constexpr const Kernels* kKernels[] = {&kAvx512, &kAvx2, &kPortable};
#else
constexpr const Kernels* kKernels[] = {&kPortable};
#endif
// Those for code books that have a lookup.
#if defined(__x86_64__)
constexpr const Kernels* kLookupKernels[] = {&kAvx512Vbmi, &kAvx512, &kAvx2, &kPortable};
#else
constexpr const Kernels* kLookupKernels[] = {&kPortable};
#endif

}  // namespace bbt::adamw8bit
