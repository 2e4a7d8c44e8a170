// Before the scan, all chunks at once: the pairs of a chunk's tokens, N_q for the queries and T for the keys.
#pragma once

#include "kda/native/chunk.h"

namespace stoker {
namespace STOKER_ISA {

template <class X, int K>
struct KdaPrepare {
  using Executor = X;
  using Real = typename X::Real;
  using Element = typename X::Element;

  struct Shared {
    typename X::template Tile<kChunk, K> q, k;
    ScaledPair<X, K> scaled;
    typename X::template Tile<kChunk, kChunk> out;
    ChannelDecays<X, K> decays;
    typename X::template Scratch<kChunk> scratch;
  };

  STOKER_TILE static void run(X &x, Shared &s, const DeltaParams &p, const Rows &rows, int head) {
    const int qk_head = head / (p.num_v_heads / p.num_qk_heads);
    const Real scale = p.scale;
    x.sync();
    x.load(s.q, (const Element *)p.q + rows.token * p.q_stride + qk_head * K, p.q_stride, rows.count);
    x.load(s.k, (const Element *)p.k + rows.token * p.k_stride + qk_head * K, p.k_stride, rows.count);
    s.decays.load(x, p, rows.token, head, rows.count);
    x.wait_loads();
    x.sync();
    s.decays.prepare(x);

    typename X::template Acc<kChunk, kChunk> n_q, n_k;
    x.zero(n_q);
    x.zero(n_k);
    for_levels([&](auto level) {
      s.scaled.fill(x, level, s.q, s.k, s.decays);
      typename X::template Acc<kChunk, kChunk> q, k;
      x.zero(q);
      x.zero(k);
      x.product_level(level, q, s.scaled.q, s.scaled.k);
      x.product_level(level, k, s.scaled.k, s.scaled.k);
      x.finish(q, k);
      x.each(
          [&](int r, int i, Real &sum_q, Real &sum_k, Real a, Real b) {
            const bool reads = level.reads(r, i), reads_key = reads && level.half;
            const Real key = b * s.decays.beta[i];
            sum_q += reads ? scale * a : 0;
            sum_k += reads_key ? key : 0;
          },
          n_q, n_k, q, k);
    });
    Element *to = (Element *)p.solved + block_of(p, rows, head) * 2 * kChunk * kChunk;
    x.unit_lower_inverse(s.out, n_k, s.scratch);
    x.store(to, kChunk, kChunk, s.out);
    x.sync();
    x.put(s.out, n_q);
    x.sync();
    x.store(to + kChunk * kChunk, kChunk, kChunk, s.out);
  }
};

}  // namespace STOKER_ISA
}  // namespace stoker
