// NVRTC comes with libtorch, but not with headers: the few functions of its C interface are declared here, and looked
// up when they are first needed. So this compiles, and loads, without CUDA.
#include "nvrtc.h"

#include "dynamic_library.h"
#include "kernels.h"

#include <unistd.h>

#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <vector>

namespace {

namespace fs = std::filesystem;

struct Source {
  const char* name;
  const char* text;
};

// The files of kernels/cuda/; written by build.rs.
constexpr Source kSources[] = {
#include "cuda_sources.inc"
};

// --- NVRTC ------------------------------------------------------------------------------------------

struct Nvrtc {
  using Program = void*;

  int (*version)(int* major, int* minor);
  int (*create_program)(Program*, const char* source, const char* name, int headers, const char* const* texts,
                        const char* const* names);
  int (*destroy_program)(Program*);
  int (*compile_program)(Program, int options, const char* const*);
  int (*log_size)(Program, size_t*);
  int (*log)(Program, char*);
  int (*cubin_size)(Program, size_t*);
  int (*cubin)(Program, char*);
  const char* (*error)(int);
};

template <typename Function>
void find(void* library, const char* name, Function*& function) {
  function = reinterpret_cast<Function*>(dlsym(library, name));
  if (function == nullptr) throw std::runtime_error(std::string("libnvrtc has no ") + name);
}

// NVRTC opens this by its name alone, which finds what is loaded already.
void load_builtins(const fs::path& folder) {
  std::error_code ignored;
  for (const auto& file : fs::directory_iterator(folder, ignored)) {
    const std::string name = file.path().filename();
    if (name.rfind("libnvrtc-builtins", 0) == 0 && name.find(".alt.") == std::string::npos) {
      dlopen(file.path().c_str(), RTLD_NOW | RTLD_GLOBAL);
    }
  }
}

void* open_nvrtc() {
  const fs::path lib = bbt::folder_of(reinterpret_cast<const void*>(&c10::warn));
  // Where the linker looks; beside the wheel's `torch`; and by the name that it has in a libtorch archive, whose
  // libcaffe2_nvrtc knows it, but wants a driver, too.
  const std::string paths[] = {"libnvrtc.so.13", lib / "../../nvidia/cu13/lib/libnvrtc.so.13",
                               lib / "libcaffe2_nvrtc.so"};
  std::string tried;
  for (const auto& path : paths) {
    if (void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL)) return library;
    tried += std::string("\n  ") + dlerror();
  }
  throw std::runtime_error("NVRTC, which compiles bbt's CUDA kernels, is not found: it comes with the CUDA build of "
                           "libtorch (`make libtorch`; for your own PyTorch: pip install nvidia-cuda-nvrtc==13.0.*)" +
                           tried);
}

const Nvrtc& nvrtc() {
  static const Nvrtc functions = [] {
    void* library = open_nvrtc();
    Nvrtc f;
    find(library, "nvrtcVersion", f.version);
    find(library, "nvrtcCreateProgram", f.create_program);
    find(library, "nvrtcDestroyProgram", f.destroy_program);
    find(library, "nvrtcCompileProgram", f.compile_program);
    find(library, "nvrtcGetProgramLogSize", f.log_size);
    find(library, "nvrtcGetProgramLog", f.log);
    find(library, "nvrtcGetCUBINSize", f.cubin_size);
    find(library, "nvrtcGetCUBIN", f.cubin);
    find(library, "nvrtcGetErrorString", f.error);
    load_builtins(bbt::folder_of(reinterpret_cast<const void*>(f.version)));
    return f;
  }();
  return functions;
}

void check(int status, const char* what) {
  if (status != 0) throw std::runtime_error(std::string(what) + ": " + nvrtc().error(status));
}

// A program that includes all files that are kernels.
std::string program_text() {
  std::string text;
  for (const auto& source : kSources) {
    const std::string name = source.name;
    if (fs::path(name).extension() == ".cu") text += "#include \"" + name + "\"\n";
  }
  return text;
}

// What every architecture is compiled with. Divisions and square roots are IEEE's without being asked for.
constexpr const char* kOptions[] = {"--std=c++17", "--device-as-default-execution-space"};

