// The GPU's way to run a tile program: a block of 8 warps shares tiles and splits accumulators.
//
// Tiles are bfloat16 in shared memory, in panels of 64 columns: a row of a panel is 128 bytes whose eight 16-byte parts
// are swapped by the row (part ^ row % 8), so that eight rows of one part, which ldmatrix reads and fragments write,
// never share a bank. It is the 128-byte swizzle of TMA and wgmma.
// Accumulators are float in the layout of mma.m16n8k16: warp w owns the stripe of 16 rows w % (R / 16) and, where there
// are fewer stripes than warps, one of the column parts.
#pragma once

#include "native/number.h"
#include "native/ptx.h"

namespace stoker {
namespace STOKER_ISA {

constexpr int kWarps = 8, kThreads = kWarps * 32;

struct BlockExec {
  using Element = bf16;
  using Real = float;
  using Wide = float;
  static constexpr int kStages = 2;

  template <int R, int C>
  struct alignas(1024) Tile {
    static_assert(C % 64 == 0 && R % 8 == 0);
    uint16_t at[R * C];
    // Index of element (r, c).
    STOKER_DEVICE static int index(int r, int c) {
      return c / 64 * (R * 64) + r * 64 + ((c / 8 % 8) ^ (r % 8)) * 8 + c % 8;
    }
    // From the index of (r, c), c a multiple of `columns` or less than 8 beyond one, to that of (r, c + columns). Where c
    // has no bits of `columns` % 64 set, as in all that follows, it is an exclusive or: no address is made twice.
    STOKER_DEVICE static int along(int index, int columns) {
      return (index ^ (columns % 64)) + columns / 64 * (R * 64);
    }
    STOKER_DEVICE float operator()(int r, int c) const {
      return bf16::from_bits(uint32_t(shared_load(at + index(r, c))) << 16);
    }
  };

  template <int R, int C>
  struct Acc {
    static constexpr int stripes = R / 16, parts = kWarps / stripes, columns = C / parts, tiles = columns / 8;
    static_assert(stripes * parts == kWarps && columns % 32 == 0);
    float x[tiles][4];
  };

  // Numbers in shared memory, element by element through the instructions that the emulated block watches.
  struct Number {
    float *at;
    STOKER_DEVICE operator float() const { return shared_load(at); }
    STOKER_DEVICE void operator=(float x) { shared_store(at, x); }
    STOKER_DEVICE void operator+=(float x) { shared_store(at, shared_load(at) + x); }
  };
  template <int N, class T = float>
  struct Vector {
    float at[N];
    STOKER_DEVICE Number operator[](int i) { return {at + i}; }
    STOKER_DEVICE float operator[](int i) const { return shared_load(at + i); }
  };

  // A float matrix in shared memory; the padding leaves two lanes to a bank where a fragment touches it.
  template <int R, int C, class T = float>
  struct alignas(16) Plane {
    static constexpr int stride = C + 8;
    float at[R * stride];
    STOKER_DEVICE Number operator()(int r, int c) { return {at + r * stride + c}; }
    STOKER_DEVICE float operator()(int r, int c) const { return shared_load(at + r * stride + c); }
  };

  template <int N>
  struct RowSums {
    static constexpr int parts = kWarps / (N / 16);
    Vector<N> part[parts];
  };
  template <int N>
  struct ColumnSums {
    static constexpr int parts = N / 16;
    Vector<N> part[parts];
  };
  struct Total {
    static constexpr int parts = kWarps;
    Vector<parts> part;
  };
  template <int N>
  struct Scratch {
    Vector<N + 1> at[N];
  };

  int thread, warp, lane;
  STOKER_DEVICE BlockExec() : thread(thread_index()), warp(thread / 32), lane(thread % 32) {}

  STOKER_DEVICE void sync() { block_barrier(); }
  template <class... Accs>
  STOKER_DEVICE void finish(Accs &...) {}

