// Forward of the gated delta rule: one segment of one value head (and one block of value columns), chunk after chunk.
#pragma once

#include <type_traits>

#include "gated_delta/native/chunk.h"

namespace stoker {
namespace STOKER_ISA {

// SolveHere: T is made on the way instead of read from the workspace.
template <class X, int K, int V, bool SolveHere>
struct GatedDeltaForward {
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
    Tile<kChunk, V> v;
    Tile<kChunk, kChunk> solved;
    Decays<X> decays;
  };
  struct Shared {
    Inputs stages[X::kStages];
    Tile<kChunk, V> right, errors;  // right: V - e^G K S0, then o on its way out
    Tile<kChunk, kChunk> within;
    Tile<K, V> state;
    std::conditional_t<SolveHere, typename X::template Scratch<kChunk>, char> scratch;
  };

  // Columns [column, column + V) of the values.
  STOKER_TILE static void run(X &x, Shared &s, const DeltaParams &p, int segment, int head, int column) {
    const int qk_head = head / (p.num_v_heads / p.num_qk_heads), all_columns = p.value_dim;
    const int64_t state_at = (int64_t(segment) * p.num_v_heads + head) * K * all_columns + column;
    const int64_t value_at = head * all_columns + column;
    const Real scale = p.scale;
    Acc<K, V> state;
    x.load_state(state, p.initial ? (const Real *)p.initial + state_at : nullptr, all_columns);
    const int end = chunks_of(p, segment);
    auto load = [&](int chunk) {
      Inputs &in = s.stages[chunk % X::kStages];
      const Rows rows = rows_of(p, segment, chunk);
      x.load(in.q, (const Element *)p.q + rows.token * p.q_stride + qk_head * K, p.q_stride, rows.count);
      x.load(in.k, (const Element *)p.k + rows.token * p.k_stride + qk_head * K, p.k_stride, rows.count);
      x.load(in.v, (const Element *)p.v + rows.token * p.v_stride + value_at, p.v_stride, rows.count);
      if constexpr (!SolveHere)
        x.load(in.solved, (const Element *)p.solved + block_of(p, rows, head) * kChunk * kChunk, kChunk, kChunk);
      in.decays.load(x, p, rows.token, head, rows.count);
    };
    if (end) load(0);
    for (int chunk = 0; chunk < end; ++chunk) {
      Inputs &in = s.stages[chunk % X::kStages];
      Decays<X> &d = in.decays;
      const Rows rows = rows_of(p, segment, chunk);
      const int64_t block = block_of(p, rows, head);
      x.wait_loads();
      x.put(s.state, state);
      x.sync();
      if (X::kStages > 1 && chunk + 1 < end) load(chunk + 1);
      d.prepare(x);

      Acc<kChunk, kChunk> between, within;
      d.matrix(x, between);
      if constexpr (SolveHere) {
        solve<X, K>(x, in.solved, in.k, between, d.beta, s.scratch);
        if (p.save) x.store((Element *)p.solved + block * kChunk * kChunk, kChunk, kChunk, in.solved);
      }
      if (p.save) x.store((Element *)p.states + block * K * all_columns + column, all_columns, K, s.state);

      Acc<kChunk, V> errors;
      x.zero(errors);
      x.template product<false, false>(errors, in.k, s.state);
      x.finish(errors);
      x.each([&](int r, int c, Real &a) { a = in.v(r, c) - d.from_start[r] * a; }, errors);
      x.put(s.right, errors);

      x.zero(within);
      x.template product<false, true>(within, in.q, in.k);
      x.finish(within);
      x.each([&](int, int i, Real &a, Real decay) { a *= scale * decay * d.beta[i]; }, within, between);
      x.put(s.within, within);
      x.sync();

      x.zero(errors);
      x.template product<false, false>(errors, in.solved, s.right);
      Acc<kChunk, V> out;
      x.zero(out);
      x.template product<false, false>(out, in.q, s.state);
      x.finish(errors, out);
      x.put(s.errors, errors);
      x.each([&](int r, int, Real &a) { a *= scale * d.from_start[r]; }, out);
      x.sync();

      if (p.save) x.store((Element *)p.errors + block * kChunk * all_columns + column, all_columns, kChunk, s.errors);
      x.template product<false, false>(out, s.within, s.errors);
      x.finish(out);
      x.sync();
      x.put(s.right, out);
      x.each([&](int r, int, Real &a) { a *= d.to_end[r] * d.beta[r]; }, errors);
      x.put(s.errors, errors);
      x.each([&](int, int, Real &a) { a *= d.whole(); }, state);
      x.sync();

      x.store((Element *)p.o + rows.token * p.o_stride + value_at, p.o_stride, rows.count, s.right);
      x.template product<true, false>(state, in.k, s.errors);
      x.finish(state);
      if (X::kStages == 1 && chunk + 1 < end) load(chunk + 1);
    }
    x.store_state((Real *)p.final + state_at, all_columns, state);
  }
};

}  // namespace STOKER_ISA
}  // namespace stoker
