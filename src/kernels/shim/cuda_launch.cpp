// The driver's interface is declared here and looked up when it is first needed, so that this compiles, and loads,
// without CUDA. Streams are asked of libtorch through what it has for any device.
#include "cuda_launch.h"

#include "nvrtc.h"
#include "kernels.h"

#include <c10/core/impl/VirtualGuardImpl.h>
#include <dlfcn.h>

#include <memory>
#include <mutex>
#include <stdexcept>
#include <unordered_map>

namespace {

using Context = void*;
using Module = void*;
using Function = void*;

struct Driver {
  int (*init)(unsigned flags);
  int (*device_get)(int* device, int ordinal);
  int (*device_name)(char* name, int size, int device);
  int (*device_attribute)(int* value, int attribute, int device);
  int (*primary_context)(Context*, int device);
  int (*push_context)(Context);
  int (*pop_context)(Context*);
  int (*load_module)(Module*, const void* image);
  int (*get_function)(Function*, Module, const char* name);
  int (*launch)(Function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,
                unsigned block_z, unsigned shared_bytes, void* stream, void** parameters, void** extra);
  int (*error)(int, const char**);
};

// CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR.
constexpr int kMajor = 75;
constexpr int kMinor = 76;
// Of a grid's first dimension.
constexpr int64_t kMaxBlocks = 0x7fffffff;

template <typename F>
void find(void* library, const char* name, F*& function) {
  function = reinterpret_cast<F*>(dlsym(library, name));
  if (function == nullptr) throw std::runtime_error(std::string("the CUDA driver has no ") + name);
}

const Driver& driver() {
  static const Driver functions = [] {
    void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) throw std::runtime_error(std::string("no CUDA driver: ") + dlerror());
    Driver f;
    find(library, "cuInit", f.init);
    find(library, "cuDeviceGet", f.device_get);
    find(library, "cuDeviceGetName", f.device_name);
    find(library, "cuDeviceGetAttribute", f.device_attribute);
    find(library, "cuDevicePrimaryCtxRetain", f.primary_context);
    find(library, "cuCtxPushCurrent_v2", f.push_context);
    find(library, "cuCtxPopCurrent_v2", f.pop_context);
    find(library, "cuModuleLoadData", f.load_module);
    find(library, "cuModuleGetFunction", f.get_function);
    find(library, "cuLaunchKernel", f.launch);
    find(library, "cuGetErrorString", f.error);
    return f;
  }();
  return functions;
}

void check(int status, const std::string& what) {
  if (status == 0) return;
  const char* text = nullptr;
  driver().error(status, &text);
  throw std::runtime_error(what + ": " + (text == nullptr ? "CUDA error " + std::to_string(status) : text));
}

// The driver's handle of CUDA device `index`.
int driver_device(int index) {
  int device = 0;
  check(driver().init(0), "the CUDA driver");
  check(driver().device_get(&device, index), "CUDA device " + std::to_string(index));
  return device;
}

// libtorch's context of the device, current in this thread while this lives. A thread of autograd may have none.
class Current {
 public:
  explicit Current(Context context) { check(driver().push_context(context), "the CUDA context"); }
  ~Current() {
    Context popped;
    driver().pop_context(&popped);
  }
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;
};

// A device's kernels, loaded once. Never freed: contexts end with the process, in an order that nobody knows.
class Kernels {
 public:
  explicit Kernels(int index) {
    int major = 0, minor = 0;
    const int device = driver_device(index);
    check(driver().device_attribute(&major, kMajor, device), "the GPU's compute capability");
    check(driver().device_attribute(&minor, kMinor, device), "the GPU's compute capability");
    // The runtime's own, which libtorch uses: streams and memory belong to it.
    check(driver().primary_context(&context_, device), "the CUDA context");
    const std::string cubin = bbt::nvrtc::kernels("sm_" + std::to_string(major) + std::to_string(minor));
    const Current current(context_);
    check(driver().load_module(&module_, cubin.data()), "loading the CUDA kernels");
  }

  Context context() const { return context_; }

  Function function(const std::string& name) {
    const std::lock_guard<std::mutex> lock(mutex_);
    auto found = functions_.find(name);
    if (found == functions_.end()) {
      Function function = nullptr;
      check(driver().get_function(&function, module_, name.c_str()), "the CUDA kernel " + name);
      found = functions_.emplace(name, function).first;
    }
    return found->second;
  }

 private:
  Context context_ = nullptr;
  Module module_ = nullptr;
  std::mutex mutex_;
  std::unordered_map<std::string, Function> functions_;
};

// Compiled and loaded under a lock, so that threads that come meanwhile wait and do not do it again.
Kernels& kernels(int index) {
  static std::mutex mutex;
  static auto& devices = *new std::unordered_map<int, std::unique_ptr<Kernels>>();
  const std::lock_guard<std::mutex> lock(mutex);
  auto& device = devices[index];
  if (device == nullptr) device = std::make_unique<Kernels>(index);
  return *device;
}

}  // namespace

void bbt::cuda::launch(at::Device device, const std::string& name, int64_t blocks, int threads,
                       const void* arguments) {
  TORCH_CHECK(device.is_cuda() && device.has_index(), "a CUDA kernel, ", name, ", got tensors on ", device);
  TORCH_CHECK(blocks <= kMaxBlocks, name, ": ", blocks, " rows are more than one launch takes");
  if (blocks == 0) return;
  const c10::impl::VirtualGuardImpl libtorch(device.type());
  void* stream = libtorch.getStream(device).native_handle();
  Kernels& loaded = kernels(device.index());
  const Current current(loaded.context());
  // The driver takes a pointer to each parameter: these have one, a structure.
  void* parameters[] = {const_cast<void*>(arguments)};
  check(driver().launch(loaded.function(name), static_cast<unsigned>(blocks), 1, 1, static_cast<unsigned>(threads), 1,
                        1, 0, stream, parameters, nullptr),
        "starting the CUDA kernel " + name);
}

extern "C" char* bbt_cuda_name(int index, char* name, int size) {
  return bbt::guarded([&] { check(driver().device_name(name, size, driver_device(index)), "the GPU's name"); });
}
