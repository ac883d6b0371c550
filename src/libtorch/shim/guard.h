// What every function of the C interface needs: tensors as a list, and exceptions as messages.
#pragma once

#include <cstddef>
#include <cstring>
#include <exception>
#include <vector>

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

namespace bbt {

// A copy of `text` that the caller of the C interface frees with bbt_free_message.
inline char* message(const char* text) {
  return strdup(text == nullptr ? "unknown error" : text);
}

// Runs `body`. Returns nullptr, or the message of the exception that it threw.
template <typename Body>
char* guarded(Body&& body) {
  try {
    body();
    return nullptr;
  } catch (const c10::Error& error) {
    return message(error.what_without_backtrace());
  } catch (const std::exception& error) {
    return message(error.what());
  } catch (...) {
    return message("unknown C++ exception");
  }
}

// The tensors behind `n` pointers.
inline std::vector<at::Tensor> list(const at::Tensor* const* tensors, size_t n) {
  std::vector<at::Tensor> out;
  out.reserve(n);
  for (size_t i = 0; i < n; ++i) out.push_back(*tensors[i]);
  return out;
}

}  // namespace bbt
