// AdamW over moments of 8 bits: CUDA's kernel, in emulation, against the CPU's portable one, bit for bit where neither
// fuses products and sums, and against fp64; and how bitsandbytes' kernel is called, which is the library that
// BBT_BITSANDBYTES names. Prints what is wrong; the exit status says whether anything is. With any argument: says which
// kernel is found.
#include "../../src/kernels/shim/adamw8bit.h"
#include "../../src/kernels/shim/kernels.h"
#include "bitsandbytes.h"
#include "expect.h"

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <dlfcn.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <string>
#include <vector>

namespace {

using at::Tensor;
using bbt::adamw8bit::Step;

constexpr int64_t kBlock = 256;
constexpr double kLr = 3e-2, kBeta1 = 0.9, kBeta2 = 0.95, kDecay = 0.1, kEps = 1e-8;

// Values as dense as those of bitsandbytes, but drawn anew, and the codes nearest to 65536 numbers.
struct Book {
  explicit Book(bool is_signed) {
    const auto magnitudes = (-(at::rand({127}) * 0.04 + 0.06).cumsum(0)).exp();
    const auto ends = at::tensor({0.0f, 1.0f});
    values = std::get<0>(at::cat({magnitudes, is_signed ? -magnitudes : magnitudes * 0.98, ends}).sort());
    const auto exact = values.to(at::kDouble);
    const auto between = (exact.narrow(0, 0, 255) + exact.narrow(0, 1, 255)) / 2;
    const auto numbers = at::arange(65536, at::kDouble) / 32767.5 - 1;
    nearest = at::searchsorted(between, numbers).to(at::kByte);
  }

  Tensor dequantize(const Tensor& codes, const Tensor& absmax) const {
    const auto scales = absmax.repeat_interleave(kBlock).narrow(0, 0, codes.numel());
    return values.index({codes.to(at::kLong)}).to(at::kDouble) * scales.to(at::kDouble);
  }

  Tensor values, nearest;
};

// One parameter, its gradient and state. Where it is not aligned, it lies as a view may: between 16 bytes.
struct Param {
  Param(int64_t n, bool aligned) : aligned(aligned) {
    const int64_t blocks = (n + kBlock - 1) / kBlock;
    param = place(at::randn({n}));
    codes1 = place(at::zeros({n}, at::kByte));
    codes2 = place(at::zeros({n}, at::kByte));
    absmax1 = place(at::zeros({blocks}));
    absmax2 = place(at::zeros({blocks}));
    grad = place(at::zeros({n}));
  }

  // Copies on places alike.
  Param(const Param& other) : aligned(other.aligned) {
    for (const auto& [to, from] : {std::pair{&param, &other.param}, {&grad, &other.grad}, {&codes1, &other.codes1},
                                   {&codes2, &other.codes2}, {&absmax1, &other.absmax1}, {&absmax2, &other.absmax2}}) {
      *to = place(*from);
    }
    step = other.step.clone();
  }

  Tensor place(const Tensor& x) const {
    const auto room = at::empty({x.numel() + 1}, x.options()).narrow(0, aligned ? 0 : 1, x.numel());
    return room.copy_(x);
  }

  // All but the gradient.
  std::vector<Tensor> state() const { return {param, codes1, codes2, absmax1, absmax2, step}; }

