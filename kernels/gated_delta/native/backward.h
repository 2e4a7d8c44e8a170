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

  // What is read of a chunk, while the one before is worked on where the executor has two stages.
  struct Inputs {
    Tile<kChunk, K> q, k;
    Tile<kChunk, V> d_o;
    Decays<X> decays;
  };
  using Scratch = typename X::template Scratch<kChunk>;
  // Buffers whose lives do not meet share memory: a chunk has time for all, a GPU's block has 227 KiB.
  union Stage {
    Inputs inputs;
    Scratch scratch;  // while the stage is not loaded
  };
  struct Shared {
    Stage stages[X::kStages];
    Tile<kChunk, V> errors;
    Tile<kChunk, kChunk> solved, from_q, from_k;
    Tile<K, V> state;
    Tile<kChunk, V> y;  // then dv
    union {
      Tile<K, V> cotangent;
      struct {
        Tile<kChunk, K> dq, dk;
      } out;
    };
    GateSums<X> sums;
  };

  // Where the gradients go that several heads or blocks of columns share: [N, key_heads, K] and [N, gate_heads].
  struct Target {
    Element *dq, *dk;
    Real *dg, *dbeta;
    int key_heads, gate_heads;
  };

  // `to_key`, `to_gate`: this head's among the target's. `add`: onto what an earlier head left of dq and dk.
  STOKER_TILE static void run(X &x, Shared &s, const DeltaParams &p, int segment, int head, int column, const Target &to,
                              int to_key, int to_gate, bool add) {
    const int qk_head = head / (p.num_v_heads / p.num_qk_heads), all_columns = p.value_dim;
    auto state_at = [&] { return (int64_t(x.anew(segment)) * p.num_v_heads + head) * K * all_columns + column; };
    const Real scale = p.scale;
    const int value_at = head * all_columns + column;
    const int last = chunks_of(p, segment) - 1;
    auto load_inputs = [&](int chunk) {
      Inputs &in = s.stages[chunk % X::kStages].inputs;
      const Rows rows = rows_of(p, segment, chunk);
      load_rows<Tokens::q>(x, in.q, p, rows, qk_head * K);
      load_rows<Tokens::k>(x, in.k, p, rows, qk_head * K);
      load_rows<Tokens::d_o>(x, in.d_o, p, rows, value_at);
      in.decays.load(x, p, rows.token, head, rows.count);
    };
    auto load_saved = [&](int chunk) {
      const int64_t block = block_of(p, rows_of(p, segment, chunk), head);
      x.load_image(s.solved, (const Element *)p.solved + block * kChunk * kChunk);
      x.load_image(s.errors, (const Element *)p.errors + (block * all_columns + column) * kChunk);
      x.load_image(s.state, (const Element *)p.states + (block * all_columns + column) * K);
    };
    Acc<K, V> cotangent;
    x.load_state(cotangent, (const Real *)p.d_final + state_at(), all_columns);
    if (last >= 0) {
      load_inputs(last);
      load_saved(last);
    }
    for (int chunk = last; chunk >= 0; --chunk) {
      const Rows rows = rows_of(p, segment, chunk);
      const int64_t key_stride = int64_t(to.key_heads) * K, key_at = rows.token * key_stride + to_key * K;
      const int64_t gate_at = rows.token * to.gate_heads + to_gate;
      Inputs &in = s.stages[chunk % X::kStages].inputs;
      Decays<X> &d = in.decays;
      x.meet();
      x.put(s.cotangent, cotangent);
      s.sums.clear(x);
      x.wait_loads();
      x.sync();

      x.total_dot(s.sums.through, s.state, cotangent);

      // y = diag(beta) (N_q^T dO + e^(G_C - G) K dS1), then dV = T^T y.
      Acc<kChunk, kChunk> n_q, n_k, between;
      Acc<kChunk, V> y;
      x.template start<false, true>(n_q, in.q, in.k);
      x.template start<false, true>(n_k, in.k, in.k);
      x.template start<false, false>(y, in.k, s.cotangent);
      d.prepare(x);
      d.matrix(x, between);
      x.finish(n_q, n_k, y);
      x.each([&](int, int, Real &a, Real decay) { a *= scale * decay; }, n_q, between);
      x.each([&](int r, int i, Real &a, Real decay) { a = i < r ? a * decay : 0; }, n_k, between);
      x.each([&](int r, int, Real &a) { a *= d.to_end[r]; }, y);
      x.put(s.from_q, n_q);
      x.sync();

      Acc<kChunk, kChunk> dn_q, dn_k;  // of the pairs inside the chunk: dN_q = dO e^T, dN_k = -dV e^T
      x.template product<true, false>(y, s.from_q, in.d_o);
      x.template start<false, true>(dn_q, in.d_o, s.errors);
      x.finish(y, dn_q);
      x.each([&](int r, int, Real &a) { a *= d.beta[r]; }, y);
      x.put(s.y, y);
      x.sync();

      x.template product<true, false>(y, s.solved, s.y);
      x.each(
          [&](int r, int i, Real &a, Real &da, Real decay) {
            a *= da;
            da *= scale * d.again(x, r, i, decay) * d.beta[i];
          },
          n_q, dn_q, between);
      x.put(s.from_q, dn_q);
      x.finish(y);
      x.meet();
      x.put(s.y, y);
      x.sync();

      // The products of dN with N hold the gates' gradients. Beside it the keys, through the leaving state that they write.
      Acc<kChunk, K> dk;
      x.template start<false, true>(dn_k, s.y, s.errors);
      x.template start<false, true>(dk, s.errors, s.cotangent);
      x.store((Element *)p.dv + rows.token * p.num_v_heads * all_columns + value_at,
              int64_t(p.num_v_heads) * all_columns, rows.count, s.y);
      x.finish(dn_k, dk);
      x.each([&](int, int, Real &a, Real b, Real db) { a -= b * db; }, n_q, n_k, dn_k);
      x.column_sums(s.sums.dbeta, n_q);
      x.each([&](int, int i, Real &a) { a *= d.beta[i]; }, n_q);
      x.passing_sums(s.sums.dg, n_q, s.stages[(chunk + 1) % X::kStages].scratch);
      x.each([&](int r, int i, Real &a, Real decay) { a = i < r ? -a * d.again(x, r, i, decay) * d.beta[i] : 0; }, dn_k,
             between);
      x.put(s.from_k, dn_k);
      x.sync();

      // Queries and keys, through the entering state that they read.
      if (X::kStages > 1 && chunk) load_inputs(chunk - 1);
      Acc<kChunk, K> dq, by_reading;
      x.template start<false, true>(dq, in.d_o, s.state);
      x.template start<false, true>(by_reading, s.y, s.state);
      x.each([&](int r, int, Real &a) { a *= d.to_end[r]; }, dk);
      x.row_dots(s.sums.along_k, in.k, dk);
      x.finish(dq, by_reading);
      x.each([&](int r, int, Real &a) { a *= scale * d.from_start[r]; }, dq);
      x.row_dots(s.sums.along_z, in.q, dq);
      x.each([&](int r, int, Real &a) { a *= -d.from_start[r]; }, by_reading);
      x.row_dots(s.sums.along_z, in.k, by_reading);
      x.each([&](int r, int, Real &a, Real b) { a = a * d.beta[r] + b; }, dk, by_reading);
      x.meet();

      // And through the pairs.
      if (X::kStages > 1 && chunk) load_saved(chunk - 1);
      x.template product<false, false>(dq, s.from_q, in.k);
      x.template product<false, false>(dk, s.from_k, in.k);
      x.template product<true, false>(dk, s.from_k, in.k);
      x.template product<true, false>(dk, s.from_q, in.q);
      x.scale_rows(in.d_o, [&](int r) { return scale * d.from_start[r]; });
      x.scale_rows(s.y, [&](int r) { return -d.from_start[r]; });
      s.sums.finish(x, d);
      x.each([&](int, int, Real &a) { a *= d.whole(); }, cotangent);
      x.finish(dq, dk);
      if (add) {
        add_rows(x, dq, to.dq + key_at, key_stride, rows.count);
        add_rows(x, dk, to.dk + key_at, key_stride, rows.count);
      }
      x.put(s.out.dq, dq);
      x.put(s.out.dk, dk);
      x.sync();

      // The state: dS0 = e^(G_C) dS1 + (e^G sQ)^T dO - (e^G K)^T dV.
      x.template product<true, false>(cotangent, in.q, in.d_o);
      x.template product<true, false>(cotangent, in.k, s.y);
      x.store(to.dq + key_at, key_stride, rows.count, s.out.dq);
      x.store(to.dk + key_at, key_stride, rows.count, s.out.dk);
      s.sums.store(x, to.dg + gate_at, to.dbeta + gate_at, to.gate_heads, rows.count);
      x.finish(cotangent);
      if (X::kStages == 1 && chunk) {
        load_inputs(chunk - 1);
        load_saved(chunk - 1);
      }
    }
    x.store_state((Real *)p.dinitial + state_at(), all_columns, cotangent);
  }

 private:
  STOKER_TILE static void add_rows(X &x, Acc<kChunk, K> &acc, const Element *from, int64_t stride, int rows) {
    x.each([&](int r, int c, Real &a) { a += r < rows ? Real(from[r * stride + c]) : 0; }, acc);
  }
};

}  // namespace STOKER_ISA
}  // namespace stoker
