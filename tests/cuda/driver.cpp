// A CUDA driver of two GPUs that computes nothing and checks how it is called: built as libcuda.so.1.
#include <algorithm>
#include <cstring>
#include <mutex>
#include <string>
#include <vector>

namespace {

struct Function {
  long context;
  std::string name;
};

std::mutex mutex;
std::string cubins[2];
thread_local std::vector<long> contexts;

constexpr int kInvalid = 1, kNoDevice = 101, kNoContext = 201, kNotFound = 500;

long of_device(int device) {
  return 0x100 + device;
}

}  // namespace

extern "C" {

// What was called.
int fake_retained = 0, fake_loaded = 0, fake_launched = 0;
unsigned fake_blocks = 0, fake_threads = 0;
char fake_argument[8];

int fake_current_contexts() {
  return static_cast<int>(contexts.size());
}

int cuInit(unsigned flags) {
  return flags == 0 ? 0 : kInvalid;
}

// NVRTC asks for something of its own here, and does without.
int cuGetExportTable(const void** table, const void*) {
  *table = nullptr;
  return kNotFound;
}

int cuDeviceGet(int* device, int ordinal) {
  *device = ordinal;
  return 0 <= ordinal && ordinal < 2 ? 0 : kNoDevice;
}

int cuDeviceGetName(char* name, int size, int device) {
  std::strncpy(name, device == 0 ? "NVIDIA H100 80GB HBM3" : "NVIDIA A100-SXM4-40GB", static_cast<size_t>(size));
  return 0;
}

// 9.0 and 8.0.
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  *value = attribute == 75 ? 9 - device : attribute == 76 ? 0 : -1;
  return *value < 0 ? kInvalid : 0;
}

int cuDevicePrimaryCtxRetain(long* context, int device) {
  const std::lock_guard<std::mutex> lock(mutex);
  ++fake_retained;
  *context = of_device(device);
  return 0;
}

int cuCtxPushCurrent_v2(long context) {
  contexts.push_back(context);
  return 0;
}

int cuCtxPopCurrent_v2(long* context) {
  if (contexts.empty()) return kNoContext;
  *context = contexts.back();
  contexts.pop_back();
  return 0;
}

// How long the machine code is follows from ELF's header: one of its tables is the end.
int cuModuleLoadData(long* module, const void* image) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (contexts.empty()) return kNoContext;
  const char* bytes = static_cast<const char*>(image);
  if (std::memcmp(bytes, "\177ELF", 4) != 0) return kInvalid;
  unsigned long programs, sections;
  unsigned short program_size, program_count, section_size, section_count;
  std::memcpy(&programs, bytes + 32, 8);
  std::memcpy(&sections, bytes + 40, 8);
  std::memcpy(&program_size, bytes + 54, 2);
  std::memcpy(&program_count, bytes + 56, 2);
  std::memcpy(&section_size, bytes + 58, 2);
  std::memcpy(&section_count, bytes + 60, 2);
  const unsigned long end =
      std::max(programs + 1UL * program_size * program_count, sections + 1UL * section_size * section_count);
  ++fake_loaded;
  *module = contexts.back();
  cubins[*module - of_device(0)].assign(bytes, end);
  return 0;
}

int cuModuleGetFunction(Function** function, long module, const char* name) {
  const std::lock_guard<std::mutex> lock(mutex);
  const std::string section = std::string(".text.") + name + '\0';
  if (cubins[module - of_device(0)].find(section) == std::string::npos) return kNotFound;
  *function = new Function{module, name};
  return 0;
}

// The fake libtorch of launch.cpp names the streams.
int cuLaunchKernel(Function* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                   unsigned block_y, unsigned block_z, unsigned shared_bytes, long stream, void** parameters,
                   void** extra) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (contexts.empty() || contexts.back() != function->context) return kNoContext;
  if (stream != function->context + 0x1000) return kInvalid;
  if (grid_y != 1 || grid_z != 1 || block_x > 1024 || block_y != 1 || block_z != 1) return kInvalid;
  if (shared_bytes != 0 || extra != nullptr) return kInvalid;
  ++fake_launched;
  fake_blocks = grid_x;
  fake_threads = block_x;
  std::memcpy(fake_argument, parameters[0], sizeof(fake_argument));
  return 0;
}

int cuGetErrorString(int status, const char** text) {
  *text = status == kNoDevice ? "invalid device ordinal" : status == kNotFound ? "named symbol not found" : nullptr;
  return *text == nullptr ? kInvalid : 0;
}

}  // extern "C"
