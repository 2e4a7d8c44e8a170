// The operations of the executors, each as a tile program of its own, over plain row-major arrays: run by the emulated
// thread block, and by the host in float, double and with bfloat16 tiles.
#include "kda/native/chunk.h"
#include "kda/native/levels.h"
#include "native/abi.h"
#include "native/block_exec.h"
#include "native/delta_device.h"
#include "native/host_entry.h"
#include "native/host_exec.h"
#include "native/launch.h"

using namespace stoker;
using namespace stoker::STOKER_ISA;

namespace {

struct Arrays {
  const void *a, *b;  // operands, in the executor's elements
  const void *x;      // numbers, in its reals
  void *out, *tile;   // results in reals and in elements
  int rows;
  int seed;  // of the order in which the emulated block's threads run
  int token;
};

// out [R, C] += op(a) op(b); the product alone, rounded, to the tile.
template <class X, bool TransA, bool TransB, int R, int C, int Inner>
struct Product {
  using Executor = X;
  struct Shared {
    typename X::template Tile<TransA ? Inner : R, TransA ? R : Inner> a;
    typename X::template Tile<TransB ? C : Inner, TransB ? Inner : C> b;
    typename X::template Tile<R, C> rounded;
  };
  static void run(X &x, Shared &s, const Arrays &p) {
    using Element = typename X::Element;
    using Real = typename X::Real;
    typename X::template Acc<R, C> acc, alone;
    x.load(s.a, (const Element *)p.a, TransA ? R : Inner, TransA ? Inner : R);
    x.load(s.b, (const Element *)p.b, TransB ? Inner : C, TransB ? C : Inner);
    x.load_state(acc, (const Real *)p.out, C);
    x.wait_loads();
    x.sync();
    x.template start<TransA, TransB>(alone, s.a, s.b);
    x.template product<TransA, TransB>(acc, s.a, s.b);
    x.finish(alone, acc);
    x.store_state((Real *)p.out, C, acc);
    x.put(s.rounded, alone);
    x.sync();
    x.store((Element *)p.tile, C, R, s.rounded);
  }
};

// A tile [64, 128] handed over as its image, of which the second half is handed over as one of 64 columns: tile [64, 128]
// and, behind it, [64, 64].
template <class X>
struct Image {
  using Executor = X;
  struct Shared {
    typename X::template Tile<64, 128> from, to;
    typename X::template Tile<64, 64> half;
  };
  static void run(X &x, Shared &s, const Arrays &p) {
    using Element = typename X::Element;
    Element *image = (Element *)p.out, *out = (Element *)p.tile;
    x.load(s.from, (const Element *)p.a, 128, 64);
    x.wait_loads();
    x.sync();
    x.store_image(image, s.from);
    x.sync();
    x.load_image(s.to, image);
    if (std::is_same_v<X, BlockExec>) x.load_image(s.half, image + 64 * 64);
    x.wait_loads();
    x.sync();
    x.store(out, 128, 64, s.to);
    if (std::is_same_v<X, BlockExec>) x.store(out + 64 * 128, 64, 64, s.half);
  }
};

// The first `rows` rows of a [64, 136], row r times r, to those of tile [64, 136]; out [64, 128]: all rows as loaded.
template <class X>
struct Ragged {
  using Executor = X;
  struct Shared {
    typename X::template Tile<64, 128> tile;
  };
  static void run(X &x, Shared &s, const Arrays &p) {
    using Real = typename X::Real;
    typename X::template Acc<64, 128> acc;
    x.load(s.tile, (const typename X::Element *)p.a, 136, p.rows);
    x.wait_loads();
    x.sync();
    x.each([&](int r, int c, Real &a) { a = s.tile(r, c); }, acc);
    x.store_state((Real *)p.out, 128, acc);
    x.sync();
    x.scale_rows(s.tile, [](int r) { return Real(r); });
    x.sync();
    x.store((typename X::Element *)p.tile, 136, p.rows, s.tile);
  }
};

// Packed tokens a [100, 200], of which 192 columns are a tensor's: tile [64, 128] = `rows` rows from `token` and column 64
// on, and behind it another chunk's.
constexpr int kMappedTokens = 100, kMappedStride = 200, kMappedColumns = 192;
template <class X>
struct Mapped {
  using Executor = X;
  struct Shared {
    typename X::template Tile<64, 128> tile;
    typename X::template Tile<64, 64> other;
  };
  static void run(X &x, Shared &s, const Arrays &p) {
    using Element = typename X::Element;
    DeltaParams delta = {};
    delta.q = p.a;
    delta.q_stride = kMappedStride;
    for (int again = 0; again < 3; ++again) {
      load_rows<Tokens::q>(x, s.tile, delta, Rows{p.token, p.rows, 0}, 64);
      if (again < 2) load_rows<Tokens::q>(x, s.other, delta, Rows{0, 17 * again + 1, 0}, 128);
      x.wait_loads();
      x.sync();
    }
    x.store((Element *)p.tile, 128, 64, s.tile);
    x.store((Element *)p.tile + 64 * 128, 64, 64, s.other);
  }
};

// Of x and a tile a, both [64, 64]: out [5, 64] = their products summed along the rows, x summed down the columns, the
// products summed over all, what passes each token, and running sums of x's first `rows` numbers.
template <class X>
struct Sums {
  using Executor = X;
  using Real = typename X::Real;
  struct Shared {
    typename X::template Tile<64, 64> tile;
    typename X::template RowSums<64> rows;
    typename X::template ColumnSums<64> columns;
    typename X::Total total;
    typename X::template Vector<64> passing, numbers;
    typename X::template Vector<64, typename X::Wide> running;
    typename X::template Scratch<64> scratch;
  };
  static void run(X &x, Shared &s, const Arrays &p) {
    typename X::template Acc<64, 64> acc;
    x.load_state(acc, (const Real *)p.x, 64);
    x.load(s.tile, (const typename X::Element *)p.a, 64, 64);
    x.load_vector(s.numbers, (const Real *)p.x, 1, p.rows);
    x.rows(64, [&](int i) {
      for (auto &part : s.rows.part) part[i] = 0;
      for (auto &part : s.columns.part) part[i] = 0;
      s.passing[i] = 0;
      if (i < s.total.parts) s.total.part[i] = 0;
    });
    x.wait_loads();
    x.sync();
    x.row_dots(s.rows, s.tile, acc);
    x.column_sums(s.columns, acc);
    x.total_dot(s.total, s.tile, acc);
    x.running_sum(s.running, s.numbers, [](int, typename X::Wide, typename X::Wide) {});
    x.sync();
    x.passing_sums(s.passing, acc, s.scratch);
    x.sync();
    Real *out = (Real *)p.out;
    x.rows(64, [&](int i) {
      Real row = 0, column = 0, total = 0;
      for (auto &part : s.rows.part) row += part[i];
      for (auto &part : s.columns.part) column += part[i];
      for (int j = 0; j < s.total.parts; ++j) total += s.total.part[j];
      out[i] = row;
      out[64 + i] = column;
      out[128 + i] = total;
      out[192 + i] = s.passing[i];
      out[256 + i] = Real(s.running[i]);
    });
  }
};

// tile [64, 64] = (I + the part of x [64, 64] below the diagonal)^-1 - I.
template <class X>
struct Inverse {
  using Executor = X;
  struct Shared {
    typename X::template Tile<64, 64> tile;
    typename X::template Scratch<64> scratch;
  };
  static void run(X &x, Shared &s, const Arrays &p) {
    typename X::template Acc<64, 64> acc;
    x.load_state(acc, (const typename X::Real *)p.x, 64);
    x.unit_lower_inverse(s.tile, acc, s.scratch);
    x.sync();
    x.store((typename X::Element *)p.tile, 64, 64, s.tile);
  }
};

// Of log decays x [64, K], of which `rows` rows count, and tokens a [64, K]: out [7, 64, K] = e^G, e^(G_C - G), a, its
// sums from each token on and before it, what was kept of it in memory, and a row of e^G_C above one of a's sums by token.
template <class X, int K>
struct ChannelSums {
  using Executor = X;
  using Real = typename X::Real;
  struct Shared {
    typename X::template Tile<64, K> tokens;
    typename X::template Gates<K> gates;
    typename X::template Vector<K> whole;
    typename X::template TokenSums<64> sums;
  };
  static void run(X &x, Shared &s, const Arrays &p) {
    Real *out = (Real *)p.out;
    auto write = [&](int plane, auto &channels) {
      each_channel(x, [&](int t, int c, Real &a) { out[(plane * 64 + t) * K + c] = a; }, channels);
    };
    x.load(s.tokens, (const typename X::Element *)p.a, K, 64);
    x.load_gates(s.gates, (const Real *)p.x, K, p.rows);
    x.rows(64, [&](int t) {
      for (auto &part : s.sums.part) part[t] = 0;
    });
    x.wait_loads();
    x.sync();
    typename X::template Channels<K> from_start, to_end, tokens, from, before;
    x.decays(from_start, to_end, s.whole, s.gates);
    write(0, from_start);
    write(1, to_end);
    x.take(tokens, s.tokens);
    write(2, tokens);
    x.take(from, s.tokens);
    x.take(before, s.tokens);
    x.sync();
    x.sums_from(from, s.gates);
    x.sums_before(before, s.gates);
    x.sync();
    x.lay_by(s.gates, from);
    x.take_up(from, s.gates);
    write(3, from);
    write(4, before);
    x.token_sums(s.sums, [](int, int, Real a) { return a; }, tokens);
    x.keep(out + 5 * 64 * K, tokens);
    x.sync();
    typename X::template Strips<K> strip;
    x.template zero_strip<K>(strip);
    x.template recall<K>(strip, out + 5 * 64 * K);
    x.template recall<K>(strip, out + 5 * 64 * K);
    x.sync();
    x.template store_strip<K>(out + 5 * 64 * K, K, 64, strip);
    x.rows(K, [&](int c) { out[6 * 64 * K + c] = s.whole[c]; });
    x.rows(64, [&](int t) {
      Real sum = 0;
      for (auto &part : s.sums.part) sum += part[t];
      out[(6 * 64 + 1) * K + t] = sum;
    });
  }
};

// out [6, 64, C] += half sums of x [64, C], halves of 32, 16, 8, 4, 2 and 1: on the host.
template <class X, int C>
struct Halves {
  using Executor = X;
  using Real = typename X::Real;
  struct Shared {
    typename X::template Plane<64, C> plane, to;
  };
  static void run(X &x, Shared &s, const Arrays &p) {
    Real *out = (Real *)p.out;
    x.load_plane(s.plane, (const Real *)p.x, C, 64);
    for_levels([&](auto level) {
      if (!level.half) return;
      x.load_plane(s.to, out, C, 64);
      x.half_sums(level, s.to, s.plane);
      memcpy(out, s.to.at, sizeof s.to.at);
      out += 64 * C;
    });
  }
};

struct BlockArrays : Arrays {
#if defined(STOKER_TMA)
  TensorMap maps[1] = {};
#endif
  explicit BlockArrays(const Arrays &p) : Arrays(p) {
#if defined(STOKER_TMA)
    map_rows(maps[0], p.a, kMappedStride, kMappedColumns, kMappedTokens);
#endif
  }
};
template <class Program>
void kernel(BlockArrays p) {
  run_block<Program>(p);
}
template <class Program>
int launched(const Arrays &p) {
  if constexpr (std::is_same_v<typename Program::Executor, BlockExec>) {
    void *stream = (void *)uintptr_t(p.seed);
    return launch("tiles", kernel<Program>, 1, 1, kThreads, block_bytes<Program>(), stream, BlockArrays(p));
  } else {
    Scratchpad<typename Program::Shared> shared;
    memset(&*shared, 0xff, sizeof(typename Program::Shared));
    typename Program::Executor x;
    Program::run(x, *shared, p);
    return 0;
  }
}

template <class X, int R, int C, int Inner>
int product(int transposition, const Arrays &p) {
  switch (transposition) {
    case 0: return launched<Product<X, false, false, R, C, Inner>>(p);
    case 1: return launched<Product<X, true, false, R, C, Inner>>(p);
    case 2: return launched<Product<X, false, true, R, C, Inner>>(p);
    default: return launched<Product<X, true, true, R, C, Inner>>(p);
  }
}

template <class X>
int run(int operation, const Arrays &p) {
  switch (operation / 4) {
    case 25: return product<X, 64, 128, 64>(operation % 4, p);
    case 26: return product<X, 128, 64, 128>(operation % 4, p);
    case 27: return product<X, 64, 64, 128>(operation % 4, p);
    case 28: return product<X, 128, 128, 64>(operation % 4, p);
  }
  switch (operation) {
    case 7: return launched<Image<X>>(p);
    case 8: return launched<Ragged<X>>(p);
    case 9: return launched<Sums<X>>(p);
    case 10: return launched<Inverse<X>>(p);
    case 11: return launched<ChannelSums<X, 64>>(p);
    case 12: return launched<ChannelSums<X, 128>>(p);
    case 15: return launched<Mapped<X>>(p);
  }
  if constexpr (!std::is_same_v<X, BlockExec>) {
    if (operation == 13) return launched<Halves<X, 64>>(p);
    if (operation == 14) return launched<Halves<X, 128>>(p);
  }
  return kUnsupported;
}

}  // namespace

STOKER_EXPORT int run_block(int operation, const Arrays *p) { return run<BlockExec>(operation, *p); }
STOKER_EXPORT int run_float(int operation, const Arrays *p) { return run<HostExec<float>>(operation, *p); }
STOKER_EXPORT int run_double(int operation, const Arrays *p) { return run<HostExec<double>>(operation, *p); }
STOKER_EXPORT int run_bf16(int operation, const Arrays *p) { return run<HostExec<bf16>>(operation, *p); }

// index [R, C] of every element of a tile in shared memory.
STOKER_EXPORT void tile_indices(int rows, int columns, int32_t *index) {
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < columns; ++c) {
      int32_t &at = index[r * columns + c];
      if (rows == 64 && columns == 64) at = BlockExec::Tile<64, 64>::index(r, c);
      if (rows == 64 && columns == 128) at = BlockExec::Tile<64, 128>::index(r, c);
      if (rows == 128 && columns == 64) at = BlockExec::Tile<128, 64>::index(r, c);
      if (rows == 128 && columns == 128) at = BlockExec::Tile<128, 128>::index(r, c);
    }
}
