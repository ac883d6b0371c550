// The fused kernels of the CPU. What is computed, and how, is in kernels/cpu/; here are tensors and threads. Tasks are
// cut by the shapes alone, and every sum has one order: the number of threads does not change a bit.
#include "fused.h"

#include "../cpu/int8_product.h"
#include "../cpu/rows.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <c10/core/CPUAllocator.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <vector>

namespace bbt::fused {
namespace {

using at::Tensor;
using rows::Matrix;
using rows::Quantized;

// Elements that a task goes over at least, which is some ten microseconds.
constexpr int64_t kTaskElements = 1 << 15;

// Rows whose contributions to a weight's gradient are summed by one task.
constexpr int64_t kSumRows = 64;

thread_local CpuFeatures features_in_use;

const rows::Kernels& row_kernels() { return best(rows::kKernels, features_in_use); }

const int8_product::Kernels& product_kernels() { return best(int8_product::kKernels, features_in_use); }

rows::Element element(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat:
      return rows::Element::kFloat;
    case at::kBFloat16:
      return rows::Element::kBFloat16;
    case at::kHalf:
      return rows::Element::kHalf;
    case at::kChar:
      return rows::Element::kInt8;
    default:
      TORCH_CHECK(false, "fused kernels: dtype ", dtype, " is none of Float, BFloat16 and Half");
  }
}

int8_product::Element product_element(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat:
      return int8_product::Element::kFloat;
    case at::kBFloat16:
      return int8_product::Element::kBFloat16;
    case at::kHalf:
      return int8_product::Element::kHalf;
    default:
      TORCH_CHECK(false, "fused kernels: dtype ", dtype, " is none of Float, BFloat16 and Half");
  }
}

Matrix matrix(const Tensor& x) { return {x.data_ptr(), element(x.scalar_type()), x.size(-1)}; }

Tensor new_floats(at::IntArrayRef size) { return at::empty(size, at::kFloat); }

// A result and where the kernels write it.
struct NewRows {
  NewRows(int64_t n, int64_t width) : rows{at::empty({n, width}, at::kChar), new_floats({n})} {}
  Quantized out() const { return {rows.codes.data_ptr<int8_t>(), rows.scales.data_ptr<float>()}; }
  Rows rows;
};

int64_t rows_per_task(int64_t width) { return std::max<int64_t>(kTaskElements / std::max<int64_t>(width, 1), 1); }

// Runs `body(begin, end, scratch)` over `n` rows on libtorch's threads.
template <typename Body>
void over_rows(int64_t n, int64_t width, const Body& body) {
  const size_t bytes = row_kernels().scratch_floats(width) * sizeof(float);
  at::parallel_for(0, n, rows_per_task(width), [&](int64_t begin, int64_t end) {
    const at::DataPtr scratch = c10::GetCPUAllocator()->allocate(bytes);
    body(begin, end, static_cast<float*>(scratch.get()));
  });
}

TernaryWeight quantize_weight(const Tensor& w) {
  const rows::Kernels& kernels = row_kernels();
  const float* data = w.data_ptr<float>();
  const int64_t n = w.numel(), out = w.size(0), in = w.size(1), tasks = (n + kTaskElements - 1) / kTaskElements;
  const auto over_weights = [&](const auto& body) {
    at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t first = task * kTaskElements;
        body(task, first, std::min(kTaskElements, n - first));
      }
    });
  };
  std::vector<double> sums(tasks);
  over_weights([&](int64_t task, int64_t first, int64_t count) { sums[task] = kernels.sum_abs(data + first, count); });
  double total = 0;
  for (const double sum : sums) total += sum;
  const float mean = static_cast<float>(total / static_cast<double>(n));
  // Not a number stays so.
  const float gamma = mean < 1e-8f ? 1e-8f : mean;

  TernaryWeight result = {out, at::empty({out, in}, at::kChar), at::empty({}, at::kFloat), {}};
  int8_t* codes = result.codes.data_ptr<int8_t>();
  *result.gamma.data_ptr<float>() = gamma;
  over_weights(
      [&](int64_t, int64_t first, int64_t count) { kernels.ternary(data + first, count, gamma, codes + first); });

  result.packed = at::empty({int8_product::packed_bytes(out, in)}, at::kByte);
  uint8_t* packed = result.packed.data_ptr<uint8_t>();
  const auto pack = product_kernels().pack;
  at::parallel_for(0, int8_product::panels(out), 1,
                   [&](int64_t begin, int64_t end) { pack(codes, out, in, begin, end, packed); });
  return result;
}

