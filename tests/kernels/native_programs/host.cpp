// The host's dense products and exponential for one instruction set, and where the chunks of packed segments lie.
#include "native/abi.h"
#include "native/delta_device.h"
#include "native/host_exec.h"
#include "native/host_product.h"

using namespace stoker;
using namespace stoker::STOKER_ISA;

namespace {

template <bool TransA, bool TransB, class Real, class E>
int sized(int rows, int columns, int inner, void *acc, const void *a, int a_stride, const void *b, int b_stride) {
#define STOKER_SIZE(R, C, Inner)                                                                                \
  if (rows == R && columns == C && inner == Inner) {                                                            \
    multiply<TransA, TransB, R, C, Inner>((Real *)acc, (const E *)a, a_stride, (const E *)b, b_stride);         \
    return 0;                                                                                                   \
  }
  STOKER_SIZE(8, 16, 8)
  STOKER_SIZE(16, 48, 24)
  STOKER_SIZE(64, 32, 40)
  if constexpr (!TransB) {
    STOKER_SIZE(8, 16, 1)
    STOKER_SIZE(24, 64, 13)
  }
#undef STOKER_SIZE
  return kUnsupported;
}

}  // namespace

#define STOKER_PRODUCT(name, Real, E)                                                                                 \
  STOKER_EXPORT int product_##name(int transposed, int rows, int columns, int inner, void *acc, const void *a,        \
                                   int a_stride, const void *b, int b_stride) {                                       \
    auto f = transposed == 0   ? sized<false, false, Real, E>                                                         \
             : transposed == 1 ? sized<true, false, Real, E>                                                          \
             : transposed == 2 ? sized<false, true, Real, E>                                                          \
                               : sized<true, true, Real, E>;                                                          \
    return f(rows, columns, inner, acc, a, a_stride, b, b_stride);                                                    \
  }
STOKER_PRODUCT(float, float, float)
STOKER_PRODUCT(double, double, double)
STOKER_PRODUCT(bf16, float, bf16)

STOKER_EXPORT void exponentials(const float *from, float *to, int64_t n) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) to[i] = exponential(from[i]);
}

// For every slot the first token, the number of tokens and the slot again that the kernels find there, or -1 three times.
STOKER_EXPORT int slot_rows(const int32_t *cu_seqlens, int num_tokens, int num_segments, int32_t *found) {
  DeltaParams p = {};
  p.cu_seqlens = cu_seqlens;
  p.num_tokens = num_tokens;
  p.num_segments = num_segments;
  const int bound = slots(num_tokens, num_segments);
  for (int slot = 0; slot < bound; ++slot) {
    Rows rows = {-1, -1, -1};
    rows_of_slot(p, slot, rows);
    found[slot * 3] = int32_t(rows.token);
    found[slot * 3 + 1] = rows.count;
    found[slot * 3 + 2] = rows.slot;
  }
  return bound;
}
// The same three numbers of every chunk, segment after segment, as the scans walk over them; how many chunks.
STOKER_EXPORT int chunk_rows(const int32_t *cu_seqlens, int num_segments, int32_t *found) {
  DeltaParams p = {};
  p.cu_seqlens = cu_seqlens;
  int count = 0;
  for (int segment = 0; segment < num_segments; ++segment)
    for (int chunk = 0; chunk < chunks_of(p, segment); ++chunk, ++count) {
      const Rows rows = rows_of(p, segment, chunk);
      found[count * 3] = int32_t(rows.token);
      found[count * 3 + 1] = rows.count;
      found[count * 3 + 2] = rows.slot;
    }
  return count;
}
