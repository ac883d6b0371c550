// Libraries that are opened while running.
#pragma once

#include <dlfcn.h>

#include <filesystem>

namespace bbt {

// Where the library that holds `symbol` is loaded from.
inline std::filesystem::path folder_of(const void* symbol) {
  Dl_info info;
  return dladdr(symbol, &info) != 0 ? std::filesystem::path(info.dli_fname).parent_path() : std::filesystem::path();
}

}  // namespace bbt
