// Sums over the accumulators of a block, every one in a fixed order.
#pragma once

#include "native/block_tiles.h"

namespace stoker {
namespace STOKER_ISA {

struct BlockSums : BlockTiles {
  using BlockTiles::BlockTiles;

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
  // to = running sum of log decays, and f(i, sum to i, sum of all) for every i. Decays below -104 make a factor that float
  // holds as 0: cut there, sums stay above -6656 and their differences exact to 5e-4, a quarter of what bfloat16 operands
  // cost.
  template <int N, class F>
  STOKER_DEVICE void running_sum(Vector<N> &to, const Vector<N> &from, F f) {
    static_assert(N == 64);
    if (warp) return;
    auto cut = [](float g) { return g < -104.0f ? -104.0f : g; };
    const float first = cut(from[2 * lane]), second = cut(from[2 * lane + 1]), both = first + second;
    const float before = beyond<-1>(both), all = shuffle(before + both, 31);
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
    const float after = beyond<1>(x[0] + x[1]) + x[1], earlier = beyond<-1>(y[0] + y[1]);
    const float all = everywhere();
    to[i] += after + x[0] + earlier + all;
    to[i + 1] += after + (earlier + y[0]) + all;
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
    meet();
    if (w >= N / 32) return;
    const int j = opaque(thread);
    float sum = 0;
#pragma unroll
    for (int s = 0; s < 4; ++s) sum += s >= 2 * w ? float(scratch.passing[s][j]) : 0.0f;
    if (w == 1) {
      const float row = whole_rows[j];
      sum += row + beyond<1>(row);
    }
    to[j] += sum;
  }

 protected:
  // Four floats side by side in shared memory, on a multiple of 16 bytes.
  struct alignas(16) Four {
    float x[4];
    STOKER_DEVICE static Four load(const float *at) { return shared_load(reinterpret_cast<const Four *>(at)); }
  };

  // Sum of the values of all later (Direction 1) or earlier (-1) lanes.
  template <int Direction>
  STOKER_DEVICE float beyond(float x) {
    float sum = 0;
#pragma unroll
    for (int steps = 1; steps < 32; steps *= 2) {
      const int from = lane + Direction * steps;
      const float other = shuffle(x, from & 31), more = unsigned(from) < 32u ? other : 0.0f;
      sum += more;
      x += more;
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
};

}  // namespace STOKER_ISA
}  // namespace stoker
