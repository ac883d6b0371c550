#include "adamw8bit_kernels.h"

constexpr bbt::adamw8bit::Kernels bbt::adamw8bit::kAvx512 = {step};
