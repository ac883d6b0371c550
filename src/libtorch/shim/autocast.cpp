// Autocast on CPU and CUDA with a chosen dtype (tch's own knows CUDA fp16 only).
// The same calls, in the same order, as torch/amp/autocast_mode.py makes.
#include "shim.h"

#include <ATen/autocast_mode.h>

namespace {

at::DeviceType device_type(bbt::DeviceType device) {
  return device == bbt::DeviceType::kCuda ? at::DeviceType::CUDA : at::DeviceType::CPU;
}

}  // namespace

extern "C" void bbt_free_message(char* text) { std::free(text); }

extern "C" char* bbt_autocast_enter(bbt::DeviceType device, bbt::Dtype dtype) {
  return bbt::guarded([&] {
    at::autocast::set_autocast_dtype(device_type(device), dtype == bbt::Dtype::kHalf ? at::kHalf : at::kBFloat16);
    at::autocast::set_autocast_enabled(device_type(device), true);
    at::autocast::increment_nesting();
  });
}

extern "C" char* bbt_autocast_exit(bbt::DeviceType device) {
  return bbt::guarded([&] {
    // Casts of the weights are kept for the outermost region only; past it they would be stale.
    if (at::autocast::decrement_nesting() == 0) at::autocast::clear_cache();
    at::autocast::set_autocast_enabled(device_type(device), false);
  });
}

extern "C" char* bbt_autocast_dtype(bbt::DeviceType device, bbt::Dtype* dtype) {
  return bbt::guarded([&] {
    *dtype = bbt::Dtype::kFloat;
    if (!at::autocast::is_autocast_enabled(device_type(device))) return;
    const bool half = at::autocast::get_autocast_dtype(device_type(device)) == at::kHalf;
    *dtype = half ? bbt::Dtype::kHalf : bbt::Dtype::kBFloat16;
  });
}
