// Kimi Delta Attention on the GPU: pairs inside all chunks, the scans over states, and in the backward the pairs again,
// which gather what the scans left; then the sums over heads that share a key.
#define STOKER_ISA cuda
#include "kda/native/backward.h"
#include "kda/native/forward.h"
#include "kda/native/pairs.h"
#include "kda/native/prepare.h"
#include "native/abi.h"
#include "native/block_exec.h"
#include "native/delta_device.h"
#include "native/launch.h"

namespace stoker {
namespace cuda {

// One chunk slot (x) of one value head (y).
template <int K>
__global__ void __launch_bounds__(kThreads) kda_prepare_kernel(DeltaParams p) {
  if (block_x() == 0 && block_y() == 0) require_bounds(p);
  Rows rows;
  if (!rows_of_slot(p, block_x(), rows)) return;
  BlockExec x;
  KdaPrepare<BlockExec, K>::run(x, shared_memory<typename KdaPrepare<BlockExec, K>::Shared>(), p, rows, block_y());
}

// One segment (x, of which there may be many) and one block of value columns of one value head (y).
template <int K, int V>
__global__ void __launch_bounds__(kThreads) kda_forward_kernel(DeltaParams p) {
  using Program = KdaForward<BlockExec, K, V>;
  BlockExec x;
  const int blocks = p.value_dim / V;
  Program::run(x, shared_memory<typename Program::Shared>(), p, block_x(), block_y() / blocks, block_y() % blocks * V);
}

// Shares of the gradients, one for each block of value columns of each value head: [N, Hv * blocks, K] and [N, Hv *
// blocks]; then, where value heads share keys, the gradients of every value head [N, Hv, K].
struct KdaShares {
  bf16 *dq, *dk, *head_dq, *head_dk;
  float *dg, *dbeta;
  int64_t bytes;
};
STOKER_BOTH KdaShares kda_shares(const DeltaParams &p) {
  const int64_t heads = int64_t(p.num_tokens) * p.num_v_heads, blocks = p.value_dim / p.value_block;
  const int64_t rows = heads * blocks * p.key_dim, merged = p.num_v_heads == p.num_qk_heads ? 0 : heads * p.key_dim;
  KdaShares at;
  at.dg = (float *)p.workspace;
  at.dbeta = at.dg + rows;
  at.dq = (bf16 *)(at.dbeta + ceil_div(heads * blocks, int64_t(4)) * 4);
  at.dk = at.dq + rows;
  at.head_dq = at.dk + rows;
  at.head_dk = at.head_dq + merged;
  at.bytes = (char *)(at.head_dk + merged) - (char *)p.workspace;
  return at;
}

template <int K, int V>
__global__ void __launch_bounds__(kThreads) kda_backward_kernel(DeltaParams p) {
  using Program = KdaBackward<BlockExec, K, V>;
  BlockExec x;
  const int blocks = p.value_dim / V, lane = block_y(), lanes = p.num_v_heads * blocks;
  const KdaShares at = kda_shares(p);
  Program::run(x, shared_memory<typename Program::Shared>(), p, block_x(), lane / blocks, lane % blocks * V,
               {at.dq + lane * K, at.dk + lane * K, at.dg + lane * K, at.dbeta + lane, int64_t(lanes) * K,
                int64_t(lanes) * K, lanes});
}

template <int K, int V>
__global__ void __launch_bounds__(kThreads) kda_pairs_kernel(DeltaParams p) {
  using Program = KdaPairs<BlockExec, K, V>;
  Rows rows;
  if (!rows_of_slot(p, block_x(), rows)) return;
  BlockExec x;
  const KdaShares at = kda_shares(p);
  const int head = block_y(), heads = p.num_v_heads, blocks = p.value_dim / V, lane = head * blocks;
  const int64_t stride = int64_t(heads) * K;
  const bool merge = heads != p.num_qk_heads;
  Program::run(x, shared_memory<typename Program::Shared>(), p, rows, head,
               {at.dq + lane * K, at.dk + lane * K, at.dg + lane * K, at.dbeta + lane, blocks, stride * blocks,
                stride * blocks, heads * blocks},
               {(merge ? at.head_dq : (bf16 *)p.dq) + head * K, (merge ? at.head_dk : (bf16 *)p.dk) + head * K,
                (float *)p.dg + head * K, (float *)p.dbeta + head, stride, stride, heads, false});
}

// dq and dk of a key head: the sum over its value heads, in order.
__global__ void __launch_bounds__(kThreads) kda_merge_kernel(DeltaParams p) {
  const KdaShares at = kda_shares(p);
  sum_heads((bf16 *)p.dq, at.head_dq, (bf16 *)p.dk, at.head_dk, p, p.num_v_heads / p.num_qk_heads);
}

template <int K>
int kda_forward(const DeltaParams &p, void *stream) {
  const int chunks = slots(p.num_tokens, p.num_segments), lanes = p.num_v_heads * (p.value_dim / p.value_block);
  if (int error = launch("kda prepare", kda_prepare_kernel<K>, chunks, p.num_v_heads, kThreads,
                         shared_bytes<typename KdaPrepare<BlockExec, K>::Shared>(), stream, p))
    return error;
  return p.value_block == 128
             ? launch("kda forward", kda_forward_kernel<K, 128>, p.num_segments, lanes, kThreads,
                      shared_bytes<typename KdaForward<BlockExec, K, 128>::Shared>(), stream, p)
             : launch("kda forward", kda_forward_kernel<K, 64>, p.num_segments, lanes, kThreads,
                      shared_bytes<typename KdaForward<BlockExec, K, 64>::Shared>(), stream, p);
}

template <int K>
int kda_backward(const DeltaParams &p, void *stream) {
  constexpr int V = 64;
  const int chunks = slots(p.num_tokens, p.num_segments), lanes = p.num_v_heads * (p.value_dim / V);
  if (p.workspace_bytes < kda_shares(p).bytes) return kWorkspaceTooSmall;
  if (int error = launch("kda backward", kda_backward_kernel<K, V>, p.num_segments, lanes, kThreads,
                         shared_bytes<typename KdaBackward<BlockExec, K, V>::Shared>(), stream, p))
    return error;
  if (int error = launch("kda pairs", kda_pairs_kernel<K, V>, chunks, p.num_v_heads, kThreads,
                         shared_bytes<typename KdaPairs<BlockExec, K, V>::Shared>(), stream, p))
    return error;
  if (p.num_v_heads == p.num_qk_heads) return 0;
  return launch("kda merge", kda_merge_kernel, sum_heads_blocks(p), 1, kThreads, 0, stream, p);
}

// The forward takes wide blocks of values where they fill the GPU; the backward's tiles leave room for 64 columns.
inline DeltaParams with_block(DeltaParams p, bool back) {
  p.value_block = back ? 64 : value_block(p, back);
  return p;
}

inline int run_kda(const DeltaParams &p, bool back, void *stream) {
  if (p.value_dim % 64 || (p.key_dim != 64 && p.key_dim != 128)) return kUnsupported;
  if (p.key_dim == 64) return back ? kda_backward<64>(p, stream) : kda_forward<64>(p, stream);
  return back ? kda_backward<128>(p, stream) : kda_forward<128>(p, stream);
}

}  // namespace cuda
}  // namespace stoker

STOKER_PARAMS(DeltaParams)

// 0, a cudaError_t, or a code of native/abi.h. `stream` is a cudaStream_t.
STOKER_EXPORT int stoker_kda_forward(const stoker::DeltaParams *p, void *stream) {
  return stoker::cuda::run_kda(stoker::cuda::with_block(*p, false), false, stream);
}
STOKER_EXPORT int stoker_kda_backward(const stoker::DeltaParams *p, void *stream) {
  return stoker::cuda::run_kda(stoker::cuda::with_block(*p, true), true, stream);
}
// Bytes of workspace that the backward wants.
STOKER_EXPORT int64_t stoker_kda_workspace(const stoker::DeltaParams *p) {
  return stoker::cuda::kda_shares(stoker::cuda::with_block(*p, true)).bytes;
}
