// isa: baseline avx2 avx512
// The prologue on CPU in float: blocks of tokens, one head after the other, so that a block's rows stay in cache.
#include <algorithm>

#include "native/host_entry.h"
#include "native/host_mode.h"
#include "native/row_host.h"
#include "prologue/native/gates.h"
#include "prologue/native/short_conv.h"

namespace stoker {
namespace STOKER_ISA {

constexpr int kBlockTokens = 64, kColumns = 64;
enum Stage { kForward, kBackward, kSums };

// Gradients of rows are gathered where they belong; what is another block's goes to a row that nobody reads.
template <int D>
struct PendingRows {
  float *dx;  // column 0 of the part
  int64_t stride;
  int first, end;
  float elsewhere[D];

  float *row(int t) { return first <= t && t < end ? dx + t * stride : elsewhere; }
  void add(const HostRows<D> &x, const Taps<HostRows<D>> &taps, const float (&dc)[D], int t, int reach) {
    float *to = row(t);
    x.each([&](int i) { to[i] = taps.at[0][i] * dc[i]; });
    for (int j = 1; j <= reach; ++j) {
      to = row(t - j);
      x.each([&](int i) { to[i] += taps.at[j][i] * dc[i]; });
    }
  }
  void finish(const HostRows<D> &, int) {}
};

template <int D>
int short_conv(const PrologueParams &p, int stage, int block, const ShortConv &conv, float *sums) {
  const int first = block * kBlockTokens, end = std::min(first + kBlockTokens, p.num_tokens);
  for (int column = 0; column < conv.channels; column += D) {
    const HostRows<D> x{column};
    if (stage == kForward) {
      short_conv_forward(x, p, conv, first, end);
    } else {
      PendingRows<D> pending;
      pending.dx = (float *)conv.dx + column;
      pending.stride = conv.channels;
      pending.first = first;
      pending.end = end;
      short_conv_backward<HostRows<D>, PendingRows<D> &>(x, pending, p, conv, sums, first, end);
    }
  }
  return 0;
}

inline int short_conv(const PrologueParams &p, int stage, int block, int s) {
  const ShortConv &conv = p.convs[s];
  float *sums = stage == kForward ? nullptr : taps_sums(p, s) + int64_t(block) * p.width * conv.channels;
  switch (conv.dim) {
    case 32: return short_conv<32>(p, stage, block, conv, sums);
    case 64: return short_conv<64>(p, stage, block, conv, sums);
    case 128: return short_conv<128>(p, stage, block, conv, sums);
    case 256: return short_conv<256>(p, stage, block, conv, sums);
  }
  return kUnsupported;
}

inline void gates(const PrologueParams &p, int stage, int block) {
  using X = Columns<float, kColumns>;
  const int first = block * kBlockTokens, end = std::min(first + kBlockTokens, p.num_tokens);
  for (int column = 0; column < p.decays; column += kColumns) {
    const X x{column, std::min(kColumns, p.decays - column)};
    const int64_t at = int64_t(block) * p.decays;
    if (stage == kForward)
      decay_forward(x, p, first, end);
    else
      decay_backward(x, p, bias_sums(p) + at, rate_sums(p) + at, first, end);
  }
  for (int column = 0; column < p.num_v_heads; column += kColumns) {
    const X x{column, std::min(kColumns, p.num_v_heads - column)};
    if (stage == kForward)
      strength_forward(x, p, first, end);
    else
      strength_backward(x, p, first, end);
  }
}

// Gradients of the weights: the blocks' sums, added in order.
inline void add_blocks(const PrologueParams &p, int blocks) {
  auto total = [&](const float *of, int64_t count, int64_t i) {
    double all = 0;
    for (int block = 0; block < blocks; ++block) all += of[block * count + i];
    return all;
  };
  for (int s = 0; s < 3; ++s) {
    const int64_t channels = p.convs[s].channels;
    for (int j = 0; j < p.width; ++j)
      for (int64_t c = 0; c < channels; ++c)
        ((float *)p.convs[s].dtaps)[c * p.width + p.width - 1 - j] =
            float(total(taps_sums(p, s), p.width * channels, j * channels + c));
  }
  const int per_head = p.decays / p.num_v_heads;
  for (int head = 0; head < p.num_v_heads; ++head) {
    double rate = 0;
    for (int c = head * per_head; c < (head + 1) * per_head; ++c) {
      p.ddt_bias[c] = float(total(bias_sums(p), p.decays, c));
      rate += total(rate_sums(p), p.decays, c);
    }
    p.dA_log[head] = float(rate);
  }
}

inline PrologueParams with_blocks(PrologueParams p) {
  p.block_tokens = p.gate_tokens = kBlockTokens;
  return p;
}

}  // namespace STOKER_ISA
}  // namespace stoker

STOKER_PARAMS(PrologueParams)

// Blocks of 64 tokens [begin, end), forward (stage 0) or backward (1); then, of a backward, what sums over blocks (2).
STOKER_HOST_ENTRY(prologue, const stoker::PrologueParams *params, int stage, int begin, int end) {
  using namespace stoker::STOKER_ISA;
  const stoker::FlushSubnormals flush;
  const stoker::PrologueParams p = with_blocks(*params);
  if (p.width > HostRows<32>::kTaps) return stoker::kUnsupported;
  if (stage != kForward && p.workspace_bytes < sums_bytes(p)) return stoker::kWorkspaceTooSmall;
  if (stage == kSums) {
    add_blocks(p, stoker::ceil_div(p.num_tokens, kBlockTokens));
    return 0;
  }
  for (int block = begin; block < end; ++block) {
    for (int s = 0; s < 3; ++s)
      if (int error = short_conv(p, stage, block, s)) return error;
    gates(p, stage, block);
  }
  return 0;
}

// Bytes of workspace that the backward wants.
STOKER_EXPORT int64_t STOKER_JOIN(stoker_prologue_workspace, STOKER_ISA)(const stoker::PrologueParams *p) {
  return stoker::sums_bytes(stoker::STOKER_ISA::with_blocks(*p));
}
