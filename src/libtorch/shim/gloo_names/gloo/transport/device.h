// Names that ProcessGroupGloo.hpp holds pointers to. See ../../README.md.
#pragma once

namespace gloo::transport {
class Device;
class UnboundBuffer;
}  // namespace gloo::transport
