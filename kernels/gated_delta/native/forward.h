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
    Tile<kChunk, V> right, errors, written;  // right: V - e^G K S0, then o on its way out
    Tile<kChunk, kChunk> within;
    Tile<K, V> state;
    std::conditional_t<SolveHere, typename X::template Scratch<kChunk>, char> scratch;
  };

  // Columns [column, column + V) of the values.
  STOKER_TILE static void run(X &x, Shared &s, const DeltaParams &p, int segment, int head, int column) {
    const int qk_head = head / (p.num_v_heads / p.num_qk_heads), all_columns = p.value_dim;
    auto state_at = [&] { return (int64_t(x.anew(segment)) * p.num_v_heads + head) * K * all_columns + column; };
    const int value_at = head * all_columns + column;
    const Real scale = p.scale;
    Acc<K, V> state;
    x.load_state(state, p.initial ? (const Real *)p.initial + state_at() : nullptr, all_columns);
    const int end = chunks_of(p, segment);
    auto load = [&](int chunk) {
      Inputs &in = s.stages[chunk % X::kStages];
      const Rows rows = rows_of(p, segment, chunk);
      load_rows<Tokens::q>(x, in.q, p, rows, qk_head * K);
      load_rows<Tokens::k>(x, in.k, p, rows, qk_head * K);
      load_rows<Tokens::v>(x, in.v, p, rows, value_at);
      if constexpr (!SolveHere)
        x.load_image(in.solved, (const Element *)p.solved + block_of(p, rows, head) * kChunk * kChunk);
      in.decays.load(x, p, rows.token, head, rows.count);
    };
    auto leave = [&](int chunk) {
      const Rows rows = rows_of(p, segment, chunk);
      x.store((Element *)p.o + rows.token * p.o_stride + value_at, p.o_stride, rows.count, s.right);
    };
    if (end) load(0);
    for (int chunk = 0; chunk < end; ++chunk) {
      Inputs &in = s.stages[chunk % X::kStages];
      Decays<X> &d = in.decays;
      const int64_t block = block_of(p, rows_of(p, segment, chunk), head);
      x.wait_loads();
      x.put(s.state, state);
      x.sync();
      if (X::kStages > 1 && chunk + 1 < end) load(chunk + 1);
      if (chunk) leave(chunk - 1);

      // Reads of the entering state and pairs of tokens, while the decays are made.
      Acc<kChunk, V> errors, out;
      Acc<kChunk, kChunk> within, between;
      x.template start<false, false>(errors, in.k, s.state);
      x.template start<false, false>(out, in.q, s.state);
      x.template start<false, true>(within, in.q, in.k);
      d.prepare(x);
      d.matrix(x, between);
      if constexpr (SolveHere) {
        solve<X, K>(x, in.solved, in.k, between, d.beta, s.scratch);
        if (p.save) x.store_image((Element *)p.solved + block * kChunk * kChunk, in.solved);
      }
      if (p.save) x.store_image((Element *)p.states + (block * all_columns + column) * K, s.state);
      x.finish(errors, out, within);
      x.each_with(in.v, [&](int r, int, Real v, Real &a) { a = v - d.from_start[r] * a; }, errors);
      x.put(s.right, errors);
      x.each([&](int, int i, Real &a, Real decay) { a *= scale * decay * d.beta[i]; }, within, between);
      x.put(s.within, within);
      x.sync();

      x.template product<false, false>(errors, in.solved, s.right);
      x.each([&](int r, int, Real &a) { a *= scale * d.from_start[r]; }, out);
      x.each([&](int, int, Real &a) { a *= d.whole(); }, state);
      x.finish(errors);
      x.put(s.errors, errors);
      x.each([&](int r, int, Real &a) { a *= d.to_end[r] * d.beta[r]; }, errors);
      x.put(s.written, errors);
      x.sync();

      x.template product<false, false>(out, s.within, s.errors);
      x.template product<true, false>(state, in.k, s.written);
      if (p.save) x.store_image((Element *)p.errors + (block * all_columns + column) * kChunk, s.errors);
      x.finish(out, state);
      x.put(s.right, out);
      if (X::kStages == 1 && chunk + 1 < end) load(chunk + 1);
    }
    x.meet();
    if (end) leave(end - 1);
    x.store_state((Real *)p.final + state_at(), all_columns, state);
  }
};

}  // namespace STOKER_ISA
}  // namespace stoker
