// The GPU's way to run a tile program: a block of 8 warps shares tiles and splits accumulators (native/block_tiles.h).
#pragma once

#include "native/block_levels.h"

namespace stoker {
namespace STOKER_ISA {

struct BlockExec : BlockLevels {
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

  // Waits for the products of these accumulators: all that were begun.
  template <class... Accs>
  STOKER_DEVICE void finish(Accs &...accs) {
#if defined(STOKER_WARPGROUP)
    warpgroup_wait();
    (pin_all(accs), ...);
#endif
  }

  // to.part[r] += sum over c of tile(r, c) x.
  template <int R, int C>
  STOKER_DEVICE void row_dots(RowSums<R> &to, const Tile<R, C> &tile, const Acc<R, C> &acc) {
    const Place<R, C> at(*this);
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      float sum = 0;
      each_pair(tile, at, i, [&](int j, float first, float second) { sum += acc.x[j][i] * first + acc.x[j][i + 1] * second; });
      sum += shuffle_xor(sum, 1);
      sum += shuffle_xor(sum, 2);
      if (lane % 4 == 0) to.part[warp / Acc<R, C>::stripes][at.row(i)] += sum;
    }
  }
  // to.part += sum over all of tile(r, c) x.
  template <int R, int C>
  STOKER_DEVICE void total_dot(Total &to, const Tile<R, C> &tile, Acc<R, C> &acc) {
    float sum = 0;
    each_with(tile, [&](int, int, float y, float &x) { sum += x * y; }, acc);
#pragma unroll
    for (int mask = 1; mask < 32; mask *= 2) sum += shuffle_xor(sum, mask);
    if (lane == 0) to.part[warp] += sum;
  }
  // to = running sum of log decays (cut at -104, see block_sums.h), and f(i, sum to i, sum of all) for every i.
  template <int N, class F>
  STOKER_DEVICE void running_sum(Vector<N> &to, const Vector<N> &from, F f) {
    static_assert(N == 64);
    if (warp) return;
    auto cut = [](float g) { return g < -104.0f ? -104.0f : g; };
    const float first = cut(from[2 * lane]), second = cut(from[2 * lane + 1]), both = first + second;
    const float before = sum_of_lanes<-1>(both), all = shuffle(before + both, 31);
    to[2 * lane] = before + first;
    to[2 * lane + 1] = before + both;
    f(2 * lane, before + first, all);
    f(2 * lane + 1, before + both, all);
  }
  // to[i] += sum of `from_here` from i on + sum of `before` before i + `everywhere`: additions only.
  template <int N, class From, class Before, class Everywhere>
  STOKER_DEVICE void around_sums(Vector<N> &to, From from_here, Before before, Everywhere everywhere) {
    static_assert(N == 64);
    if (warp) return;
    const int i = 2 * lane;
    const float x[2] = {from_here(i), from_here(i + 1)}, y[2] = {before(i), before(i + 1)};
    const float after = sum_of_lanes<1>(x[0] + x[1]) + x[1], earlier = sum_of_lanes<-1>(y[0] + y[1]);
    const float all = everywhere();
    to[i] += after + x[0] + earlier + all;
    to[i + 1] += after + (earlier + y[0]) + all;
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
  // Sum of the values of all later (Direction 1) or earlier (-1) lanes.
  template <int Direction>
  STOKER_DEVICE float sum_of_lanes(float value) {
    auto beyond = [&](float x, int step) {
      const int from = lane + Direction * step;
      const bool there = 0 <= from && from < 32;
      const float other = shuffle(x, there ? from : lane);
      return there ? other : 0.0f;
    };
#pragma unroll
    for (int step = 1; step < 32; step *= 2) value += beyond(value, step);
    return beyond(value, 1);
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
