#include "rows_kernels.h"

constexpr bbt::rows::Kernels bbt::rows::kAvx2 = kernels("avx2");
