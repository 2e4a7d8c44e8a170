// What the caller of decode hands over (kernels/decode/native.py mirrors it), and where a head's numbers lie.
//
// Host and GPU take a token in two steps, so that the state is read once for both products. With S decayed:
// e = beta (v - S^T k), o = scale (S^T q + (k . q) e), then S += k e^T.
#pragma once

#include <cstdint>

#include "native/number.h"

namespace stoker {

// Tensors as in kernels/decode/op.py, contiguous. `Element` is float on the host, bf16 on the GPU.
struct DecodeParams {
  const void *q, *k, *v;     // [B, T, Hk, K], [B, T, Hk, K], [B, T, Hv, V]
  const float *g, *beta;     // [B, T, Hv] or per channel [B, T, Hv, K]; [B, T, Hv]
  const int64_t *slots;      // [B], or null: sequence b has the state b
  void *state;               // [P, Hv, K, V], float or bf16, read and written in place
  void *o;                   // [B, T, Hv, V]
  int32_t batch, num_tokens, num_qk_heads, num_v_heads, key_dim, value_dim, num_states;
  int32_t per_channel;       // g has a decay for every key channel
  int32_t narrow_state;      // the state is bf16
  float scale;
};

// Where the numbers of one sequence and value head lie.
struct DecodeHead {
  int64_t qk, v, g, beta;                      // first token
  int64_t qk_step, v_step, g_step, beta_step;  // to the next
  int64_t state;                               // -1: not in the pool

  STOKER_BOTH DecodeHead(const DecodeParams &p, int sequence, int head) {
    const int qk_head = head / (p.num_v_heads / p.num_qk_heads), decays = p.per_channel ? p.key_dim : 1;
    const int64_t tokens = int64_t(sequence) * p.num_tokens, slot = p.slots ? p.slots[sequence] : sequence;
    qk_step = int64_t(p.num_qk_heads) * p.key_dim;
    v_step = int64_t(p.num_v_heads) * p.value_dim;
    g_step = int64_t(p.num_v_heads) * decays;
    beta_step = p.num_v_heads;
    qk = tokens * qk_step + int64_t(qk_head) * p.key_dim;
    v = tokens * v_step + int64_t(head) * p.value_dim;
    g = tokens * g_step + int64_t(head) * decays;
    beta = tokens * beta_step + head;
    state = slot < 0 || slot >= p.num_states ? -1 : (slot * p.num_v_heads + head) * p.key_dim * p.value_dim;
  }
};

}  // namespace stoker
