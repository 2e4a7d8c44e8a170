// Kimi Delta Attention over the heads and segments of a batch, on the host.
#pragma once

#include <vector>

#include "kda/native/backward.h"
#include "kda/native/forward.h"
#include "kda/native/pairs.h"
#include "kda/native/prepare.h"
#include "native/host_entry.h"
#include "native/host_exec.h"

namespace stoker {
namespace STOKER_ISA {

// Value heads [begin, end).
template <class X, int K, int V>
int kda_forward(const DeltaParams &p, int begin, int end) {
  Scratchpad<typename KdaPrepare<X, K>::Shared> prepare;
  Scratchpad<typename KdaForward<X, K, V>::Shared> scan;
  X x;
  for (int head = begin; head < end; ++head)
    for (int segment = 0; segment < p.num_segments; ++segment) {
      for (int chunk = 0; chunk < chunks_of(p, segment); ++chunk)
        KdaPrepare<X, K>::run(x, *prepare, p, rows_of(p, segment, chunk), head);
      KdaForward<X, K, V>::run(x, *scan, p, segment, head, 0);
    }
  return 0;
}

// Query-key heads [begin, end): the value heads of one add up their dq and dk in order. The states' shares of the
// gradients pass through a segment's worth of memory.
template <class X, int K, int V>
int kda_backward(const DeltaParams &p, int begin, int end) {
  using Real = typename X::Real;
  using Element = typename X::Element;
  Scratchpad<typename KdaBackward<X, K, V>::Shared> scan;
  Scratchpad<typename KdaPairs<X, K, V>::Shared> pairs;
  X x;
  const int group = p.num_v_heads / p.num_qk_heads;
  const int64_t stride = int64_t(p.num_qk_heads) * K, gate_stride = int64_t(p.num_v_heads) * K;
  for (int segment = 0; segment < p.num_segments; ++segment) {
    const int64_t first = p.cu_seqlens[segment], count = p.cu_seqlens[segment + 1] - first;
    std::vector<Element> dq(count * K), dk(count * K);
    std::vector<Real> dg(count * K), dbeta(count);
    // Both programs index by the token in the batch.
    Element *dq_at = dq.data() - first * K, *dk_at = dk.data() - first * K;
    Real *dg_at = dg.data() - first * K, *dbeta_at = dbeta.data() - first;
    for (int head = begin * group; head < end * group; ++head) {
      KdaBackward<X, K, V>::run(x, *scan, p, segment, head, 0, {dq_at, dk_at, dg_at, dbeta_at, K, K, 1});
      const int64_t at = int64_t(head / group) * K;
      for (int chunk = 0; chunk < chunks_of(p, segment); ++chunk)
        KdaPairs<X, K, V>::run(x, *pairs, p, rows_of(p, segment, chunk), head,
                               {dq_at, dk_at, dg_at, dbeta_at, 1, K, K, 1},
                               {(Element *)p.dq + at, (Element *)p.dk + at, (Real *)p.dg + int64_t(head) * K,
                                (Real *)p.dbeta + head, stride, gate_stride, p.num_v_heads, head % group != 0});
    }
  }
  return 0;
}

}  // namespace STOKER_ISA
}  // namespace stoker
