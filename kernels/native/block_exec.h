// The GPU's way to run a tile program: a block of 8 warps shares tiles and splits accumulators (native/block_tiles.h).
#pragma once

#include "native/block_levels.h"

namespace stoker {
namespace STOKER_ISA {

struct BlockExec : BlockLevels {
  template <bool TransA, bool TransB, int R, int C, int AR, int AC, int BR, int BC>
  STOKER_DEVICE void product(Acc<R, C> &acc, const Tile<AR, AC> &a, const Tile<BR, BC> &b) {
    constexpr int inner = TransA ? AR : AC;
    static_assert((TransA ? AC : AR) == R && (TransB ? BR : BC) == C && (TransB ? BC : BR) == inner);
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
  }
};

}  // namespace STOKER_ISA
}  // namespace stoker
