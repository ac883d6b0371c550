#include "adamw8bit_lookup.h"

#include <algorithm>
#include <cstring>

namespace {

constexpr int kPlaces = 1 << 16, kMiddle = kPlaces / 2;

// The tables of the cells of 2 m, 1 << shift wide, from the index `first` to before `end`. Whether none has two steps.
bool fill(const int* steps, int shift, int first, int end, uint8_t* before, uint8_t* step) {
  for (int cell = first; cell < end; ++cell) {
    const int from = cell << shift, to = from + (1 << shift);
    const int* const next = std::lower_bound(steps + 1, steps + 257, from);
    const bool has_one = next < steps + 257 && *next < to;
    if (has_one && next + 1 < steps + 257 && next[1] < to) return false;
    // Where there is none, it was at the cell's beginning.
    before[cell] = static_cast<uint8_t>(next - steps - 1 - (has_one ? 0 : 1));
    step[cell] = static_cast<uint8_t>(has_one ? *next : from);
  }
  return true;
}

}  // namespace

bool bbt::adamw8bit::Lookup::cut(const CodeBook& book, bool has_sign) {
  // first[c]: the first place of a code that is not below c.
  int first[257];
  for (int code = 0; code <= 256; ++code) {
    const auto below = [&](const uint8_t& nearest) { return nearest < code; };
    const auto begin = book.nearest, end = book.nearest + kPlaces;
    first[code] = static_cast<int>(std::partition_point(begin, end, below) - begin);
  }
  // steps[k]: the first 2 m with at least that k. The code in the middle is none of a place's.
  const int middle = has_sign ? 127 : 0;
  int steps[257];
  for (int k = 0; k <= 256; ++k) {
    steps[k] = middle + k > 256 ? 2 * kPlaces : 2 * std::max(first[middle + k] - kMiddle, 0);
  }
  for (int k = 1; has_sign && k <= 127; ++k) {
    if (first[128 - k] != kPlaces - first[127 + k]) return false;
  }
  for (int c = 0; c < 256; ++c) {
    uint32_t bits;
    std::memcpy(&bits, book.values + c, sizeof bits);
    for (int byte = 0; byte < 4; ++byte) values[byte][c] = static_cast<uint8_t>(bits >> 8 * byte);
  }
  for (int i = 0; i < 128; ++i) {
    nearest[i] = static_cast<uint8_t>(std::upper_bound(steps + 1, steps + 257, i) - steps - 1);
  }
  // What lies below a width's first is left to the finer ones.
  return fill(steps, 8, 32, 256, before_far, step_far) && fill(steps, 6, 16, 128, before_middle, step_middle) &&
         fill(steps, 3, 16, 128, before_near, step_near);
}
