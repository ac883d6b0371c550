// AdamW over moments of 8 bits by bitsandbytes' own CUDA kernel, where its library is: opened when it is first wanted,
// so that bbt links to nothing of it.
#include "adamw8bit.h"
#include "default_stream.h"
#include "dynamic_library.h"
#include "kernels.h"

#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/ops/_foreach_add.h>
#include <ATen/ops/stack.h>

#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <limits>
#include <stdexcept>
#include <string>

namespace {

namespace fs = std::filesystem;

// Of bitsandbytes 0.50, as its backends/cuda/ops.py calls it. Blocks are of 256. It takes no stream: the launch goes to
// the default one of the current device. A launch that fails ends the process, with the runtime's message.
using AdamStep = void(float* param, float* grad, unsigned char* state1, unsigned char* state2, float beta1, float beta2,
                      float beta3, float alpha, float eps, int step, float lr, float* qmap1, float* qmap2,
                      float* absmax1, float* absmax2, float weight_decay, float gnorm_scale, bool skip_zeros, int n);

constexpr const char* kStep = "cadam_8bit_blockwise_grad_fp32";
// What that one calls, whose name tells the types of its arguments: other versions have had others.
constexpr const char* kTypes = "_Z29adam_8bit_blockwise_grad_fp32PfS_PhS0_fffffifS_S_S_S_ffbi";

constexpr const char* kVariable = "BBT_BITSANDBYTES";

struct Kernel {
  // nullptr: there is none.
  AdamStep* step = nullptr;
  std::string path;
  // Why there is none.
  std::string why;
};

bool has_cuda() {
  return at::detail::getCUDAHooks().hasCUDART();
}

// That for the version of CUDA that libtorch is built with.
std::string library_name() {
  if (!has_cuda()) throw std::runtime_error("this libtorch is built without CUDA");
  const long version = at::detail::getCUDAHooks().versionCUDART();  // 13000 is 13.0
  return "libbitsandbytes_cuda" + std::to_string(version / 1000) + std::to_string(version % 1000 / 10) + ".so";
}

Kernel open(fs::path path) {
  if (fs::is_directory(path)) path /= library_name();
  if (!fs::exists(path)) throw std::runtime_error("there is no " + path.string());
  path = fs::canonical(path);
  // CUDA's runtime, which it needs, is the one that libtorch has loaded.
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) throw std::runtime_error(dlerror());
  for (const char* name : {kStep, kTypes}) {
    if (dlsym(library, name) != nullptr) continue;
    throw std::runtime_error(path.string() + " is not that of bitsandbytes 0.50: it has no " + name);
  }
  return {reinterpret_cast<AdamStep*>(dlsym(library, kStep)), path, ""};
}

Kernel find() {
  const char* variable = std::getenv(kVariable);
  const std::string given = variable == nullptr ? "" : variable;
  if (given == "none") return {nullptr, "", std::string(kVariable) + " is none"};
  if (!given.empty()) {
    try {
      return open(fs::absolute(given));
    } catch (const std::exception& error) {
      throw std::runtime_error(std::string(kVariable) + "=" + given + ": " + error.what() +
                               "; name the CUDA library of bitsandbytes 0.50.2 or its folder, or `none` to do without");
    }
  }
  if (!has_cuda()) return {nullptr, "", "this libtorch is built without CUDA"};
  // Beside the wheel's `torch`.
  const fs::path folder = bbt::folder_of(reinterpret_cast<const void*>(&c10::warn)) / "../../bitsandbytes";
  if (!fs::exists(folder)) {
    return {nullptr, "", "bitsandbytes' are not installed (`make libtorch BITSANDBYTES=1` installs them)"};
  }
  try {
    return open(folder);
  } catch (const std::exception& error) {
    return {nullptr, "", std::string("bitsandbytes' cannot be used: ") + error.what()};
  }
}

// Looked for once, or each time where that throws.
const Kernel& kernel() {
  static const Kernel found = find();
  return found;
}

}  // namespace

bool bbt::adamw8bit::bitsandbytes_found() {
  return kernel().step != nullptr;
}

void bbt::adamw8bit::step_bitsandbytes(const Step& step) {
  for (const auto& param : step.params) {
    TORCH_CHECK(param.numel() <= std::numeric_limits<int>::max(), "bitsandbytes' AdamW of 8 bits counts elements in ",
                "32 bits, and a parameter is ", param.sizes(), ": set ", kVariable, "=none");
  }
  // The kernel is told the step as a number, and cannot be told to do nothing: the host waits for both, once.
  auto known = step.steps;
  known.push_back(step.found_inf);
  const at::Tensor numbers = at::stack(known).to(at::kCPU);
  if (numbers.data_ptr<float>()[step.params.size()] == 1) return;
  at::_foreach_add_(step.steps, 1);
  bbt::cuda::on_default_stream(step.params[0].device(), [&] {
    for (size_t i = 0; i < step.params.size(); ++i) {
      if (step.params[i].numel() == 0) continue;
      const int t = static_cast<int>(std::lround(numbers.data_ptr<float>()[i])) + 1;
      kernel().step(step.params[i].data_ptr<float>(), step.grads[i].data_ptr<float>(),
                    step.codes1[i].data_ptr<uint8_t>(), step.codes2[i].data_ptr<uint8_t>(),
                    static_cast<float>(step.beta1), static_cast<float>(step.beta2), /*beta3=*/0, /*alpha=*/0,
                    static_cast<float>(step.eps), t, static_cast<float>(step.lr), step.values1.data_ptr<float>(),
                    step.values2.data_ptr<float>(), step.absmax1[i].data_ptr<float>(),
                    step.absmax2[i].data_ptr<float>(), static_cast<float>(step.weight_decay), /*gnorm_scale=*/1,
                    /*skip_zeros=*/false, static_cast<int>(step.params[i].numel()));
    }
  });
}

extern "C" char* bbt_bitsandbytes(char** path, char** why) {
  return bbt::guarded([&] {
    const Kernel& found = kernel();
    *path = found.step != nullptr ? bbt::message(found.path.c_str()) : nullptr;
    *why = found.step != nullptr ? nullptr : bbt::message(found.why.c_str());
  });
}
