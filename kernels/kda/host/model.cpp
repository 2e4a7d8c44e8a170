// isa: baseline
// The same programs as models of themselves: in double the algebra, with bfloat16 tiles what a GPU's rounding costs.
#include "kda/native/host.h"

namespace stoker {
namespace STOKER_ISA {

template <class E>
int run_kda(const DeltaParams &p, int back, int begin, int end) {
  using X = HostExec<E>;
  if (p.key_dim != 64 || p.value_dim != 64) return kUnsupported;
  return back ? kda_backward<X, 64, 64>(p, begin, end) : kda_forward<X, 64, 64>(p, begin, end);
}

}  // namespace STOKER_ISA
}  // namespace stoker

// As stoker_kda_*, in double or with bfloat16 tiles.
STOKER_HOST_ENTRY(kda_double, const stoker::DeltaParams *p, int back, int begin, int end) {
  return stoker::STOKER_ISA::run_kda<double>(*p, back, begin, end);
}
STOKER_HOST_ENTRY(kda_bf16, const stoker::DeltaParams *p, int back, int begin, int end) {
  return stoker::STOKER_ISA::run_kda<stoker::bf16>(*p, back, begin, end);
}
