// The host's way to run a tile program: one thread owns whole tiles, an accumulator is a plain matrix.
//
// A tile program is a class template over an executor X. It sees tiles (operands, rounded to X::Element) and
// accumulators (X::Real), multiplies with x.product, touches accumulators with x.each, and rounds with x.put. This
// executor makes it plain loops: in float it is the trainer's CPU kernel, in double a check of the algebra, with bf16
// elements a model of the device kernel, which rounds at the same places.
#pragma once

#include <cmath>
#include <type_traits>

#include "native/host_product.h"
#include "native/number.h"

namespace stoker {
namespace STOKER_ISA {

// e^x to 4/3 ulp; 0 below -87.3, where e^x leaves the normal numbers. No branch and no call: loops over it vectorise.
STOKER_TILE float exponential(float x) {
  float n = std::nearbyint(x * 1.44269504088896341f);
  n = n < -126.0f ? -126.0f : n > 127.0f ? 127.0f : n;
  float r = std::fma(n, -0.693145751953125f, x);
  r = std::fma(n, -1.42860682030941723212e-6f, r);
  float p = 1.9875691500e-4f;
  p = std::fma(p, r, 1.3981999507e-3f);
  p = std::fma(p, r, 8.3334519073e-3f);
  p = std::fma(p, r, 4.1665795894e-2f);
  p = std::fma(p, r, 1.6666665459e-1f);
  p = std::fma(p, r, 5.0000001201e-1f);
  p = std::fma(p * r, r, r + 1.0f);
  float scale = bf16::from_bits(uint32_t(int32_t(n) + 127) << 23);
  return x < -87.3f ? 0.0f : p * scale;
}
STOKER_TILE double exponential(double x) { return std::exp(x); }

template <class X, int K>
struct TileTriangle;  // kda/native/tile_triangle.h
template <class X, int K>
struct TileTriangleGradient;

template <class E>
struct HostExec {
  using Element = E;
  using Real = std::conditional_t<std::is_same_v<E, double>, double, float>;
  using Wide = double;  // sums of log decays

  template <int R, int C>
  struct alignas(64) Tile {
    E at[R * C];
    Real operator()(int r, int c) const { return Real(at[r * C + c]); }
  };
  template <int R, int C>
  struct alignas(64) Acc {
    Real at[R * C];
  };

  // Numbers that all threads share.
  template <int N, class T = Real>
  struct Vector {
    T at[N];
    T& operator[](int i) { return at[i]; }
    T operator[](int i) const { return at[i]; }
  };
  // A matrix that all threads share, in full precision.
  template <int R, int C, class T = Real>
  struct alignas(64) Plane {
    T at[R * C];
    T& operator()(int r, int c) { return at[r * C + c]; }
    T operator()(int r, int c) const { return at[r * C + c]; }
  };
  // Elements as Real: themselves, or a copy where they are narrower.
  template <int N, class From = E>
  struct Widened {
    alignas(64) Real copy[N];
    const Real* of(const From* from) {
      for (int i = 0; i < N; ++i) copy[i] = Real(from[i]);
      return copy;
    }
  };
  template <int N>
  struct Widened<N, Real> {
    const Real* of(const Real* from) { return from; }
  };
  static constexpr int kStages = 1;  // sets of tiles that loads run ahead by
  static constexpr bool kFewRegisters = false;
  static constexpr bool kMapped = false;

  // Sums over an accumulator, in the parts that the executor's threads make without meeting; the program adds them up.
  template <int N>
  struct RowSums {
    static constexpr int parts = 1;
    Vector<N> part[parts];
  };
  template <int N>
  using ColumnSums = RowSums<N>;
  struct Total {
    static constexpr int parts = 1;
    Vector<parts> part;
  };
  template <int N>
  struct Scratch {};

  int anew(int i) { return i; }
  void meet() {}
  void sync() {}
  // The accumulators of products are complete only after this.
  template <class... Accs>
  void finish(Accs&...) {}

