// The interface between fused_cpu.cpp, which knows tensors and threads, and the products of quantized activations and
// ternary weights, which know neither. Each instruction set has a file of kernels that is compiled with its flags.
//
// Packed weights are the same for all of them: codes + 1, that is 0, 1 or 2, as unsigned bytes, [panels, in / 4,
// kPanel, 4], with zeros past the ends of `out` and `in`. So a 32-bit word holds four neighbours of one output, and 16
// outputs' words are what one AVX-512 instruction takes. What the added 1 contributes is the sum of the row, which is
// taken off in the end. Unsigned bytes up to 2 times signed ones stay far within 16 bits: no pair saturates.
#pragma once

#include "features.h"

#include <cstddef>
#include <cstdint>

namespace bbt::int8_product {

// Outputs in a panel of packed weights.
constexpr int64_t kPanel = 64;

enum class Element { kFloat, kBFloat16, kHalf };

struct Problem {
  int64_t rows, in, out;
  // [rows, in]
  const int8_t* codes;
  // [rows]
  const float* scales;
  // As above.
  const uint8_t* packed;
  float gamma;
  // [rows, out]: the integers' product times scale and gamma.
  void* result;
  Element element;
};

constexpr int64_t panels(int64_t out) { return (out + kPanel - 1) / kPanel; }
constexpr int64_t words(int64_t in) { return (in + 3) / 4; }
constexpr int64_t packed_bytes(int64_t out, int64_t in) { return panels(out) * words(in) * kPanel * 4; }

// The kernels of one instruction set. Tasks are numbered from 0 and may run in any order and on any thread; a call
// does those from `begin` to `end`, in a scratch of its own, aligned to 64 bytes.
struct Kernels {
  // As doctor prints it, and the features without which it cannot run.
  const char* name;
  CpuFeatures needs;

  // Packs the panels from `begin` to `end`. `codes`: [out, in].
  void (*pack)(const int8_t* codes, int64_t out, int64_t in, int64_t begin, int64_t end, uint8_t* packed);
  int64_t (*tasks)(const Problem&);
  size_t (*scratch)(const Problem&);
  void (*product)(const Problem&, int64_t begin, int64_t end, void* scratch);
};

extern const Kernels kAvx512Vnni, kAvx512, kAvxVnni, kAvx2, kPortable;

// The best first.
#if defined(__x86_64__)
constexpr const Kernels* kKernels[] = {&kAvx512Vnni, &kAvx512, &kAvxVnni, &kAvx2, &kPortable};
#else
constexpr const Kernels* kKernels[] = {&kPortable};
#endif

}  // namespace bbt::int8_product
