// One step of AdamW over moments of 8 bits: checks, and the CPU's way. What is computed there, and how, is in
// kernels/cpu/adamw8bit*.h; here are tensors and threads. Blocks are cut by the shapes alone: the number of threads
// does not change a bit.
#include "adamw8bit.h"

#include "kernels.h"

#include "../cpu/adamw8bit.h"
#include "../cpu/adamw8bit_lookup.h"

#include <ATen/Parallel.h>

#include <cmath>

namespace {

using at::Tensor;
using bbt::adamw8bit::CodeBook;
using bbt::adamw8bit::kBlock;
using bbt::adamw8bit::Lookup;
using bbt::adamw8bit::Moment;
using bbt::adamw8bit::Step;

// Blocks that a task steps at least, which is some ten microseconds.
constexpr int64_t kTaskBlocks = 32;

int64_t blocks(const Tensor& param) {
  return (param.numel() + kBlock - 1) / kBlock;
}

// That kernels may read all of it as what they take it for.
void check(const Step& step) {
  const at::Device device = step.params[0].device();
  const auto check = [&](const Tensor& tensor, at::ScalarType dtype, int64_t numel, const char* what) {
    TORCH_CHECK(tensor.device() == device && tensor.scalar_type() == dtype && tensor.is_contiguous() &&
                    tensor.numel() == numel,
                "AdamW of 8 bits: ", what, " is ", tensor.toString(), " ", tensor.sizes(), " on ", tensor.device(),
                ", but a contiguous tensor of ", numel, " ", dtype, " on ", device, " is needed");
  };
  for (size_t i = 0; i < step.params.size(); ++i) {
    const int64_t numel = step.params[i].numel(), blocks = ::blocks(step.params[i]);
    check(step.params[i], at::kFloat, numel, "a parameter");
    check(step.grads[i], at::kFloat, numel, "a gradient");
    check(step.steps[i], at::kFloat, 1, "a step");
    for (const Tensor* codes : {&step.codes1[i], &step.codes2[i]}) check(*codes, at::kByte, numel, "a moment");
    for (const Tensor* absmax : {&step.absmax1[i], &step.absmax2[i]}) {
      check(*absmax, at::kFloat, blocks, "a moment's absmax");
    }
  }
  for (const Tensor* values : {&step.values1, &step.values2}) check(*values, at::kFloat, 256, "a book's values");
  for (const Tensor* nearest : {&step.nearest1, &step.nearest2}) {
    check(*nearest, at::kByte, 1 << 16, "a book's nearest codes");
  }
  check(step.found_inf, at::kFloat, 1, "found_inf");
}

void step_cpu(bbt::CpuFeatures features, const Step& step) {
  if (step.found_inf.item<float>() == 1) return;
  const auto book = [](const Tensor& values, const Tensor& nearest) {
    return CodeBook{values.data_ptr<float>(), nearest.data_ptr<uint8_t>(), nullptr};
  };
  const auto moment = [](const Tensor& codes, const Tensor& absmax, const CodeBook& book) {
    return Moment{codes.data_ptr<uint8_t>(), absmax.data_ptr<float>(), book};
  };
  CodeBook first = book(step.values1, step.nearest1), second = book(step.values2, step.nearest2);
  const bbt::adamw8bit::Kernels* kernels = &bbt::best(bbt::adamw8bit::kLookupKernels, features);
  Lookup lookup1, lookup2;
  if (kernels->needs_lookup) {
    // Made anew in each step, which takes some 15 microseconds.
    if (lookup1.cut(first, true) && lookup2.cut(second, false)) {
      first.lookup = &lookup1;
      second.lookup = &lookup2;
    } else {
      kernels = &bbt::best(bbt::adamw8bit::kKernels, features);
    }
  }
  for (size_t i = 0; i < step.params.size(); ++i) {
    const double t = *step.steps[i].data_ptr<float>() += 1;
    bbt::adamw8bit::Problem problem;
    problem.n = step.params[i].numel();
    problem.param = step.params[i].data_ptr<float>();
    problem.grad = step.grads[i].data_ptr<float>();
    problem.first = moment(step.codes1[i], step.absmax1[i], first);
    problem.second = moment(step.codes2[i], step.absmax2[i], second);
    problem.beta1 = static_cast<float>(step.beta1);
    problem.beta2 = static_cast<float>(step.beta2);
    problem.rest1 = static_cast<float>(1 - step.beta1);
    problem.rest2 = static_cast<float>(1 - step.beta2);
    problem.keep = static_cast<float>(1 - step.lr * step.weight_decay);
    problem.rate = static_cast<float>(step.lr / (1 - std::pow(step.beta1, t)));
    problem.scale = static_cast<float>(1 / std::sqrt(1 - std::pow(step.beta2, t)));
    problem.eps = static_cast<float>(step.eps);
    at::parallel_for(0, blocks(step.params[i]), kTaskBlocks,
                     [&](int64_t begin, int64_t end) { kernels->step(problem, begin, end); });
  }
}

}  // namespace

extern "C" char* bbt_adamw8bit(uint32_t features, const at::Tensor* const* params, const at::Tensor* const* grads,
                               const at::Tensor* const* codes1, const at::Tensor* const* absmax1,
                               const at::Tensor* const* codes2, const at::Tensor* const* absmax2,
                               const at::Tensor* const* steps, size_t n, const at::Tensor* const* book1,
                               const at::Tensor* const* book2, double lr, double beta1, double beta2,
                               double weight_decay, double eps, const at::Tensor* found_inf) {
  return bbt::guarded([&] {
    if (n == 0) return;
    const auto list = [&](const at::Tensor* const* tensors) { return bbt::list(tensors, n); };
    Step step = {list(params),  list(grads), list(codes1), list(absmax1), list(codes2), list(absmax2), list(steps),
                 *book1[0],     *book1[1],   *book2[0],    *book2[1],     *found_inf,   lr,            beta1,
                 beta2,         weight_decay, eps};
    for (Tensor& grad : step.grads) grad = grad.contiguous();
    check(step);
    if (step.params[0].is_cpu()) {
      step_cpu({features}, step);
    } else if (bbt::adamw8bit::bitsandbytes_found()) {
      bbt::adamw8bit::step_bitsandbytes(step);
    } else {
      bbt::adamw8bit::step_cuda(step);
    }
  });
}
