// The GPU's way to run a row program (see native/row_host.h): a thread has 8 channels, 16 bytes, of every row that it
// visits; neighbouring lanes of a warp have the rest of the row.
#pragma once

#include "native/ptx.h"

namespace stoker {
namespace STOKER_ISA {

struct LaneRows {
  static constexpr int kPart = 8, kTaps = 4, kAhead = 4;
  using Element = bf16;

  struct alignas(16) Row {
    uint32_t at[4];
    STOKER_DEVICE float operator()(int i) const {
      return bf16::from_bits(i % 2 ? at[i / 2] & 0xffff0000u : at[i / 2] << 16);
    }
  };

  // The rows that the current token sees, j tokens back. At first those `reach` before `first`.
  struct Window {
    Row at[kTaps];
    STOKER_DEVICE Window(const LaneRows &x, const void *base, int64_t stride, int first, int reach) {
#pragma unroll
      for (int j = 1; j < kTaps; ++j) at[j - 1] = j <= reach ? x.load(base, stride, first - j) : Row{};
    }
    STOKER_DEVICE void push(Row row) {
#pragma unroll
      for (int j = kTaps - 1; j > 0; --j) at[j] = at[j - 1];
      at[0] = row;
    }
    STOKER_DEVICE const Row &operator[](int j) const { return at[j]; }
  };

  int column, lanes;  // lanes that share a row: a power of two
  bool active;        // false beyond the last column: takes part in sums, reads zeros and writes nothing

  STOKER_DEVICE Row load(const void *base, int64_t stride, int64_t t) const {
    return active ? *aligned<const Row>((const bf16 *)base + t * stride + column) : Row{};
  }
  STOKER_DEVICE void store(void *base, int64_t stride, int64_t t, const float (&x)[kPart]) const {
    Row row;
#pragma unroll
    for (int i = 0; i < 4; ++i) row.at[i] = bf16(x[2 * i]).bits | uint32_t(bf16(x[2 * i + 1]).bits) << 16;
    if (active) *aligned<Row>((bf16 *)base + t * stride + column) = row;
  }
  // A weight: float where `wide`, else bf16.
  STOKER_DEVICE static float number(const void *base, bool wide, int64_t i) {
    return wide ? ((const float *)base)[i] : float(((const bf16 *)base)[i]);
  }

  template <class F>
  STOKER_DEVICE static void each(F f) {
#pragma unroll
    for (int i = 0; i < kPart; ++i) f(i);
  }
  template <class F>
  STOKER_DEVICE float sum(F f) const {
    float all = 0;
#pragma unroll
    for (int i = 0; i < kPart; ++i) all += f(i);
    for (int mask = lanes / 2; mask; mask /= 2) all += shuffle_xor(all, mask);
    return all;
  }

  // A GPU faults on a wide access that is not aligned, so the emulated one stops there.
  template <class T>
  STOKER_DEVICE static T *aligned(const void *at) {
#if defined(STOKER_SIMT)
    if (reinterpret_cast<uintptr_t>(at) % alignof(T)) {
      fprintf(stderr, "%s: a 16-byte access is not aligned\n", simt::block->kernel);
      abort();
    }
#endif
    return (T *)at;
  }
};

}  // namespace STOKER_ISA
}  // namespace stoker
