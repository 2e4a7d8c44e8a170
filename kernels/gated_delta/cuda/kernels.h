// The gated delta rule on the GPU: T of every chunk at once, then the scans, then the sums over heads that share a key.
// Included with STOKER_ISA, a namespace, and STOKER_ENTRY(name), the exported symbol.
#pragma once

#include "gated_delta/native/backward.h"
#include "gated_delta/native/forward.h"
#include "native/abi.h"
#include "native/block_exec.h"
#include "native/delta_device.h"
#include "native/launch.h"

namespace stoker {
namespace STOKER_ISA {

// T of one chunk.
template <int K>
struct GatedDeltaPrepare {
  struct Shared {
    BlockExec::Tile<kChunk, K> k;
    BlockExec::Tile<kChunk, kChunk> solved;
    Decays<BlockExec> decays;
    BlockExec::Scratch<kChunk> scratch;
  };
  STOKER_DEVICE static void run(BlockExec &x, Shared &s, const DeltaParams &p, const Rows &rows, int head) {
    const int qk_head = head / (p.num_v_heads / p.num_qk_heads);
    load_rows<Tokens::k>(x, s.k, p, rows, qk_head * K);
    s.decays.load(x, p, rows.token, head, rows.count);
    x.wait_loads();
    x.sync();
    s.decays.prepare(x);
    BlockExec::Acc<kChunk, kChunk> between;
    s.decays.matrix(x, between);
    solve<BlockExec, K>(x, s.solved, s.k, between, s.decays.beta, s.scratch);
    x.store_image((bf16 *)p.solved + block_of(p, rows, head) * kChunk * kChunk, s.solved);
  }
};

// One chunk slot (x) of one value head (y); slots that no segment uses are passed over.
template <int K>
__global__ void __launch_bounds__(kThreads) prepare_kernel(const __grid_constant__ DeviceParams p) {
  if (block_x() == 0 && block_y() == 0) require_bounds(p);
  Rows rows;
  if (rows_of_slot(p, block_x(), rows)) run_block<GatedDeltaPrepare<K>>(p, rows, block_y());
}

// One segment (x, of which there may be many) and one block of value columns of one value head (y).
template <int K, int V>
__global__ void __launch_bounds__(kThreads) forward_kernel(const __grid_constant__ DeviceParams p) {
  const int blocks = p.value_dim / V;
  run_block<GatedDeltaForward<BlockExec, K, V, false>>(p, block_x(), block_y() / blocks, block_y() % blocks * V);
}

// Partial gradients in the workspace: dq and dk [N, Hv * blocks, K] as bfloat16, dg and dbeta [N, Hv * blocks] as float.
struct Partials {
  bf16 *dq, *dk;
  float *dg, *dbeta;
  int64_t bytes;
};
STOKER_BOTH Partials partials_of(const DeltaParams &p, int blocks) {
  const int64_t heads = int64_t(p.num_tokens) * p.num_v_heads * blocks, rows = heads * p.key_dim;
  Partials at;
  at.dq = (bf16 *)p.workspace;
  at.dk = at.dq + rows;
  at.dg = (float *)(at.dk + rows);
  at.dbeta = at.dg + heads;
  at.bytes = rows * 4 + heads * 8;
  return at;
}

template <int K, int V>
struct BackwardParams {
  DeviceParams delta;
  typename GatedDeltaBackward<BlockExec, K, V>::Target to;
};
template <int K, int V>
__global__ void __launch_bounds__(kThreads) backward_kernel(const __grid_constant__ BackwardParams<K, V> p) {
  const int blocks = p.delta.value_dim / V, task = block_y();
  run_block<GatedDeltaBackward<BlockExec, K, V>>(p.delta, block_x(), task / blocks, task % blocks * V, p.to, task, task,
                                                 false);
}

// Sums the partial gradients in the order of heads and blocks: one thread an element.
__global__ void __launch_bounds__(kThreads) reduce_kernel(DeltaParams p) {
  const int blocks = p.value_dim / p.value_block;
  const Partials at = partials_of(p, blocks);
  sum_heads((bf16 *)p.dq, at.dq, (bf16 *)p.dk, at.dk, p, p.num_v_heads / p.num_qk_heads * blocks);
  const int64_t i = int64_t(block_x()) * kThreads + thread_index();
  if (i >= int64_t(p.num_tokens) * p.num_v_heads) return;
  float dg = 0, dbeta = 0;
  for (int j = 0; j < blocks; ++j) {
    dg += at.dg[i * blocks + j];
    dbeta += at.dbeta[i * blocks + j];
  }
  ((float *)p.dg)[i] = dg;
  ((float *)p.dbeta)[i] = dbeta;
}

template <int K>
int prepare(const DeviceParams &p, void *stream) {
  return launch("gated_delta prepare", prepare_kernel<K>, slots(p.num_tokens, p.num_segments), p.num_v_heads, kThreads,
                block_bytes<GatedDeltaPrepare<K>>(), stream, p);
}
template <int K, int V>
int forward(const DeviceParams &p, void *stream) {
  if (int error = prepare<K>(p, stream)) return error;
  return launch("gated_delta forward", forward_kernel<K, V>, p.num_segments, p.num_v_heads * (p.value_dim / V), kThreads,
                block_bytes<GatedDeltaForward<BlockExec, K, V, false>>(), stream, p);
}
template <int K, int V>
int backward(const DeviceParams &p, void *stream) {
  const int blocks = p.value_dim / V;
  const bool direct = blocks * p.num_v_heads == p.num_qk_heads;
  const Partials at = partials_of(p, blocks);
  if (!direct && p.workspace_bytes < at.bytes) return kWorkspaceTooSmall;
  const int tasks = p.num_v_heads * blocks;
  BackwardParams<K, V> params = {p, {at.dq, at.dk, at.dg, at.dbeta, tasks, tasks}};
  if (direct) params.to = {(bf16 *)p.dq, (bf16 *)p.dk, (float *)p.dg, (float *)p.dbeta, tasks, tasks};
  if (int error = launch("gated_delta backward", backward_kernel<K, V>, p.num_segments, tasks, kThreads,
                         block_bytes<GatedDeltaBackward<BlockExec, K, V>>(), stream, params))
    return error;
  if (direct) return 0;
  const int64_t gates = int64_t(p.num_tokens) * p.num_v_heads, gate_blocks = ceil_div(gates, int64_t(kThreads));
  const int reduce_blocks = gate_blocks > sum_heads_blocks(p) ? int(gate_blocks) : sum_heads_blocks(p);
  return launch("gated_delta reduce", reduce_kernel, reduce_blocks, 1, kThreads, 0, stream,
                static_cast<const DeltaParams &>(p));
}

int run(const DeltaParams &called, bool back, void *stream) {
  DeviceParams p;
  if (int error = device_params(p, called)) return error;
  p.value_block = value_block(p, back);
  if (p.value_dim % p.value_block) return kUnsupported;
  switch (p.key_dim * 1000 + p.value_block) {
#define STOKER_DIMS(K, V) \
  case K * 1000 + V:      \
    return back ? backward<K, V>(p, stream) : forward<K, V>(p, stream);
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
  return stoker::STOKER_ISA::run(*p, false, stream);
}
STOKER_EXPORT int STOKER_ENTRY(backward)(const stoker::DeltaParams *p, void *stream) {
  return stoker::STOKER_ISA::run(*p, true, stream);
}
// Bytes of workspace that the backward wants.
STOKER_EXPORT int64_t STOKER_ENTRY(workspace)(const stoker::DeltaParams *p) {
  const int blocks = p->value_dim / stoker::STOKER_ISA::value_block(*p, true);
  const bool direct = blocks * p->num_v_heads == p->num_qk_heads;
  return direct ? 0 : stoker::STOKER_ISA::partials_of(*p, blocks).bytes;
}
