#include "attention_kernels.h"

constexpr bbt::attention::Kernels bbt::attention::kAvx2Float = kernels<Float, Singles>("avx2");
constexpr bbt::attention::Kernels bbt::attention::kAvx2BFloat16 = kernels<BFloat16, Singles>("avx2");
