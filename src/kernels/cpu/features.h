// What a CPU can do, as a set, and how the best kernel for it is found.
#pragma once

#include <cstddef>
#include <cstdint>

namespace bbt {

// The bits of a set. cpu_features.rs has the same ones; a test compares the two.
enum class CpuFeature : int {
  kAvx2,
  kFma,
  kAvx512F,
  kAvx512Bw,
  kAvx512Dq,
  kAvx512Vl,
  kAvx512Vnni,
  kAvx512Vbmi,
  kAvx512Bf16,
  kAvx512Fp16,
  kAvxVnni,
  kAmxInt8,
  kAmxBf16,
  kNeon,
};

struct CpuFeatures {
  uint32_t bits = 0;

  constexpr bool has(CpuFeatures needed) const { return (needed.bits & ~bits) == 0; }
};

// The first of `kernels`, of which the best comes first and the last one needs nothing, that a CPU with these features
// can run.
template <class Kernels, size_t kCount>
const Kernels& best(const Kernels* const (&kernels)[kCount], CpuFeatures features) {
  for (const Kernels* candidate : kernels) {
    if (features.has(candidate->needs)) return *candidate;
  }
  return *kernels[kCount - 1];
}

}  // namespace bbt
