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
  using Channels = typename X::template Channels<K>;

  struct Shared {
    Tile<kChunk, K> q, k;
    // q and k decayed since the entering state; beta k until the leaving one.
    typename X::template ChannelTile<K> query, read, write;
    Tile<kChunk, V> v, right, errors;                        // right: V - e^G K S0, then o on its way out
    Tile<kChunk, kChunk> solved, within[2];                  // within: of even and odd chunks
    Tile<K, V> state;
    typename X::template Gates<K> gates;
    typename X::template Vector<kChunk> beta;
    typename X::template Vector<K> whole;  // e^G_C
  };

  STOKER_TILE static void run(X &x, Shared &s, const DeltaParams &p, int segment, int head, int column) {
    const int qk_head = head / (p.num_v_heads / p.num_qk_heads), all_columns = p.value_dim;
    auto state_at = [&] { return (int64_t(x.anew(segment)) * p.num_v_heads + head) * K * all_columns + column; };
    const int value_at = head * all_columns + column;
    const Real scale = p.scale;
    constexpr bool by_channel = X::kChannelsFirst;
    Acc<K, V> state;
    x.load_state(state, p.initial ? (const Real *)p.initial + state_at() : nullptr, all_columns);
    const int end = chunks_of(p, segment);
    // Loads of a chunk begin where the one before it has read a tile for the last time.
    auto load_tokens = [&](int chunk) {
      const Rows rows = rows_of(p, segment, chunk);
      load_rows<Tokens::q>(x, s.q, p, rows, qk_head * K);
      load_rows<Tokens::k>(x, s.k, p, rows, qk_head * K);
      const int64_t gate = rows.token * p.num_v_heads + head;
      x.load_gates(s.gates, (const Real *)p.g + gate * K, int64_t(p.num_v_heads) * K, rows.count);
      x.load_vector(s.beta, (const Real *)p.beta + gate, p.num_v_heads, rows.count);
    };
    auto load_pairs = [&](int chunk) {
      const Rows rows = rows_of(p, segment, chunk);
      const Element *pairs = (const Element *)p.solved + block_of(p, rows, head) * 2 * kChunk * kChunk;
      load_rows<Tokens::v>(x, s.v, p, rows, value_at);
      x.load_image(s.solved, pairs);
      x.load_image(s.within[chunk % 2], pairs + kChunk * kChunk);
    };
    if (end) {
      load_tokens(0);
      load_pairs(0);
    }
    for (int chunk = 0; chunk < end; ++chunk) {
      const Rows rows = rows_of(p, segment, chunk);
      const int64_t block = block_of(p, rows, head);
      x.wait_loads();
      x.meet();
      x.put(s.state, state);
      decay(x, s, scale);
      x.sync();
      if (chunk + 1 < end) load_tokens(chunk + 1);
      if (p.save) x.store_image((Element *)p.states + (block * all_columns + column) * K, s.state);

      Acc<kChunk, V> errors, out;
      x.template start<by_channel, false>(errors, s.read, s.state);
      x.finish(errors);
      x.each_with(s.v, [&](int, int, Real v, Real &a) { a = v - a; }, errors);
      x.put(s.right, errors);
      x.sync();

      x.template product<false, false>(errors, s.solved, s.right);
      x.template start<by_channel, false>(out, s.query, s.state);
      x.finish(errors, out);
      x.put(s.errors, errors);
      x.each([&](int r, int, Real &a) { a *= s.whole[r]; }, state);
      x.sync();
      if (chunk + 1 < end) load_pairs(chunk + 1);
      if (p.save) x.store_image((Element *)p.errors + (block * all_columns + column) * kChunk, s.errors);

      x.template product<false, false>(out, s.within[chunk % 2], s.errors);
      x.template product<!by_channel, false>(state, s.write, s.errors);
      x.finish(out, state);
      x.put(s.right, out);
      x.meet();
      x.store((Element *)p.o + rows.token * p.o_stride + value_at, p.o_stride, rows.count, s.right);
    }
    x.store_state((Real *)p.final + state_at(), all_columns, state);
  }

 private:
  STOKER_TILE static void decay(X &x, Shared &s, Real scale) {
    Channels from_start, to_end, z;
    x.decays(from_start, to_end, s.whole, s.gates);
    x.take(z, s.q);
    each_channel(x, [&](int, int, Real &a, Real decay) { a *= scale * decay; }, z, from_start);
    x.put(s.query, z);
    x.take(z, s.k);
    each_channel(
        x, [&](int t, int, Real a, Real &read, Real &write) { read *= a, write *= s.beta[t] * a; }, z, from_start, to_end);
    x.put(s.read, from_start);
    x.put(s.write, to_end);
  }
};

}  // namespace STOKER_ISA
}  // namespace stoker
