// The products of Kimi Delta Attention's levels by a block: of one level only the squares that hold its pairs (see
// kda/native/levels.h).
#pragma once

#include "native/block_inverse.h"

namespace stoker {
namespace STOKER_ISA {

struct BlockLevels : BlockInverse {
  template <class Level, int C, int K>
  STOKER_DEVICE void product_level(Level level, Acc<C, C> &acc, const Tile<C, K> &a, const Tile<C, K> &b) {
    const int half = level.half;
    warp_barrier();
    const int l = opaque(lane), w = opaque(warp);
    const int top = w % Acc<C, C>::stripes * 16, left = w / Acc<C, C>::stripes * Acc<C, C>::columns;
    const int in8 = l % 8, low = l / 8 % 2 * 8, high = l / 16 * 8;
    const bool reads = half < 16 || level.later(top);
    const int first = half < 16 ? top : level.boundary(top) + 1 - half, end = first + (half < 16 ? 16 : half);
    if (!reads || first >= left + Acc<C, C>::columns || end <= left) return;
#pragma unroll 1
    for (int t = 0; t < K; t += 16) {
      uint32_t rows[4];
      load_matrices<false>(rows, a.at + a.index(top + in8 + low, t + high));
#pragma unroll
      for (int j = 0; j < Acc<C, C>::tiles; j += 2) {
        if (left + j * 8 < first || left + j * 8 >= end) continue;
        uint32_t columns[4];
        load_matrices<false>(columns, b.at + b.index(left + j * 8 + in8 + high, t + low));
        multiply_add(acc.x[j], rows, columns[0], columns[1]);
        multiply_add(acc.x[j + 1], rows, columns[2], columns[3]);
      }
    }
  }
  template <bool Transposed, class Level, int C, int K>
  STOKER_DEVICE void product_pairs(Level level, Acc<C, K> &acc, const Tile<C, C> &pairs, const Tile<C, K> &b) {
    const int half = level.half;
    warp_barrier();
    const int l = opaque(lane), w = opaque(warp);
    const int top = w % Acc<C, K>::stripes * 16, left = w / Acc<C, K>::stripes * Acc<C, K>::columns;
    const int in8 = l % 8, low = l / 8 % 2 * 8, high = l / 16 * 8;
    if (half >= 16 && level.later(top) == Transposed) return;
    const int first = half < 16 ? top : level.boundary(top) + 1 - (Transposed ? 0 : half);
#pragma unroll 1
    for (int t = first; t < first + (half < 16 ? 16 : half); t += 16) {
      uint32_t rows[4];
      if constexpr (Transposed)
        load_matrices<true>(rows, pairs.at + pairs.index(t + in8 + high, top + low));
      else
        load_matrices<false>(rows, pairs.at + pairs.index(top + in8 + low, t + high));
#pragma unroll
      for (int j = 0; j < Acc<C, K>::tiles; j += 2) {
        uint32_t columns[4];
        load_matrices<true>(columns, b.at + b.index(t + in8 + low, left + j * 8 + high));
        multiply_add(acc.x[j], rows, columns[0], columns[1]);
        multiply_add(acc.x[j + 1], rows, columns[2], columns[3]);
      }
    }
  }
};

}  // namespace STOKER_ISA
}  // namespace stoker
