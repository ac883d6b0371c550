// A tensor on its way to the host, for which the host need not wait yet.
#include "shim.h"

#include <ATen/ops/empty.h>
#include <c10/core/Event.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <optional>

namespace {

struct HostCopy {
  explicit HostCopy(const at::Tensor& tensor) {
    if (tensor.device().is_cpu()) {
      host = tensor.detach();
      return;
    }
    // Only into pinned memory does the device copy by itself.
    host = at::empty(tensor.sizes(), tensor.options().device(at::kCPU).pinned_memory(true));
    host.copy_(tensor.detach(), /*non_blocking=*/true);
    const c10::impl::VirtualGuardImpl device(tensor.device().type());
    arrived.emplace(tensor.device().type());
    arrived->record(device.getStream(tensor.device()));
  }

  at::Tensor host;
  std::optional<c10::Event> arrived;
};

}  // namespace

extern "C" char* bbt_host_copy_start(const at::Tensor* tensor, void** copy) {
  return bbt::guarded([&] { *copy = new HostCopy(*tensor); });
}

extern "C" char* bbt_host_copy_wait(void* copy, at::Tensor** tensor) {
  return bbt::guarded([&] {
    auto* started = static_cast<HostCopy*>(copy);
    if (started->arrived) started->arrived->synchronize();
    *tensor = new at::Tensor(started->host);
  });
}

extern "C" void bbt_host_copy_free(void* copy) {
  delete static_cast<HostCopy*>(copy);
}
