// The kernels as the emulation compiles them, and fused_cuda.cpp's launches of them.
#include "emulation.h"

#include "../../src/kernels/cuda/adamw8bit.cu"
#include "../../src/kernels/cuda/cross_entropy.cu"
#include "../../src/kernels/cuda/quantize.cu"
#include "../../src/kernels/cuda/rms_norm.cu"
#include "../../src/kernels/cuda/rope.cu"
#include "../../src/kernels/cuda/scale.cu"
#include "../../src/kernels/cuda/swiglu.cu"
#include "../../src/kernels/cuda/ternary.cu"
#include "../../src/kernels/shim/cuda_launch.h"

void bbt::cuda::launch(at::Device device, const std::string& name, int64_t blocks, int threads,
                       const void* arguments) {
  TORCH_CHECK(device.is_cpu(), name, " is emulated on the CPU, not on ", device);
  TORCH_CHECK(threads % 32 == 0 && 0 < threads && threads <= 1024, name, " in blocks of ", threads, " threads");
  const auto kernel = emulation::kernels().find(name);
  TORCH_CHECK(kernel != emulation::kernels().end(), "no kernel ", name);
  emulation::run(static_cast<unsigned>(blocks), static_cast<unsigned>(threads), [&] { kernel->second(arguments); });
}
