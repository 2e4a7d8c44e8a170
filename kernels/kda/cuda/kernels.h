// Kimi Delta Attention on the GPU: pairs inside all chunks, the scans over states, and in the backward the pairs again,
// which gather what the scans left; then the sums over heads that share a key.
// Included with STOKER_ISA, a namespace, and STOKER_ENTRY(name), the exported symbol.
#pragma once

#include "kda/native/backward.h"
#include "kda/native/block_triangle.h"
#include "kda/native/block_triangle_gradient.h"
#include "kda/native/forward.h"
#include "kda/native/pairs.h"
#include "kda/native/prepare.h"
#include "native/abi.h"
#include "native/block_exec.h"
#include "native/delta_device.h"
#include "native/launch.h"

namespace stoker {
namespace STOKER_ISA {

// One chunk slot (x) of one value head (y).
template <int K>
__global__ void __launch_bounds__(kThreads) kda_prepare_kernel(const __grid_constant__ DeviceParams p) {
  if (block_x() == 0 && block_y() == 0) require_bounds(p);
  Rows rows;
  if (rows_of_slot(p, block_x(), rows)) run_block<KdaPrepare<BlockExec, K>>(p, rows, block_y());
}

// One segment (x, of which there may be many) and one block of value columns of one value head (y).
template <int K, int V>
__global__ void __launch_bounds__(kThreads) kda_forward_kernel(const __grid_constant__ DeviceParams p) {
  const int blocks = p.value_dim / V;
  run_block<KdaForward<BlockExec, K, V>>(p, block_x(), block_y() / blocks, block_y() % blocks * V);
}

// Shares of the gradients, one for each chunk slot, value head and block of value columns; then, where value heads share
// keys, the gradients of every value head [N, Hv, K].
struct KdaWorkspace {
  bf16 *dq, *dk, *head_dq, *head_dk;
  float *dg, *dbeta;
  int64_t bytes;

