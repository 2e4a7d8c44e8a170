// Sums over the accumulators and planes of a block, every one in a fixed order.
#pragma once

#include "native/block_tiles.h"

namespace stoker {
namespace STOKER_ISA {

struct BlockSums : BlockTiles {
  // What passing sums and the inverse pass through shared memory.
  template <int N>
  struct Scratch {
    static_assert(N == 64);
    // A block of 16 x 16 numbers, each the sum of two bfloat16. The halves of a row, 16 bytes each, are swapped in rows
    // 4-7 and 12-15: eight rows of one half, which ldmatrix reads and fragments write, never share a bank.
    struct alignas(16) Block {
      uint16_t high[16 * 16], low[16 * 16];
      STOKER_DEVICE static int index(int r, int c) { return r * 16 + ((c / 8) ^ (r / 4 % 2)) * 8 + c % 8; }
    };
    static constexpr int kSystem = 8 * 20;  // numbers of two triangles of 8 x 8: BlockInverse::pose
    Block blocks[13];                       // block (r, c) of the lower triangle is at 3 r + c
    union {
      float systems[4 * kSystem];
      Vector<N> passing[5];  // what passes a token, by stripe of rows; then whole rows
    };
  };

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
      sum = over_columns(sum);
      if (lane % 4 == 0) to.part[warp / Acc<R, C>::stripes][at.row(i)] += sum;
    }
  }
  // to.part[r] += sum over c of tile(r, c) x.
  template <int R, int C>
  STOKER_DEVICE void row_dots(RowSums<R> &to, const Tile<R, C> &tile, const Acc<R, C> &acc) {
    const Place<R, C> at(*this);
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      float sum = 0;
      each_pair(tile, at, i, [&](int j, float first, float second) { sum += acc.x[j][i] * first + acc.x[j][i + 1] * second; });
      sum = over_columns(sum);
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
  template <int N>
  STOKER_DEVICE void column_sums(ColumnSums<N> &to, const Acc<N, N> &acc) {
    static_assert(Acc<N, N>::tiles == 4);
    const Place<N, N> at(*this);
    float x[8];
#pragma unroll
    for (int k = 0; k < 8; ++k) x[k] = acc.x[k / 2][k % 2] + acc.x[k / 2][k % 2 + 2];
    const float sum = over_rows(x);
    to.part[warp % Acc<N, N>::stripes][at.column(lane / 8, lane / 4)] += sum;
  }
  template <int R, int C, class F>
  STOKER_DEVICE void total(Total &to, F f, Acc<R, C> &acc) {
    float sum = 0;
    each([&](int r, int c, float &x) { sum += f(r, c, x); }, acc);
#pragma unroll
    for (int mask = 1; mask < 32; mask *= 2) sum += shuffle_xor(sum, mask);
    if (lane == 0) to.part[warp] += sum;
  }

  // Log decays below -104 make a factor that float holds as 0: cut there, sums stay above -6656 and their differences
  // exact to 5e-4, a quarter of what bfloat16 operands cost.
  STOKER_DEVICE static float cut(float g) { return g < -104.0f ? -104.0f : g; }
  template <int R, int C>
  STOKER_DEVICE void running_sums(Plane<R, C> &plane) {
    scan<false, true>(plane, cut);
  }
  template <int R, int C>
  STOKER_DEVICE void suffix_sums(Plane<R, C> &plane) {
    scan<true, true>(plane, [](float x) { return x; });
    sync();
  }
  template <int R, int C>
  STOKER_DEVICE void prefix_sums(Plane<R, C> &plane) {
    scan<false, false>(plane, [](float x) { return x; });
    sync();
  }
  // to = running sum of log decays (cut as above), and f(i, sum to i, sum of all) for every i.
  template <int N, class F>
  STOKER_DEVICE void running_sum(Vector<N> &to, const Vector<N> &from, F f) {
    static_assert(N == 64);
    if (warp) return;
    const float first = cut(from[2 * lane]), second = cut(from[2 * lane + 1]), both = first + second;
    const float before = beyond<32>(both, lane, -1, 32), all = shuffle(before + both, 31);
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
    const float after = beyond<32>(x[0] + x[1], lane, 1, 32) + x[1], earlier = beyond<32>(y[0] + y[1], lane, -1, 32);
    const float all = everywhere();
    to[i] += after + x[0] + earlier + all;
    to[i + 1] += after + (earlier + y[0]) + all;
  }
  template <class Level, int R, int C>
  STOKER_DEVICE void half_sums(Level level, Plane<R, C> &to, const Plane<R, C> &plane) {
    using At = Run<R, C>;
    const At at(*this);
    if (level.half < At::rows) {
      within_runs<At::rows / 2>(level.half, to.at + at.start, plane.at + at.start, at);
      return;
    }
    // A run lies in one half. In a later one it is passed from its end.
    const bool later = level.later(at.first);
    const int step = later ? -At::stride : At::stride, start = at.start + (later ? (At::rows - 1) * At::stride : 0);
    Four x[At::rows], sum = {};
#pragma unroll
    for (int i = 0; i < At::rows; ++i) sum += x[i] = Four::load(plane.at + start + i * step);
    sum = beyond<At::runs>(sum, at.run, later ? 1 : -1, level.half / At::rows, At::across);
#pragma unroll
    for (int i = 0; i < At::rows; ++i) {
      const Four before = sum;
      sum += x[i];
      Four y = Four::load(to.at + start + i * step);
#pragma unroll
      for (int k = 0; k < 4; ++k) y.x[k] += later ? sum.x[k] : before.x[k];
      y.store(to.at + start + i * step);
    }
  }

  // to[j] += sum over r >= j > i of x_ri, there after a barrier. A warp sums along its rows to before every j of its 32
  // columns, and that down from j on. A token of the right half is passed by rows of the left half besides.
  template <int N>
  STOKER_DEVICE void passing_sums(Vector<N> &to, const Acc<N, N> &acc, Scratch<N> &scratch) {
    static_assert(Acc<N, N>::stripes == 4 && Acc<N, N>::tiles == 4);
    const Place<N, N> at(*this);
    const int w = uniform(opaque(warp)), stripe = w % 4, part = w / 4, t = at.left % 8 / 2;
    Vector<N> &whole_rows = scratch.passing[4];
    if (stripe >= 2 * part) {  // elsewhere all is above the diagonal
      float before[2] = {}, passing[8];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float even[2], odd[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float x = acc.x[j][2 * h], two = x + acc.x[j][2 * h + 1];
          const float beside = shuffle_xor(two, 1), four = two + beside, others = shuffle_xor(four, 2);
          const float sum = before[h] + ((t % 2 ? beside : 0.0f) + (t / 2 ? others : 0.0f));
          even[h] = at.row(2 * h) >= at.column(j, 0) ? sum : 0.0f;
          odd[h] = at.row(2 * h) >= at.column(j, 1) ? sum + x : 0.0f;
          before[h] += four + others;
        }
        passing[2 * j] = even[0] + even[1];
        passing[2 * j + 1] = odd[0] + odd[1];
      }
      scratch.passing[stripe][at.column(lane / 8, lane / 4)] = over_rows(passing);
      if (part == 0 && t < 2) whole_rows[at.row(2 * t)] = t ? before[1] : before[0];
    }
    sync();
    if (w >= N / 32) return;
    const int j = opaque(thread);
    float sum = 0;
#pragma unroll
    for (int s = 0; s < 4; ++s) sum += s >= 2 * w ? float(scratch.passing[s][j]) : 0.0f;
    if (w == 1) {
      const float row = whole_rows[j];
      sum += row + beyond<32>(row, lane, 1, 32);
    }
    to[j] += sum;
  }

