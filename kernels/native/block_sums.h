// Sums over the accumulators and planes of a block, every one in a fixed order.
#pragma once

#include "native/block_tiles.h"

namespace stoker {
namespace STOKER_ISA {

struct BlockSums : BlockTiles {
  template <int R, int C, class F>
  STOKER_DEVICE void row_sums(RowSums<R> &to, F f, const Acc<R, C> &acc) {
    const Place<R, C> at(*this);
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      float sum = 0;
#pragma unroll
      for (int j = 0; j < Acc<R, C>::tiles; ++j)
#pragma unroll
        for (int h = i; h < i + 2; ++h) sum += f(at.row(h), at.column(j, h), acc.x[j][h]);
      sum += shuffle_xor(sum, 1);
      sum += shuffle_xor(sum, 2);
      if (lane % 4 == 0) to.part[warp / Acc<R, C>::stripes][at.row(i)] += sum;
    }
  }
  template <int R, int C>
  STOKER_DEVICE void column_sums(ColumnSums<C> &to, const Acc<R, C> &acc) {
    const Place<R, C> at(*this);
    static_assert(R == C);
#pragma unroll
    for (int j = 0; j < Acc<R, C>::tiles; ++j)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float sum = acc.x[j][i] + acc.x[j][i + 2];
        sum += shuffle_xor(sum, 4);
        sum += shuffle_xor(sum, 8);
        sum += shuffle_xor(sum, 16);
        if (lane < 4) to.part[warp % Acc<R, C>::stripes][at.column(j, i)] += sum;
      }
  }
  template <int R, int C, class F>
  STOKER_DEVICE void total(Total &to, F f, Acc<R, C> &acc) {
    float sum = 0;
    each([&](int r, int c, float &x) { sum += f(r, c, x); }, acc);
#pragma unroll
    for (int mask = 1; mask < 32; mask *= 2) sum += shuffle_xor(sum, mask);
    if (lane == 0) to.part[warp] += sum;
  }

  // Sums down the columns of a plane of 64 rows: two threads a column, 32 rows each.
  static constexpr int kRun = 32;
  template <int R, int C, class F>
  STOKER_DEVICE void columns(F f) {
    static_assert(R == 2 * kRun && 2 * C <= kThreads);
    const int i = opaque(thread);
    if (i < 2 * C) f(i % C, i / C * kRun);
  }
  // Log decays are cut at -104 first, as in running_sum.
  template <int R, int C>
  STOKER_DEVICE void running_sums(Plane<R, C> &plane) {
    columns<R, C>([&](int c, int first) {
      float sum = 0;
      for (int r = first; r < first + kRun; ++r) {
        const float g = plane(r, c);
        sum += g < -104.0f ? -104.0f : g;
        plane(r, c) = sum;
      }
    });
    sync();
    columns<R, C>([&](int c, int first) {
      if (first == 0) return;
      const float before = plane(first - 1, c);
      for (int r = first; r < first + kRun; ++r) plane(r, c) += before;
    });
  }
  template <int R, int C>
  STOKER_DEVICE void suffix_sums(Plane<R, C> &plane) {
    columns<R, C>([&](int c, int first) {
      float sum = 0;
      for (int r = first + kRun - 1; r >= first; --r) {
        sum += plane(r, c);
        plane(r, c) = sum;
      }
    });
    sync();
    columns<R, C>([&](int c, int first) {
      if (first) return;
      const float after = plane(kRun, c);
      for (int r = 0; r < kRun; ++r) plane(r, c) += after;
    });
    sync();
  }
  template <int R, int C>
  STOKER_DEVICE void prefix_sums(Plane<R, C> &plane) {
    float last = 0;
    columns<R, C>([&](int c, int first) {
      float sum = 0;
      for (int r = first; r < first + kRun; ++r) {
        const float x = plane(r, c);
        plane(r, c) = sum;
        sum += x;
      }
      last = sum;
    });
    // The second half waits for the first's total, which the first leaves in the row where the second starts with 0.
    sync();
    columns<R, C>([&](int c, int first) {
      if (first == 0) plane(kRun, c) = last;
    });
    sync();
    columns<R, C>([&](int c, int first) {
      if (first == 0) return;
      const float before = plane(kRun, c);
      for (int r = first + 1; r < first + kRun; ++r) plane(r, c) += before;
    });
    sync();
  }
  template <class Level, int R, int C>
  STOKER_DEVICE void half_sums(Level level, Plane<R, C> &to, const Plane<R, C> &plane) {
    columns<R, C>([&](int c, int first) {
      float sum = 0;
#pragma unroll 4
      for (int i = first; i < first + kRun; ++i) {
        // Halves one after the other, the later ones from their end.
        const bool later = level.later(i);
        const int r = later ? i ^ (level.half - 1) : i;
        if ((i & (level.half - 1)) == 0) sum = 0;
        const float x = plane(r, c), before = sum;
        sum += x;
        to(r, c) += later ? sum : before;
      }
    });
  }

  // to[j] += sum over r >= j > i of x_ri: running sums along the rows, then along the columns, four threads for each.
  template <int N>
  STOKER_DEVICE void passing_sums(Vector<N> &to, Acc<N, N> &acc, Scratch<N> &scratch) {
    constexpr int run = N * N / kThreads, threads = N / run;
    static_assert(N * threads == kThreads);
    spill(scratch, acc);
    sync();
    const int line = thread / threads, part = thread % threads;
    float sum = 0;
    for (int i = part * run; i < (part + 1) * run; ++i) {
      const float x = scratch.at[line][i];
      scratch.at[line][i] = sum;
      sum += x;
    }
    const float before = sum_before<threads>(sum, part);
    for (int i = part * run; i < (part + 1) * run; ++i) scratch.at[line][i] += before;
    sync();
    sum = 0;
    for (int r = part * run; r < (part + 1) * run; ++r)
      if (r >= line) sum += float(scratch.at[r][line]);
    const float all = sum_before<threads>(sum, part) + sum;
    if (part == threads - 1) to[line] += all;
    sync();
  }
  // Sum of the values of the earlier threads of a run of neighbours.
  template <int Threads>
  STOKER_DEVICE float sum_before(float value, int part) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < Threads - 1; ++i) {
      float other = shuffle(value, lane - part + i);
      sum += i < part ? other : 0.0f;
    }
    return sum;
  }
  template <int N>
  STOKER_DEVICE void spill(Scratch<N> &scratch, Acc<N, N> &acc) {
    each([&](int r, int c, float &x) { scratch.at[r][c] = x; }, acc);
  }

  // Log decays below -104 make a factor that float holds as 0: cut there, sums stay above -6656 and their differences
  // exact to 5e-4, a quarter of what bfloat16 operands cost.
  template <int N>
  STOKER_DEVICE void running_sum(Vector<N> &to, const Vector<N> &from) {
    static_assert(N == 64);
    if (warp) return;
    auto cut = [](float g) { return g < -104.0f ? -104.0f : g; };
    const float first = cut(from[2 * lane]), second = cut(from[2 * lane + 1]);
    float sum = first + second;
    for (int step = 1; step < 32; step *= 2) {
      float before = shuffle(sum, lane >= step ? lane - step : lane);
      sum += lane >= step ? before : 0.0f;
    }
    float before = shuffle(sum, lane ? lane - 1 : 0);
    before = lane ? before : 0.0f;
    to[2 * lane] = before + first;
    to[2 * lane + 1] = before + first + second;
  }
};

}  // namespace STOKER_ISA
}  // namespace stoker
