#include "adamw8bit_kernels.h"

constexpr bbt::adamw8bit::Kernels bbt::adamw8bit::kAvx512 = {
    .name = "avx512", .needs = compiled_for(), .needs_lookup = false, .step = ::step};
