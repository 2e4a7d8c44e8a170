// Backward of the gated delta rule: one segment of one value head (and one block of value columns), last chunk first.
//
// Formulas and names: kernels/gated_delta/chunked.py. y is the cotangent of e, `cotangent` that of the state a chunk
// leaves behind, turned into that of the state it entered with.
#pragma once

#include "gated_delta/native/chunk.h"

namespace stoker {
namespace STOKER_ISA {

template <class X, int K, int V>
struct GatedDeltaBackward {
  using Executor = X;
  using Real = typename X::Real;
  using Element = typename X::Element;
  template <int R, int C>
  using Tile = typename X::template Tile<R, C>;
  template <int R, int C>
  using Acc = typename X::template Acc<R, C>;

  struct Shared {
    Tile<kChunk, K> q, k, out;       // out: dq, then dk, on their way out
    Tile<kChunk, V> d_o, errors, y;  // y: then dv
    Tile<kChunk, kChunk> solved, from_q, from_k;
    Tile<K, V> state, cotangent;
    Decays<X> decays;
    GateSums<X> sums;
    typename X::template Scratch<kChunk> scratch;
  };

  // Where the gradients go that several heads or blocks of columns share. `add`: onto what an earlier one left there.
  struct Target {
    Element *dq, *dk;
    Real *dg, *dbeta;
    int64_t stride, gate_stride;
    bool add;
  };

  // Gradients of g for one head of one token.
  STOKER_BOTH static int gates(const DeltaParams &) { return 1; }

