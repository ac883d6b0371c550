#include "attention_kernels.h"

constexpr bbt::attention::Kernels bbt::attention::kAvx512Bf16 = kernels<BFloat16, Pairs>("avx512bf16");
