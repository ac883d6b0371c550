// An NVRTC that compiles nothing and counts how often it is asked to, in bytes of the file $FAKE_NVRTC_COUNT: built as
// libnvrtc.so.13.
#include <fcntl.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <string>

namespace {

const std::string kCubin = "\177ELF" + std::string(20000, 'x');
int program_of_all = 0;

}  // namespace

extern "C" {

int nvrtcVersion(int* major, int* minor) {
  *major = 13;
  *minor = 0;
  return 0;
}

int nvrtcCreateProgram(void** program, const char*, const char*, int, const char* const*, const char* const*) {
  *program = &program_of_all;
  return 0;
}

int nvrtcDestroyProgram(void**) {
  return 0;
}

int nvrtcCompileProgram(void*, int, const char* const*) {
  const int file = open(std::getenv("FAKE_NVRTC_COUNT"), O_WRONLY | O_APPEND | O_CREAT, 0600);
  const bool counted = write(file, "x", 1) == 1;
  close(file);
  return counted ? 0 : 1;
}

int nvrtcGetProgramLogSize(void*, size_t* size) {
  *size = 0;
  return 0;
}

int nvrtcGetProgramLog(void*, char*) {
  return 0;
}

int nvrtcGetCUBINSize(void*, size_t* size) {
  *size = kCubin.size();
  return 0;
}

int nvrtcGetCUBIN(void*, char* cubin) {
  std::memcpy(cubin, kCubin.data(), kCubin.size());
  return 0;
}

const char* nvrtcGetErrorString(int) {
  return "not counted";
}

}  // extern "C"
