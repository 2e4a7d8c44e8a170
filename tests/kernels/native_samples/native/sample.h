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
