// What a block of 8 warps shares and splits: tiles, accumulators, and the passing of numbers between them.
//
// Tiles are bfloat16 in shared memory, in panels of 64 columns: a row of a panel is 128 bytes whose eight 16-byte parts
// are swapped by the row (part ^ row % 8), so that eight rows of one part, which ldmatrix reads and fragments write,
// never share a bank. It is the 128-byte swizzle of TMA and wgmma.
// Accumulators are float in the layout of mma.m16n8k16: warp w owns the stripe of 16 rows w % (R / 16) and, where there
// are fewer stripes than warps, one of the column parts. It is the layout of wgmma.m64 with two warpgroups as well.
#pragma once

#include "native/number.h"
#include "native/ptx.h"
#if defined(STOKER_TMA)
#include "native/tensor_map.h"
#endif

namespace stoker {
namespace STOKER_ISA {

constexpr int kWarps = 8, kThreads = kWarps * 32;

struct BlockTiles {
  using Element = bf16;
  using Real = float;
  using Wide = float;
  static constexpr int kStages = 2;
  static constexpr bool kFewRegisters = true;
#if defined(STOKER_TMA)
  static constexpr bool kMapped = true;
#else
  static constexpr bool kMapped = false;
#endif

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
  // Eight elements of a row, the unit of copies.
  struct alignas(16) Part {
    uint32_t words[4];
  };

  int thread, warp, lane;
  int group;  // of four warps; the same for all threads of a warp, and known to be
  STOKER_DEVICE BlockTiles()
      : thread(thread_index()), warp(thread / 32), lane(thread % 32), group(uniform(thread / 128)) {}
#if defined(STOKER_TMA)
  // Whole panels of tiles come by bulk copies (TMA), which the first thread begins for all: their bytes are announced to
  // `landed` with each, and it arrives there itself in wait_loads, so that a phase is what one wait waits for.
  Barrier *landed = nullptr;
  const TensorMap *maps = nullptr;
  int parity = 0;
  STOKER_DEVICE BlockTiles(Barrier *landed, const TensorMap *maps) : BlockTiles() {
    this->landed = landed;
    this->maps = maps;
    if (thread == 0) barrier_init(landed, 1);
    sync();
  }
#endif

  // The same number: what is derived from it is not kept from where it was derived before.
  STOKER_DEVICE int anew(int i) { return opaque(i); }

  // All threads come here before any goes on: what they wrote is seen by all threads, and after sync by their products and
  // bulk copies too, which know nothing of threads.
  STOKER_DEVICE void meet() { block_barrier(); }
  STOKER_DEVICE void sync() {
#if defined(STOKER_WARPGROUP)
    fence_async_proxy();
#endif
    block_barrier();
  }

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
      copy16_async(to + j * step * 64, at, valid);
    }
  }
  // A tile as it lies in shared memory, for kernels to hand to one another: R * C elements in one piece, of which every
  // 64 columns are a piece of their own, so a tile of more columns is the tiles of fewer in a row.
  template <int R, int C>
  STOKER_DEVICE void load_image(Tile<R, C> &tile, const bf16 *from) {
#if defined(STOKER_TMA)
    if (thread == 0) {
      barrier_expect(landed, sizeof tile.at);
      copy_bulk_async(tile.at, from, sizeof tile.at, landed);
    }
#else
    const int first = opaque(thread) * 8;
#pragma unroll
    for (int i = 0; i < R * C; i += kThreads * 8) copy16_async(tile.at + first + i, from + first + i, true);
#endif
  }
#if defined(STOKER_TMA)
  // `rows` rows of a tensor, from a token and a column on; zeros below.
  template <int R, int C>
  STOKER_DEVICE void load_mapped(Tile<R, C> &tile, int tensor, int64_t token, int column, int rows) {
    static_assert(R == kBoxRows);
    if (thread == 0) {
      barrier_expect(landed, sizeof tile.at);
#pragma unroll
      for (int c = 0; c < C; c += kBoxColumns)
        copy_box_async(tile.at + R * c, maps + tensor, column + c, R - rows, int(token) + rows, landed);
    }
  }
#endif
  template <int R, int C>
  STOKER_DEVICE void store_image(bf16 *to, const Tile<R, C> &tile) {
    const int first = opaque(thread) * 8;
#pragma unroll 4
    for (int i = 0; i < R * C; i += kThreads * 8)
      *reinterpret_cast<Part *>(to + first + i) = shared_load(reinterpret_cast<const Part *>(tile.at + first + i));
  }
  template <int N>
  STOKER_DEVICE void load_vector(Vector<N> &to, const float *from, int64_t stride, int rows) {
    static_assert(N <= kThreads);
    const int i = opaque(thread);
    if (i < N) copy4_async(to.at + i, from + i * stride, i < rows);
  }
  STOKER_DEVICE void wait_loads() {
    copy_wait();
#if defined(STOKER_TMA)
    if (thread == 0) barrier_arrive(landed);
    barrier_wait(landed, parity);
    parity ^= 1;
#endif
  }

