// The prologue on the GPU: a thread walks over a block of tokens with 8 channels, so that a row is read once for all its
// taps; gradients of weights are summed over such blocks first, then over the blocks in their order.
#define STOKER_ISA cuda
#include "native/abi.h"
#include "native/launch.h"
#include "native/row_block.h"
#include "prologue/native/gates.h"
#include "prologue/native/short_conv.h"

namespace stoker {
namespace cuda {

constexpr int kRowThreads = 128;

// Gradients of the rows in the window, in registers: a row leaves when no later token sees it.
struct PendingLanes {
  const ShortConv &conv;
  int first, end;
  float at[LaneRows::kTaps][LaneRows::kPart];

  STOKER_DEVICE PendingLanes(const ShortConv &conv, int first, int end) : conv(conv), first(first), end(end), at{} {}
  STOKER_DEVICE void add(const LaneRows &x, const Taps<LaneRows> &taps, const float (&dc)[LaneRows::kPart], int t,
                         int reach) {
    x.each([&](int i) { at[0][i] = taps.at[0][i] * dc[i]; });
#pragma unroll
    for (int j = 1; j < LaneRows::kTaps; ++j)
      if (j <= reach) x.each([&](int i) { at[j][i] += taps.at[j][i] * dc[i]; });
    retire(x, t);
  }
  STOKER_DEVICE void finish(const LaneRows &x, int last) {
    for (int t = last; t < end + LaneRows::kTaps - 1; ++t) {
      x.each([&](int i) { at[0][i] = 0; });
      retire(x, t);
    }
  }
  STOKER_DEVICE void retire(const LaneRows &x, int t) {
    const int row = t - LaneRows::kTaps + 1;
    if (first <= row && row < end) x.store(conv.dx, conv.channels, row, at[LaneRows::kTaps - 1]);
#pragma unroll
    for (int j = LaneRows::kTaps - 1; j > 0; --j) x.each([&](int i) { at[j][i] = at[j - 1][i]; });
  }
};

STOKER_BOTH int groups_of(const ShortConv &conv) { return ceil_div(conv.channels, LaneRows::kPart * kRowThreads); }

// Groups of channels (y): those of q, of k, of v; blocks of tokens (x).
STOKER_DEVICE int conv_of_group(const PrologueParams &p, int &group) {
  int s = 0;
  for (group = block_y(); group >= groups_of(p.convs[s]); ++s) group -= groups_of(p.convs[s]);
  return s;
}

template <bool Back>
__global__ void __launch_bounds__(kRowThreads) short_conv_kernel(PrologueParams p) {
  int group;
  const int s = conv_of_group(p, group);
  const ShortConv &conv = p.convs[s];
  LaneRows x;
  x.column = (group * kRowThreads + thread_index()) * LaneRows::kPart;
  x.lanes = conv.dim / LaneRows::kPart;
  x.active = x.column < conv.channels;
  const int first = block_x() * p.block_tokens, after = first + p.block_tokens;
  const int end = after < p.num_tokens ? after : p.num_tokens;
  if constexpr (Back) {
    float *sums = taps_sums(p, s) + int64_t(block_x()) * p.width * conv.channels;
    short_conv_backward(x, PendingLanes(conv, first, end), p, conv, sums, first, end);
  } else {
    short_conv_forward(x, p, conv, first, end);
  }
}

// Columns of a, then those of b (y); blocks of tokens (x).
template <bool Back>
__global__ void __launch_bounds__(kRowThreads) gates_kernel(PrologueParams p) {
  const int first = block_x() * p.gate_tokens, after = first + p.gate_tokens;
  const int end = after < p.num_tokens ? after : p.num_tokens;
  const int column = block_y() * kRowThreads + thread_index();
  Columns<bf16, 1> x{column, 1};
  if (column < p.decays) {
    if constexpr (Back) {
      const int64_t at = int64_t(block_x()) * p.decays;
      decay_backward(x, p, bias_sums(p) + at, rate_sums(p) + at, first, end);
    } else {
      decay_forward(x, p, first, end);
    }
  } else if (column < p.decays + p.num_v_heads) {
    x.column -= p.decays;
    if constexpr (Back)
      strength_backward(x, p, first, end);
    else
      strength_forward(x, p, first, end);
  }
}

// The sum of of[block * stride], block after block.
STOKER_DEVICE float over_blocks(const float *of, int64_t stride, int blocks) {
  float all = 0;
#pragma unroll 8
  for (int block = 0; block < blocks; ++block) all += of[block * stride];
  return all;
}

// One thread a weight of a convolution: q, k or v (y).
__global__ void __launch_bounds__(kRowThreads) taps_sum_kernel(PrologueParams p) {
  const ShortConv &conv = p.convs[block_y()];
  const int i = block_x() * kRowThreads + thread_index(), tap = i / conv.channels, channel = i % conv.channels;
  if (tap >= p.width) return;
  const float sum = over_blocks(taps_sums(p, block_y()) + i, int64_t(p.width) * conv.channels,
                                ceil_div(p.num_tokens, p.block_tokens));
  const int64_t to = int64_t(channel) * p.width + p.width - 1 - tap;
  if (conv.wide_taps)
    ((float *)conv.dtaps)[to] = sum;
  else
    ((bf16 *)conv.dtaps)[to] = bf16(sum);
}

struct RateShared {
  float part[kRowThreads];
};

// One block a head: dt_bias of its columns, and its A_log.
__global__ void __launch_bounds__(kRowThreads) gates_sum_kernel(PrologueParams p) {
  auto &s = shared_memory<RateShared>();
  const int per_head = p.decays / p.num_v_heads, blocks = ceil_div(p.num_tokens, p.gate_tokens);
  float rate = 0;
  for (int c = thread_index(); c < per_head; c += kRowThreads) {
    const int column = block_x() * per_head + c;
    p.ddt_bias[column] = over_blocks(bias_sums(p) + column, p.decays, blocks);
    rate += over_blocks(rate_sums(p) + column, p.decays, blocks);
  }
  shared_store(s.part + thread_index(), rate);
  for (int half = kRowThreads / 2; half; half /= 2) {
    block_barrier();
    if (thread_index() < half) {
      rate += shared_load(s.part + thread_index() + half);
      shared_store(s.part + thread_index(), rate);
    }
  }
  if (thread_index() == 0) p.dA_log[block_x()] = rate;
}

// Long blocks of tokens read few rows twice and leave few sums; short ones keep the GPU busy (132 multiprocessors on an
// H200, some blocks on each).
inline int tokens_of_block(int num_tokens, int groups) {
  int tokens = 256;
  while (tokens > 32 && int64_t(ceil_div(num_tokens, tokens)) * groups < 1024) tokens /= 2;
  return tokens;
}
inline PrologueParams with_blocks(PrologueParams p) {
  const int groups = groups_of(p.convs[0]) + groups_of(p.convs[1]) + groups_of(p.convs[2]);
  p.block_tokens = tokens_of_block(p.num_tokens, groups);
  p.gate_tokens = tokens_of_block(p.num_tokens, ceil_div(p.decays + p.num_v_heads, kRowThreads));
  return p;
}

template <bool Back>
int run_prologue(const PrologueParams &params, void *stream) {
  const PrologueParams p = with_blocks(params);
  int groups = 0, most_weights = 0;
  for (const ShortConv &conv : p.convs) {
    const bool power = conv.dim == 32 || conv.dim == 64 || conv.dim == 128 || conv.dim == 256;
    if (p.width > LaneRows::kTaps || conv.channels % LaneRows::kPart || (conv.unit && !power)) return kUnsupported;
    groups += groups_of(conv);
    most_weights = conv.channels * p.width > most_weights ? conv.channels * p.width : most_weights;
  }
  if (Back && p.workspace_bytes < sums_bytes(p)) return kWorkspaceTooSmall;
  if (int error = launch("prologue short_conv", short_conv_kernel<Back>, ceil_div(p.num_tokens, p.block_tokens), groups,
                         kRowThreads, 0, stream, p))
    return error;
  if (int error = launch("prologue gates", gates_kernel<Back>, ceil_div(p.num_tokens, p.gate_tokens),
                         ceil_div(p.decays + p.num_v_heads, kRowThreads), kRowThreads, 0, stream, p))
    return error;
  if (!Back) return 0;
  if (int error = launch("prologue taps_sum", taps_sum_kernel, ceil_div(most_weights, kRowThreads), 3, kRowThreads, 0,
                         stream, p))
    return error;
  return launch("prologue gates_sum", gates_sum_kernel, p.num_v_heads, 1, kRowThreads, sizeof(RateShared), stream, p);
}

}  // namespace cuda
}  // namespace stoker

STOKER_PARAMS(PrologueParams)

// 0, a cudaError_t, or a code of native/abi.h. `stream` is a cudaStream_t.
STOKER_EXPORT int stoker_prologue_forward(const stoker::PrologueParams *p, void *stream) {
  return stoker::cuda::run_prologue<false>(*p, stream);
}
STOKER_EXPORT int stoker_prologue_backward(const stoker::PrologueParams *p, void *stream) {
  return stoker::cuda::run_prologue<true>(*p, stream);
}
// Bytes of workspace that the backward wants.
STOKER_EXPORT int64_t stoker_prologue_workspace(const stoker::PrologueParams *p) {
  return stoker::sums_bytes(stoker::cuda::with_blocks(*p));
}