 protected:
  // Four floats side by side in shared memory, on a multiple of 16 bytes.
  struct alignas(16) Four {
    float x[4];
    STOKER_DEVICE static Four load(const float *at) { return shared_load(reinterpret_cast<const Four *>(at)); }
    STOKER_DEVICE void store(float *at) const { shared_store(reinterpret_cast<Four *>(at), *this); }
    STOKER_DEVICE Four &operator+=(const Four &other) {
#pragma unroll
      for (int k = 0; k < 4; ++k) x[k] += other.x[k];
      return *this;
    }
  };

  // The value `steps` places further, 0 where that is beyond the span; lanes of neighbouring places are `apart`.
  STOKER_DEVICE float further(float x, int place, int steps, int span, int apart) {
    const float other = shuffle(x, (lane + steps * apart) & 31);
    return unsigned(place ^ (place + steps)) < unsigned(span) ? other : 0.0f;
  }
  STOKER_DEVICE Four further(Four x, int place, int steps, int span, int apart) {
#pragma unroll
    for (float &number : x.x) number = further(number, place, steps, span, apart);
    return x;
  }
  // Sum of the values at all places further in a direction (1 or -1) in the same span of at most `Most` places.
  template <int Most, class T>
  STOKER_DEVICE T beyond(T x, int place, int direction, int span, int apart = 1) {
    T sum = {};
    if (span > 1) x += sum = further(x, place, direction, span, apart);
#pragma unroll
    for (int steps = 2; steps < Most; steps *= 2)
      if (steps < span) {
        const T other = further(x, place, direction * steps, span, apart);
        sum += other;
        x += other;
      }
    return sum;
  }
  // Sum over the lanes that share a row of a fragment.
  STOKER_DEVICE float over_columns(float x) {
    x += shuffle_xor(x, 1);
    return x + shuffle_xor(x, 2);
  }
  // Sums of eight values over the eight lanes that share a column of a fragment: value lane / 4 of all.
  STOKER_DEVICE float over_rows(float (&x)[8]) {
#pragma unroll
    for (int half = 4; half; half /= 2) {
      const bool upper = lane & half * 4;
#pragma unroll
      for (int k = 0; k < half; ++k) {
        const float keep = upper ? x[k + half] : x[k], give = upper ? x[k] : x[k + half];
        x[k] = keep + shuffle_xor(give, half * 4);
      }
    }
    return x[0];
  }

