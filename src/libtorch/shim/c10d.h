// Between the files of the shim: what a handle of the C interface points to.
#pragma once

#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <torch/csrc/distributed/c10d/Store.hpp>

namespace bbt {

using Store = c10::intrusive_ptr<c10d::Store>;
using ProcessGroup = c10::intrusive_ptr<c10d::ProcessGroup>;

// nccl.cpp. Throws where this build has no NCCL, or the machine no GPU.
c10::intrusive_ptr<c10d::Backend> nccl_backend(const Store& store, int rank, int size,
                                               std::chrono::milliseconds timeout, int device);

}  // namespace bbt
