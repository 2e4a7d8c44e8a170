// The epilogue on the GPU: V / 8 threads a row of V channels, a block walks over rows and sums the weight's gradient.
#define STOKER_ISA cuda
#include "epilogue/native/norm_gate.h"
#include "native/abi.h"
#include "native/launch.h"
#include "native/row_block.h"

namespace stoker {
namespace cuda {

constexpr int kRowThreads = 128, kPart = LaneRows::kPart, kSumColumns = 32, kSumParts = 8;

// Rows are heads of tokens. A block takes `passes` times `rows` of them: as long a walk as leaves 8 blocks for each of
// 132 multiprocessors (H200), so that there are few sums to add up afterwards.
struct Walk {
  int rows, passes, blocks;
  int64_t total;
};
STOKER_BOTH Walk walk_of(const EpilogueParams &p) {
  Walk walk;
  walk.rows = kRowThreads * kPart / p.dim;
  walk.total = int64_t(p.num_tokens) * p.num_heads;
  walk.passes = int(ceil_div(walk.total, int64_t(walk.rows) * 1056));
  walk.blocks = walk.passes ? int(ceil_div(walk.total, int64_t(walk.rows) * walk.passes)) : 0;
  return walk;
}

struct WeightShared {
  float part[kRowThreads * kPart];  // [rows, V]
};

template <bool Back>
__global__ void __launch_bounds__(kRowThreads) norm_gate_kernel(EpilogueParams p) {
  const Walk walk = walk_of(p);
  const int lanes = p.dim / kPart, channel = thread_index() % lanes * kPart;
  int64_t row = int64_t(block_x()) * walk.passes * walk.rows + thread_index() / lanes;
  float weight[kPart], dweight[kPart] = {};
  LaneRows x{0, lanes, false};
  x.each([&](int i) { weight[i] = x.number(p.weight, p.wide_weight, channel + i); });
  uint32_t token = 0;
  auto load = [&] {  // of `row`, which becomes x and token
    x.active = row < walk.total;
    token = uint32_t(row / p.num_heads);
    x.column = int(row - int64_t(token) * p.num_heads) * p.dim + channel;
    return Back ? NormGateRows<LaneRows>::load_all(x, p, token) : NormGateRows<LaneRows>::load(x, p, token);
  };
  NormGateRows<LaneRows> next = load();
  for (int pass = 0; pass < walk.passes; ++pass) {
    const NormGateRows<LaneRows> rows = next;
    const LaneRows here = x;
    const uint32_t t = token;
    row += walk.rows;
    if (pass + 1 < walk.passes) next = load();
    if constexpr (Back)
      norm_gate_backward(here, p, weight, rows, t, dweight);
    else
      norm_gate_forward(here, p, weight, rows, t);
  }
  if constexpr (Back) {
    auto &s = shared_memory<WeightShared>();
    x.each([&](int i) { shared_store(s.part + thread_index() / lanes * p.dim + channel + i, dweight[i]); });
    block_barrier();
    for (int c = thread_index(); c < p.dim; c += kRowThreads) {
      float sum = 0;
      for (int r = 0; r < walk.rows; ++r) sum += shared_load(s.part + r * p.dim + c);
      ((float *)p.workspace)[int64_t(block_x()) * p.dim + c] = sum;
    }
  }
}

struct SumShared {
  float part[kSumParts * kSumColumns];
};

// Columns of the weight's gradient: every eighth block's sum by one thread, then the eight in order.
__global__ void __launch_bounds__(kSumParts *kSumColumns) weight_sum_kernel(EpilogueParams p) {
  auto &s = shared_memory<SumShared>();
  const int column = thread_index() % kSumColumns, c = block_x() * kSumColumns + column, blocks = walk_of(p).blocks;
  float sum = 0;
#pragma unroll 8
  for (int block = thread_index() / kSumColumns; block < blocks; block += kSumParts)
    sum += ((const float *)p.workspace)[int64_t(block) * p.dim + c];
  shared_store(s.part + thread_index(), sum);
  block_barrier();
  if (thread_index() >= kSumColumns) return;
  for (int part = 1; part < kSumParts; ++part) sum += shared_load(s.part + part * kSumColumns + column);
  if (p.wide_weight)
    ((float *)p.dweight)[c] = sum;
  else
    ((bf16 *)p.dweight)[c] = bf16(sum);
}

inline int64_t workspace_bytes(const EpilogueParams &p) { return int64_t(walk_of(p).blocks) * p.dim * 4; }

inline bool supported(const EpilogueParams &p) { return p.dim == 32 || p.dim == 64 || p.dim == 128 || p.dim == 256; }

template <bool Back>
int run_epilogue(const EpilogueParams &p, void *stream) {
  if (!supported(p)) return kUnsupported;
  if (Back && p.workspace_bytes < workspace_bytes(p)) return kWorkspaceTooSmall;
  if (int error = launch("epilogue norm_gate", norm_gate_kernel<Back>, walk_of(p).blocks, 1, kRowThreads,
                         Back ? sizeof(WeightShared) : 0, stream, p))
    return error;
  if (!Back) return 0;
  return launch("epilogue weight_sum", weight_sum_kernel, p.dim / kSumColumns, 1, kSumParts * kSumColumns,
                sizeof(SumShared), stream, p);
}

}  // namespace cuda
}  // namespace stoker

STOKER_PARAMS(EpilogueParams)

// 0, a cudaError_t, or a code of native/abi.h. `stream` is a cudaStream_t.
STOKER_EXPORT int stoker_epilogue_forward(const stoker::EpilogueParams *p, void *stream) {
  return stoker::cuda::run_epilogue<false>(*p, stream);
}
STOKER_EXPORT int stoker_epilogue_backward(const stoker::EpilogueParams *p, void *stream) {
  return stoker::cuda::run_epilogue<true>(*p, stream);
}
// Bytes of workspace that the backward wants.
STOKER_EXPORT int64_t stoker_epilogue_workspace(const stoker::EpilogueParams *p) {
  return stoker::cuda::supported(*p) ? stoker::cuda::workspace_bytes(*p) : 0;
}
