// Short convolution, SiLU and unit length of a row part, over a block of tokens: forward and backward.
//
// Written for either row executor (native/row_host.h, native/row_block.h); the mathematics is that of
// kernels/prologue/chunked.py. A token is read once and kept while later ones see it.
#pragma once

#include "native/activation.h"
#include "prologue/native/params.h"
#include "prologue/native/segment.h"

namespace stoker {
namespace STOKER_ISA {

constexpr float kUnitEps = 1e-6f;  // UNIT_EPS of kernels/prologue/reference.py

// The rows of a tensor from `first` on, loaded some tokens before they are asked for.
template <class X>
struct Reader {
  const void *base;
  int64_t stride;
  int end;
  typename X::Row ahead[X::kAhead];

  STOKER_TILE Reader(const X &x, const void *base, int64_t stride, int first, int end)
      : base(base), stride(stride), end(end) {
    for (int i = 0; i < X::kAhead; ++i) ahead[i] = load(x, first + i);
  }
  STOKER_TILE typename X::Row load(const X &x, int t) const {
    return t < end ? x.load(base, stride, t) : typename X::Row{};
  }
  STOKER_TILE typename X::Row next(const X &x, int t) {
    const typename X::Row row = ahead[0];
    for (int i = 1; i < X::kAhead; ++i) ahead[i - 1] = ahead[i];
    ahead[X::kAhead - 1] = load(x, t + X::kAhead);
    return row;
  }
};

// Tap j meets the token j back: the last column of the weight is tap 0.
template <class X>
struct Taps {
  float at[X::kTaps][X::kPart];

  STOKER_TILE void load(const X &x, const ShortConv &conv, int width) {
    for (int j = 0; j < X::kTaps; ++j)
      X::each([&](int i) {
        const bool there = j < width && x.column + i < conv.channels;
        at[j][i] = there ? X::number(conv.taps, conv.wide_taps, int64_t(x.column + i) * width + width - 1 - j) : 0.0f;
      });
  }
};

template <class X>
STOKER_TILE void convolve(float (&c)[X::kPart], const Taps<X> &taps, const typename X::Window &window, int reach) {
  X::each([&](int i) { c[i] = taps.at[0][i] * window[0](i); });
  for (int j = 1; j < X::kTaps; ++j)
    if (j <= reach) X::each([&](int i) { c[i] += taps.at[j][i] * window[j](i); });
}

// Tokens [first, end).
template <class X>
STOKER_TILE void short_conv_forward(const X &x, const PrologueParams &p, const ShortConv &conv, int first, int end) {
  Taps<X> taps;
  taps.load(x, conv, p.width);
  Segment segment(p.cu_seqlens, p.num_segments, first);
  typename X::Window window(x, conv.x, conv.x_stride, first, segment.reach(first, p.width));
  Reader<X> rows(x, conv.x, conv.x_stride, first, end);
  for (int t = first; t < end; ++t) {
    float y[X::kPart];
    window.push(rows.next(x, t));
    convolve<X>(y, taps, window, segment.reach(t, p.width));
    X::each([&](int i) { y[i] *= sigmoid(y[i]); });
    if (conv.unit) {
      const float r = inverse_root(x.sum([&](int i) { return y[i] * y[i]; }) + kUnitEps);
      X::each([&](int i) { y[i] *= r; });
    }
    x.store(conv.y, conv.channels, t, y);
  }
}

// dx of the tokens [first, end), to which the next width - 1 tokens of the same segment add; and the block's dtaps.
// `Pending` gathers the gradients of the rows in the window, until no later token adds to them.
template <class X, class Pending>
STOKER_TILE void short_conv_backward(const X &x, Pending pending, const PrologueParams &p, const ShortConv &conv,
                                     float *dtaps_sum, int first, int end) {
  const int last = end + p.width - 1 < p.num_tokens ? end + p.width - 1 : p.num_tokens;
  Taps<X> taps, dtaps;
  taps.load(x, conv, p.width);
  for (int j = 0; j < X::kTaps; ++j) X::each([&](int i) { dtaps.at[j][i] = 0; });
  Segment segment(p.cu_seqlens, p.num_segments, first);
  typename X::Window window(x, conv.x, conv.x_stride, first, segment.reach(first, p.width));
  Reader<X> rows(x, conv.x, conv.x_stride, first, last), cotangents(x, conv.dy, conv.channels, first, last);
  for (int t = first; t < last; ++t) {
    const int reach = segment.reach(t, p.width);
    float dc[X::kPart], y[X::kPart], slope[X::kPart];
    window.push(rows.next(x, t));
    const typename X::Row dy = cotangents.next(x, t);
    convolve<X>(y, taps, window, reach);
    X::each([&](int i) {
      const float s = sigmoid(y[i]);
      y[i] *= s;
      slope[i] = silu_slope(s, y[i]);
    });
    if (conv.unit) {
      const float r = inverse_root(x.sum([&](int i) { return y[i] * y[i]; }) + kUnitEps);
      const float along = r * r * x.sum([&](int i) { return y[i] * dy(i); });
      X::each([&](int i) { dc[i] = slope[i] * r * (dy(i) - along * y[i]); });
    } else {
      X::each([&](int i) { dc[i] = slope[i] * dy(i); });
    }
    if (t < end)
      for (int j = 0; j < X::kTaps; ++j)
        if (j <= reach) X::each([&](int i) { dtaps.at[j][i] += dc[i] * window[j](i); });
    pending.add(x, taps, dc, t, reach);
  }
  pending.finish(x, last);
  for (int j = 0; j < X::kTaps; ++j)
    if (j < p.width)
      X::each([&](int i) {
        if (x.column + i < conv.channels) dtaps_sum[int64_t(j) * conv.channels + x.column + i] = dtaps.at[j][i];
      });
}

}  // namespace STOKER_ISA
}  // namespace stoker
