// Logistic functions of one number, as in kernels/activation.py. No branch and no call: loops over them vectorise.
#pragma once

#include "native/number.h"

#if defined(__CUDACC__) || defined(STOKER_SIMT)
#include "native/ptx.h"
#else
#include "native/host_exec.h"
#endif

namespace stoker {
namespace STOKER_ISA {

#if defined(__CUDACC__)
// Two instructions of 16 lanes a clock for a sigmoid: IEEE division would cost more than the traffic it hides behind.
STOKER_TILE float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
STOKER_TILE float inverse_root(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
#else
STOKER_TILE float reciprocal(float x) { return 1.0f / x; }
STOKER_TILE float inverse_root(float x) { return 1.0f / std::sqrt(x); }
#endif
#if defined(__CUDACC__) || defined(STOKER_SIMT)
STOKER_TILE float exponential(float x) { return exponential2(1.44269504088896341f * x); }
#endif

// 1 / (1 + e^-x); 0 where e^-x overflows.
STOKER_TILE float sigmoid(float x) { return reciprocal(1 + exponential(-x)); }

// Derivative of y = silu(x) = x s by x, from y and s = sigmoid(x).
STOKER_TILE float silu_slope(float s, float y) { return s + y * (1 - s); }

// log(1 + e^x), to rounding for every x: with e = e^-|x| it is max(x, 0) + 2 artanh(e / (2 + e)), whose series in a
// square of at most 1/9 is cut where it falls below 2e-8.
STOKER_TILE float softplus(float x) {
  const float e = exponential(x < 0 ? x : -x), a = e * reciprocal(2 + e), square = a * a;
  float series = 2.0f / 13;
  series = series * square + 2.0f / 11;
  series = series * square + 2.0f / 9;
  series = series * square + 2.0f / 7;
  series = series * square + 2.0f / 5;
  series = series * square + 2.0f / 3;
  series = series * square + 2.0f;
  return (x > 0 ? x : 0.0f) + series * a;
}

}  // namespace STOKER_ISA
}  // namespace stoker
