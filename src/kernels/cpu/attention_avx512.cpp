#include "attention_kernels.h"

constexpr bbt::attention::Kernels bbt::attention::kAvx512Float = kernels<Float, Singles>();
constexpr bbt::attention::Kernels bbt::attention::kAvx512BFloat16 = kernels<BFloat16, Singles>();
