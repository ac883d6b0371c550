#include "attention_kernels.h"

constexpr bbt::attention::Kernels bbt::attention::kAvx512Float = kernels<Float, Singles>("avx512");
constexpr bbt::attention::Kernels bbt::attention::kAvx512BFloat16 = kernels<BFloat16, Singles>("avx512");