  // A thread copies the same 16 bytes of a row every few rows; as these are a multiple of 8, so is the swizzle.
  template <int R, int C>
  STOKER_DEVICE void load(Tile<R, C> &tile, const bf16 *from, int64_t stride, int rows) {
    constexpr int step = kThreads / (C / 8);
    static_assert(step % 8 == 0 && R % step == 0);
    const int i = opaque(thread), r = i / (C / 8), c = i % (C / 8) * 8;
    uint16_t *to = tile.at + tile.index(r, c);
    const bf16 *at = from + r * stride + c;
#pragma unroll
    for (int j = 0; j < R / step; ++j, at += step * stride) {
      const bool valid = r + j * step < rows;
      copy16_async(to + j * step * 64, valid ? at : from, valid);
    }
  }
  template <int N>
  STOKER_DEVICE void load_vector(Vector<N> &to, const float *from, int64_t stride, int rows) {
    for (int i = opaque(thread); i < N; i += kThreads) copy4_async(to.at + i, from + (i < rows ? i * stride : 0), i < rows);
  }
  template <int R, int C>
  STOKER_DEVICE void load_plane(Plane<R, C> &plane, const float *from, int64_t stride, int rows) {
    for (int i = opaque(thread); i < R * C / 4; i += kThreads) {
      int r = i / (C / 4), c = i % (C / 4) * 4;
      bool valid = r < rows;
      copy16_async(plane.at + r * plane.stride + c, from + (valid ? r * stride + c : 0), valid);
    }
  }
  STOKER_DEVICE void wait_loads() { copy_wait(); }

  template <int R, int C>
  STOKER_DEVICE void store(bf16 *to, int64_t stride, int rows, const Tile<R, C> &tile) {
    struct alignas(16) Part {
      uint32_t words[4];
    };
    constexpr int step = kThreads / (C / 8);
    static_assert(step % 8 == 0 && R % step == 0);
    const int i = opaque(thread), r = i / (C / 8), c = i % (C / 8) * 8;
    const uint16_t *from = tile.at + tile.index(r, c);
    bf16 *at = to + r * stride + c;
#pragma unroll 1
    for (int j = 0; j < R / step; ++j, at += step * stride)
      if (r + j * step < rows)
        *reinterpret_cast<Part *>(at) = shared_load(reinterpret_cast<const Part *>(from + j * step * 64));
  }

  template <int R, int C>
  STOKER_DEVICE void zero(Acc<R, C> &acc) {
#pragma unroll
    for (auto &tile : acc.x)
#pragma unroll
      for (float &x : tile) x = 0;
  }
  // Where a thread's part of an accumulator lies: element i of n-tile j. Made anew for every operation (see opaque), or
  // the addresses of all of them would fill the registers for the whole kernel.
  template <int R, int C>
  struct Place {
    int top, left;
    STOKER_DEVICE explicit Place(const BlockExec &x) {
      const int lane = opaque(x.lane), warp = opaque(x.warp);
      top = warp % Acc<R, C>::stripes * 16 + lane / 4;
      left = warp / Acc<R, C>::stripes * Acc<R, C>::columns + lane % 4 * 2;
    }
    STOKER_DEVICE int row(int i) const { return top + i / 2 * 8; }
    STOKER_DEVICE int column(int j, int i) const { return left + j * 8 + i % 2; }
  };

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

  // Of the products of 16 x 16 only those that hold a pair of the level (see kda/native/levels.h).
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
  template <int R, int C, class F>
  STOKER_DEVICE void fill(Tile<R, C> &tile, F f) {
#pragma unroll 1
    for (int i = opaque(thread); i < R * C / 2; i += kThreads) {
      int r = i / (C / 2), c = i % (C / 2) * 2;
      uint32_t pair = round_pair(f(r, c), f(r, c + 1));
      shared_store(reinterpret_cast<uint32_t *>(tile.at + tile.index(r, c)), pair);
    }
  }
  template <int R, int C, class F>
  STOKER_DEVICE void fill(Tile<R, C> &first, Tile<R, C> &second, F f) {
#pragma unroll 1
    for (int i = opaque(thread); i < R * C / 2; i += kThreads) {
      int r = i / (C / 2), c = i % (C / 2) * 2, at = first.index(r, c);
      float x[2], y[2];
      f(r, c, x[0], y[0]);
      f(r, c + 1, x[1], y[1]);
      shared_store(reinterpret_cast<uint32_t *>(first.at + at), round_pair(x[0], x[1]));
      shared_store(reinterpret_cast<uint32_t *>(second.at + at), round_pair(y[0], y[1]));
    }
  }
  template <int C, class F>
  STOKER_DEVICE void cells(int rows, F f) {
#pragma unroll 1
    for (int i = opaque(thread); i < rows * C; i += kThreads) f(i / C, i % C);
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

  template <class F, int R, int C, class... More>
  STOKER_DEVICE void each(F f, Acc<R, C> &acc, More &...more) {
    const Place<R, C> at(*this);
#pragma unroll
    for (int j = 0; j < Acc<R, C>::tiles; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) f(at.row(i), at.column(j, i), acc.x[j][i], more.x[j][i]...);
  }
  template <int R, int C>
  STOKER_DEVICE void put(Tile<R, C> &tile, const Acc<R, C> &acc) {
    const Place<R, C> at(*this);
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      const int first = tile.index(at.row(i), at.column(0, 0));
#pragma unroll
      for (int j = 0; j < Acc<R, C>::tiles; ++j)
        shared_store(reinterpret_cast<uint32_t *>(tile.at + tile.along(first, j * 8)),
                     round_pair(acc.x[j][i], acc.x[j][i + 1]));
    }
  }
  template <class F>
  STOKER_DEVICE void rows(int n, F f) {
    for (int i = opaque(thread); i < n; i += kThreads) f(i);
  }
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

