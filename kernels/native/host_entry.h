// How host entry points are named and where they keep their tiles.
#pragma once

#include <new>

#include "native/abi.h"

#define STOKER_JOIN_(a, b) a##_##b
#define STOKER_JOIN(a, b) STOKER_JOIN_(a, b)
// int stoker_<name>_<isa>(...): the caller picks the best set that the processor has.
#define STOKER_HOST_ENTRY(name, ...) \
  STOKER_EXPORT int STOKER_JOIN(stoker_##name, STOKER_ISA)(__VA_ARGS__)

namespace stoker {

// One program's shared tiles, aligned for vectors and for pages of cache lines.
template <class T>
struct Scratchpad {
  T *at = static_cast<T *>(::operator new(sizeof(T), std::align_val_t(4096)));
  Scratchpad() = default;
  Scratchpad(const Scratchpad &) = delete;
  ~Scratchpad() { ::operator delete(at, std::align_val_t(4096)); }
  T &operator*() { return *at; }
};

}  // namespace stoker
