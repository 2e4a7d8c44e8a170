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
  using Channels = typename X::template Channels<K>;
  using ChannelTile = typename X::template ChannelTile<K>;

  struct Shared {
    Tile<kChunk, K> q, k;
    ChannelTile write_query;  // beta k decayed to the end, then q decayed from the start
    union {
      struct {
        Tile<kChunk, kChunk> solved, within;
      } pairs;
      ChannelTile read;  // -k decayed from the start, once dv is made
    };
    Tile<kChunk, V> d_o, errors, y;  // y: then dv
    Tile<K, V> state, cotangent;
    typename X::template Gates<K> gates;
    typename X::template Vector<kChunk> beta;
    typename X::template TokenSums<kChunk> along_k;
    typename X::template RowSums<K> through;  // <dS1, S0> by channel, in parts
    typename X::template Vector<K> whole;     // e^G_C
  };

  // shares(chunk): where this block's of a chunk go; asked for late, or its pointers would fill registers all the time.
  template <class SharesOf>
  STOKER_TILE static void run(X &x, Shared &s, const DeltaParams &p, int segment, int head, int column, SharesOf shares) {
    const int all_columns = p.value_dim;
    auto qk_head = [&] { return x.anew(head) / (p.num_v_heads / p.num_qk_heads); };
    auto state_at = [&] { return (int64_t(x.anew(segment)) * p.num_v_heads + head) * K * all_columns + column; };
    const int value_at = head * all_columns + column;
    const Real scale = p.scale;
    constexpr bool by_channel = X::kChannelsFirst;
    Acc<K, V> cotangent;
    x.load_state(cotangent, (const Real *)p.d_final + state_at(), all_columns);
    // Loads of a chunk begin where the one after it has read a tile for the last time.
    auto load_tokens = [&](int chunk) {
      const Rows rows = rows_of(p, segment, chunk);
      const int64_t block = block_of(p, rows, head), gate = rows.token * p.num_v_heads + head;
      load_rows<Tokens::q>(x, s.q, p, rows, qk_head() * K);
      load_rows<Tokens::k>(x, s.k, p, rows, qk_head() * K);
      x.load_image(s.errors, (const Element *)p.errors + (block * all_columns + column) * kChunk);
      x.load_image(s.state, (const Element *)p.states + (block * all_columns + column) * K);
      x.load_gates(s.gates, (const Real *)p.g + gate * K, int64_t(p.num_v_heads) * K, rows.count);
      x.load_vector(s.beta, (const Real *)p.beta + gate, p.num_v_heads, rows.count);
    };
    auto load_pairs = [&](int chunk) {
      const Rows rows = rows_of(p, segment, chunk);
      const Element *pairs = (const Element *)p.solved + block_of(p, rows, head) * 2 * kChunk * kChunk;
      load_rows<Tokens::d_o>(x, s.d_o, p, rows, value_at);
      x.load_image(s.pairs.solved, pairs);
      x.load_image(s.pairs.within, pairs + kChunk * kChunk);
    };
    const int last = chunks_of(p, segment) - 1;
    if (last >= 0) {
      load_tokens(last);
      load_pairs(last);
    }
    for (int chunk = last; chunk >= 0; --chunk) {
      const Rows rows = rows_of(p, segment, chunk);
      x.put(s.cotangent, cotangent);
      x.rows(K, [&](int c) {
        for (auto &part : s.through.part) part[c] = 0;
      });
      x.rows(kChunk, [&](int t) {
        for (auto &part : s.along_k.part) part[t] = 0;
      });
      x.wait_loads();
      x.sync();
      // Writes to the leaving state; `passing` gathers the cotangents of g.
      Channels from_start, dk, passing;
      {
        Channels to_end, z;
        x.decays(from_start, to_end, s.whole, s.gates);
        x.take(z, s.k);
        each_channel(
            x, [&](int t, int, Real &to, Real a, Real decay) { to = s.beta[t] * decay * a; }, passing, z, to_end);
        x.put(s.write_query, passing);
        start_channels(x, dk, s.errors, s.cotangent);
        x.finish(dk);
        each_channel(
            x,
            [&](int, int, Real &a, Real decay, Real &k) {
              a *= decay;
              k *= a;
            },
            dk, to_end, z);
        x.token_sums(s.along_k, [](int, int, Real a) { return a; }, z);
        each_channel(
            x,
            [&](int t, int, Real &a, Real along, Real &sum) {
              const Real beta = s.beta[t];
              a *= beta;
              sum = along * beta;
            },
            dk, z, passing);
        x.sums_before(passing, s.gates);
      }
      x.row_dots(s.through, s.state, cotangent);
      x.sync();
      x.lay_by(s.gates, passing);

      // y = diag(beta) (N_q^T dO + e^(G_C - G) K dS1), then dV = T^T y.
      Acc<kChunk, V> y;
      x.template start<by_channel, false>(y, s.write_query, s.cotangent);
      x.template product<true, false>(y, s.pairs.within, s.d_o);
      x.finish(y);
      x.put(s.y, y);
      x.sync();
      x.template product<true, false>(y, s.pairs.solved, s.y);
      x.finish(y);
      x.meet();
      x.put(s.y, y);
      x.sync();
      x.store((Element *)p.dv + rows.token * p.num_v_heads * all_columns + value_at, int64_t(p.num_v_heads) * all_columns,
              rows.count, s.y);

      // Reads of the entering state, by keys and by queries.
      Channels reads, z;
      start_channels(x, passing, s.y, s.state);
      x.take(z, s.k);
      x.finish(passing);
      each_channel(
          x,
          [&](int, int, Real decay, Real &a, Real &sum, Real &k) {
            sum *= -decay;
            a += sum;
            sum *= k;
            k *= -decay;
          },
          from_start, dk, passing, z);
      x.keep(shares(x.anew(chunk)).dk, dk);
      x.put(s.read, z);
      start_channels(x, reads, s.d_o, s.state);
      x.take(z, s.q);
      x.finish(reads);
      each_channel(
          x,
          [&](int, int, Real decay, Real &a, Real &sum, Real &q) {
            a = a * scale * decay;  // scale * decay would be made early, and kept
            sum += a * q;
            q = q * scale * decay;
          },
          from_start, reads, passing, z);
      x.keep(shares(x.anew(chunk)).dq, reads);
      x.put(s.write_query, z);
      x.sums_from(passing, s.gates);
      x.take_up(z, s.gates);
      each_channel(
          x,
          [&](int, int c, Real &sum, Real before) {
            Real through = 0;
            for (auto &part : s.through.part) through += part[c];
            sum += before + through * s.whole[c];
          },
          passing, z);
      x.keep(shares(x.anew(chunk)).dg, passing);
      x.each([&](int r, int, Real &a) { a *= s.whole[r]; }, cotangent);
      x.sync();
      if (chunk) load_tokens(chunk - 1);
      x.rows(kChunk, [&](int t) {
        Real sum = 0;
        for (auto &part : s.along_k.part) sum += part[t];
        shares(chunk).dbeta[t] = sum;
      });

      // The state: dS0 = e^(G_C) dS1 + (e^G sQ)^T dO - (e^G K)^T dV.
      x.template product<!by_channel, false>(cotangent, s.write_query, s.d_o);
      x.template product<!by_channel, false>(cotangent, s.read, s.y);
      x.finish(cotangent);
      x.meet();
      if (chunk) load_pairs(chunk - 1);
    }
    x.store_state((Real *)p.dinitial + state_at(), all_columns, cotangent);
  }
};

}  // namespace STOKER_ISA
}  // namespace stoker
