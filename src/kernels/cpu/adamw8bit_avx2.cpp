#include "adamw8bit_kernels.h"

constexpr bbt::adamw8bit::Kernels bbt::adamw8bit::kAvx2 = {
    .name = "avx2", .needs = compiled_for(), .needs_lookup = false, .step = ::step};
