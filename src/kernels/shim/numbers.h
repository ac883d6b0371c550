// The enumerations that cross the C interface of the kernels, with the numbers that they have in Rust. A test compares
// the two.
#pragma once

#include "../../libtorch/shim/numbers.h"

namespace bbt {

// The instruction sets that the CPU kernels are compiled for, each with all that those before it have. In Rust:
// cpu_kernels.rs.
enum class CpuKernels : int { kPortable, kAvx2, kAvx512, kAvx512Vnni, kAvx512Vbmi, kAvx512Bf16 };

// What a BitLinear layer does to its input before it quantizes it. In Rust: ffi.rs.
enum class Prologue : int { kNone, kRmsNorm, kSwiGlu };

}  // namespace bbt
