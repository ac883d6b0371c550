#include "rows_kernels.h"

constexpr bbt::rows::Kernels bbt::rows::kAvx512 = kernels("avx512");
