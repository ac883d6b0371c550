#include "adamw8bit_kernels.h"

constexpr bbt::adamw8bit::Kernels bbt::adamw8bit::kPortable = {
    .name = "portable", .needs = compiled_for(), .needs_lookup = false, .step = ::step};
