// What forward and backward of the gated delta rule share: the decays of a chunk and the matrix it must solve.
//
// Written for any executor (native/host_exec.h, native/block_exec.h); the mathematics and its names are those of
// kernels/gated_delta/chunked.py: e = T (V - e^G K S0), o = e^G sQ S0 + N_q diag(beta) e.
#pragma once

#include "native/delta_chunk.h"

namespace stoker {
namespace STOKER_ISA {

template <class X>
struct Decays {
  typename X::template Vector<kChunk> g, beta;
  typename X::template Vector<kChunk, typename X::Wide> sums;  // G: running sum of g
  typename X::template Vector<kChunk> from_start, to_end;

  // g and beta of `rows` tokens of one head; rows beyond have g = 0 and beta = 0, which leaves the state as it is.
  STOKER_TILE void load(X &x, const DeltaParams &p, int64_t token, int head, int rows) {
    using Real = typename X::Real;
    const int64_t at = token * p.num_v_heads + head;
    x.load_vector(g, (const Real *)p.g + at, p.num_v_heads, rows);
    x.load_vector(beta, (const Real *)p.beta + at, p.num_v_heads, rows);
  }
  // The rest, once the loads are done; ends with a barrier.
  STOKER_TILE void prepare(X &x) {
    x.running_sum(sums, g, [&](int r, typename X::Wide sum, typename X::Wide all) {
      from_start[r] = x.exp(sum);
      to_end[r] = x.exp(all - sum);
    });
    x.meet();
  }
  STOKER_TILE typename X::Real whole() const { return from_start[kChunk - 1]; }
  // D_ri = e^(G_r - G_i) for i <= r, else 0. The exponent is cut at 0: what is thrown away cannot overflow.
  STOKER_TILE typename X::Real between(X &x, int r, int i) const {
    const typename X::Wide exponent = sums[r] - sums[i];
    return i <= r ? x.exp(exponent < 0 ? exponent : 0) : 0;
  }
  // The same of which `kept` was made: a GPU makes it again, since it has no registers to keep it in.
  STOKER_TILE typename X::Real again(X &x, int r, int i, typename X::Real kept) const {
    if constexpr (X::kFewRegisters)
      return between(x, r, i);
    else
      return kept;
  }
  STOKER_TILE void matrix(X &x, typename X::template Acc<kChunk, kChunk> &all) const {
    x.each([&](int r, int i, typename X::Real &a) { a = between(x, r, i); }, all);
  }
};

// Gradients of g and beta of one chunk, gathered in parts while the products pass by.
template <class X>
struct GateSums {
  using Real = typename X::Real;
  typename X::template RowSums<kChunk> along_z;  // reads of the entering state, by token
  typename X::template RowSums<kChunk> along_k;  // writes to the leaving state, by token, without beta
  typename X::template ColumnSums<kChunk> dbeta;
  typename X::Total through;  // <dS1, S0>
  typename X::template Vector<kChunk> dg, b;  // dg: first only what passes a token by pairs of others

  STOKER_TILE void clear(X &x) {
    x.rows(kChunk, [&](int i) {
      for (auto &part : along_z.part) part[i] = 0;
      for (auto &part : along_k.part) part[i] = 0;
      for (auto &part : dbeta.part) part[i] = 0;
      dg[i] = 0;
      if (i < through.parts) through.part[i] = 0;
    });
  }
  // dg_j += reads from j on + writes before j + what goes through the whole chunk; all parts are added in a fixed order.
  // There after a barrier.
  STOKER_TILE void finish(X &x, const Decays<X> &d) {
    x.around_sums(
        dg, [&](int i) { return sum_of(along_z.part, i); }, [&](int i) { return sum_of(along_k.part, i) * d.beta[i]; },
        [&] {
          Real sum = 0;
          for (int i = 0; i < through.parts; ++i) sum += through.part[i];
          return sum * d.whole();
        });
    x.rows(kChunk, [&](int i) { b[i] = sum_of(dbeta.part, i) + sum_of(along_k.part, i); });
  }
  STOKER_TILE void store(X &x, Real *to_dg, Real *to_dbeta, int64_t stride, int rows) {
    x.rows(rows, [&](int i) {
      to_dg[i * stride] = dg[i];
      to_dbeta[i * stride] = b[i];
    });
  }

 private:
  template <class Parts>
  STOKER_TILE static Real sum_of(const Parts &parts, int i) {
    Real sum = 0;
    for (auto &part : parts) sum += part[i];
    return sum;
  }
};

// T - I, T = (I + N_k diag(beta))^-1 of one chunk, N_k = (K K^T) D below the diagonal.
template <class X, int K>
STOKER_TILE void solve(X &x, typename X::template Tile<kChunk, kChunk> &solved, const typename X::template Tile<kChunk, K> &k,
           const typename X::template Acc<kChunk, kChunk> &between, const typename X::template Vector<kChunk> &beta,
           typename X::template Scratch<kChunk> &scratch) {
  typename X::template Acc<kChunk, kChunk> system;
  x.template start<false, true>(system, k, k);
  x.finish(system);
  x.each([&](int r, int i, typename X::Real &a, typename X::Real decay) { a = i < r ? a * decay * beta[i] : 0; },
         system, between);
  x.unit_lower_inverse(solved, system, scratch);
}

}  // namespace STOKER_ISA
}  // namespace stoker
