// c10d's NCCL backend. Its headers want those of NCCL and CUDA; where build.rs has not found them, this build
// says so when NCCL is asked for.
#include "c10d.h"

#ifdef BBT_NCCL

#define USE_C10D_NCCL
#include <torch/csrc/distributed/c10d/ProcessGroupNCCL.hpp>

c10::intrusive_ptr<c10d::Backend> bbt::nccl_backend(const Store& store, int rank, int size,
                                                    std::chrono::milliseconds timeout, int device) {
  auto options = c10d::ProcessGroupNCCL::Options::create();
  options->timeout = timeout;
  auto backend = c10::make_intrusive<c10d::ProcessGroupNCCL>(store, rank, size, options);
  // Now, not at the first collective: what does not work shows before the run has begun.
  backend->eagerConnectSingleDevice(at::Device(at::DeviceType::CUDA, static_cast<c10::DeviceIndex>(device)));
  return backend;
}

#else

c10::intrusive_ptr<c10d::Backend> bbt::nccl_backend(const Store&, int, int, std::chrono::milliseconds, int) {
  throw std::runtime_error("this build of bbt has no NCCL: it was built against a libtorch without CUDA, or without "
                           "NCCL's and CUDA's headers (`make libtorch` installs them)");
}

#endif
