// Element types and the few scalar functions that host and device share.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define STOKER_BOTH __host__ __device__ __forceinline__  // callable on either side
#define STOKER_TILE __device__ __forceinline__           // part of a tile program: runs where its executor lives
#else
#include <cmath>
#define STOKER_BOTH inline
#define STOKER_TILE inline __attribute__((always_inline))  // or loops over it would not vectorise
#endif

namespace stoker {

// bfloat16 as storage: every product and sum is made in float.
struct bf16 {
  uint16_t bits;

  bf16() = default;
  STOKER_BOTH bf16(float x) : bits(round(x)) {}
  STOKER_BOTH operator float() const { return from_bits(uint32_t(bits) << 16); }

  STOKER_BOTH static uint32_t to_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
  }
  STOKER_BOTH static float from_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
  }
  // To nearest, ties to even; a NaN stays one whatever its payload.
  STOKER_BOTH static uint16_t round(float x) {
#if defined(__CUDA_ARCH__)
    uint16_t rounded_here;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(rounded_here) : "f"(x));
    return rounded_here;
#else
    uint32_t bits = to_bits(x);
    uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    uint32_t nan = (bits >> 16) | 0x40u;
    return uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded);
#endif
  }
};

template <class T>
STOKER_BOTH constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

}  // namespace stoker
