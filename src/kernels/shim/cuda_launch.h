// Starts the kernels of kernels/cuda/ on a GPU.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>

namespace bbt::cuda {

// Starts `blocks` blocks of `threads` threads of the kernel `name` on the device's current stream, with `arguments`, of
// which this reads the bytes before it returns. No blocks: nothing to do. From any thread. Throws what the driver says.
void launch(at::Device device, const std::string& name, int64_t blocks, int threads, const void* arguments);

}  // namespace bbt::cuda
