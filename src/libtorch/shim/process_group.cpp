// c10d's process groups: Gloo for tensors on the CPU, NCCL (or Gloo) for those on a CUDA device.
#include "c10d.h"
#include "shim.h"

#define USE_C10D_GLOO
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>
#include <torch/csrc/distributed/c10d/comm.hpp>

namespace {

c10d::ProcessGroup& group_of(void* handle) { return **static_cast<bbt::ProcessGroup*>(handle); }

// Of the buffers in which broadcast_coalesced packs small tensors.
constexpr size_t kBroadcastBytes = 250 * 1024 * 1024;

}  // namespace

extern "C" char* bbt_process_group_new(void* store, int rank, int size, int nccl, int cuda_device,
                                       int64_t timeout_ms, void** group) {
  return bbt::guarded([&] {
    const auto& shared = *static_cast<bbt::Store*>(store);
    const auto timeout = std::chrono::milliseconds(timeout_ms);
    auto made = c10::make_intrusive<c10d::ProcessGroup>(shared, rank, size);
    auto options = c10d::ProcessGroupGloo::Options::create_default(timeout);
    auto gloo = c10::make_intrusive<c10d::ProcessGroupGloo>(shared, rank, size, options);
    made->setBackend(c10::DeviceType::CPU, c10d::ProcessGroup::BackendType::GLOO, gloo);
    made->setDefaultBackend(c10d::ProcessGroup::BackendType::GLOO);
    if (nccl != 0) {
      auto backend = bbt::nccl_backend(shared, rank, size, timeout, cuda_device);
      made->setBackend(c10::DeviceType::CUDA, c10d::ProcessGroup::BackendType::NCCL, backend);
      made->setDefaultBackend(c10d::ProcessGroup::BackendType::NCCL);
    } else if (cuda_device >= 0) {
      made->setBackend(c10::DeviceType::CUDA, c10d::ProcessGroup::BackendType::GLOO, gloo);
    }
    made->setGroupName("bbt");
    *group = new bbt::ProcessGroup(std::move(made));
  });
}

extern "C" char* bbt_process_group_shutdown(void* group) {
  return bbt::guarded([&] { group_of(group).shutdown(); });
}

extern "C" void bbt_process_group_free(void* group) { delete static_cast<bbt::ProcessGroup*>(group); }

extern "C" char* bbt_all_reduce(void* group, const at::Tensor* tensor, int max) {
  return bbt::guarded([&] {
    c10d::AllreduceOptions options;
    options.reduceOp = max != 0 ? c10d::ReduceOp::MAX : c10d::ReduceOp::SUM;
    std::vector<at::Tensor> tensors{*tensor};
    group_of(group).allreduce(tensors, options)->wait();
  });
}

extern "C" char* bbt_broadcast(void* group, const at::Tensor* const* tensors, size_t n, int root) {
  return bbt::guarded([&] {
    c10d::broadcast_coalesced(*static_cast<bbt::ProcessGroup*>(group), bbt::list(tensors, n), kBroadcastBytes, root);
  });
}

extern "C" char* bbt_all_gather(void* group, const at::Tensor* output, const at::Tensor* input) {
  return bbt::guarded([&] {
    at::Tensor to = *output, from = *input;
    group_of(group)._allgather_base(to, from)->wait();
  });
}

extern "C" char* bbt_reduce_scatter(void* group, const at::Tensor* output, const at::Tensor* input) {
  return bbt::guarded([&] {
    at::Tensor to = *output, from = *input;
    group_of(group)._reduce_scatter_base(to, from)->wait();
  });
}

extern "C" char* bbt_barrier(void* group) {
  return bbt::guarded([&] { group_of(group).barrier()->wait(); });
}
