#include "native/sample.h"

namespace baseline { int scale(const ScaleParams&); }
#if defined(__x86_64__)
namespace avx2 { int scale(const ScaleParams&); }
namespace avx512 { int scale(const ScaleParams&); }
#endif

EXPORT int stoker_abi_version() { return 1; }
EXPORT const char* stoker_error_text(int code) { return code == 7 ? "negative length" : nullptr; }

EXPORT_SIZE(ScaleParams)
EXPORT int sample_scale(const ScaleParams* p) {
  if (p->n < 0) return p->n == -1 ? 7 : 8;
  baseline::scale(*p);
  return 0;
}

// 1000 * (instruction set of the object) + (that of the inline function it calls), for the newest set that runs here.
EXPORT int64_t sample_newest_isa(const ScaleParams* p) {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")) return avx512::scale(*p);
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return avx2::scale(*p);
#endif
  return baseline::scale(*p);
}

EXPORT int64_t sample_repeated(const ScaleParams* p, int times) { return p->n * times; }