  // Rows of `stride` elements; rows from `rows` on are zero.
  template <int R, int C>
  void load(Tile<R, C>& tile, const E* from, int64_t stride, int rows) {
    for (int r = 0; r < R; ++r)
      if (r < rows)
        memcpy(tile.at + r * C, from + r * stride, C * sizeof(E));
      else
        memset(tile.at + r * C, 0, C * sizeof(E));
  }
  template <int R, int C>
  void store(E* to, int64_t stride, int rows, const Tile<R, C>& tile) {
    for (int r = 0; r < rows; ++r) memcpy(to + r * stride, tile.at + r * C, C * sizeof(E));
  }
  // A whole tile of the workspace, in the executor's own layout.
  template <int R, int C>
  void load_image(Tile<R, C>& tile, const E* from) {
    memcpy(tile.at, from, sizeof tile.at);
  }
  template <int R, int C>
  void store_image(E* to, const Tile<R, C>& tile) {
    memcpy(to, tile.at, sizeof tile.at);
  }
  template <int N>
  void load_vector(Vector<N>& to, const Real* from, int64_t stride, int rows) {
    for (int r = 0; r < N; ++r) to[r] = r < rows ? from[r * stride] : Real(0);
  }
  template <int R, int C, class T>
  void load_plane(Plane<R, C, T>& plane, const Real* from, int64_t stride, int rows) {
    for (int r = 0; r < rows; ++r)
      for (int c = 0; c < C; ++c) plane(r, c) = from[r * stride + c];
    for (int i = rows * C; i < R * C; ++i) plane.at[i] = 0;
  }
  void wait_loads() {}

