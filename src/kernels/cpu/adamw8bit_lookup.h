// A code book cut up for instructions that look up bytes, 128 at a time.
#pragma once

#include "adamw8bit.h"

namespace bbt::adamw8bit {

// A book's code of a place p of 65536 follows from k, how many codes lie between p and the middle, and the side that p is
// on. k goes by the distance from the middle, m = p - 32768 or 32767 - p, and grows by one at certain m. Those get rarer
// as m grows, so that m is looked up in cells of growing width, each of which has one such step at most: by two tables, k
// before the step, and where the step is. Both are bytes: a step is told by the lower byte of 2 m, which leaves the
// lowest bit to be anything.
struct alignas(64) Lookup {
  // The values' bytes, the lowest first.
  uint8_t values[4][256];
  // m from 4096: 2 m >> 8. From 512: 2 m >> 6. From 64: 2 m >> 3. Of the last two, the lower seven bits.
  uint8_t before_far[256], step_far[256];
  uint8_t before_middle[128], step_middle[128];
  uint8_t before_near[128], step_near[128];
  // m below 64, by 2 m: k itself.
  uint8_t nearest[128];

  // Whether `book` can be cut up so; one with a sign is to be the same on both sides. Only then is this filled.
  bool cut(const CodeBook& book, bool has_sign);
};

}  // namespace bbt::adamw8bit
