// For libraries that start their kernels on CUDA's default stream, whatever libtorch's current one is.
#pragma once

#include <c10/core/DeviceGuard.h>
#include <c10/core/Event.h>
#include <c10/core/impl/VirtualGuardImpl.h>

namespace bbt::cuda {

// Calls `body` with `device` as the current one of CUDA's runtime, which takes that, and its default stream, where it
// is told no stream. What the body starts there comes after what libtorch's current stream holds, and before what that
// one is given afterwards: libtorch's other streams do not wait for the default one of themselves, nor it for them.
// Where the current stream is the default one, which it is unless somebody has chosen another, there is nothing to do.
template <typename Body>
void on_default_stream(at::Device device, const Body& body) {
  const c10::DeviceGuard on(device);
  const c10::Stream current = c10::impl::VirtualGuardImpl(device.type()).getStream(device);
  const c10::Stream theirs(c10::Stream::DEFAULT, current.device());
  const auto wait = [&](const c10::Stream& later, const c10::Stream& earlier) {
    if (later == earlier) return;
    c10::Event reached(device.type());
    reached.record(earlier);
    reached.block(later);
  };
  wait(theirs, current);
  body();
  wait(current, theirs);
}

}  // namespace bbt::cuda
