// The pairs of a chunk's tokens and their gradients with whole tiles, level after level: the host's way.
#pragma once

#include "kda/native/levels.h"
#include "native/delta_chunk.h"

namespace stoker {
namespace STOKER_ISA {

// Decays between tokens, and the tokens of a level scaled by them.
template <class X, int K>
struct LevelTiles {
  using Real = typename X::Real;
  using Tile = typename X::template Tile<kChunk, K>;
  typename X::template Plane<kChunk, K, typename X::Wide> sums;  // G
  Tile q, k;

  STOKER_TILE void load(X &x, const Real *g, int64_t stride, int rows) {
    x.load_plane(sums, g, stride, rows);
    x.running_sums(sums);
  }
  // e^-|G_t - G_b|: from the boundary to a later token, or from an earlier one to it; 1 where a token meets itself.
  template <class Level>
  STOKER_TILE Real across(X &x, Level level, int t, int c) const {
    const typename X::Wide sign = level.half == 0 ? 0 : level.later(t) ? 1 : -1;
    return x.exp(sign * (sums(t, c) - sums(level.half ? level.boundary(t) : t, c)));
  }
  template <class Level>
  STOKER_TILE void fill(X &x, Level level, const Tile &from_q, const Tile &from_k) {
    x.fill(q, k, [&](int t, int c, auto &to_q, auto &to_k) {
      const auto decay = across(x, level, t, c);
      to_q = from_q(t, c) * decay;
      to_k = from_k(t, c) * decay;
    });
  }
};

template <class X, int K>
struct TileTriangle {
  using Real = typename X::Real;
  using Pairs = typename X::template Acc<kChunk, kChunk>;
  using Tile = typename X::template Tile<kChunk, K>;
  LevelTiles<X, K> scaled;

  // N_q and N_k, zeros above their diagonals; that of N_k is zero as well.
  STOKER_TILE void products(X &x, Pairs &n_q, Pairs &n_k, const Tile &q, const Tile &k, const Real *g, int64_t stride,
                            int rows) {
    scaled.load(x, g, stride, rows);
    x.zero(n_q);
    x.zero(n_k);
    for_levels([&](auto level) {
      scaled.fill(x, level, q, k);
      Pairs level_q, level_k;
      x.zero(level_q);
      x.zero(level_k);
      x.product_level(level, level_q, scaled.q, scaled.k);
      x.product_level(level, level_k, scaled.k, scaled.k);
      x.each(
          [&](int r, int i, Real &sum_q, Real &sum_k, Real a, Real b) {
            const bool reads = level.reads(r, i), reads_key = reads && level.half;
            sum_q += reads ? a : 0;
            sum_k += reads_key ? b : 0;
          },
          n_q, n_k, level_q, level_k);
    });
  }
};

template <class X, int K>
struct TileTriangleGradient {
  using Real = typename X::Real;
  using Pairs = typename X::template Tile<kChunk, kChunk>;
  using Tile = typename X::template Tile<kChunk, K>;
  using Acc = typename X::template Acc<kChunk, K>;
  using Square = typename X::template Acc<kChunk, kChunk>;
  using Beta = typename X::template Vector<kChunk>;
  LevelTiles<X, K> scaled;
  Pairs level_q, level_k;
  typename X::template Plane<kChunk, K> passing, dg_tokens;

  // Adds what the cotangents of N_q and N_k, zero where these are, give to q, k, g and beta. `reads_*`: they times beta of
  // the key.
  template <class Sums>
  STOKER_TILE void add(X &x, Acc &dq, Acc &dk, Acc &dg, Sums &dbeta, const Tile &q, const Tile &k, const Pairs &from_q,
                       const Pairs &from_k, const Pairs &reads_q, const Pairs &reads_k, const Beta &beta, const Real *g,
                       int64_t stride, int rows) {
    scaled.load(x, g, stride, rows);
    x.template cells<K>(kChunk, [&](int t, int c) { dg_tokens(t, c) = 0; });
    for_levels([&](auto level) {
      scaled.fill(x, level, q, k);
      only(x, level, level_q, reads_q);
      only(x, level, level_k, reads_k);
      Acc part;
      x.zero(part);
      x.template product_pairs<false>(level, part, level_q, scaled.k);
      x.each(
          [&](int t, int c, Real &sum, Real a) {
            sum += a * scaled.across(x, level, t, c);
            if (level.half && level.later(t)) passing(t, c) = a * scaled.q(t, c);
          },
          dq, part);
      x.zero(part);
      if (level.half) x.template product_pairs<false>(level, part, level_k, scaled.k);
      x.each(
          [&](int t, int c, Real &sum, Real a) {
            sum += a * scaled.across(x, level, t, c);
            if (level.half && level.later(t)) passing(t, c) += a * scaled.k(t, c);
          },
          dk, part);
      only(x, level, level_q, from_q);
      only(x, level, level_k, from_k);
      x.zero(part);
      x.template product_pairs<true>(level, part, level_q, scaled.q);
      if (level.half) x.template product_pairs<true>(level, part, level_k, scaled.k);
      x.row_sums(dbeta, [&](int t, int c, Real a) { return a * scaled.k(t, c); }, part);
      x.each(
          [&](int t, int c, Real &sum, Real a) {
            a *= beta[t];
            sum += a * scaled.across(x, level, t, c);
            if (level.half && !level.later(t)) passing(t, c) = a * scaled.k(t, c);
          },
          dk, part);
      if (level.half) x.half_sums(level, dg_tokens, passing);
    });
    x.each([&](int t, int c, Real &sum) { sum += dg_tokens(t, c); }, dg);
  }

 private:
  template <class Level>
  STOKER_TILE static void only(X &x, Level level, Pairs &to, const Pairs &from) {
    x.fill(to, [&](int r, int i) {
      const Real pair = from(r, i);
      return level.reads(r, i) ? pair : 0;
    });
  }
};

}  // namespace STOKER_ISA
}  // namespace stoker
