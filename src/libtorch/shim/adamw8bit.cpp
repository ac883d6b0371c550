// One step of AdamW over moments of 8 bits, on the CPU. What is computed, and how, is in kernels/cpu/adamw8bit*.h; here
// are tensors and threads. Blocks are cut by the shapes alone: the number of threads does not change a bit.
#include "shim.h"

#include "../kernels/cpu/adamw8bit.h"
#include "../kernels/cpu/adamw8bit_lookup.h"

#include <ATen/Parallel.h>

#include <cmath>

namespace {

using at::Tensor;
using bbt::adamw8bit::CodeBook;
using bbt::adamw8bit::kBlock;
using bbt::adamw8bit::Lookup;
using bbt::adamw8bit::Moment;

// Blocks that a task steps at least, which is some ten microseconds.
constexpr int64_t kTaskBlocks = 32;

// As cpu_kernels.rs counts them.
constexpr int kVbmi = 4;

const bbt::adamw8bit::Kernels& kernels(int isa) {
#if defined(__x86_64__)
  if (isa >= 2) return bbt::adamw8bit::kAvx512;
  if (isa == 1) return bbt::adamw8bit::kAvx2;
#endif
  return bbt::adamw8bit::kPortable;
}

void check(const Tensor& tensor, at::ScalarType dtype, int64_t numel, const char* what) {
  TORCH_CHECK(tensor.is_cpu() && tensor.scalar_type() == dtype && tensor.is_contiguous() && tensor.numel() == numel,
              "AdamW of 8 bits: ", what, " is ", tensor.toString(), " ", tensor.sizes(), ", but a contiguous CPU tensor of ",
              numel, " ", dtype, " is needed");
}

CodeBook code_book(at::Tensor* const* book) {
  check(*book[0], at::kFloat, 256, "a book's values");
  check(*book[1], at::kByte, 1 << 16, "a book's nearest codes");
  return {book[0]->data_ptr<float>(), book[1]->data_ptr<uint8_t>(), nullptr};
}

Moment moment(const Tensor& codes, const Tensor& absmax, const CodeBook& book, int64_t n, int64_t blocks) {
  check(codes, at::kByte, n, "a moment");
  check(absmax, at::kFloat, blocks, "a moment's absmax");
  return {codes.data_ptr<uint8_t>(), absmax.data_ptr<float>(), book};
}

}  // namespace

extern "C" char* bbt_adamw8bit(int isa, at::Tensor* const* params, at::Tensor* const* grads,
                               at::Tensor* const* codes1, at::Tensor* const* absmax1, at::Tensor* const* codes2,
                               at::Tensor* const* absmax2, at::Tensor* const* steps, size_t n,
                               at::Tensor* const* book1, at::Tensor* const* book2, double lr, double beta1,
                               double beta2, double weight_decay, double eps, at::Tensor* found_inf) {
  return bbt::guarded([&] {
    if (found_inf->item<float>() == 1) return;
    CodeBook first = code_book(book1), second = code_book(book2);
    auto kernel = kernels(isa).step;
    Lookup lookup1, lookup2;
    if (isa >= kVbmi && lookup1.cut(first, true) && lookup2.cut(second, false)) {
      first.lookup = &lookup1;
      second.lookup = &lookup2;
      kernel = bbt::adamw8bit::kAvx512Vbmi.step;
    }
    for (size_t i = 0; i < n; ++i) {
      const int64_t numel = params[i]->numel(), blocks = (numel + kBlock - 1) / kBlock;
      check(*params[i], at::kFloat, numel, "a parameter");
      const Tensor grad = grads[i]->contiguous();
      check(grad, at::kFloat, numel, "a gradient");
      check(*steps[i], at::kFloat, 1, "a step");
      const double step = *steps[i]->data_ptr<float>() += 1;
      bbt::adamw8bit::Problem problem;
      problem.n = numel;
      problem.param = params[i]->data_ptr<float>();
      problem.grad = grad.data_ptr<float>();
      problem.first = moment(*codes1[i], *absmax1[i], first, numel, blocks);
      problem.second = moment(*codes2[i], *absmax2[i], second, numel, blocks);
      problem.beta1 = static_cast<float>(beta1);
      problem.beta2 = static_cast<float>(beta2);
      problem.rest1 = static_cast<float>(1 - beta1);
      problem.rest2 = static_cast<float>(1 - beta2);
      problem.keep = static_cast<float>(1 - lr * weight_decay);
      problem.rate = static_cast<float>(lr / (1 - std::pow(beta1, step)));
      problem.scale = static_cast<float>(1 / std::sqrt(1 - std::pow(beta2, step)));
      problem.eps = static_cast<float>(eps);
      at::parallel_for(0, blocks, kTaskBlocks,
                       [&](int64_t begin, int64_t end) { kernel(problem, begin, end); });
    }
  });
}