  bool aligned;
  Tensor param, grad, codes1, codes2, absmax1, absmax2, step = at::zeros({});
};

// Of `n` parameters, which it changes.
Step step_of(const Param* params, size_t n, const Book& first, const Book& second, float found_inf) {
  Step step;
  for (size_t i = 0; i < n; ++i) {
    const Param& p = params[i];
    step.params.push_back(p.param);
    step.grads.push_back(p.grad);
    step.codes1.push_back(p.codes1);
    step.absmax1.push_back(p.absmax1);
    step.codes2.push_back(p.codes2);
    step.absmax2.push_back(p.absmax2);
    step.steps.push_back(p.step);
  }
  step.values1 = first.values;
  step.nearest1 = first.nearest;
  step.values2 = second.values;
  step.nearest2 = second.nearest;
  step.found_inf = at::full({}, found_inf);
  step.lr = kLr;
  step.beta1 = kBeta1;
  step.beta2 = kBeta2;
  step.weight_decay = kDecay;
  step.eps = kEps;
  return step;
}

// The CPU's, through the C interface: its message, empty where it succeeds.
std::string step_cpu(const Step& step) {
  const auto pointers = [](const std::vector<Tensor>& tensors) {
    std::vector<Tensor*> all;
    for (const Tensor& tensor : tensors) all.push_back(const_cast<Tensor*>(&tensor));
    return all;
  };
  Tensor books[] = {step.values1, step.nearest1, step.values2, step.nearest2}, found_inf = step.found_inf;
  Tensor *first[] = {&books[0], &books[1]}, *second[] = {&books[2], &books[3]};
  char* const error = bbt_adamw8bit(
      /*features=*/0, pointers(step.params).data(), pointers(step.grads).data(), pointers(step.codes1).data(),
      pointers(step.absmax1).data(), pointers(step.codes2).data(), pointers(step.absmax2).data(),
      pointers(step.steps).data(), step.params.size(), first, second, step.lr, step.beta1, step.beta2,
      step.weight_decay, step.eps, &found_inf);
  const std::string message = error == nullptr ? "" : error;
  std::free(error);
  return message;
}

bool same(const std::vector<Tensor>& a, const std::vector<Tensor>& b) {
  for (size_t i = 0; i < a.size(); ++i) {
    if (!at::equal(a[i], b[i])) return false;
  }
  return true;
}

// Parameter, first and second moment after the next step, in fp64 up to the rounding of the moments.
std::vector<Tensor> exact_step(const Param& p, const Book& first, const Book& second) {
  const double t = p.step.item<double>() + 1;
  const auto g = p.grad.to(at::kDouble);
  const auto m = first.dequantize(p.codes1, p.absmax1) * kBeta1 + g * (1 - kBeta1);
  const auto v = second.dequantize(p.codes2, p.absmax2) * kBeta2 + g.square() * (1 - kBeta2);
  const auto denominator = (v / (1 - std::pow(kBeta2, t))).sqrt() + kEps;
  const auto update = m / (1 - std::pow(kBeta1, t)) * kLr / denominator;
  return {p.param.to(at::kDouble) * (1 - kLr * kDecay) - update, m, v};
}

// That the codes stand for the values of the book that are nearest to the exact moment, but for what fp32 and the table
// of 65536 numbers round.
void rounded(const Book& book, const Tensor& codes, const Tensor& absmax, const Tensor& exact,
             const std::string& what) {
  const auto scales = absmax.repeat_interleave(kBlock).narrow(0, 0, exact.numel()).to(at::kDouble);
  const auto values = book.values.to(at::kDouble), x = exact / scales.clamp_min(1e-300);
  const auto above = at::searchsorted(values, x).clamp(1, 255);
  const auto least = at::minimum((values.index({above}) - x).abs(), (values.index({above - 1}) - x).abs());
  const auto taken = (values.index({codes.to(at::kLong)}) - x).abs() * (scales > 0);
  const double error = (taken - least).max().item<double>();
  expect(error < 5e-5, text(what, ": ", error, " of the block's largest further off than the nearest"));
}

void test_steps(int64_t n, bool aligned, int steps, const Book& first, const Book& second) {
  Param p(n, aligned);
  // A long run's, and one that begins.
  if (n % 2 == 0) p.step.fill_(99999);
  for (int i = 0; i < steps; ++i) {
    const auto what = text("n ", n, aligned ? "" : " misaligned", " step ", i);
    p.grad.copy_(at::randn({n}) * (at::randn({n}) * 2).exp());
    // Of a block the moments may be zero, and a gradient cancel a moment.
    if (n > 3 * kBlock && i < 2) p.grad.narrow(0, kBlock, kBlock).zero_();
    const Param before(p), cpu(p);
    bbt::adamw8bit::step_cuda(step_of(&p, 1, first, second, 1));
    expect(same(p.state(), before.state()), what + ": a skipped step changes something");
    bbt::adamw8bit::step_cuda(step_of(&p, 1, first, second, 0));
    const auto error = step_cpu(step_of(&cpu, 1, first, second, 0));
    expect(error.empty(), what + ": " + error);
    expect(same(p.state(), cpu.state()), what + ": not the CPU's bits");
    expect(at::equal(p.grad, before.grad), what + ": the gradient has changed");
    expect(p.step.item<float>() == before.step.item<float>() + 1, what + ": the count");
    const auto exact = exact_step(before, first, second);
    const double moved = (exact[0] - before.param).abs().max().item<double>();
    const double off = (exact[0] - p.param).abs().max().item<double>();
    expect(off < 1e-5 * (1 + moved), text(what, ": ", off, " off where it moves by ", moved));
    rounded(first, p.codes1, p.absmax1, exact[1], what + ": first moment");
    rounded(second, p.codes2, p.absmax2, exact[2], what + ": second moment");
    if (n > 3 * kBlock && i < 2) {
      const float zero = p.absmax1[1].item<float>() + p.absmax2[1].item<float>();
      expect(zero == 0, what + ": a block of zeros is none afterwards");
    }
  }
}

// Many parameters in a step; values that are not finite, which stay in their block.
void test_lists(const Book& first, const Book& second) {
  std::vector<Param> ours;
  for (const int64_t n : {5000, 4096, 4353}) {
    ours.emplace_back(n, n != 4353);
    ours.back().grad.normal_();
    ours.back().step.fill_(n % 7);
  }
  const std::vector<Param> cpu(ours);
  bbt::adamw8bit::step_cuda(step_of(ours.data(), ours.size(), first, second, 0));
  expect(step_cpu(step_of(cpu.data(), cpu.size(), first, second, 0)).empty(), "a list on the CPU");
  for (size_t i = 0; i < ours.size(); ++i) expect(same(ours[i].state(), cpu[i].state()), text("parameter ", i));

  for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(), 1e30f}) {
    Param p(1000, true);
    p.grad.normal_()[300] = bad;
    const Param cpu(p);
    bbt::adamw8bit::step_cuda(step_of(&p, 1, first, second, 0));
    step_cpu(step_of(&cpu, 1, first, second, 0));
    expect(same({p.codes1, p.codes2, p.absmax1, p.absmax2}, {cpu.codes1, cpu.codes2, cpu.absmax1, cpu.absmax2}),
           text("a gradient of ", bad));
    expect(at::equal(p.param.isnan(), cpu.param.isnan()), text("parameters under a gradient of ", bad));
  }
}

