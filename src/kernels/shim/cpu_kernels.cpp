// Which CPU kernels are chosen, for `bbt doctor` and for tests. The choice itself is bbt::best().
#include "kernels.h"

#include "../cpu/adamw8bit.h"
#include "../cpu/attention.h"
#include "../cpu/int8_product.h"
#include "../cpu/rows.h"

extern "C" const char* bbt_cpu_kernel(uint32_t bits, bbt::CpuOperation operation) {
  const bbt::CpuFeatures features = {bits};
  switch (operation) {
    case bbt::CpuOperation::kInt8Product:
      return bbt::best(bbt::int8_product::kKernels, features).name;
    case bbt::CpuOperation::kRows:
      return bbt::best(bbt::rows::kKernels, features).name;
    case bbt::CpuOperation::kAttentionFloat:
      return bbt::best(bbt::attention::kFloatKernels, features).name;
    case bbt::CpuOperation::kAttentionBFloat16:
      return bbt::best(bbt::attention::kBFloat16Kernels, features).name;
    case bbt::CpuOperation::kAdamW8bit:
      return bbt::best(bbt::adamw8bit::kLookupKernels, features).name;
  }
  return "";
}
