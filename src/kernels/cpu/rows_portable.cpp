#include "rows_kernels.h"

constexpr bbt::rows::Kernels bbt::rows::kPortable = kernels("portable");
