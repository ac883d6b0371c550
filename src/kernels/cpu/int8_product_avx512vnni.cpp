#include "int8_product_kernels.h"

constexpr bbt::int8_product::Kernels bbt::int8_product::kAvx512Vnni = kernels("avx512vnni");
