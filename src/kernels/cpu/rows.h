// The interface between fused_cpu.cpp, which knows tensors and threads, and the kernels that go over rows, which know
// neither. Each instruction set has a file of kernels that is compiled with its flags.
#pragma once

#include "features.h"

#include <cstddef>
#include <cstdint>

namespace bbt::rows {

enum class Element { kFloat, kBFloat16, kHalf, kInt8 };

// Rows of `width` elements, one after the other.
struct Matrix {
  void* data;
  Element element;
  int64_t width;
};

// Heads [B, T, H, D], strides in elements; that of D is 1.
struct Heads {
  void* data;
  Element element;
  int64_t batch, time, head;
};

// What a call writes per row of quantized activations.
struct Quantized {
  int8_t* codes;
  float* scales;
};

// The kernels of one instruction set. A call reads and writes the rows from `begin` to `end` of its matrices, which do
// not depend on other rows. `scratch` holds scratch_floats(D) numbers, where D is the width of a normed, gated or plain
// row.
struct Kernels {
  // As doctor prints it, and the features without which it cannot run.
  const char* name;
  CpuFeatures needs;

  size_t (*scratch_floats)(int64_t width);

  // The sum of |w|, each element's in fp64.
  double (*sum_abs)(const float* w, int64_t n);
  // w / gamma, rounded to -1, 0 or 1; 0 where it is not a number.
  void (*ternary)(const float* w, int64_t n, float gamma, int8_t* codes);

  // As fused.h says of the functions of these names.
  void (*quantize)(const Matrix& x, int64_t begin, int64_t end, const Quantized& out, float* scratch);
  void (*rms_norm_quantize)(const Matrix& x, const float* weight, double eps, int64_t begin, int64_t end,
                            const Quantized& out, float* rstd, float* scratch);
  // `dweight` [D]: the sum over these rows.
  void (*rms_norm_backward)(const Matrix& dy, const Matrix& x, const float* weight, const float* rstd, int64_t begin,
                            int64_t end, const Matrix& dx, float* dweight, float* scratch);
  void (*swiglu_quantize)(const Matrix& gate_up, int64_t begin, int64_t end, const Quantized& out, float* scratch);
  void (*swiglu_backward)(const Matrix& dy, const Matrix& gate_up, int64_t begin, int64_t end,
                          const Matrix& dgate_up, float* scratch);
  void (*scale_rows)(const Matrix& x, const float* scales, int64_t begin, int64_t end, const Matrix& out,
                     float* scratch);
  // Rows are [B, T]. `sign`: of the sine.
  void (*rope)(const Heads& x, int64_t length, int64_t heads, int64_t dim, const float* cos, const float* sin,
               float sign, int64_t begin, int64_t end, void* out, float* scratch);
  void (*cross_entropy)(const Matrix& logits, const int64_t* targets, int64_t begin, int64_t end, float* losses,
                        float* log_sums, float* scratch);
  void (*cross_entropy_backward)(const Matrix& logits, const int64_t* targets, const float* log_sums, float factor,
                                 int64_t begin, int64_t end, const Matrix& dlogits, float* scratch);
};

extern const Kernels kAvx512, kAvx2, kPortable;

// The best first.
#if defined(__x86_64__)
constexpr const Kernels* kKernels[] = {&kAvx512, &kAvx2, &kPortable};
#else
constexpr const Kernels* kKernels[] = {&kPortable};
#endif

}  // namespace bbt::rows
