// What the samples share: the parameters as Python declares them, and how a function is exported.
#pragma once

#include <cstdint>

#define EXPORT extern "C" __attribute__((visibility("default")))

struct ScaleParams {
  const float* x;
  float* y;
  int64_t n;
  float factor;
};

// int64_t sizeof_<Params>(): Python compares it with its own struct of that name.
#define EXPORT_SIZE(Params) \
  EXPORT int64_t sizeof_##Params() { return sizeof(Params); }

// Emitted by every object that calls it; of all copies the linker keeps one.
__attribute__((noinline)) inline int isa_of_shared_code() {
#if defined(__AVX512F__)
  return 512;
#elif defined(__AVX2__)
  return 2;
#else
  return 0;
#endif
}
