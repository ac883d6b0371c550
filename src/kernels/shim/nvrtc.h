// The CUDA kernels (kernels/cuda/), compiled for a GPU when it first needs them.
#pragma once

#include <filesystem>
#include <string>

namespace bbt::nvrtc {

// All kernels as one cubin for `architecture`, "sm_90". Kept on disk: in $XDG_CACHE_HOME/bbt, or ~/.cache/bbt, under a
// hash of all that decides what it is. That only saves time: a cache that cannot be read or written is none.
// Throws std::runtime_error with the compiler's log.
std::string kernels(const std::string& architecture);

// The same, kept in the folder `cache`.
std::string kernels(const std::string& architecture, const std::filesystem::path& cache);

}  // namespace bbt::nvrtc
