// Gated RMSNorm of the row part of one head of one token: forward and backward.
//
// Written for either row executor (native/row_host.h, native/row_block.h); `x.column` counts the channels of all heads.
// The mathematics is that of kernels/epilogue/chunked.py.
#pragma once

#include "epilogue/native/params.h"
#include "native/activation.h"

namespace stoker {
namespace STOKER_ISA {

// What is read of a token; the next one is on its way while this one is worked on.
template <class X>
struct NormGateRows {
  typename X::Row o, z, dy;

  STOKER_TILE static NormGateRows load(const X &x, const EpilogueParams &p, int64_t t) {
    return {x.load(p.o, p.o_stride, t), x.load(p.z, p.z_stride, t), {}};
  }
  STOKER_TILE static NormGateRows load_all(const X &x, const EpilogueParams &p, int64_t t) {
    return {x.load(p.o, p.o_stride, t), x.load(p.z, p.z_stride, t), x.load(p.dy, p.dy_stride, t)};
  }
};

template <class X>
STOKER_TILE float inverse_rms(const X &x, const EpilogueParams &p, const typename X::Row &o) {
  return inverse_root(x.sum([&](int i) { return o(i) * o(i); }) / float(p.dim) + p.eps);
}

template <class X>
STOKER_TILE void norm_gate_forward(const X &x, const EpilogueParams &p, const float (&weight)[X::kPart],
                                   const NormGateRows<X> &rows, int64_t t) {
  const float r = inverse_rms(x, p, rows.o);
  const bool silu = p.silu;
  float y[X::kPart];
  X::each([&](int i) {
    const float s = sigmoid(rows.z(i));
    y[i] = rows.o(i) * r * weight[i] * (silu ? rows.z(i) * s : s);
  });
  x.store(p.y, int64_t(p.num_heads) * p.dim, t, y);
}

// Adds to `dweight` what the row says of the weight.
template <class X>
STOKER_TILE void norm_gate_backward(const X &x, const EpilogueParams &p, const float (&weight)[X::kPart],
                                    const NormGateRows<X> &rows, int64_t t, float (&dweight)[X::kPart]) {
  const float r = inverse_rms(x, p, rows.o);
  const bool silu = p.silu;
  float n[X::kPart], dn[X::kPart], dz[X::kPart];
  X::each([&](int i) {
    const float s = sigmoid(rows.z(i)), gate = silu ? rows.z(i) * s : s;
    const float slope = silu ? silu_slope(s, gate) : s * (1 - s);
    n[i] = r * rows.o(i);
    const float along = rows.dy(i) * n[i];
    dn[i] = rows.dy(i) * weight[i] * gate;
    dz[i] = slope * weight[i] * along;
    dweight[i] += along * gate;
  });
  const float mean = x.sum([&](int i) { return n[i] * dn[i]; }) / float(p.dim);
  X::each([&](int i) { dn[i] = r * (dn[i] - n[i] * mean); });
  x.store(p.d_o, int64_t(p.num_heads) * p.dim, t, dn);
  x.store(p.dz, int64_t(p.num_heads) * p.dim, t, dz);
}

}  // namespace STOKER_ISA
}  // namespace stoker
