// What every library tells its caller before the first call (see kernels/toolchain/library.py).
#pragma once

#include <cstdint>

#define STOKER_EXPORT extern "C" __attribute__((visibility("default")))

// The size that this side sees of a struct. Weak: every object that uses the struct may say it.
#define STOKER_PARAMS(Struct)                                                                \
  extern "C" __attribute__((visibility("default"), weak)) int64_t sizeof_##Struct() { \
    return sizeof(stoker::Struct);                                                           \
  }

namespace stoker {

constexpr int kAbiVersion = 1;
// Beside the codes of cudaError_t, which are positive.
constexpr int kUnsupported = -1000000, kWorkspaceTooSmall = -1000001, kNoTensorMap = -1000002;

}  // namespace stoker
