// What the programs of Kimi Delta Attention share: the decays of a chunk, and the pairs of its tokens.
#pragma once

#include "kda/native/levels.h"
#include "native/delta_chunk.h"

namespace stoker {
namespace STOKER_ISA {

template <class X, int K>
struct ChannelDecays {
  using Real = typename X::Real;
  typename X::template Vector<kChunk> beta;
  typename X::template Plane<kChunk, K, typename X::Wide> sums;  // g, then G: its running sum

  STOKER_TILE void load(X &x, const DeltaParams &p, int64_t token, int head, int rows) {
    const int64_t at = token * p.num_v_heads + head;
    x.load_vector(beta, (const Real *)p.beta + at, p.num_v_heads, rows);
    x.load_plane(sums, (const Real *)p.g + at * K, int64_t(p.num_v_heads) * K, rows);
  }
  // Once the loads are done; ends with a barrier.
  STOKER_TILE void prepare(X &x) {
    x.running_sums(sums);
    x.sync();
  }
  STOKER_TILE Real from_start(X &x, int t, int c) const { return x.exp(sums(t, c)); }
  STOKER_TILE Real to_end(X &x, int t, int c) const { return x.exp(sums(kChunk - 1, c) - sums(t, c)); }
  STOKER_TILE Real whole(X &x, int c) const { return x.exp(sums(kChunk - 1, c)); }
  // e^-|G_t - G_b|: from the boundary to a later token, or from an earlier one to it; 1 where a token meets itself.
  template <class Level>
  STOKER_TILE Real across(X &x, Level level, int t, int c) const {
    const typename X::Wide sign = level.half == 0 ? 0 : level.later(t) ? 1 : -1;
    return x.exp(sign * (sums(t, c) - sums(level.half ? level.boundary(t) : t, c)));
  }
};

// Rows and keys of one level, scaled; the tokens themselves where every one meets itself.
template <class X, int K>
struct ScaledPair {
  typename X::template Tile<kChunk, K> q, k;

  template <class Level>
  STOKER_TILE void fill(X &x, Level level, const typename X::template Tile<kChunk, K> &from_q,
                        const typename X::template Tile<kChunk, K> &from_k, const ChannelDecays<X, K> &decays) {
    x.sync();
    x.fill(q, k, [&](int t, int c, auto &to_q, auto &to_k) {
      const auto decay = decays.across(x, level, t, c);
      to_q = from_q(t, c) * decay;
      to_k = from_k(t, c) * decay;
    });
    x.sync();
  }
};

}  // namespace STOKER_ISA
}  // namespace stoker
