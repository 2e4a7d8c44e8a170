// isa: avx512 avx2 baseline
#include "native/sample.h"

namespace STOKER_ISA {

int scale(const ScaleParams& p) {
  for (int64_t i = 0; i < p.n; ++i) p.y[i] = p.factor * p.x[i];
#if defined(__AVX512F__)
  const int own = 512;
#elif defined(__AVX2__)
  const int own = 2;
#else
  const int own = 0;
#endif
  return 1000 * own + isa_of_shared_code();
}

}  // namespace STOKER_ISA