std::string compile(const std::string& architecture) {
  const Nvrtc& f = nvrtc();
  std::vector<const char*> names, texts;
  for (const auto& source : kSources) {
    names.push_back(source.name);
    texts.push_back(source.text);
  }
  const std::string text = program_text(), flag = "--gpu-architecture=" + architecture;
  Nvrtc::Program program = nullptr;
  check(f.create_program(&program, text.c_str(), "bbt.cu", static_cast<int>(names.size()), texts.data(), names.data()),
        "a CUDA program");
  struct Destroy {
    Nvrtc::Program* program;
    ~Destroy() { nvrtc().destroy_program(program); }
  } destroy{&program};
  std::vector<const char*> options(std::begin(kOptions), std::end(kOptions));
  options.push_back(flag.c_str());
  if (const int status = f.compile_program(program, static_cast<int>(options.size()), options.data())) {
    size_t size = 0;
    std::string log;
    if (f.log_size(program, &size) == 0) {
      log.resize(size);
      f.log(program, log.data());
    }
    throw std::runtime_error("the CUDA kernels do not compile for " + architecture + ": " + f.error(status) + "\n" +
                             log);
  }
  size_t size = 0;
  check(f.cubin_size(program, &size), "the size of a cubin");
  std::string cubin(size, '\0');
  check(f.cubin(program, cubin.data()), "a cubin");
  return cubin;
}

// --- the cache --------------------------------------------------------------------------------------

// FNV-1a.
uint64_t hash(const std::string& text) {
  uint64_t h = 0xcbf29ce484222325;
  for (const char c : text) h = (h ^ static_cast<unsigned char>(c)) * 0x100000001b3;
  return h;
}

std::string hex(uint64_t number) {
  char text[17];
  std::snprintf(text, sizeof(text), "%016llx", static_cast<unsigned long long>(number));
  return text;
}

// Empty where there is no home.
fs::path cache() {
  const auto variable = [](const char* name) {
    const char* value = std::getenv(name);
    return fs::path(value == nullptr ? "" : value);
  };
  if (const auto cache = variable("XDG_CACHE_HOME"); cache.is_absolute()) return cache / "bbt";
  if (const auto home = variable("HOME"); home.is_absolute()) return home / ".cache" / "bbt";
  return {};
}

std::string file_name(const std::string& architecture) {
  int major = 0, minor = 0;
  check(nvrtc().version(&major, &minor), "NVRTC's version");
  std::string all = architecture + '\n' + std::to_string(major) + '.' + std::to_string(minor) + '\n';
  for (const char* option : kOptions) all += std::string(option) + '\n';
  for (const auto& source : kSources) all += std::string(source.name) + '\n' + source.text + '\n';
  return "kernels-" + architecture + "-" + hex(hash(all)) + ".cubin";
}

// A file is a cubin and its hash, so that a torn one is told.
std::string read(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  std::string text{std::istreambuf_iterator<char>(file), {}};
  if (!file || text.size() <= 16) return {};
  const std::string sum = text.substr(text.size() - 16);
  text.resize(text.size() - 16);
  return sum == hex(hash(text)) ? text : std::string();
}

// Beside and renamed: many ranks do this at once, and each sees a whole file or none.
void write(const fs::path& path, const std::string& cubin) {
  std::error_code ignored;
  fs::create_directories(path.parent_path(), ignored);
  std::string beside = path.string() + ".XXXXXX";
  const int fd = mkstemp(beside.data());
  if (fd < 0) return;
  close(fd);
  std::ofstream file(beside, std::ios::binary);
  file << cubin << hex(hash(cubin));
  file.close();
  if (file) fs::rename(beside, path, ignored);
  if (!file || ignored) fs::remove(beside, ignored);
}

}  // namespace

std::string bbt::nvrtc::kernels(const std::string& architecture) {
  return kernels(architecture, cache());
}

std::string bbt::nvrtc::kernels(const std::string& architecture, const fs::path& cache) {
  if (cache.empty()) return compile(architecture);
  const fs::path path = cache / file_name(architecture);
  std::string cubin = read(path);
  if (cubin.empty()) {
    cubin = compile(architecture);
    write(path, cubin);
  }
  return cubin;
}

extern "C" char* bbt_cuda_kernels(const char* architecture, const char* cache, size_t* bytes) {
  return bbt::guarded([&] { *bytes = bbt::nvrtc::kernels(architecture, cache).size(); });
}
