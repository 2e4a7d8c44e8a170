// What the caller of the epilogue hands over (kernels/epilogue/native.py mirrors it).
#pragma once

#include <cstdint>

#include "native/number.h"

namespace stoker {

// Tensors as in kernels/epilogue/op.py. `Element` is float on the host, bf16 on the GPU; tokens are `*_stride` elements
// apart, heads lie side by side, what has no stride is contiguous.
struct EpilogueParams {
  const void *o, *z, *weight;  // [N, Hv, V], [N, Hv, V], [V]
  void *y;                     // as o
  const void *dy;              // cotangent of y
  void *d_o, *dz, *dweight;    // as o, z and weight
  void *workspace;             // backward: as many bytes as the library's query says
  int64_t workspace_bytes;
  int64_t o_stride, z_stride, dy_stride;
  int32_t num_tokens, num_heads, dim;
  int32_t silu;         // the gate is silu(z), else sigmoid(z)
  int32_t wide_weight;  // weight and dweight are float, else Element
  float eps;
};

}  // namespace stoker
