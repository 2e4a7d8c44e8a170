// Where the chunks of a segment lie.
#pragma once

#include "native/delta_params.h"
#include "native/number.h"

namespace stoker {

// The rows of one chunk of one head.
struct Rows {
  int64_t token;
  int count, slot;
};

STOKER_BOTH Rows rows_of(const DeltaParams &p, int segment, int chunk) {
  int64_t token = p.cu_seqlens[segment] + int64_t(chunk) * kChunk;
  int left = int(p.cu_seqlens[segment + 1] - token);
  return {token, left < kChunk ? left : kChunk, first_slot(p.cu_seqlens, segment) + chunk};
}
// Index of a chunk of one head in the workspace.
STOKER_BOTH int64_t block_of(const DeltaParams &p, const Rows &rows, int head) {
  return int64_t(rows.slot) * p.num_v_heads + head;
}
STOKER_BOTH int chunks_of(const DeltaParams &p, int segment) {
  return ceil_div(p.cu_seqlens[segment + 1] - p.cu_seqlens[segment], kChunk);
}

}  // namespace stoker
