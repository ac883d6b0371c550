// What the programs of this folder check with: failures are printed and counted.
#pragma once

#include <c10/util/StringUtil.h>

#include <cstdio>
#include <string>

namespace {

int checks = 0, failures = 0;

void expect(bool condition, const std::string& what) {
  ++checks;
  if (condition) return;
  ++failures;
  std::printf("FAILED %s\n", what.c_str());
}

template <typename... Parts>
std::string text(const Parts&... parts) {
  return c10::str(parts...);
}

}  // namespace
