// Backward of Kimi Delta Attention between the tokens of a chunk, all chunks at once.
//
// It starts from what the backward through the states left (dv, and its shares of dq, dk, dg and dbeta, one for each block
// of value columns), adds the pairs', level by level, and writes the gradients of one value head.
#pragma once

#include "kda/native/chunk.h"

namespace stoker {
namespace STOKER_ISA {

template <class X, int K, int V>
struct KdaPairs {
  using Executor = X;
  using Real = typename X::Real;
  using Element = typename X::Element;
  template <int R, int C>
  using Tile = typename X::template Tile<R, C>;
  template <int R, int C>
  using Acc = typename X::template Acc<R, C>;

  struct Shared {
    Tile<kChunk, K> q, k;
    ScaledPair<X, K> scaled;
    Tile<kChunk, V> d_o, errors, dv;
    Tile<kChunk, kChunk> from_q, from_k;
    ChannelDecays<X, K> decays;
    typename X::template Plane<kChunk, K> passing, dg;
    typename X::template ColumnSums<kChunk> dbeta;
  };

  // Shares of `count` blocks side by side for this head, [N, count, K] a head; and where the head's gradients go.
  struct Shares {
    const Element *dq, *dk;
    const Real *dg, *dbeta;
    int count;
    int64_t stride, gate_stride, beta_stride;
  };
  struct Target {
    Element *dq, *dk;
    Real *dg, *dbeta;
    int64_t stride, gate_stride, beta_stride;
    bool add;  // onto the gradients of an earlier head of the group
  };

