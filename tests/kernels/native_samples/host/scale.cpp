// isa: avx512 avx2 baseline
#include "native/sample.h"

void scale(const ScaleParams& p) {
  for (int64_t i = 0; i < p.n; ++i) p.y[i] = p.factor * p.x[i];
}

// What the compiler's flags say of the instruction set: named by what STOKER_ISA says of it.
#define NAMED_(isa) sample_flags_##isa
#define NAMED(isa) NAMED_(isa)
EXPORT int64_t NAMED(STOKER_ISA)(const ScaleParams*) {
#if defined(__AVX512F__) && defined(__AVX512BW__)
  return 512;
#elif defined(__AVX2__) && defined(__FMA__)
  return 2;
#else
  return 0;
#endif
}
