// The enumerations that cross the C interface, with the numbers that they have in Rust. A test compiles both sides
// against each other (tests/it/shim.rs).
#pragma once

namespace bbt {

// Instruction sets that the CPU kernels are compiled for, each with all that those before it have. In Rust:
// cpu_kernels.rs.
enum class CpuKernels : int { kPortable, kAvx2, kAvx512, kAvx512Vnni, kAvx512Vbmi, kAvx512Bf16 };

// In Rust these are in ffi.rs.
enum class DeviceType : int { kCpu, kCuda };
enum class Dtype : int { kFloat, kBFloat16, kHalf };

// What a BitLinear layer does to its input before it quantizes it.
enum class Prologue : int { kNone, kRmsNorm, kSwiGlu };

}  // namespace bbt
