// cuda_launch.cpp and nvrtc.cpp with the driver of driver.cpp: kernels are compiled and loaded once for each GPU, and
// started in its context, on its stream, from any thread. Prints what is wrong, and fails.
#include "../../src/kernels/cuda/arguments.h"
#include "../../src/kernels/shim/cuda_launch.h"
#include "../../src/kernels/shim/default_stream.h"
#include "../../src/kernels/shim/kernels.h"

#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <thread>
#include <vector>

namespace {

// libtorch's side of two GPUs, whose streams have names that the driver knows.
struct Guard final : c10::impl::DeviceGuardImplInterface {
  static constexpr auto static_type = c10::DeviceType::CUDA;
  c10::DeviceType type() const override { return static_type; }
  c10::Device exchangeDevice(c10::Device device) const override {
    const auto before = current;
    current = device;
    return before;
  }
  c10::Device getDevice() const override { return current; }
  void setDevice(c10::Device device) const override { current = device; }
  void uncheckedSetDevice(c10::Device device) const noexcept override { current = device; }
  c10::Stream getStream(c10::Device device) const override {
    return c10::Stream(c10::Stream::UNSAFE, device, current_stream);
  }
  c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return 2; }
  void* getStreamNativeHandle(const c10::Stream stream) const override {
    return reinterpret_cast<void*>(0x1100L + stream.device_index());
  }
  void record(void** event, const c10::Stream& stream, c10::DeviceIndex, c10::EventFlag) const override {
    *event = &log;
    log += " record " + std::to_string(stream.id());
  }
  void block(void*, const c10::Stream& stream) const override { log += " block " + std::to_string(stream.id()); }
  void destroyEvent(void*, c10::DeviceIndex) const noexcept override {}

  static inline thread_local c10::Device current{static_type, 0};
  static inline c10::StreamId current_stream = 0;
  // What is asked of streams.
  static inline std::string log;
};

C10_REGISTER_GUARD_IMPL(CUDA, Guard)

void expect(bool condition, const char* what) {
  if (condition) return;
  std::printf("FAILED %s\n", what);
  std::exit(1);
}

template <typename T>
T& fake(const char* name) {
  static void* driver = dlopen("libcuda.so.1", RTLD_NOW);
  expect(driver != nullptr, "the driver is the fake one");
  void* symbol = dlsym(driver, name);
  expect(symbol != nullptr, name);
  return *reinterpret_cast<T*>(symbol);
}

template <typename Call>
std::string error(const Call& call) {
  try {
    call();
    return "";
  } catch (const std::exception& error) {
    return error.what();
  }
}

// What is started on the default stream comes after what the current one holds, and before what it is given then.
void test_default_stream() {
  const auto device_of_body = [](int index, c10::StreamId current) {
    Guard::log.clear();
    Guard::current_stream = current;
    const at::Device device(at::kCUDA, static_cast<c10::DeviceIndex>(index));
    c10::DeviceIndex inside = -1;
    bbt::cuda::on_default_stream(device, [&] {
      inside = Guard::current.index();
      Guard::log += " body";
    });
    expect(Guard::current.index() == 0, "the device is as before");
    return inside;
  };
  expect(device_of_body(1, 0) == 1 && Guard::log == " body", "nothing is waited for on the default stream");
  expect(device_of_body(1, 7) == 1, "the device of the call");
  expect(Guard::log == " record 7 block 0 body record 0 block 7", Guard::log.c_str());
  Guard::current_stream = 0;
}

}  // namespace

int main() {
  test_default_stream();
  const auto gpu = [](int index) { return at::Device(at::kCUDA, static_cast<c10::DeviceIndex>(index)); };
  const auto start = [](at::Device device, const char* name, int64_t blocks) {
    bbt::cuda::Quantize arguments = {};
    arguments.x = reinterpret_cast<const void*>(0x1234567890);
    bbt::cuda::launch(device, name, blocks, 96, &arguments);
  };
  std::vector<std::thread> threads;
  for (int t = 0; t < 8; ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < 10; ++i) {
        const auto failed = error([&] { start(gpu((t + i) % 2), i % 3 == 0 ? "sum" : "quantize_bfloat16", 5); });
        expect(failed.empty(), failed.c_str());
        expect(fake<int()>("fake_current_contexts")() == 0, "the thread's contexts are as before");
      }
    });
  }
  for (auto& thread : threads) thread.join();
  expect(fake<int>("fake_launched") == 80, "launches");
  expect(fake<int>("fake_retained") == 2 && fake<int>("fake_loaded") == 2, "each GPU's kernels are loaded once");

  start(gpu(1), "rms_norm_backward_bfloat16_float", 0x7fffffff);
  expect(fake<unsigned>("fake_blocks") == 0x7fffffff && fake<unsigned>("fake_threads") == 96, "the largest grid");
  void* x = nullptr;
  std::memcpy(&x, &fake<char>("fake_argument"), sizeof(x));
  expect(x == reinterpret_cast<void*>(0x1234567890), "the arguments");
  start(gpu(0), "adamw8bit", 1);
  start(gpu(0), "sum", 0);
  expect(fake<int>("fake_launched") == 82, "no blocks, no launch");

  const auto contains = [](const std::string& text, const char* part) { return text.find(part) != std::string::npos; };
  expect(contains(error([&] { start(gpu(0), "sum", 1LL << 31); }), "2147483648"), "a grid that is too large");
  expect(contains(error([&] { start(gpu(0), "none", 1); }), "none: named symbol not found"), "no such kernel");
  expect(contains(error([&] { start(gpu(2), "sum", 1); }), "device 2: invalid device ordinal"), "no such GPU");
  expect(contains(error([&] { start(at::Device(at::kCPU), "sum", 1); }), "cpu"), "the CPU");
  char name[32];
  expect(bbt_cuda_name(1, name, sizeof(name)) == nullptr && name == std::string("NVIDIA A100-SXM4-40GB"), "a name");
  char* const message = bbt_cuda_name(2, name, sizeof(name));
  expect(message != nullptr && contains(message, "device 2: invalid device ordinal"), "no such GPU has no name");
  std::free(message);
  expect(fake<int()>("fake_current_contexts")() == 0, "no context is left");
  std::puts("launches are as they should be");
}
