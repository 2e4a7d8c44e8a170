// Kimi Delta Attention over the heads and segments of a batch, on the host.
#pragma once

#include <vector>

#include "kda/native/backward.h"
#include "kda/native/forward.h"
#include "kda/native/pairs.h"
#include "kda/native/prepare.h"
#include "kda/native/tile_triangle.h"
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
  using Shares = KdaShares<X>;
  Scratchpad<typename KdaBackward<X, K, V>::Shared> scan;
  Scratchpad<typename KdaPairs<X, K, V>::Shared> pairs;
  X x;
  const int group = p.num_v_heads / p.num_qk_heads;
  const int64_t stride = int64_t(p.num_qk_heads) * K, gate_stride = int64_t(p.num_v_heads) * K;
  for (int segment = 0; segment < p.num_segments; ++segment) {
    const int chunks = chunks_of(p, segment);
    const size_t tokens = size_t(chunks) * kChunk;
    std::vector<Element> dq(tokens * K), dk(tokens * K);
    std::vector<Real> dg(tokens * K), dbeta(tokens);
    for (int head = begin * group; head < end * group; ++head) {
      // Shares of this head in this segment, by chunk.
      auto of = [&](int chunk) {
        const int64_t at = int64_t(chunk) * kChunk;
        return Shares{dq.data() + at * K, dk.data() + at * K, dg.data() + at * K, dbeta.data() + at};
      };
      KdaBackward<X, K, V>::run(x, *scan, p, segment, head, 0, of);
      const int64_t at = int64_t(head / group) * K;
      const typename KdaPairs<X, K, V>::Target to = {
          (Element *)p.dq + at, (Element *)p.dk + at, (Real *)p.dg + int64_t(head) * K, (Real *)p.dbeta + head,
          stride,               gate_stride,          p.num_v_heads,                    head % group != 0};
      for (int chunk = 0; chunk < chunks; ++chunk)
        KdaPairs<X, K, V>::run(
            x, *pairs, p, rows_of(p, segment, chunk), head, 1, [&](int) { return of(chunk); }, [&] { return to; });
    }
  }
  return 0;
}

}  // namespace STOKER_ISA
}  // namespace stoker