  // Of block `at` of a chunk's.
  STOKER_BOTH KdaShares<BlockExec> shares(int64_t at, int K) const {
    return {dq + at * kChunk * K, dk + at * kChunk * K, dg + at * kChunk * K, dbeta + at * kChunk};
  }
};
STOKER_BOTH KdaWorkspace kda_workspace(const DeltaParams &p) {
  const int64_t blocks = int64_t(slots(p.num_tokens, p.num_segments)) * p.num_v_heads * (p.value_dim / p.value_block);
  const int64_t merged = p.num_v_heads == p.num_qk_heads ? 0 : int64_t(p.num_tokens) * p.num_v_heads * p.key_dim;
  KdaWorkspace at;
  at.dg = (float *)p.workspace;
  at.dbeta = at.dg + blocks * kChunk * p.key_dim;
  at.dq = (bf16 *)(at.dbeta + blocks * kChunk);
  at.dk = at.dq + blocks * kChunk * p.key_dim;
  at.head_dq = at.dk + blocks * kChunk * p.key_dim;
  at.head_dk = at.head_dq + merged;
  at.bytes = (char *)(at.head_dk + merged) - (char *)p.workspace;
  return at;
}

template <int K, int V>
__global__ void __launch_bounds__(kThreads) kda_backward_kernel(const __grid_constant__ DeviceParams p) {
  const int blocks = p.value_dim / V, segment = block_x(), head = block_y() / blocks, column = block_y() % blocks;
  run_block<KdaBackward<BlockExec, K, V>>(p, segment, head, column * V, [&](int chunk) {
    return kda_workspace(p).shares(block_of(p, rows_of(p, segment, chunk), head) * blocks + column, K);
  });
}

template <int K, int V>
__global__ void __launch_bounds__(kThreads) kda_pairs_kernel(const __grid_constant__ DeviceParams p) {
  using Program = KdaPairs<BlockExec, K, V>;
  Rows rows;
  if (!rows_of_slot(p, block_x(), rows)) return;
  const int head = block_y(), blocks = p.value_dim / V;
  auto shares = [&](int i) { return kda_workspace(p).shares(block_of(p, rows, head) * blocks + i, K); };
  auto target = [&] {
    const KdaWorkspace at = kda_workspace(p);
    const int heads = p.num_v_heads;
    const int64_t stride = int64_t(heads) * K;
    const bool merge = heads != p.num_qk_heads;
    return typename Program::Target{(merge ? at.head_dq : (bf16 *)p.dq) + head * K,
                                    (merge ? at.head_dk : (bf16 *)p.dk) + head * K,
                                    (float *)p.dg + head * K, (float *)p.dbeta + head, stride, stride, heads, false};
  };
  run_block<Program>(p, rows, head, blocks, shares, target);
}

// dq and dk of a key head: the sum over its value heads, in order.
__global__ void __launch_bounds__(kThreads) kda_merge_kernel(DeltaParams p) {
  const KdaWorkspace at = kda_workspace(p);
  sum_heads((bf16 *)p.dq, at.head_dq, (bf16 *)p.dk, at.head_dk, p, p.num_v_heads / p.num_qk_heads);
}

template <int K, int V>
int kda_forward(const DeviceParams &p, void *stream) {
  const int chunks = slots(p.num_tokens, p.num_segments), tasks = p.num_v_heads * (p.value_dim / V);
  if (int error = launch("kda prepare", kda_prepare_kernel<K>, chunks, p.num_v_heads, kThreads,
                         block_bytes<KdaPrepare<BlockExec, K>>(), stream, p))
    return error;
  return launch("kda forward", kda_forward_kernel<K, V>, p.num_segments, tasks, kThreads,
                block_bytes<KdaForward<BlockExec, K, V>>(), stream, p);
}

template <int K, int V>
int kda_backward(const DeviceParams &p, void *stream) {
  const int chunks = slots(p.num_tokens, p.num_segments), tasks = p.num_v_heads * (p.value_dim / V);
  if (p.workspace_bytes < kda_workspace(p).bytes) return kWorkspaceTooSmall;
  if (int error = launch("kda backward", kda_backward_kernel<K, V>, p.num_segments, tasks, kThreads,
                         block_bytes<KdaBackward<BlockExec, K, V>>(), stream, p))
    return error;
  if (int error = launch("kda pairs", kda_pairs_kernel<K, V>, chunks, p.num_v_heads, kThreads,
                         block_bytes<KdaPairs<BlockExec, K, V>>(), stream, p))
    return error;
  if (p.num_v_heads == p.num_qk_heads) return 0;
  return launch("kda merge", kda_merge_kernel, sum_heads_blocks(p), 1, kThreads, 0, stream,
                static_cast<const DeltaParams &>(p));
}

inline DeltaParams with_block(DeltaParams p, bool back) {
  p.value_block = value_block(p, back);
  return p;
}

inline int run_kda(const DeltaParams &called, bool back, void *stream) {
  DeviceParams p;
  if (int error = device_params(p, called)) return error;
  if (p.value_dim % p.value_block) return kUnsupported;
  switch (p.key_dim * 1000 + p.value_block) {
#define STOKER_DIMS(K, V) \
  case K * 1000 + V:      \
    return back ? kda_backward<K, V>(p, stream) : kda_forward<K, V>(p, stream);
    STOKER_DIMS(64, 64)
    STOKER_DIMS(64, 128)
    STOKER_DIMS(128, 64)
    STOKER_DIMS(128, 128)
#undef STOKER_DIMS
  }
  return kUnsupported;
}

}  // namespace STOKER_ISA
}  // namespace stoker

// 0, a cudaError_t, or a code of native/abi.h. `stream` is a cudaStream_t.
STOKER_EXPORT int STOKER_ENTRY(forward)(const stoker::DeltaParams *p, void *stream) {
  return stoker::STOKER_ISA::run_kda(stoker::STOKER_ISA::with_block(*p, false), false, stream);
}
STOKER_EXPORT int STOKER_ENTRY(backward)(const stoker::DeltaParams *p, void *stream) {
  return stoker::STOKER_ISA::run_kda(stoker::STOKER_ISA::with_block(*p, true), true, stream);
}
// Bytes of workspace that the backward wants.
STOKER_EXPORT int64_t STOKER_ENTRY(workspace)(const stoker::DeltaParams *p) {
  return stoker::STOKER_ISA::kda_workspace(stoker::STOKER_ISA::with_block(*p, true)).bytes;
}
