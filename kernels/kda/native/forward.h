// The scan of Kimi Delta Attention: one segment of one value head and one block of value columns, chunk after chunk.
#pragma once

#include "kda/native/chunk.h"

namespace stoker {
namespace STOKER_ISA {

template <class X, int K, int V>
struct KdaForward {
  using Executor = X;
  using Real = typename X::Real;
  using Element = typename X::Element;
  template <int R, int C>
  using Tile = typename X::template Tile<R, C>;
  template <int R, int C>
  using Acc = typename X::template Acc<R, C>;

  struct Shared {
    Tile<kChunk, K> q, k, read, write;  // q and read: as decayed since the entering state; write: until the leaving one
    Tile<kChunk, V> v, right, errors;   // right: V - e^G K S0, then o on its way out
    Tile<kChunk, kChunk> solved, within;
    Tile<K, V> state;
    ChannelDecays<X, K> decays;
  };

  STOKER_TILE static void run(X &x, Shared &s, const DeltaParams &p, int segment, int head, int column) {
    const int qk_head = head / (p.num_v_heads / p.num_qk_heads), all_columns = p.value_dim;
    const int64_t state_at = (int64_t(segment) * p.num_v_heads + head) * K * all_columns + column;
    const int64_t value_at = head * all_columns + column;
    const Real scale = p.scale;
    const ChannelDecays<X, K> &d = s.decays;
    Acc<K, V> state;
    x.load_state(state, p.initial ? (const Real *)p.initial + state_at : nullptr, all_columns);
    for (int chunk = 0, end = chunks_of(p, segment); chunk < end; ++chunk) {
      const Rows rows = rows_of(p, segment, chunk);
      const int64_t block = block_of(p, rows, head);
      const Element *pairs = (const Element *)p.solved + block * 2 * kChunk * kChunk;
      x.sync();
      x.load(s.q, (const Element *)p.q + rows.token * p.q_stride + qk_head * K, p.q_stride, rows.count);
      x.load(s.k, (const Element *)p.k + rows.token * p.k_stride + qk_head * K, p.k_stride, rows.count);
      x.load(s.v, (const Element *)p.v + rows.token * p.v_stride + value_at, p.v_stride, rows.count);
      x.load(s.solved, pairs, kChunk, kChunk);
      x.load(s.within, pairs + kChunk * kChunk, kChunk, kChunk);
      s.decays.load(x, p, rows.token, head, rows.count);
      x.put(s.state, state);
      x.wait_loads();
      x.sync();
      s.decays.prepare(x);
      x.fill(s.read, [&](int t, int c) { return s.k(t, c) * d.from_start(x, t, c); });
      x.fill(s.write, [&](int t, int c) { return s.k(t, c) * d.to_end(x, t, c); });
      x.fill(s.q, [&](int t, int c) { return scale * s.q(t, c) * d.from_start(x, t, c); });
      x.sync();
      if (p.save) x.store((Element *)p.states + block * K * all_columns + column, all_columns, K, s.state);

      Acc<kChunk, V> errors;
      x.zero(errors);
      x.template product<false, false>(errors, s.read, s.state);
      x.finish(errors);
      x.each([&](int r, int c, Real &a) { a = s.v(r, c) - a; }, errors);
      x.put(s.right, errors);
      x.sync();

      x.template product<false, false>(errors, s.solved, s.right);
      Acc<kChunk, V> out;
      x.zero(out);
      x.template product<false, false>(out, s.q, s.state);
      x.finish(errors, out);
      if (p.save) {
        x.put(s.errors, errors);
        x.sync();
        x.store((Element *)p.errors + block * kChunk * all_columns + column, all_columns, kChunk, s.errors);
        x.sync();
      }
      x.each([&](int r, int, Real &a) { a *= d.beta[r]; }, errors);
      x.put(s.errors, errors);
      x.each([&](int r, int, Real &a) { a *= d.whole(x, r); }, state);
      x.sync();

      x.template product<false, false>(out, s.within, s.errors);
      x.template product<true, false>(state, s.write, s.errors);
      x.finish(out, state);
      x.put(s.right, out);
      x.sync();
      x.store((Element *)p.o + rows.token * p.o_stride + value_at, p.o_stride, rows.count, s.right);
    }
    x.store_state((Real *)p.final + state_at, all_columns, state);
  }
};

}  // namespace STOKER_ISA
}  // namespace stoker