  STOKER_TILE static void run(X &x, Shared &s, const DeltaParams &p, int segment, int head, int column, Target to) {
    const int qk_head = head / (p.num_v_heads / p.num_qk_heads), all_columns = p.value_dim;
    const int64_t state_at = (int64_t(segment) * p.num_v_heads + head) * K * all_columns + column;
    const Real scale = p.scale;
    const Decays<X> &d = s.decays;
    Acc<K, V> cotangent;
    x.load_state(cotangent, (const Real *)p.d_final + state_at, all_columns);
    for (int chunk = chunks_of(p, segment) - 1; chunk >= 0; --chunk) {
      const Rows rows = rows_of(p, segment, chunk);
      const int64_t block = block_of(p, rows, head);
      const int64_t value_at = head * all_columns + column;
      x.sync();
      x.load(s.q, (const Element *)p.q + rows.token * p.q_stride + qk_head * K, p.q_stride, rows.count);
      x.load(s.k, (const Element *)p.k + rows.token * p.k_stride + qk_head * K, p.k_stride, rows.count);
      x.load(s.d_o, (const Element *)p.d_o + rows.token * p.d_o_stride + value_at, p.d_o_stride, rows.count);
      x.load(s.solved, (const Element *)p.solved + block * kChunk * kChunk, kChunk, kChunk);
      x.load(s.errors, (const Element *)p.errors + block * kChunk * all_columns + column, all_columns, kChunk);
      x.load(s.state, (const Element *)p.states + block * K * all_columns + column, all_columns, K);
      x.put(s.cotangent, cotangent);
      s.sums.clear(x);
      s.decays.load(x, p, rows.token, head, rows.count);
      x.wait_loads();
      x.sync();
      s.decays.prepare(x);
      Acc<kChunk, kChunk> between;
      d.matrix(x, between);

      // y = diag(beta) (N_q^T dO + e^(G_C - G) K dS1), then dV = T^T y.
      Acc<kChunk, kChunk> n_q, n_k;
      x.zero(n_q);
      x.zero(n_k);
      x.template product<false, true>(n_q, s.q, s.k);
      x.template product<false, true>(n_k, s.k, s.k);
      Acc<kChunk, V> y;
      x.zero(y);
      x.template product<false, false>(y, s.k, s.cotangent);
      x.finish(n_q, n_k, y);
      x.each([&](int, int, Real &a, Real decay) { a *= scale * decay; }, n_q, between);
      x.each([&](int r, int i, Real &a, Real decay) { a = i < r ? a * decay : 0; }, n_k, between);
      x.each([&](int r, int, Real &a) { a *= d.to_end[r]; }, y);
      x.put(s.from_q, n_q);
      x.sync();
      x.template product<true, false>(y, s.from_q, s.d_o);
      x.finish(y);
      x.each([&](int r, int, Real &a) { a *= d.beta[r]; }, y);
      x.put(s.y, y);
      x.sync();
      x.zero(y);
      x.template product<true, false>(y, s.solved, s.y);
      x.finish(y);
      x.sync();
      x.put(s.y, y);
      x.sync();
      x.store((Element *)p.dv + rows.token * p.num_v_heads * all_columns + value_at, int64_t(p.num_v_heads) * all_columns, rows.count, s.y);

      // Pairs of tokens inside the chunk: dN_q = dO e^T, dN_k = -dV e^T, whose products with N hold the gates' gradients.
      Acc<kChunk, kChunk> dn_q, dn_k;
      x.zero(dn_q);
      x.zero(dn_k);
      x.template product<false, true>(dn_q, s.d_o, s.errors);
      x.template product<false, true>(dn_k, s.y, s.errors);
      x.finish(dn_q, dn_k);
      x.each([&](int, int, Real &a, Real b, Real da, Real db) { a = a * da - b * db; }, n_q, n_k, dn_q, dn_k);
      x.column_sums(s.sums.dbeta, n_q);
      x.each([&](int, int i, Real &a) { a *= d.beta[i]; }, n_q);
      x.passing_sums(s.sums.dg, n_q, s.scratch);
      x.each([&](int, int i, Real &a, Real decay) { a *= scale * decay * d.beta[i]; }, dn_q, between);
      x.each([&](int r, int i, Real &a, Real decay) { a = i < r ? -a * decay * d.beta[i] : 0; }, dn_k, between);
      x.put(s.from_q, dn_q);
      x.put(s.from_k, dn_k);

      // Queries: through the entering state and through the pairs.
      Acc<kChunk, K> dz;
      x.zero(dz);
      x.template product<false, true>(dz, s.d_o, s.state);
      x.finish(dz);
      x.each([&](int r, int, Real &a) { a *= scale * d.from_start[r]; }, dz);
      x.row_sums(s.sums.along_z, [&](int r, int c, Real a) { return a * s.q(r, c); }, dz);
      x.sync();
      x.template product<false, false>(dz, s.from_q, s.k);
      x.finish(dz);
      put_gradient(x, s, dz, to.dq, rows, to);
      x.sync();
      x.store(to.dq + rows.token * to.stride, to.stride, rows.count, s.out);

      // Keys: through the leaving state, scaled by beta, the entering state, and the pairs on both sides.
      Acc<kChunk, K> dk;
      x.zero(dk);
      x.zero(dz);
      x.template product<false, true>(dk, s.errors, s.cotangent);
      x.template product<false, true>(dz, s.y, s.state);
      x.finish(dk, dz);
      x.each([&](int r, int, Real &a) { a *= d.to_end[r]; }, dk);
      x.row_sums(s.sums.along_k, [&](int r, int c, Real a) { return a * s.k(r, c); }, dk);
      x.each([&](int r, int, Real &a) { a *= -d.from_start[r]; }, dz);
      x.row_sums(s.sums.along_z, [&](int r, int c, Real a) { return a * s.k(r, c); }, dz);
      x.each([&](int r, int, Real &a, Real b) { a = a * d.beta[r] + b; }, dk, dz);
      x.template product<false, false>(dk, s.from_k, s.k);
      x.template product<true, false>(dk, s.from_k, s.k);
      x.template product<true, false>(dk, s.from_q, s.q);
      x.total(s.sums.through, [&](int r, int c, Real a) { return a * s.state(r, c); }, cotangent);
      x.finish(dk);
      x.sync();
      put_gradient(x, s, dk, to.dk, rows, to);
      s.sums.finish(x, d);

      // The state: dS0 = e^(G_C) dS1 + (e^G sQ)^T dO - (e^G K)^T dV.
      x.scale_rows(s.d_o, [&](int r) { return scale * d.from_start[r]; });
      x.scale_rows(s.y, [&](int r) { return -d.from_start[r]; });
      x.each([&](int, int, Real &a) { a *= d.whole(); }, cotangent);
      x.sync();
      x.store(to.dk + rows.token * to.stride, to.stride, rows.count, s.out);
      s.sums.store(x, to.dg + rows.token * to.gate_stride, to.dbeta + rows.token * to.gate_stride, to.gate_stride,
                   rows.count);
      x.template product<true, false>(cotangent, s.q, s.d_o);
      x.template product<true, false>(cotangent, s.k, s.y);
      x.finish(cotangent);
    }
    x.store_state((Real *)p.dinitial + state_at, all_columns, cotangent);
  }

 private:
  STOKER_TILE static void put_gradient(X &x, Shared &s, Acc<kChunk, K> &acc, const Element *to, const Rows &rows, const Target &t) {
    if (t.add)
      x.each([&](int r, int c, Real &a) { a += r < rows.count ? Real(to[(rows.token + r) * t.stride + c]) : 0; }, acc);
    x.put(s.out, acc);
  }
};

}  // namespace STOKER_ISA
}  // namespace stoker