  STOKER_TILE static void run(X &x, Shared &s, const DeltaParams &p, const Rows &rows, int head, Shares from, Target to) {
    const int qk_head = head / (p.num_v_heads / p.num_qk_heads), all_columns = p.value_dim;
    const int64_t block = block_of(p, rows, head), v_stride = int64_t(p.num_v_heads) * all_columns;
    const Real scale = p.scale;
    const ChannelDecays<X, K> &d = s.decays;
    x.sync();
    x.load(s.q, (const Element *)p.q + rows.token * p.q_stride + qk_head * K, p.q_stride, rows.count);
    x.load(s.k, (const Element *)p.k + rows.token * p.k_stride + qk_head * K, p.k_stride, rows.count);
    s.decays.load(x, p, rows.token, head, rows.count);
    x.rows(kChunk, [&](int i) {
      for (auto &part : s.dbeta.part) part[i] = 0;
    });
    x.template cells<K>(kChunk, [&](int t, int c) { s.dg(t, c) = 0; });

    // dN_q = dO e^T, dN_k = -dV e^T.
    Acc<kChunk, kChunk> dn_q, dn_k, pairs;
    x.zero(dn_q);
    x.zero(dn_k);
    x.zero(pairs);
    for (int column = 0; column < all_columns; column += V) {
      const int64_t value_at = head * all_columns + column;
      x.load(s.d_o, (const Element *)p.d_o + rows.token * p.d_o_stride + value_at, p.d_o_stride, rows.count);
      x.load(s.dv, (const Element *)p.dv + rows.token * v_stride + value_at, v_stride, rows.count);
      x.load(s.errors, (const Element *)p.errors + block * kChunk * all_columns + column, all_columns, kChunk);
      x.wait_loads();
      x.sync();
      x.template product<false, true>(dn_q, s.d_o, s.errors);
      x.template product<false, true>(dn_k, s.dv, s.errors);
      x.finish(dn_q, dn_k);
      x.sync();
    }
    s.decays.prepare(x);

    Acc<kChunk, K> dq, dk;
    load_shares(x, dq, from.dq, rows, from);
    load_shares(x, dk, from.dk, rows, from);
    for_levels([&](auto level) {
      s.scaled.fill(x, level, s.q, s.k, d);
      Acc<kChunk, kChunk> n_q, n_k;
      x.zero(n_q);
      x.zero(n_k);
      x.product_level(level, n_q, s.scaled.q, s.scaled.k);
      x.product_level(level, n_k, s.scaled.k, s.scaled.k);
      x.finish(n_q, n_k);
      x.each(
          [&](int r, int i, Real &sum, Real &a, Real &b, Real da, Real db) {
            const bool reads = level.reads(r, i), reads_key = reads && level.half;
            const Real beta = d.beta[i], pair = scale * a * da - (level.half ? b * db : 0);
            const Real query = scale * da * beta, key = -db * beta;
            sum += reads ? pair : 0;
            a = reads ? query : 0;
            b = reads_key ? key : 0;
          },
          pairs, n_q, n_k, dn_q, dn_k);
      x.put(s.from_q, n_q);
      x.put(s.from_k, n_k);
      x.sync();

      Acc<kChunk, K> part;
      x.zero(part);
      x.template product_pairs<false>(level, part, s.from_q, s.scaled.k);
      x.finish(part);
      x.each(
          [&](int t, int c, Real &sum, Real a) {
            sum += a * d.across(x, level, t, c);
            if (level.half && level.later(t)) s.passing(t, c) = a * s.scaled.q(t, c);
          },
          dq, part);
      x.zero(part);
      x.template product_pairs<false>(level, part, s.from_k, s.scaled.k);
      x.finish(part);
      x.each(
          [&](int t, int c, Real &sum, Real a) {
            sum += a * d.across(x, level, t, c);
            if (level.half && level.later(t)) s.passing(t, c) += a * s.scaled.k(t, c);
          },
          dk, part);
      x.zero(part);
      x.template product_pairs<true>(level, part, s.from_q, s.scaled.q);
      x.template product_pairs<true>(level, part, s.from_k, s.scaled.k);
      x.finish(part);
      x.each(
          [&](int t, int c, Real &sum, Real a) {
            sum += a * d.across(x, level, t, c);
            if (level.half && !level.later(t)) s.passing(t, c) = a * s.scaled.k(t, c);
          },
          dk, part);
      if (level.half) {
        x.sync();
        x.half_sums(level, s.dg, s.passing);
      }
    });
    x.column_sums(s.dbeta, pairs);

    x.sync();
    put_gradient(x, s.q, dq, to.dq, rows, to);
    put_gradient(x, s.k, dk, to.dk, rows, to);
    x.sync();
    x.store(to.dq + rows.token * to.stride, to.stride, rows.count, s.q);
    x.store(to.dk + rows.token * to.stride, to.stride, rows.count, s.k);
    x.template cells<K>(rows.count, [&](int t, int c) {
      Real sum = s.dg(t, c);
      for (int i = 0; i < from.count; ++i) sum += from.dg[(rows.token + t) * from.gate_stride + i * K + c];
      to.dg[(rows.token + t) * to.gate_stride + c] = sum;
    });
    x.rows(rows.count, [&](int t) {
      Real sum = 0;
      for (auto &part : s.dbeta.part) sum += part[t];
      for (int i = 0; i < from.count; ++i) sum += from.dbeta[(rows.token + t) * from.beta_stride + i];
      to.dbeta[(rows.token + t) * to.beta_stride] = sum;
    });
  }

 private:
  STOKER_TILE static void load_shares(X &x, Acc<kChunk, K> &acc, const Element *shares, const Rows &rows, Shares from) {
    x.zero(acc);
    for (int i = 0; i < from.count; ++i)
      x.each(
          [&](int t, int c, Real &a) {
            if (t < rows.count) a += Real(shares[(rows.token + t) * from.stride + i * K + c]);
          },
          acc);
  }
  STOKER_TILE static void put_gradient(X &x, Tile<kChunk, K> &out, Acc<kChunk, K> &acc, const Element *to,
                                       const Rows &rows, const Target &t) {
    if (t.add)
      x.each([&](int r, int c, Real &a) { a += r < rows.count ? Real(to[(rows.token + r) * t.stride + c]) : 0; }, acc);
    x.put(out, acc);
  }
};

}  // namespace STOKER_ISA
}  // namespace stoker
