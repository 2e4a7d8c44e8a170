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
  using Strip = typename X::template Strips<K>;

  struct Shared {
    Tile<kChunk, K> q, k;
    Tile<kChunk, kChunk> from_q, from_k, reads_q, reads_k;  // cotangents of N_q and N_k; these times beta of the key
    union {
      struct {
        Tile<kChunk, V> d_o, errors, dv;
      } values;
      typename X::template TriangleGradient<K> triangle;
    };
    typename X::template Vector<kChunk> beta;
    typename X::template TokenSums<kChunk> dbeta;
  };

  struct Target {
    Element *dq, *dk;
    Real *dg, *dbeta;
    int64_t stride, gate_stride, beta_stride;
    bool add;  // dq and dk onto those of an earlier head of the group
  };

  // shares(i): those of block i of `blocks`; target(): called late, or its pointers would fill registers all the time.
  template <class SharesOf, class TargetOf>
  STOKER_TILE static void run(X &x, Shared &s, const DeltaParams &p, const Rows &rows, int head, int blocks, SharesOf shares,
                              TargetOf target) {
    const int qk_head = head / (p.num_v_heads / p.num_qk_heads), all_columns = p.value_dim;
    const int64_t block = block_of(p, rows, head);
    const int64_t gate = rows.token * p.num_v_heads + head;
    const Real scale = p.scale;
    x.meet();
    load_rows<Tokens::q>(x, s.q, p, rows, qk_head * K);
    load_rows<Tokens::k>(x, s.k, p, rows, qk_head * K);
    x.load_vector(s.beta, (const Real *)p.beta + gate, p.num_v_heads, rows.count);
    x.rows(kChunk, [&](int i) {
      for (auto &part : s.dbeta.part) part[i] = 0;
    });

    // dN_q = dO e^T, dN_k = -dV e^T.
    {
      typename X::template Acc<kChunk, kChunk> dn_q, dn_k;
      x.zero(dn_q);
      x.zero(dn_k);
      for (int column = 0; column < all_columns; column += V) {
        const int value_at = head * all_columns + column;
        auto &v = s.values;
        load_rows<Tokens::d_o>(x, v.d_o, p, rows, value_at);
        load_rows<Tokens::dv>(x, v.dv, p, rows, value_at);
        x.load_image(v.errors, (const Element *)p.errors + (block * all_columns + column) * kChunk);
        x.wait_loads();
        x.sync();
        x.template product<false, true>(dn_q, v.d_o, v.errors);
        x.template product<false, true>(dn_k, v.dv, v.errors);
        x.finish(dn_q, dn_k);
        x.meet();
      }
      x.each(
          [&](int r, int i, Real &a, Real &b) {
            a = i <= r ? scale * a : 0;
            b = i < r ? -b : 0;
          },
          dn_q, dn_k);
      x.put(s.from_q, dn_q);
      x.put(s.from_k, dn_k);
      x.each([&](int, int i, Real &a, Real &b) { a *= s.beta[i], b *= s.beta[i]; }, dn_q, dn_k);
      x.put(s.reads_q, dn_q);
      x.put(s.reads_k, dn_k);
    }
    x.meet();

    Strip dq, dk, dg;
    x.template zero_strip<K>(dq);
    x.template zero_strip<K>(dk);
    x.template zero_strip<K>(dg);
    s.triangle.add(x, dq, dk, dg, s.dbeta, s.q, s.k, s.from_q, s.from_k, s.reads_q, s.reads_k, s.beta,
                   (const Real *)p.g + gate * K, int64_t(p.num_v_heads) * K, rows.count);
    const Target to = target();
    for (int i = 0; i < blocks; ++i) {
      const KdaShares<X> share = shares(i);
      x.template recall<K>(dq, share.dq);
      x.template recall<K>(dk, share.dk);
      x.template recall<K>(dg, share.dg);
    }
    if (to.add) {
      x.template add_strip<K>(dq, to.dq + rows.token * to.stride, to.stride, rows.count);
      x.template add_strip<K>(dk, to.dk + rows.token * to.stride, to.stride, rows.count);
    }
    x.template store_strip<K>(to.dq + rows.token * to.stride, to.stride, rows.count, dq);
    x.template store_strip<K>(to.dk + rows.token * to.stride, to.stride, rows.count, dk);
    x.template store_strip<K>(to.dg + rows.token * to.gate_stride, to.gate_stride, rows.count, dg);
    x.meet();
    x.rows(rows.count, [&](int t) {
      Real sum = 0;
      for (auto &part : s.dbeta.part) sum += part[t];
      for (int i = 0; i < blocks; ++i) sum += shares(i).dbeta[t];
      to.dbeta[(rows.token + t) * to.beta_stride] = sum;
    });
  }
};

}  // namespace STOKER_ISA
}  // namespace stoker