 private:
  // A thread's part of a plane: a run of rows of four columns. A warp has 32 rows, neighbouring lanes other columns.
  template <int R, int C>
  struct Run {
    static constexpr int stride = Plane<R, C>::stride, across = C / 16, runs = 32 / across, rows = 32 / runs;
    static_assert(R == 64 && runs * across == 32);
    int run, first, column, start;
    STOKER_DEVICE explicit Run(const BlockTiles &x) {
      const int lane = opaque(x.lane), warp = opaque(x.warp);
      run = lane / across;
      first = warp / 4 * 32 + run * rows;
      column = (warp % 4 * across + lane % across) * 4;
      start = first * stride + column;
    }
  };
  // Up or down the columns; the 32 rows that come first hand their sums over in the padding of the rows.
  template <bool Up, bool Inclusive, int R, int C, class Cut>
  STOKER_DEVICE void scan(Plane<R, C> &plane, Cut cut) {
    using At = Run<R, C>;
    const At at(*this);
    Four x[At::rows], sum = {};
#pragma unroll
    for (int i = 0; i < At::rows; ++i) {
      x[i] = Four::load(plane.at + at.start + i * At::stride);
#pragma unroll
      for (float &number : x[i].x) number = cut(number);
      sum += x[i];
    }
    Four before = beyond<At::runs>(sum, at.run, Up ? 1 : -1, At::runs, At::across);
    const bool comes_first = (at.first < 32) != Up;
    float *handed = plane.at + at.column / 4 * At::stride + C;
    sum += before;
    if (comes_first && at.run == (Up ? 0 : At::runs - 1)) sum.store(handed);
    sync();
    if (!comes_first) before += Four::load(handed);
#pragma unroll
    for (int i = 0; i < At::rows; ++i) {
      const int r = Up ? At::rows - 1 - i : i;
      sum = before;
      sum += x[r];
      (Inclusive ? sum : before).store(plane.at + at.start + r * At::stride);
      before = sum;
    }
  }
  // half_sums where a run holds halves of both kinds.
  template <int Half, class At>
  STOKER_DEVICE void within_runs(int half, float *to, const float *from, const At &at) {
    if (half == Half) {
#pragma unroll
      for (int first = 0; first < At::rows; first += Half) {
        const bool later = first / Half % 2;
        Four sum = {};
#pragma unroll
        for (int i = 0; i < Half; ++i) {
          const int r = (later ? first + Half - 1 - i : first + i) * At::stride;
          Four y = Four::load(to + r), passing = sum;
          sum += Four::load(from + r);
          y += later ? sum : passing;
          if (later || i) y.store(to + r);
        }
      }
    } else if constexpr (Half > 1) {
      within_runs<Half / 2>(half, to, from, at);
    }
  }
};

}  // namespace STOKER_ISA
}  // namespace stoker
