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

// A chunk's rows of as many columns of a tensor as the tile has, from `column` on; beyond the chunk's tokens they are zero.
template <Tokens Which, class X, class Tile>
STOKER_TILE void load_rows(X &x, Tile &tile, const DeltaParams &p, const Rows &rows, int column) {
  if constexpr (X::kMapped) {
    x.load_mapped(tile, int(Which), rows.token, column, rows.count);
  } else {
    const TokenTensor from = token_tensor(p, Which);
    x.load(tile, (const typename X::Element *)from.at + rows.token * from.stride + column, from.stride, rows.count);
  }
}

}  // namespace stoker
