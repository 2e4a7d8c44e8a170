// What the caller of the prologue hands over (kernels/prologue/native.py mirrors it), and where partial sums lie.
#pragma once

#include <cstdint>

#include "native/number.h"

namespace stoker {

// q, k or v. `Element` is float on the host, bf16 on the GPU; rows of x are `x_stride` elements apart, all else is
// contiguous.
struct ShortConv {
  const void *x, *taps;   // [N, channels]; [channels, width]
  void *y;                // [N, channels]: forward
  const void *dy;         // cotangent of y
  void *dx, *dtaps;       // as x and taps: backward
  int64_t x_stride;
  int32_t channels, dim;  // dim: channels of a head
  int32_t unit;           // heads are scaled to unit length
  int32_t wide_taps;      // taps and dtaps are float, else Element
};

struct PrologueParams {
  ShortConv convs[3];
  const void *a, *b;                   // [N, decays], [N, Hv]; rows `*_stride` apart
  const float *A_log, *dt_bias;        // [Hv], [decays]
  const int32_t *cu_seqlens;           // [S + 1]
  float *g, *beta;                     // as a and b
  const float *dg, *dbeta;             // cotangents of g and beta
  void *da, *db;                       // as a and b
  float *dA_log, *ddt_bias;            // as A_log and dt_bias
  void *workspace;                     // backward: as many bytes as the library's query says
  int64_t workspace_bytes;
  int64_t a_stride, b_stride;
  int32_t num_tokens, num_segments, num_v_heads, decays;  // decays: Hv, or Hv * K
  int32_t width;                       // taps of the convolutions
  int32_t block_tokens, gate_tokens;   // set by the library: tokens whose gradients of weights are summed first
};

// Where the workspace has the sums over the tokens of a block. For the taps of q, k and v (s = 0, 1, 2):
// [blocks, width, channels]; for dt_bias, and g dg for A_log: [gate blocks, decays].
STOKER_BOTH float *taps_sums(const PrologueParams &p, int s) {
  int64_t channels = 0;
  for (int i = 0; i < s; ++i) channels += p.convs[i].channels;
  return (float *)p.workspace + ceil_div(p.num_tokens, p.block_tokens) * p.width * channels;
}
STOKER_BOTH float *bias_sums(const PrologueParams &p) { return taps_sums(p, 3); }
STOKER_BOTH float *rate_sums(const PrologueParams &p) {
  return bias_sums(p) + int64_t(ceil_div(p.num_tokens, p.gate_tokens)) * p.decays;
}
STOKER_BOTH int64_t sums_bytes(const PrologueParams &p) {
  return 2 * ((char *)rate_sums(p) - (char *)bias_sums(p)) + ((char *)bias_sums(p) - (char *)p.workspace);
}

}  // namespace stoker
