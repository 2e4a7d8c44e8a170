// Where the segment of a token begins, for tokens that are visited in order.
#pragma once

#include <cstdint>

#include "native/number.h"

namespace stoker {
namespace STOKER_ISA {

struct Segment {
  const int32_t *bounds;
  int index, last, start, end;

  STOKER_TILE Segment(const int32_t *cu_seqlens, int num_segments, int token)
      : bounds(cu_seqlens), last(num_segments - 1) {
    int low = 0, high = num_segments;  // the last segment that begins at the token or before
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (bounds[middle] <= token ? low : high) = middle;
    }
    index = low;
    start = bounds[index];
    end = bounds[index + 1];
  }
  // How many tokens back `token`, not before the one last asked for, sees with `width` taps.
  STOKER_TILE int reach(int token, int width) {
    while (token >= end && index < last) {
      start = end;
      end = bounds[++index + 1];
    }
    return token - start < width ? token - start : width - 1;
  }
};

}  // namespace STOKER_ISA
}  // namespace stoker
