// A delta rule's tile programs over the heads and segments of a batch, on the host.
#pragma once

#include "native/delta_params.h"
#include "native/host_entry.h"
#include "native/host_exec.h"

namespace stoker {
namespace STOKER_ISA {

// Value heads [begin, end).
template <class Program>
int forward_heads(const DeltaParams &p, int begin, int end) {
  Scratchpad<typename Program::Shared> shared;
  typename Program::Executor x;
  for (int head = begin; head < end; ++head)
    for (int segment = 0; segment < p.num_segments; ++segment) Program::run(x, *shared, p, segment, head, 0);
  return 0;
}

// Query-key heads [begin, end): the value heads of one add up their dq and dk in order.
template <class Program>
int backward_heads(const DeltaParams &p, int begin, int end) {
  using Element = typename Program::Element;
  using Real = typename Program::Real;
  Scratchpad<typename Program::Shared> shared;
  typename Program::Executor x;
  const int group = p.num_v_heads / p.num_qk_heads;
  const typename Program::Target to = {(Element *)p.dq, (Element *)p.dk,  (Real *)p.dg,
                                       (Real *)p.dbeta, p.num_qk_heads, p.num_v_heads};
  for (int head = begin * group; head < end * group; ++head)
    for (int segment = 0; segment < p.num_segments; ++segment)
      Program::run(x, *shared, p, segment, head, 0, to, head / group, head, head % group != 0);
  return 0;
}

}  // namespace STOKER_ISA
}  // namespace stoker
