// Backward of Kimi Delta Attention through the states: one segment of one value head and one block of value columns,
// last chunk first. What passes between the tokens of a chunk is another program's (kda/native/pairs.h).
#pragma once

#include "kda/native/chunk.h"

namespace stoker {
namespace STOKER_ISA {

template <class X, int K, int V>
struct KdaBackward {
  using Executor = X;
  using Real = typename X::Real;
  using Element = typename X::Element;
  template <int R, int C>
  using Tile = typename X::template Tile<R, C>;
  template <int R, int C>
  using Acc = typename X::template Acc<R, C>;

  struct Shared {
    Tile<kChunk, K> q, k, scaled;    // scaled: keys decayed to the end, then gradients on their way out, keys read
    Tile<kChunk, V> d_o, errors, y;  // y: then dv
    Tile<kChunk, kChunk> solved, within;
    Tile<K, V> state, cotangent;
    ChannelDecays<X, K> decays;
    typename X::template Plane<kChunk, K> passing;
    typename X::template RowSums<kChunk> along_k;
    typename X::template RowSums<K> through;       // <dS1, S0> by channel, in parts
    typename X::template Vector<K> whole_chunk;    // and what it adds to dg
  };

  // Where this block's share of the gradients goes.
  struct Target {
    Element *dq, *dk;
    Real *dg, *dbeta;
    int64_t stride, gate_stride, beta_stride;
  };

  STOKER_TILE static void run(X &x, Shared &s, const DeltaParams &p, int segment, int head, int column, Target to) {
    const int qk_head = head / (p.num_v_heads / p.num_qk_heads), all_columns = p.value_dim;
    const int64_t state_at = (int64_t(segment) * p.num_v_heads + head) * K * all_columns + column;
    const int64_t value_at = head * all_columns + column;
    const Real scale = p.scale;
    const ChannelDecays<X, K> &d = s.decays;
    Acc<K, V> cotangent;
    x.load_state(cotangent, (const Real *)p.d_final + state_at, all_columns);
    for (int chunk = chunks_of(p, segment) - 1; chunk >= 0; --chunk) {
      const Rows rows = rows_of(p, segment, chunk);
      const int64_t block = block_of(p, rows, head);
      const Element *pairs = (const Element *)p.solved + block * 2 * kChunk * kChunk;
      x.sync();
      x.load(s.q, (const Element *)p.q + rows.token * p.q_stride + qk_head * K, p.q_stride, rows.count);
      x.load(s.k, (const Element *)p.k + rows.token * p.k_stride + qk_head * K, p.k_stride, rows.count);
      x.load(s.d_o, (const Element *)p.d_o + rows.token * p.d_o_stride + value_at, p.d_o_stride, rows.count);
      x.load(s.solved, pairs, kChunk, kChunk);
      x.load(s.within, pairs + kChunk * kChunk, kChunk, kChunk);
      x.load(s.errors, (const Element *)p.errors + block * kChunk * all_columns + column, all_columns, kChunk);
      x.load(s.state, (const Element *)p.states + block * K * all_columns + column, all_columns, K);
      s.decays.load(x, p, rows.token, head, rows.count);
      x.put(s.cotangent, cotangent);
      x.rows(kChunk, [&](int r) {
        for (auto &part : s.along_k.part) part[r] = 0;
      });
      x.rows(K, [&](int c) {
        for (auto &part : s.through.part) part[c] = 0;
      });
      x.wait_loads();
      x.sync();
      s.decays.prepare(x);
      x.fill(s.scaled, [&](int t, int c) { return s.k(t, c) * d.to_end(x, t, c); });
      x.sync();

      // y = diag(beta) (N_q^T dO + e^(G_C - G) K dS1), then dV = T^T y.
      Acc<kChunk, V> y;
      x.zero(y);
      x.template product<false, false>(y, s.scaled, s.cotangent);
      x.template product<true, false>(y, s.within, s.d_o);
      x.row_sums(s.through, [&](int r, int c, Real a) { return a * s.state(r, c); }, cotangent);
      x.finish(y);
      x.each([&](int r, int, Real &a) { a *= d.beta[r]; }, y);
      x.put(s.y, y);
      x.sync();
      x.template product<true, false>(y, s.solved, s.y);
      x.finish(y);
      x.sync();
      x.put(s.y, y);
      x.sync();
      x.store((Element *)p.dv + (rows.token * p.num_v_heads) * all_columns + value_at,
              int64_t(p.num_v_heads) * all_columns, rows.count, s.y);

      // Reads of the entering state, by queries and by keys; `passing` gathers the cotangents of G.
      Acc<kChunk, K> dq, dk;
      x.zero(dq);
      x.zero(dk);
      x.template product<false, true>(dq, s.d_o, s.state);
      x.template product<false, true>(dk, s.y, s.state);
      x.finish(dq, dk);
      x.each(
          [&](int t, int c, Real &a, Real &b) {
            const Real decay = d.from_start(x, t, c);
            a *= scale * decay;
            b *= -decay;
            s.passing(t, c) = a * s.q(t, c) + b * s.k(t, c);
          },
          dq, dk);
      x.put(s.scaled, dq);
      x.rows(K, [&](int c) {
        Real sum = 0;
        for (auto &part : s.through.part) sum += part[c];
        s.whole_chunk[c] = sum * d.whole(x, c);
      });
      x.sync();
      x.store(to.dq + rows.token * to.stride, to.stride, rows.count, s.scaled);
      x.suffix_sums(s.passing);
      x.template cells<K>(rows.count, [&](int t, int c) {
        to.dg[(rows.token + t) * to.gate_stride + c] = s.passing(t, c) + s.whole_chunk[c];
      });
      x.sync();

      // Writes to the leaving state.
      x.zero(dq);
      x.template product<false, true>(dq, s.errors, s.cotangent);
      x.finish(dq);
      x.each([&](int t, int c, Real &a) { a *= d.to_end(x, t, c); }, dq);
      x.row_sums(s.along_k, [&](int t, int c, Real a) { return a * s.k(t, c); }, dq);
      x.each(
          [&](int t, int c, Real &a, Real &b) {
            a *= d.beta[t];
            b += a;
            s.passing(t, c) = a * s.k(t, c);
          },
          dq, dk);
      x.put(s.scaled, dk);
      x.sync();
      x.store(to.dk + rows.token * to.stride, to.stride, rows.count, s.scaled);
      x.prefix_sums(s.passing);
      x.template cells<K>(rows.count, [&](int t, int c) {
        to.dg[(rows.token + t) * to.gate_stride + c] += s.passing(t, c);
      });
      x.rows(rows.count, [&](int t) {
        Real sum = 0;
        for (auto &part : s.along_k.part) sum += part[t];
        to.dbeta[(rows.token + t) * to.beta_stride] = sum;
      });
      x.sync();

      // The state: dS0 = e^(G_C) dS1 + (e^G sQ)^T dO - (e^G K)^T dV.
      x.fill(s.q, [&](int t, int c) { return scale * s.q(t, c) * d.from_start(x, t, c); });
      x.fill(s.scaled, [&](int t, int c) { return -s.k(t, c) * d.from_start(x, t, c); });
      x.each([&](int r, int, Real &a) { a *= d.whole(x, r); }, cotangent);
      x.sync();
      x.template product<true, false>(cotangent, s.q, s.d_o);
      x.template product<true, false>(cotangent, s.scaled, s.y);
      x.finish(cotangent);
    }
    x.store_state((Real *)p.dinitial + state_at, all_columns, cotangent);
  }
};

}  // namespace STOKER_ISA
}  // namespace stoker
