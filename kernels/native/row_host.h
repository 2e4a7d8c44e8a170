// The host's way to run a row program: one thread has whole rows.
//
// A row program sees its part of a row of numbers: kPart of them, from `column` on. `sum` adds up over all parts of the
// row. On the host the part is the row itself, read in place.
#pragma once

#include "native/host_exec.h"

namespace stoker {
namespace STOKER_ISA {

template <int D>
struct HostRows {
  static constexpr int kPart = D, kTaps = 8, kAhead = 8;
  using Element = float;

  struct Row {
    const float *at;
    float operator()(int i) const { return at[i]; }
  };

  // The rows that the current token sees, j tokens back: they are where they were.
  struct Window {
    const float *now;
    int64_t stride;
    Window(const HostRows &, const void *, int64_t stride, int, int) : now(nullptr), stride(stride) {}
    void push(Row row) { now = row.at; }
    Row operator[](int j) const { return {now - j * stride}; }
  };

  int column = 0;

  // Row t of a tensor whose rows are `stride` apart: on its way to the cache, which would not guess rows a page apart.
  Row load(const void *base, int64_t stride, int64_t t) const {
    const float *at = (const float *)base + t * stride + column;
    for (int i = 0; i < D; i += 16) __builtin_prefetch(at + i);
    return {at};
  }
  void store(void *base, int64_t stride, int64_t t, const float (&x)[D]) const {
    memcpy((float *)base + t * stride + column, x, sizeof x);
  }
  // A weight or a partial sum: one number.
  static float number(const void *base, bool, int64_t i) { return ((const float *)base)[i]; }

  template <class F>
  static void each(F f) {
#pragma GCC ivdep
    for (int i = 0; i < D; ++i) f(i);
    asm("");  // GCC 12 would jam such loops over taps into one that it does not vectorise
  }
  // Sum of f(i) over the row, in an order that vectors of any width keep.
  template <class F>
  static float sum(F f) {
    constexpr int L = 16;
    static_assert(D % L == 0);
    float part[L] = {};
    for (int i = 0; i < D; i += L)
#pragma GCC ivdep
      for (int l = 0; l < L; ++l) part[l] += f(i + l);
    for (int half = L / 2; half; half /= 2)
      for (int l = 0; l < half; ++l) part[l] += part[l + half];
    return part[0];
  }
};

}  // namespace STOKER_ISA
}  // namespace stoker