  template <int R, int C>
  void zero(Acc<R, C>& acc) {
    memset(acc.at, 0, sizeof acc.at);
  }
  // acc = op(a) op(b).
  template <bool TransA, bool TransB, int R, int C, int AR, int AC, int BR, int BC>
  void start(Acc<R, C>& acc, const Tile<AR, AC>& a, const Tile<BR, BC>& b) {
    zero(acc);
    product<TransA, TransB>(acc, a, b);
  }
  // acc += op(a) op(b).
  template <bool TransA, bool TransB, int R, int C, int AR, int AC, int BR, int BC>
  void product(Acc<R, C>& acc, const Tile<AR, AC>& a, const Tile<BR, BC>& b) {
    constexpr int inner = TransA ? AR : AC;
    static_assert((TransA ? AC : AR) == R && (TransB ? BR : BC) == C && (TransB ? BC : BR) == inner);
    multiply<TransA, TransB, R, C, inner>(acc.at, a.at, AC, b.at, BC);
  }
  // Numbers by token and channel, summed and multiplied along the tokens.
  static constexpr bool kChannelsFirst = false;
  template <int K>
  using Channels = Acc<64, K>;
  template <int K>
  using ChannelTile = Tile<64, K>;
  template <int K>
  using Strips = Acc<64, K>;
  template <int K>
  using Gates = Plane<64, K, Wide>;
  template <int N>
  using TokenSums = RowSums<N>;
  template <int K>
  using Triangle = TileTriangle<HostExec, K>;
  template <int K>
  using TriangleGradient = TileTriangleGradient<HostExec, K>;
  template <int K>
  void load_gates(Gates<K>& gates, const Real* from, int64_t stride, int rows) {
    load_plane(gates, from, stride, rows);
  }
  // from_start = e^G, to_end = e^(G_C - G), whole[c] = e^G_C; the gates are used up.
  template <int K>
  void decays(Channels<K>& from_start, Channels<K>& to_end, Vector<K>& whole, Gates<K>& gates) {
    running_sums(gates);
    each(
        [&](int t, int c, Real& start, Real& end) {
          start = exp(gates(t, c));
          end = exp(gates(63, c) - gates(t, c));
        },
        from_start, to_end);
    for (int c = 0; c < K; ++c) whole[c] = from_start.at[63 * K + c];
  }
  // x_t = sum of x from t on; of all x before t.
  template <int K>
  void sums_from(Channels<K>& x, Gates<K>&) {
    for (int t = 62; t >= 0; --t)
      for (int c = 0; c < K; ++c) x.at[t * K + c] += x.at[(t + 1) * K + c];
  }
  template <int K>
  void sums_before(Channels<K>& x, Gates<K>&) {
    Real before[K] = {};
    for (int t = 0; t < 64; ++t)
      for (int c = 0; c < K; ++c) {
        const Real here = x.at[t * K + c];
        x.at[t * K + c] = before[c];
        before[c] += here;
      }
  }
  // Numbers laid by in place of the gates, and taken up again.
  template <int K>
  void lay_by(Gates<K>& gates, const Channels<K>& acc) {
    for (int i = 0; i < 64 * K; ++i) gates.at[i] = acc.at[i];
  }
  template <int K>
  void take_up(Channels<K>& acc, const Gates<K>& gates) {
    for (int i = 0; i < 64 * K; ++i) acc.at[i] = Real(gates.at[i]);
  }
  template <int K>
  void take(Channels<K>& to, const Tile<64, K>& tile) {
    for (int i = 0; i < 64 * K; ++i) to.at[i] = Real(tile.at[i]);
  }
  template <class F, int K>
  void token_sums(RowSums<64>& to, F f, const Acc<64, K>& acc) {
    row_sums(to, f, acc);
  }
  // A chunk's numbers in memory and back.
  template <int K, class T>
  void keep(T* to, const Acc<64, K>& acc) {
    for (int i = 0; i < 64 * K; ++i) to[i] = T(acc.at[i]);
  }
  template <int K, class T>
  void recall(Strips<K>& acc, const T* from) {
    for (int i = 0; i < 64 * K; ++i) acc.at[i] += Real(from[i]);
  }
  template <int K>
  void zero_strip(Strips<K>& acc) {
    zero(acc);
  }
  // Rows of tokens in memory.
  template <int K, class T>
  void add_strip(Strips<K>& acc, const T* from, int64_t stride, int rows) {
    for (int r = 0; r < rows; ++r)
      for (int c = 0; c < K; ++c) acc.at[r * K + c] += Real(from[r * stride + c]);
  }
  template <int K, class T>
  void store_strip(T* to, int64_t stride, int rows, const Strips<K>& acc) {
    for (int r = 0; r < rows; ++r)
      for (int c = 0; c < K; ++c) to[r * stride + c] = T(acc.at[r * K + c]);
  }
  // acc += a b^T, at least where the level says that a token of the row reads one of the column (kda/native/levels.h).
  template <class Level, int C, int K>
  void product_level(Level level, Acc<C, C>& acc, const Tile<C, K>& a, const Tile<C, K>& b) {
    Widened<C * K> wide_a;
    const Real* left = wide_a.of(a.at);
    alignas(64) Real turned[K * C];
    transpose<C, K>(turned, b.at, K);
    squares<C>(level, [&](auto size, int row, int key) {
      multiply_part<false, size, size, K>(acc.at + row * C + key, C, left + row * K, K, turned + key, C);
    });
  }
  // acc += pairs b, or its transpose times b, where `pairs` is zero but for a level's.
  template <bool Transposed, class Level, int C, int K>
  void product_pairs(Level level, Acc<C, K>& acc, const Tile<C, C>& pairs, const Tile<C, K>& b) {
    Widened<C * C> wide_pairs;
    Widened<C * K> wide_b;
    const Real *left = wide_pairs.of(pairs.at), *right = wide_b.of(b.at);
    squares<C>(level, [&](auto size, int row, int key) {
      const int to = Transposed ? key : row, from = Transposed ? row : key;
      multiply_part<Transposed, size, K, size>(acc.at + to * K, K, left + row * C + key, C, right + from * K, K);
    });
  }
  // f(size, first row, first key) for the squares that hold the level's pairs: at least 16 wide, or vectors stay empty.
  template <int C, class Level, class F>
  void squares(Level level, F f) {
    if (level.half == 32)
      f(std::integral_constant<int, 32>(), 32, 0);
    else if (level.half == 16)
      for (int key = 0; key < C; key += 32) f(std::integral_constant<int, 16>(), key + 16, key);
    else
      for (int key = 0; key < C; key += 16) f(std::integral_constant<int, 16>(), key, key);
  }
  // tile(r, c) = f(r, c).
  template <int R, int C, class F>
  void fill(Tile<R, C>& tile, F f) {
    for (int r = 0; r < R; ++r)
#pragma GCC ivdep
      for (int c = 0; c < C; ++c) tile.at[r * C + c] = E(f(r, c));
  }
  // f(r, c, x, y): two tiles at once.
  template <int R, int C, class F>
  void fill(Tile<R, C>& first, Tile<R, C>& second, F f) {
    for (int r = 0; r < R; ++r)
#pragma GCC ivdep
      for (int c = 0; c < C; ++c) {
        Real x, y;
        f(r, c, x, y);
        first.at[r * C + c] = E(x);
        second.at[r * C + c] = E(y);
      }
  }
  // f(r, c) for every cell of `rows` rows of C, by the same thread every time.
  template <int C, class F>
  void cells(int rows, F f) {
    for (int r = 0; r < rows; ++r)
#pragma GCC ivdep
      for (int c = 0; c < C; ++c) f(r, c);
  }
  // Down every column, in place: sums of all rows up to and with r.
  template <int R, int C, class T>
  void running_sums(Plane<R, C, T>& plane) {
    for (int r = 1; r < R; ++r)
      for (int c = 0; c < C; ++c) plane(r, c) += plane(r - 1, c);
  }
  // to(j) += in later halves the sum of `plane` from j to the half's end, in earlier ones of what is before j.
  template <class Level, int R, int C>
  void half_sums(Level level, Plane<R, C>& to, const Plane<R, C>& plane) {
    for (int from = 0; from < R; from += level.half) {
      const bool later = level.later(from);
      Real sum[C] = {};
      for (int i = 0; i < level.half; ++i) {
        const int r = later ? from + level.half - 1 - i : from + i;
        for (int c = 0; c < C; ++c) {
          const Real before = sum[c];
          sum[c] += plane(r, c);
          to(r, c) += later ? sum[c] : before;
        }
      }
    }
  }
  // f(row, column, x, ...) for every element of accumulators of one shape.
  template <class F, int R, int C, class... More>
  void each(F f, Acc<R, C>& acc, More&... more) {
    for (int r = 0; r < R; ++r)
#pragma GCC ivdep
      for (int c = 0; c < C; ++c) f(r, c, acc.at[r * C + c], more.at[r * C + c]...);
  }
  // f(row, column, element, x, ...) with the elements of a tile of the same shape.
  template <class F, int R, int C, class... More>
  void each_with(const Tile<R, C>& tile, F f, Acc<R, C>& acc, More&... more) {
    for (int r = 0; r < R; ++r)
#pragma GCC ivdep
      for (int c = 0; c < C; ++c) f(r, c, tile(r, c), acc.at[r * C + c], more.at[r * C + c]...);
  }
  template <int R, int C>
  void put(Tile<R, C>& tile, const Acc<R, C>& acc) {
    for (int i = 0; i < R * C; ++i) tile.at[i] = E(acc.at[i]);
  }
  // f(i) for every i < n, by any thread.
  template <class F>
  void rows(int n, F f) {
    for (int i = 0; i < n; ++i) f(i);
  }
  // to.part[r] += sum over c of f(r, c, x).
  template <int R, int C, class F>
  void row_sums(RowSums<R>& to, F f, const Acc<R, C>& acc) {
    constexpr int L = 16;
    static_assert(C % L == 0);
    for (int r = 0; r < R; ++r) {
      Real part[L] = {};
      for (int c = 0; c < C; c += L)
#pragma GCC ivdep
        for (int l = 0; l < L; ++l) part[l] += f(r, c + l, acc.at[r * C + c + l]);
      for (int half = L / 2; half; half /= 2)
        for (int l = 0; l < half; ++l) part[l] += part[l + half];
      to.part[0][r] += part[0];
    }
  }
  // to.part[c] += sum over r of x.
  template <int R, int C>
  void column_sums(ColumnSums<C>& to, const Acc<R, C>& acc) {
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c) to.part[0][c] += acc.at[r * C + c];
  }
  // to.part[r] += sum over c of tile(r, c) x.
  template <int R, int C>
  void row_dots(RowSums<R>& to, const Tile<R, C>& tile, const Acc<R, C>& acc) {
    row_sums(to, [&](int r, int c, Real x) { return x * tile(r, c); }, acc);
  }
  // to.part += sum over all of tile(r, c) x.
  template <int R, int C>
  void total_dot(Total& to, const Tile<R, C>& tile, const Acc<R, C>& acc) {
    RowSums<R> sums = {};
    row_dots(sums, tile, acc);
    for (Real sum : sums.part[0].at) to.part[0] += sum;
  }
  // to[j] += sum over r >= j > i of x_ri: what passes token j. Additions only, so that a tiny sum keeps its digits.
  template <int N>
  void passing_sums(Vector<N>& to, const Acc<N, N>& acc, Scratch<N>&) {
    Real from_here[N] = {};
    for (int j = N - 1; j > 0; --j) {
      for (int i = 0; i < N; ++i) from_here[i] += acc.at[j * N + i];
      Real sum = 0;
      for (int i = 0; i < j; ++i) sum += from_here[i];
      to[j] += sum;
    }
  }
  template <int N>
  void running_sum(Vector<N, Wide>& to, const Vector<N>& from) {
    Wide sum = 0;
    for (int i = 0; i < N; ++i) to[i] = sum += from[i];
  }
  // And f(i, sum to i, sum of all) for every i.
  template <int N, class F>
  void running_sum(Vector<N, Wide>& to, const Vector<N>& from, F f) {
    running_sum(to, from);
    for (int i = 0; i < N; ++i) f(i, to[i], to[N - 1]);
  }
  // to[i] += sum of `from_here` from i on + sum of `before` before i + `everywhere`: additions only.
  template <int N, class From, class Before, class Everywhere>
  void around_sums(Vector<N>& to, From from_here, Before before, Everywhere everywhere) {
    Real sum = everywhere();
    for (int i = 0; i < N; ++i) {
      to[i] += sum;
      sum += before(i);
    }
    sum = 0;
    for (int i = N - 1; i >= 0; --i) to[i] += sum += from_here(i);
  }
  // tile = T - I, T = (I + L)^-1, for the L that acc has below the diagonal: zeros on the diagonal and above. T's unit
  // diagonal is for the caller to add in Real, where rounding costs it nothing. acc is used up.
  template <int N>
  void unit_lower_inverse(Tile<N, N>& tile, Acc<N, N>& acc, Scratch<N>&) {
    for (int r = 0; r < N; ++r) {
      Real row[N] = {};
      for (int c = 0; c < r; ++c) row[c] = -acc.at[r * N + c];
      for (int i = 0; i < r; ++i) {
        Real factor = acc.at[r * N + i];
        for (int c = 0; c < N; ++c) row[c] -= factor * acc.at[i * N + c];
      }
      memcpy(acc.at + r * N, row, sizeof row);
    }
    put(tile, acc);
  }
  template <int R, int C, class F>
  void scale_rows(Tile<R, C>& tile, F factor) {
    for (int r = 0; r < R; ++r) {
      Real by = factor(r);
      for (int c = 0; c < C; ++c) tile.at[r * C + c] = E(Real(tile.at[r * C + c]) * by);
    }
  }
  // A state [R, C] in Real, zeros if `from` is null.
  template <int R, int C>
  void load_state(Acc<R, C>& acc, const Real* from, int64_t stride) {
    each([&](int r, int c, Real& x) { x = from ? from[r * stride + c] : Real(0); }, acc);
  }
  template <int R, int C>
  void store_state(Real* to, int64_t stride, const Acc<R, C>& acc) {
    for (int r = 0; r < R; ++r) memcpy(to + r * stride, acc.at + r * C, C * sizeof(Real));
  }

  STOKER_TILE Real exp(Wide x) { return exponential(Real(x)); }
};

}  // namespace STOKER_ISA
}  // namespace stoker