  // tile = (I + L)^-1, L = acc below the diagonal: blocks of 16 by substitution, then two merges
  // [[A, 0], [B, C]]^-1 = [[A', 0], [-C' B A', C']].
  STOKER_DEVICE void unit_lower_inverse(Tile<64, 64> &tile, Acc<64, 64> &acc, Scratch<64> &scratch) {
    each([&](int r, int c, float &x) { scratch.at[r][c] = c < r ? x : r == c ? 1.0f : 0.0f; }, acc);
    sync();
    float column[16];
    const int base = thread / 16 * 16, c = thread % 16;
    if (thread < 64) {
#pragma unroll
      for (int r = 0; r < 16; ++r) {
        float x = r == c ? 1.0f : 0.0f;
#pragma unroll
        for (int i = 0; i < r; ++i) x -= float(scratch.at[base + r][base + i]) * column[i];
        column[r] = x;
      }
    }
    sync();
    if (thread < 64) {
#pragma unroll
      for (int r = 0; r < 16; ++r) scratch.at[base + r][base + c] = column[r];
    }
    sync();
    merge<16>(scratch);
    merge<32>(scratch);
    for (int i = opaque(thread); i < 64 * 32; i += kThreads) {
      int r = i / 32, c2 = i % 32 * 2;
      uint32_t pair = round_pair(float(scratch.at[r][c2]), float(scratch.at[r][c2 + 1]));
      shared_store(reinterpret_cast<uint32_t *>(tile.at + tile.index(r, c2)), pair);
    }
    sync();
  }
  // Every second pair of blocks of N: B := -C' (B A'). A thread has elements of one column, so it reads A' once for all.
  template <int N>
  STOKER_DEVICE void merge(Scratch<64> &s) {
    constexpr int outputs = 64 / (2 * N) * N * N / kThreads;
    struct Place {
      int row, column, pair;
    };
    auto place = [&](int o) {
      const int i = thread + o * kThreads, pair = i / (N * N) * 2 * N;
      return Place{pair + N + i / N % N, pair + i % N, pair};
    };
    auto multiply = [&](int left, int right, float sign) {
      float sums[outputs] = {};
#pragma unroll 4
      for (int t = 0; t < N; ++t)
#pragma unroll
        for (int o = 0; o < outputs; ++o) {
          const Place at = place(o);
          sums[o] += float(s.at[at.row][at.pair + left + t]) * float(s.at[at.pair + right + t][at.column]);
        }
      sync();
#pragma unroll
      for (int o = 0; o < outputs; ++o) s.at[place(o).row][place(o).column] = sign * sums[o];
      sync();
    };
    multiply(0, 0, 1);
    multiply(N, N, -1);
  }

  template <int R, int C, class F>
  STOKER_DEVICE void scale_rows(Tile<R, C> &tile, F factor) {
    for (int i = opaque(thread); i < R * C / 2; i += kThreads) {
      int r = i / (C / 2), c = i % (C / 2) * 2;
      float by = factor(r);
      uint32_t *at = reinterpret_cast<uint32_t *>(tile.at + tile.index(r, c)), pair = shared_load(at);
      float first = bf16::from_bits(pair << 16) * by, second = bf16::from_bits(pair & 0xffff0000u) * by;
      shared_store(at, round_pair(first, second));
    }
  }
  template <int R, int C>
  STOKER_DEVICE void load_state(Acc<R, C> &acc, const float *from, int64_t stride) {
    each([&](int r, int c, float &x) { x = from ? from[r * stride + c] : 0.0f; }, acc);
  }
  template <int R, int C>
  STOKER_DEVICE void store_state(float *to, int64_t stride, Acc<R, C> &acc) {
    each([&](int r, int c, float &x) { to[r * stride + c] = x; }, acc);
  }

  STOKER_DEVICE float exp(float x) { return exponential2(x * 1.44269504088896341f); }
};

}  // namespace STOKER_ISA
}  // namespace stoker