  template <int R, int C>
  STOKER_DEVICE void store(bf16 *to, int64_t stride, int rows, const Tile<R, C> &tile) {
    constexpr int step = kThreads / (C / 8);
    static_assert(step % 8 == 0 && R % step == 0);
    const int i = opaque(thread), r = i / (C / 8), c = i % (C / 8) * 8;
    const uint16_t *from = tile.at + tile.index(r, c);
    bf16 *at = to + r * stride + c;
#pragma unroll 2
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
    STOKER_DEVICE explicit Place(const BlockTiles &x) {
      const int lane = opaque(x.lane), warp = opaque(x.warp);
      top = warp % Acc<R, C>::stripes * 16 + lane / 4;
      left = warp / Acc<R, C>::stripes * Acc<R, C>::columns + lane % 4 * 2;
    }
    STOKER_DEVICE int row(int i) const { return top + i / 2 * 8; }
    STOKER_DEVICE int column(int j, int i) const { return left + j * 8 + i % 2; }
  };

  template <class F, int R, int C, class... More>
  STOKER_DEVICE void each(F f, Acc<R, C> &acc, More &...more) {
    const Place<R, C> at(*this);
#pragma unroll
    for (int j = 0; j < Acc<R, C>::tiles; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) f(at.row(i), at.column(j, i), acc.x[j][i], more.x[j][i]...);
  }
  // f(row, column, element, x, ...) with the elements of a tile of the same shape.
  template <class F, int R, int C, class... More>
  STOKER_DEVICE void each_with(const Tile<R, C> &tile, F f, Acc<R, C> &acc, More &...more) {
    const Place<R, C> at(*this);
#pragma unroll
    for (int i = 0; i < 4; i += 2)
      each_pair(tile, at, i, [&](int j, float first, float second) {
        f(at.row(i), at.column(j, i), first, acc.x[j][i], more.x[j][i]...);
        f(at.row(i), at.column(j, i + 1), second, acc.x[j][i + 1], more.x[j][i + 1]...);
      });
  }
  // f(j, element i, element i + 1) of a thread's place in a tile, for every j.
  template <int R, int C, class F>
  STOKER_DEVICE void each_pair(const Tile<R, C> &tile, const Place<R, C> &at, int i, F f) {
    const int start = tile.index(at.row(i), at.column(0, 0));
#pragma unroll
    for (int j = 0; j < Acc<R, C>::tiles; ++j) {
      const uint32_t pair = shared_load(reinterpret_cast<const uint32_t *>(tile.at + tile.along(start, j * 8)));
      f(j, bf16::from_bits(pair << 16), bf16::from_bits(pair & 0xffff0000u));
    }
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
#pragma unroll 1
    for (int i = opaque(thread); i < n; i += kThreads) f(i);
  }
  template <int R, int C, class F>
  STOKER_DEVICE void scale_rows(Tile<R, C> &tile, F factor) {
    constexpr int step = kThreads / (C / 8);
    const int i = opaque(thread), r = i / (C / 8), c = i % (C / 8) * 8;
    uint16_t *at = tile.at + tile.index(r, c);
#pragma unroll
    for (int j = 0; j < R / step; ++j) {
      Part *part = reinterpret_cast<Part *>(at + j * step * 64);
      const float by = factor(r + j * step);
      Part words = shared_load(part);
      for (uint32_t &pair : words.words)
        pair = round_pair(bf16::from_bits(pair << 16) * by, bf16::from_bits(pair & 0xffff0000u) * by);
      shared_store(part, words);
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