Rows quantize(const Tensor& x) {
  const NewRows result(x.size(0), x.size(1));
  const auto kernel = row_kernels().quantize;
  over_rows(x.size(0), x.size(1), [&](int64_t begin, int64_t end, float* scratch) {
    kernel(matrix(x), begin, end, result.out(), scratch);
  });
  return result.rows;
}

Rows rms_norm_quantize(const Tensor& x, const Tensor& weight, double eps, Tensor& rstd) {
  const NewRows result(x.size(0), x.size(1));
  rstd = new_floats({x.size(0)});
  const auto kernel = row_kernels().rms_norm_quantize;
  over_rows(x.size(0), x.size(1), [&](int64_t begin, int64_t end, float* scratch) {
    kernel(matrix(x), weight.data_ptr<float>(), eps, begin, end, result.out(), rstd.data_ptr<float>(), scratch);
  });
  return result.rows;
}

std::pair<Tensor, Tensor> rms_norm_backward(const Tensor& dy, const Tensor& x, const Tensor& weight,
                                            const Tensor& rstd) {
  const int64_t n = x.size(0), width = x.size(1), tasks = (n + kSumRows - 1) / kSumRows;
  const Tensor dx = at::empty({n, width}, x.options()), partial = new_floats({tasks, width});
  const rows::Kernels& kernels = row_kernels();
  at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    const at::DataPtr scratch = c10::GetCPUAllocator()->allocate(kernels.scratch_floats(width) * sizeof(float));
    for (int64_t task = begin; task < end; ++task) {
      kernels.rms_norm_backward(matrix(dy), matrix(x), weight.data_ptr<float>(), rstd.data_ptr<float>(),
                                task * kSumRows, std::min(n, (task + 1) * kSumRows), matrix(dx),
                                partial.data_ptr<float>() + task * width, static_cast<float*>(scratch.get()));
    }
  });
  const Tensor dweight = new_floats({width});
  const float* parts = partial.data_ptr<float>();
  float* to = dweight.data_ptr<float>();
  std::fill(to, to + width, 0.0f);
  for (int64_t task = 0; task < tasks; ++task) {
    for (int64_t i = 0; i < width; ++i) to[i] += parts[task * width + i];
  }
  return {dx, dweight};
}

Rows swiglu_quantize(const Tensor& gate_up) {
  const int64_t width = gate_up.size(1) / 2;
  const NewRows result(gate_up.size(0), width);
  const auto kernel = row_kernels().swiglu_quantize;
  over_rows(gate_up.size(0), width, [&](int64_t begin, int64_t end, float* scratch) {
    kernel(matrix(gate_up), begin, end, result.out(), scratch);
  });
  return result.rows;
}

Tensor swiglu_backward(const Tensor& dy, const Tensor& gate_up) {
  const Tensor result = at::empty(gate_up.sizes(), gate_up.options());
  const auto kernel = row_kernels().swiglu_backward;
  over_rows(dy.size(0), dy.size(1), [&](int64_t begin, int64_t end, float* scratch) {
    kernel(matrix(dy), matrix(gate_up), begin, end, matrix(result), scratch);
  });
  return result;
}

Tensor product(const Rows& x, const TernaryWeight& w, at::ScalarType dtype) {
  const int64_t n = x.codes.size(0), in = x.codes.size(1), out = w.out;
  const Tensor result = at::empty({n, out}, dtype);
  const int8_product::Kernels& kernels = product_kernels();
  const int8_product::Problem problem = {
      n,
      in,
      out,
      x.codes.data_ptr<int8_t>(),
      x.scales.data_ptr<float>(),
      w.packed.data_ptr<uint8_t>(),
      *w.gamma.data_ptr<float>(),
      result.data_ptr(),
      product_element(dtype),
  };
  at::parallel_for(0, kernels.tasks(problem), 1, [&](int64_t begin, int64_t end) {
    const at::DataPtr scratch = c10::GetCPUAllocator()->allocate(kernels.scratch(problem));
    kernels.product(problem, begin, end, scratch.get());
  });
  return result;
}

