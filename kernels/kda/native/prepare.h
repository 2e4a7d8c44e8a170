// Before the scan, all chunks at once: the pairs of a chunk's tokens, T - I for the keys and N_q diag(beta) for the
// queries.
#pragma once

#include "kda/native/chunk.h"

namespace stoker {
namespace STOKER_ISA {

template <class X, int K>
struct KdaPrepare {
  using Executor = X;
  using Real = typename X::Real;
  using Element = typename X::Element;
  template <int R, int C>
  using Tile = typename X::template Tile<R, C>;

  struct Shared {
    union {
      struct {
        Tile<kChunk, K> q, k;
      } tokens;
      struct {
        Tile<kChunk, kChunk> out;
        typename X::template Scratch<kChunk> scratch;
      } inverse;
    };
    typename X::template Triangle<K> triangle;
    typename X::template Vector<kChunk> beta;
  };

  STOKER_TILE static void run(X &x, Shared &s, const DeltaParams &p, const Rows &rows, int head) {
    const int qk_head = head / (p.num_v_heads / p.num_qk_heads);
    const int64_t gate = rows.token * p.num_v_heads + head;
    const Real scale = p.scale;
    x.meet();
    load_rows<Tokens::q>(x, s.tokens.q, p, rows, qk_head * K);
    load_rows<Tokens::k>(x, s.tokens.k, p, rows, qk_head * K);
    x.load_vector(s.beta, (const Real *)p.beta + gate, p.num_v_heads, rows.count);
    x.wait_loads();
    x.meet();

    typename X::template Acc<kChunk, kChunk> n_q, n_k;
    s.triangle.products(x, n_q, n_k, s.tokens.q, s.tokens.k, (const Real *)p.g + gate * K, int64_t(p.num_v_heads) * K,
                        rows.count);
    x.each([&](int, int i, Real &a) { a *= scale * s.beta[i]; }, n_q);
    x.each([&](int, int i, Real &a) { a *= s.beta[i]; }, n_k);

    Element *to = (Element *)p.solved + block_of(p, rows, head) * 2 * kChunk * kChunk;
    x.unit_lower_inverse(s.inverse.out, n_k, s.inverse.scratch);
    x.store_image(to, s.inverse.out);
    x.meet();
    x.put(s.inverse.out, n_q);
    x.meet();
    x.store_image(to + kChunk * kChunk, s.inverse.out);
  }
};

}  // namespace STOKER_ISA
}  // namespace stoker
