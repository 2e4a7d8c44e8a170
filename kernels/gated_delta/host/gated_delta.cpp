// isa: baseline avx2 avx512
// The gated delta rule on CPU in float: the trainer's kernel.
#include "gated_delta/native/backward.h"
#include "gated_delta/native/forward.h"
#include "native/delta_host.h"
#include "native/host_mode.h"

STOKER_PARAMS(DeltaParams)

// Heads [begin, end): value heads forward, query-key heads backward.
STOKER_HOST_ENTRY(gated_delta, const stoker::DeltaParams *p, int back, int begin, int end) {
  using namespace stoker::STOKER_ISA;
  const stoker::FlushSubnormals flush;
  using X = HostExec<float>;
  switch (p->key_dim * 1000 + p->value_dim) {
#define STOKER_DIMS(K, V) \
  case K * 1000 + V:      \
    return back ? backward_heads<GatedDeltaBackward<X, K, V>>(*p, begin, end) \
                : forward_heads<GatedDeltaForward<X, K, V, true>>(*p, begin, end);
    STOKER_DIMS(32, 32)
    STOKER_DIMS(64, 64)
    STOKER_DIMS(128, 128)
#undef STOKER_DIMS
  }
  return stoker::kUnsupported;
}
