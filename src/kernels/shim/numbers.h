// The enumerations that cross the C interface of the kernels, with the numbers that they have in Rust. A test compares
// the two.
#pragma once

#include "../../libtorch/shim/numbers.h"
#include "../cpu/features.h"

namespace bbt {

// What a BitLinear layer does to its input before it quantizes it.
enum class Prologue : int { kNone, kRmsNorm, kSwiGlu };

// What there are several CPU kernels for.
enum class CpuOperation : int { kInt8Product, kRows, kAttentionFloat, kAttentionBFloat16, kAdamW8bit };

}  // namespace bbt
