// isa: baseline avx2 avx512
// Kimi Delta Attention on CPU in float: the trainer's kernel.
#include "kda/native/host.h"
#include "native/host_mode.h"

STOKER_PARAMS(DeltaParams)

// Heads [begin, end): value heads forward, query-key heads backward.
STOKER_HOST_ENTRY(kda, const stoker::DeltaParams *p, int back, int begin, int end) {
  using namespace stoker::STOKER_ISA;
  const stoker::FlushSubnormals flush;
  using X = HostExec<float>;
  switch (p->key_dim * 1000 + p->value_dim) {
#define STOKER_DIMS(K, V) \
  case K * 1000 + V:      \
    return back ? kda_backward<X, K, V>(*p, begin, end) : kda_forward<X, K, V>(*p, begin, end);
    STOKER_DIMS(32, 32)
    STOKER_DIMS(64, 64)
    STOKER_DIMS(128, 128)
#undef STOKER_DIMS
  }
  return stoker::kUnsupported;
}
