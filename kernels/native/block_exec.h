// The GPU's way to run a tile program: a block of 8 warps shares tiles and splits accumulators (native/block_tiles.h).
#pragma once

#include "native/block_levels.h"

namespace stoker {
namespace STOKER_ISA {

struct BlockExec : BlockLevels {
  using BlockLevels::BlockLevels;

  // acc = op(a) op(b).
  template <bool TransA, bool TransB, int R, int C, int AR, int AC, int BR, int BC>
  STOKER_DEVICE void start(Acc<R, C> &acc, const Tile<AR, AC> &a, const Tile<BR, BC> &b) {
    multiply<false, TransA, TransB>(acc, a, b);
  }
  // acc += op(a) op(b).
  template <bool TransA, bool TransB, int R, int C, int AR, int AC, int BR, int BC>
  STOKER_DEVICE void product(Acc<R, C> &acc, const Tile<AR, AC> &a, const Tile<BR, BC> &b) {
    multiply<true, TransA, TransB>(acc, a, b);
  }

  // Waits for all products that were begun. Every accumulator under way must be named, or the compiler may read it before.
  template <class... Accs>
  STOKER_DEVICE void finish(Accs &...accs) {
#if defined(STOKER_WARPGROUP)
    warpgroup_wait();
    (pin_all(accs), ...);
#endif
  }

 private:
  template <bool Add, bool TransA, bool TransB, int R, int C, int AR, int AC, int BR, int BC>
  STOKER_DEVICE void multiply(Acc<R, C> &acc, const Tile<AR, AC> &a, const Tile<BR, BC> &b) {
    constexpr int inner = TransA ? AR : AC;
    static_assert((TransA ? AC : AR) == R && (TransB ? BR : BC) == C && (TransB ? BC : BR) == inner);
#if defined(STOKER_WARPGROUP)
    // Warps 0-3 and 4-7: the upper and the lower half of 128 rows, or the left and the right half of 64.
    const int top = R == 128 ? group * 64 : 0, left = R == 128 ? 0 : group * (C / 2);
    constexpr int panel_a = AR * 128, panel_b = BR * 128, atom = 8 * 128;
    const uint16_t *from_a = a.at + (TransA ? top / 64 * (panel_a / 2) : top * 64);
    const uint16_t *from_b = b.at + (TransB ? left * 64 : left / 64 * (panel_b / 2) + left % 64);
    const uint64_t first_a = operand_descriptor(from_a, panel_a, atom), first_b = operand_descriptor(from_b, panel_b, atom);
    // 16 columns on, or 16 rows where the operand is transposed; addresses count 16 bytes.
    auto step_a = [](int t) { return (TransA ? t * 128 : t % 64 * 2 + t / 64 * panel_a) >> 4; };
    auto step_b = [](int t) { return (!TransB ? t * 128 : t % 64 * 2 + t / 64 * panel_b) >> 4; };
    if constexpr (Add) pin_all(acc);
    warpgroup_begin();
#pragma unroll
    for (int t = 0; t < inner; t += 16) {
      if (Add || t)
        warpgroup_multiply_add<true, TransA, !TransB>(acc.x, first_a + step_a(t), first_b + step_b(t));
      else
        warpgroup_multiply_add<false, TransA, !TransB>(acc.x, first_a, first_b);
    }
    warpgroup_end();
#else
    if constexpr (!Add) zero(acc);
    warp_barrier();
    const int l = opaque(lane), w = opaque(warp);
    const int top = w % Acc<R, C>::stripes * 16, left = w / Acc<R, C>::stripes * Acc<R, C>::columns;
    const int in8 = l % 8, low = l / 8 % 2 * 8, high = l / 16 * 8;
    const int a0 = TransA ? a.index(in8 + high, top + low) : a.index(top + in8 + low, high);
    const int b0 = TransB ? b.index(left + in8 + high, low) : b.index(in8 + low, left + high);
#pragma unroll 2
    for (int t = 0; t < inner; t += 16) {
      uint32_t rows[4];
      load_matrices<TransA>(rows, a.at + (TransA ? a0 + t * 64 : a.along(a0, t)));
#pragma unroll
      for (int j = 0; j < Acc<R, C>::tiles; j += 2) {
        uint32_t columns[4];
        load_matrices<!TransB>(columns, b.at + (TransB ? b.along(b0, t) + j * 8 * 64 : b.along(b0, j * 8) + t * 64));
        multiply_add(acc.x[j], rows, columns[0], columns[1]);
        multiply_add(acc.x[j + 1], rows, columns[2], columns[3]);
      }
    }
#endif
  }
#if defined(STOKER_WARPGROUP)
  template <class A>
  STOKER_DEVICE void pin_all(A &acc) {
#pragma unroll
    for (int j = 0; j < A::tiles; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) pin(acc.x[j][i]);
  }
#endif
};

}  // namespace STOKER_ISA
}  // namespace stoker
