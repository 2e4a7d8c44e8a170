#include "native/sample.h"

void scale(const ScaleParams& p);  // of scale.cpp

EXPORT int stoker_abi_version() { return 1; }
EXPORT const char* stoker_error_text(int code) { return code == 7 ? "negative length" : nullptr; }

EXPORT_SIZE(ScaleParams)
EXPORT int sample_scale(const ScaleParams* p) {
  if (p->n < 0) return p->n == -1 ? 7 : 8;
  scale(*p);
  return 0;
}

EXPORT int64_t sample_repeated(const ScaleParams* p, int times) { return p->n * times; }
