// The enumerations that cross the C interface, with the numbers that they have in Rust (ffi.rs). A test compares the two.
#pragma once

namespace bbt {

enum class DeviceType : int { kCpu, kCuda };
enum class Dtype : int { kFloat, kBFloat16, kHalf };

}  // namespace bbt
