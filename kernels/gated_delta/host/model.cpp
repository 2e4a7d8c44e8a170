// isa: baseline
// The same programs as models of themselves: in double the algebra, with bfloat16 tiles what a GPU's rounding costs.
#include "gated_delta/native/backward.h"
#include "gated_delta/native/forward.h"
#include "native/delta_host.h"

namespace stoker {
namespace STOKER_ISA {

template <class E>
int run(const DeltaParams &p, int back, int begin, int end) {
  using X = HostExec<E>;
  if (p.key_dim != 64 || p.value_dim != 64) return kUnsupported;
  return back ? backward_heads<GatedDeltaBackward<X, 64, 64>>(p, begin, end)
              : forward_heads<GatedDeltaForward<X, 64, 64, true>>(p, begin, end);
}

}  // namespace STOKER_ISA
}  // namespace stoker

// As stoker_gated_delta_*, in double or with bfloat16 tiles.
STOKER_HOST_ENTRY(gated_delta_double, const stoker::DeltaParams *p, int back, int begin, int end) {
  return stoker::STOKER_ISA::run<double>(*p, back, begin, end);
}
STOKER_HOST_ENTRY(gated_delta_bf16, const stoker::DeltaParams *p, int back, int begin, int end) {
  return stoker::STOKER_ISA::run<stoker::bf16>(*p, back, begin, end);
}
