#include "attention_kernels.h"

constexpr bbt::attention::Kernels bbt::attention::kPortableFloat = kernels<Float, Singles>("portable");
constexpr bbt::attention::Kernels bbt::attention::kPortableBFloat16 = kernels<BFloat16, Singles>("portable");
