// Decay and write strength: part of the columns over a block of tokens, forward and backward.
//
// A column has no neighbours: a thread has one of them on the GPU, and as many as fill a vector on the host.
#pragma once

#include "native/activation.h"
#include "prologue/native/params.h"

namespace stoker {
namespace STOKER_ISA {

// Columns [column, column + count) of rows of numbers; what is beyond reads as zero.
template <class E, int N>
struct Columns {
  static constexpr int kPart = N;
  using Element = E;
  int column, count;

  template <class T>
  STOKER_TILE void load(float (&x)[N], const T *base, int64_t stride, int64_t t) const {
    const T *from = base + t * stride + column;
    if (count == N)
      for (int i = 0; i < N; ++i) x[i] = float(from[i]);
    else
      for (int i = 0; i < N; ++i) x[i] = i < count ? float(from[i]) : 0.0f;
  }
  template <class T>
  STOKER_TILE void store(T *base, int64_t stride, int64_t t, const float (&x)[N]) const {
    T *to = base + t * stride + column;
    if (count == N)
      for (int i = 0; i < N; ++i) to[i] = T(x[i]);
    else
      for (int i = 0; i < N; ++i)
        if (i < count) to[i] = T(x[i]);
  }
};

// -e^A_log and dt_bias of the columns.
template <class X>
struct DecayWeights {
  float rate[X::kPart], bias[X::kPart];
  STOKER_TILE DecayWeights(const X &x, const PrologueParams &p) {
    const int per_head = p.decays / p.num_v_heads;
    x.load(bias, p.dt_bias, 0, 0);
    for (int i = 0; i < X::kPart; ++i)
      rate[i] = i < x.count ? -exponential(p.A_log[(x.column + i) / per_head]) : 0.0f;
  }
};

// load(t, i) then use(t, i) for every token, i < kBatch: loads of a batch are under way before the first is waited for.
constexpr int kBatch = 4;
template <class Load, class Use>
STOKER_TILE void in_batches(int first, int end, Load load, Use use) {
  for (int t = first; t < end; t += kBatch) {
    for (int i = 0; i < kBatch; ++i)
      if (t + i < end) load(t + i, i);
    for (int i = 0; i < kBatch; ++i)
      if (t + i < end) use(t + i, i);
  }
}

template <class X>
STOKER_TILE void decay_forward(const X &x, const PrologueParams &p, int first, int end) {
  const DecayWeights<X> w(x, p);
  float g[kBatch][X::kPart];
  in_batches(
      first, end, [&](int t, int i) { x.load(g[i], (const typename X::Element *)p.a, p.a_stride, t); },
      [&](int t, int i) {
        for (int c = 0; c < X::kPart; ++c) g[i][c] = w.rate[c] * softplus(g[i][c] + w.bias[c]);
        x.store(p.g, p.decays, t, g[i]);
      });
}

// bias_sum, rate_sum [decays]: the block's sums, for dt_bias and A_log.
template <class X>
STOKER_TILE void decay_backward(const X &x, const PrologueParams &p, float *bias_sum, float *rate_sum, int first,
                                int end) {
  const DecayWeights<X> w(x, p);
  float bias[X::kPart] = {}, rate[X::kPart] = {};
  float a[kBatch][X::kPart], da[kBatch][X::kPart];
  in_batches(
      first, end,
      [&](int t, int i) {
        x.load(a[i], (const typename X::Element *)p.a, p.a_stride, t);
        x.load(da[i], p.dg, p.decays, t);
      },
      [&](int t, int i) {
        for (int c = 0; c < X::kPart; ++c) {
          const float step = a[i][c] + w.bias[c], ddt = w.rate[c] * da[i][c];
          rate[c] += ddt * softplus(step);
          da[i][c] = ddt * sigmoid(step);
          bias[c] += da[i][c];
        }
        x.store((typename X::Element *)p.da, p.decays, t, da[i]);
      });
  x.store(bias_sum, 0, 0, bias);
  x.store(rate_sum, 0, 0, rate);
}

template <class X>
STOKER_TILE void strength_forward(const X &x, const PrologueParams &p, int first, int end) {
  float beta[kBatch][X::kPart];
  in_batches(
      first, end, [&](int t, int i) { x.load(beta[i], (const typename X::Element *)p.b, p.b_stride, t); },
      [&](int t, int i) {
        for (int c = 0; c < X::kPart; ++c) beta[i][c] = sigmoid(beta[i][c]);
        x.store(p.beta, p.num_v_heads, t, beta[i]);
      });
}

template <class X>
STOKER_TILE void strength_backward(const X &x, const PrologueParams &p, int first, int end) {
  float b[kBatch][X::kPart], db[kBatch][X::kPart];
  in_batches(
      first, end,
      [&](int t, int i) {
        x.load(b[i], (const typename X::Element *)p.b, p.b_stride, t);
        x.load(db[i], p.dbeta, p.num_v_heads, t);
      },
      [&](int t, int i) {
        for (int c = 0; c < X::kPart; ++c) {
          const float s = sigmoid(b[i][c]);
          db[i][c] *= s * (1 - s);
        }
        x.store((typename X::Element *)p.db, p.num_v_heads, t, db[i]);
      });
}

}  // namespace STOKER_ISA
}  // namespace stoker
