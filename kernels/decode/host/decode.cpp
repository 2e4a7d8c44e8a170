// isa: baseline avx2 avx512
// Decoding on CPU in float: a head's state stays in the nearest cache from token to token.
#include <memory>

#include "decode/native/params.h"
#include "native/host_entry.h"
#include "native/host_exec.h"
#include "native/host_mode.h"
#include "native/host_product.h"

namespace stoker {
namespace STOKER_ISA {

constexpr int kMostKeys = 256, kLanes = Vector<float>::lanes;

// What all columns of a head share in a token.
struct DecodeToken {
  const float *q, *k;
  float decay[kMostKeys];
  float kq, beta, scale;
};

// N vectors of columns of the state [keys, stride].
template <int N>
void decode_columns(const DecodeToken &token, int keys, float *state, int stride, const float *v, float *o) {
  using V = typename Vector<float>::type;
  V with_k[N] = {}, with_q[N] = {}, error[N];
  for (int r = 0; r < keys; ++r)
    for (int n = 0; n < N; ++n) {
      const V decayed = token.decay[r] * *(const V *)(state + r * stride + n * kLanes);
      with_k[n] += token.k[r] * decayed;
      with_q[n] += token.q[r] * decayed;
    }
  for (int n = 0; n < N; ++n) {
    error[n] = token.beta * (*(const V *)(v + n * kLanes) - with_k[n]);
    *(V *)(o + n * kLanes) = token.scale * (with_q[n] + token.kq * error[n]);
  }
  for (int r = 0; r < keys; ++r)
    for (int n = 0; n < N; ++n) {
      V &s = *(V *)(state + r * stride + n * kLanes);
      s = token.decay[r] * s + token.k[r] * error[n];
    }
}

inline void decode_head(const DecodeParams &p, int sequence, int head, float *wide_state) {
  const DecodeHead at(p, sequence, head);
  const int K = p.key_dim, V = p.value_dim, size = K * V;
  float *state = p.narrow_state ? wide_state : (float *)p.state + at.state;
  bf16 *narrow = (bf16 *)p.state + at.state;
  if (p.narrow_state)
    for (int i = 0; i < size; ++i) state[i] = float(narrow[i]);
  DecodeToken token;
  for (int t = 0; t < p.num_tokens; ++t) {
    token.q = (const float *)p.q + at.qk + t * at.qk_step;
    token.k = (const float *)p.k + at.qk + t * at.qk_step;
    const float *g = p.g + at.g + t * at.g_step;
    for (int r = 0; r < K; ++r) token.decay[r] = p.per_channel ? exponential(g[r]) : 0.0f;
    if (!p.per_channel) {
      const float decay = exponential(g[0]);
      for (int r = 0; r < K; ++r) token.decay[r] = decay;
    }
    token.kq = 0;
    for (int r = 0; r < K; ++r) token.kq += token.k[r] * token.q[r];
    token.beta = p.beta[at.beta + t * at.beta_step];
    token.scale = p.scale;
    const float *v = (const float *)p.v + at.v + t * at.v_step;
    float *o = (float *)p.o + at.v + t * at.v_step;
    int c = 0;
    for (; c + 4 * kLanes <= V; c += 4 * kLanes) decode_columns<4>(token, K, state + c, V, v + c, o + c);
    for (; c < V; c += kLanes) decode_columns<1>(token, K, state + c, V, v + c, o + c);
  }
  if (p.narrow_state)
    for (int i = 0; i < size; ++i) narrow[i] = bf16(state[i]);
}

}  // namespace STOKER_ISA
}  // namespace stoker

STOKER_PARAMS(DecodeParams)

// Heads [begin, end), those of a sequence side by side.
STOKER_HOST_ENTRY(decode, const stoker::DecodeParams *p, int begin, int end) {
  using namespace stoker::STOKER_ISA;
  const stoker::FlushSubnormals flush;
  if (p->key_dim > kMostKeys || p->value_dim > kMostKeys || p->value_dim % 16) return stoker::kUnsupported;
  const auto wide_state = std::make_unique<float[]>(p->narrow_state ? p->key_dim * p->value_dim : 0);
  for (int i = begin; i < end; ++i) decode_head(*p, i / p->num_v_heads, i % p->num_v_heads, wide_state.get());
  return 0;
}
