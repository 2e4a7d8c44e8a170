// What the kernels of both delta rules share beside their programs.
#pragma once

#include "native/block_exec.h"
#include "native/delta_chunk.h"
#include "native/launch.h"

namespace stoker {
namespace STOKER_ISA {

// What a kernel is given: beside the caller's parameters the maps of what it reads by token.
#if defined(STOKER_TMA)
struct DeviceParams : DeltaParams {
  TensorMap maps[kTokenTensors];
};
#else
struct DeviceParams : DeltaParams {};
#endif
// 0 or kNoTensorMap.
inline int device_params(DeviceParams &to, const DeltaParams &from) {
  static_cast<DeltaParams &>(to) = from;
#if defined(STOKER_TMA)
  for (int i = 0; i < kTokenTensors; ++i) {
    const TokenTensor tensor = token_tensor(from, Tokens(i));
    if (!tensor.at || !from.num_tokens) continue;
    if (int error = map_rows(to.maps[i], tensor.at, tensor.stride, tensor.columns, from.num_tokens)) return error;
  }
#endif
  return 0;
}

// A program and its block's shared memory.
template <class Program>
struct Memory {
  typename Program::Shared shared;
#if defined(STOKER_TMA)
  Barrier landed;
#endif
};
template <class Program>
constexpr size_t block_bytes() {
  return shared_bytes<Memory<Program>>();
}
template <class Program, class Params, class... Arguments>
STOKER_DEVICE void run_block(const Params &p, Arguments... arguments) {
  auto &memory = shared_memory<Memory<Program>>();
#if defined(STOKER_TMA)
  BlockExec x(&memory.landed, p.maps);
#else
  BlockExec x;
#endif
  Program::run(x, memory.shared, p, arguments...);
}

// Stops the kernel loudly where bounds do not rise from 0 to the number of tokens, as soon as one block has seen it: reads
// and writes of others may have gone astray by then. The host never looks at them, since it would have to wait.
STOKER_DEVICE void require_bounds(const DeltaParams &p) {
  const int32_t *cu = p.cu_seqlens;
  bool wrong = cu[0] != 0 || cu[p.num_segments] != p.num_tokens;
  for (int i = thread_index(); i < p.num_segments; i += kThreads) wrong |= cu[i] > cu[i + 1];
  if (wrong) trap();
}

// The chunk in a slot; false where no segment uses it.
STOKER_DEVICE bool rows_of_slot(const DeltaParams &p, int slot, Rows &rows) {
  int low = 0, high = p.num_segments;  // low: the last segment whose first slot is not beyond this one
  while (high - low > 1) {
    int middle = (low + high) / 2;
    (first_slot(p.cu_seqlens, middle) <= slot ? low : high) = middle;
  }
  const int chunk = slot - first_slot(p.cu_seqlens, low);
  if (chunk >= chunks_of(p, low)) return false;
  rows = rows_of(p, low, chunk);
  return true;
}

// dq and dk [N, Hk, K] from [N, Hk * group, K]: sums in the order of the group, one thread an element.
STOKER_DEVICE void sum_heads(bf16 *dq, const bf16 *parts_q, bf16 *dk, const bf16 *parts_k, const DeltaParams &p,
                             int group) {
  const int K = p.key_dim;
  const int64_t i = int64_t(block_x()) * kThreads + thread_index();
  if (i >= int64_t(p.num_tokens) * p.num_qk_heads * K) return;
  float q = 0, k = 0;
  for (int j = 0; j < group; ++j) {
    const int64_t from = (i / K * group + j) * K + i % K;
    q += float(parts_q[from]);
    k += float(parts_k[from]);
  }
  dq[i] = bf16(q);
  dk[i] = bf16(k);
}
inline int sum_heads_blocks(const DeltaParams &p) {
  return int(ceil_div(int64_t(p.num_tokens) * p.num_qk_heads * p.key_dim, int64_t(kThreads)));
}

// Value columns a block works on. Forward: narrow where wide blocks would leave multiprocessors idle (132 on an H200);
// columns do not meet there. Backward: by the dims alone, since the blocks' shares of a gradient are added up, and a
// sequence must get the same bits whatever else is in the batch.
inline int value_block(const DeltaParams &p, bool back) {
  if (p.value_dim % 128) return 64;
  return !back && int64_t(p.num_segments) * p.num_v_heads * (p.value_dim / 128) <= 66 ? 64 : 128;
}

}  // namespace STOKER_ISA
}  // namespace stoker
