// What the caller of a delta rule hands over: one plain struct for all entry points (kernels/delta_native.py mirrors it).
#pragma once

#include <cstdint>

#include "native/number.h"

namespace stoker {

// Tensors as in kernels/gated_delta/op.py and kernels/kda/op.py. Tokens are `*_stride` elements apart, heads lie side by side. `Element` is
// float, double or bf16; g, beta and the states that enter and leave a segment are float, or double with double.
struct DeltaParams {
  const void *q, *k, *v;           // [N, Hk, K], [N, Hk, K], [N, Hv, V]
  const void *g, *beta;            // [N, Hv] or per channel [N, Hv, K]; [N, Hv]; contiguous
  const int32_t *cu_seqlens;       // [S + 1]
  const void *initial;             // [S, Hv, K, V], or null for zeros
  void *o;                         // [N, Hv, V]
  void *final;                     // [S, Hv, K, V]
  // `slots` chunks: [slots, Hv, K, V], [slots, Hv, C, V], [slots, Hv, C, C]; inside a head's matrix as the executor likes.
  void *states, *errors, *solved;
  const void *d_o, *d_final;       // cotangents, as o and final
  void *dq, *dk, *dv, *dg, *dbeta, *dinitial;  // as the inputs, contiguous
  void *workspace;                 // GPU backward: as many bytes as the library's query says
  int64_t workspace_bytes;
  int64_t q_stride, k_stride, v_stride, o_stride, d_o_stride;
  int32_t num_tokens, num_segments, num_qk_heads, num_v_heads, key_dim, value_dim;
  int32_t save;                    // forward: keep states, errors and solved for the backward
  int32_t value_block;             // set by the library
  double scale;
};

// What is read by token, [N, heads, dim]; columns: all heads'.
enum class Tokens { q, k, v, d_o, dv };
constexpr int kTokenTensors = 5;
struct TokenTensor {
  const void *at;
  int64_t stride;
  int columns;
};
STOKER_BOTH TokenTensor token_tensor(const DeltaParams &p, Tokens which) {
  const int keys = p.num_qk_heads * p.key_dim, values = p.num_v_heads * p.value_dim;
  switch (which) {
    case Tokens::q: return {p.q, p.q_stride, keys};
    case Tokens::k: return {p.k, p.k_stride, keys};
    case Tokens::v: return {p.v, p.v_stride, values};
    case Tokens::d_o: return {p.d_o, p.d_o_stride, values};
    default: return {p.dv, values, values};
  }
}

// Chunks of 64 tokens are cut from the start of every segment. Chunk j of segment i has the slot
// cu_seqlens[i] / 64 + i + j: no table is needed, slots rise with the token and never meet, some stay unused.
constexpr int kChunk = 64;
STOKER_BOTH int first_slot(const int32_t *cu_seqlens, int segment) { return cu_seqlens[segment] / kChunk + segment; }
STOKER_BOTH int slots(int num_tokens, int num_segments) { return num_tokens / kChunk + num_segments; }

}  // namespace stoker