// What does not fit is an error, not a wrong read.
void test_refusals(const Book& first, const Book& second) {
  const std::vector<Param> params = {Param(5000, true)};
  const auto refused = [&](const char* word, const auto& change) {
    Step step = step_of(params.data(), params.size(), first, second, 0);
    change(step);
    const auto message = step_cpu(step);
    expect(message.find(word) != std::string::npos, text(word, " is not what is said: ", message));
  };
  refused("found_inf", [](Step& step) { step.found_inf = step.found_inf.to(at::kDouble); });
  refused("nearest codes", [](Step& step) { step.nearest2 = step.nearest2.narrow(0, 0, 256); });
  // Books elsewhere than the moments.
  refused("on meta", [](Step& step) { step.values1 = step.values1.to(at::kMeta); });
  refused("absmax", [](Step& step) { step.absmax2[0] = step.absmax2[0].narrow(0, 1, 19); });
}

// bitsandbytes' kernel as bitsandbytes.cpp calls it, by a library that records the arguments (bitsandbytes.cpp beside).
void test_bitsandbytes(const Book& first, const Book& second) {
  expect(bbt::adamw8bit::bitsandbytes_found(), "the library is found");
  void* const library = dlopen(std::getenv("BBT_BITSANDBYTES"), RTLD_NOW);
  const auto calls = static_cast<const int*>(dlsym(library, "fake_calls"));
  const auto recorded = static_cast<const Call*>(dlsym(library, "fake_call"));
  std::vector<Param> params;
  for (const int64_t n : {5000, 4096, 66495}) params.emplace_back(n, n != 4096);
  const std::vector<float> taken = {0, 41, 100000};
  for (size_t i = 0; i < params.size(); ++i) params[i].step.fill_(taken[i]);
  const std::vector<Param> before(params);

  bbt::adamw8bit::step_bitsandbytes(step_of(params.data(), params.size(), first, second, 1));
  expect(*calls == 0, "a skipped step calls nothing");
  for (size_t i = 0; i < params.size(); ++i) expect(same(params[i].state(), before[i].state()), "a skipped step");

  bbt::adamw8bit::step_bitsandbytes(step_of(params.data(), params.size(), first, second, 0));
  expect(*calls == 3, text("three parameters, ", *calls, " calls"));
  for (size_t i = 0; i < params.size() && i < kRoom; ++i) {
    const Param& p = params[i];
    const Call& call = recorded[i];
    const auto what = text("call ", i);
    expect(call.param == p.param.data_ptr() && call.grad == p.grad.data_ptr(), what + ": parameter and gradient");
    expect(call.state1 == p.codes1.data_ptr() && call.state2 == p.codes2.data_ptr(), what + ": codes");
    expect(call.absmax1 == p.absmax1.data_ptr() && call.absmax2 == p.absmax2.data_ptr(), what + ": scales");
    expect(call.qmap1 == first.values.data_ptr() && call.qmap2 == second.values.data_ptr(), what + ": code books");
    expect(call.beta1 == 0.9f && call.beta2 == 0.95f && call.beta3 == 0 && call.alpha == 0, what + ": betas");
    expect(call.eps == 1e-8f && call.lr == 3e-2f && call.weight_decay == 0.1f, what + ": eps, rate, decay");
    expect(call.gnorm_scale == 1 && !call.skip_zeros, what + ": neither scaled nor skipped");
    expect(call.n == p.param.numel() && call.step == static_cast<int>(taken[i]) + 1, what + ": size and step");
    expect(p.step.item<float>() == taken[i] + 1, what + ": the count");
  }

  // More elements than it can count, which take no memory here.
  Step large = step_of(params.data(), 1, first, second, 0);
  large.params[0] = at::zeros({1}).expand({int64_t{1} << 31});
  std::string message;
  try {
    bbt::adamw8bit::step_bitsandbytes(large);
  } catch (const c10::Error& error) {
    message = error.what();
  }
  expect(message.find("BBT_BITSANDBYTES=none") != std::string::npos && *calls == 3, "2^31 elements: " + message);
}

// What bbt_bitsandbytes says.
int print_kernel() {
  char *path = nullptr, *why = nullptr, *const error = bbt_bitsandbytes(&path, &why);
  std::printf("path %s why %s error %s\n", path ? path : "-", why ? why : "-", error ? error : "-");
  return 0;
}

}  // namespace

int main(int arguments, char**) {
  if (arguments > 1) return print_kernel();
  auto generator = at::detail::getDefaultCPUGenerator();
  const uint64_t seed = generator.seed();
  const Book first(true), second(false);
  for (const bool aligned : {true, false}) {
    for (const int64_t n : {1, 255, 256, 257, 771, 4097, 20480, 66495}) test_steps(n, aligned, 4, first, second);
  }
  // More blocks than a launch has warps: each has two turns, or one.
  test_steps(1024 * 8 * kBlock + 40000, true, 1, first, second);
  test_lists(first, second);
  test_refusals(first, second);
  test_bitsandbytes(first, second);
  std::printf("%d of %d checks failed, seed %llu\n", failures, checks, static_cast<unsigned long long>(seed));
  return failures == 0 ? 0 : 1;
}