Tensor scale_rows(const Tensor& x, const Tensor& scales, at::ScalarType dtype) {
  const Tensor result = at::empty(x.sizes(), dtype);
  const auto kernel = row_kernels().scale_rows;
  over_rows(x.size(0), x.size(1), [&](int64_t begin, int64_t end, float* scratch) {
    kernel(matrix(x), scales.data_ptr<float>(), begin, end, matrix(result), scratch);
  });
  return result;
}

Tensor rope(const Tensor& x, const Tensor& cos, const Tensor& sin, bool inverse) {
  const int64_t time = x.size(1), heads = x.size(2), dim = x.size(3);
  const Tensor result = at::empty(x.sizes(), x.scalar_type());
  const rows::Heads view = {x.data_ptr(), element(x.scalar_type()), x.stride(0), x.stride(1), x.stride(2)};
  const rows::Kernels& kernels = row_kernels();
  at::parallel_for(0, x.size(0) * time, rows_per_task(heads * dim), [&](int64_t begin, int64_t end) {
    const at::DataPtr scratch = c10::GetCPUAllocator()->allocate(kernels.scratch_floats(dim) * sizeof(float));
    kernels.rope(view, time, heads, dim, cos.data_ptr<float>(), sin.data_ptr<float>(), inverse ? -1.0f : 1.0f, begin,
                 end, result.data_ptr(), static_cast<float*>(scratch.get()));
  });
  return result;
}

std::pair<Tensor, Tensor> cross_entropy(const Tensor& logits, const Tensor& targets) {
  const int64_t n = logits.size(0), classes = logits.size(1);
  const int64_t* target = targets.data_ptr<int64_t>();
  for (int64_t i = 0; i < n; ++i) {
    const bool is_class = target[i] >= 0 && target[i] < classes;
    TORCH_CHECK(is_class, "cross entropy: target ", target[i], " of ", classes, " classes");
  }
  const Tensor losses = new_floats({n}), log_sums = new_floats({n}), sum = new_floats({});
  const auto kernel = row_kernels().cross_entropy;
  over_rows(n, classes, [&](int64_t begin, int64_t end, float* scratch) {
    kernel(matrix(logits), target, begin, end, losses.data_ptr<float>(), log_sums.data_ptr<float>(), scratch);
  });
  double total = 0;
  for (int64_t i = 0; i < n; ++i) total += losses.data_ptr<float>()[i];
  *sum.data_ptr<float>() = static_cast<float>(total);
  return {sum, log_sums};
}

Tensor cross_entropy_backward(const Tensor& logits, const Tensor& targets, const Tensor& log_sums,
                              const Tensor& factor) {
  const Tensor result = at::empty(logits.sizes(), logits.scalar_type());
  const auto kernel = row_kernels().cross_entropy_backward;
  over_rows(logits.size(0), logits.size(1), [&](int64_t begin, int64_t end, float* scratch) {
    kernel(matrix(logits), targets.data_ptr<int64_t>(), log_sums.data_ptr<float>(), *factor.data_ptr<float>(), begin,
           end, matrix(result), scratch);
  });
  return result;
}

}  // namespace

void use_cpu_features(CpuFeatures features) { features_in_use = features; }
CpuFeatures cpu_features_in_use() { return features_in_use; }

const Kernels kCpu = {
    .quantize_weight = quantize_weight,
    .quantize = quantize,
    .rms_norm_quantize = rms_norm_quantize,
    .rms_norm_backward = rms_norm_backward,
    .swiglu_quantize = swiglu_quantize,
    .swiglu_backward = swiglu_backward,
    .product = product,
    .scale_rows = scale_rows,
    .rope = rope,
    .cross_entropy = cross_entropy,
    .cross_entropy_backward = cross_entropy_backward,
};

}  // namespace bbt::fused
