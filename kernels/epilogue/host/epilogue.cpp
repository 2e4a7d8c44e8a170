// isa: baseline avx2 avx512
// The epilogue on CPU in float, by blocks of tokens.
#include <algorithm>

#include "epilogue/native/norm_gate.h"
#include "native/host_entry.h"
#include "native/host_mode.h"
#include "native/row_host.h"

namespace stoker {
namespace STOKER_ISA {

constexpr int kBlockTokens = 64;
enum Stage { kForward, kBackward, kSums };

template <int D>
int norm_gate(const EpilogueParams &p, int stage, int block) {
  using X = HostRows<D>;
  const int first = block * kBlockTokens, end = std::min(first + kBlockTokens, p.num_tokens);
  float weight[D];
  double total[D] = {};
  X::each([&](int i) { weight[i] = X::number(p.weight, true, i); });
  for (int t = first; t < end; ++t) {
    float dweight[D] = {};
    for (int head = 0; head < p.num_heads; ++head) {
      const X x{head * D};
      if (stage == kForward)
        norm_gate_forward(x, p, weight, NormGateRows<X>::load(x, p, t), t);
      else
        norm_gate_backward(x, p, weight, NormGateRows<X>::load_all(x, p, t), t, dweight);
    }
    X::each([&](int i) { total[i] += dweight[i]; });
  }
  if (stage == kBackward) X::each([&](int i) { ((float *)p.workspace)[block * D + i] = float(total[i]); });
  return 0;
}

inline int64_t workspace_bytes(const EpilogueParams &p) {
  return int64_t(ceil_div(p.num_tokens, kBlockTokens)) * p.dim * 4;
}

// The gradient of the weight: the blocks' sums, added in order.
inline void add_blocks(const EpilogueParams &p) {
  for (int i = 0; i < p.dim; ++i) {
    double all = 0;
    for (int block = 0; block < ceil_div(p.num_tokens, kBlockTokens); ++block)
      all += ((const float *)p.workspace)[block * p.dim + i];
    ((float *)p.dweight)[i] = float(all);
  }
}

}  // namespace STOKER_ISA
}  // namespace stoker

STOKER_PARAMS(EpilogueParams)

// Blocks of 64 tokens [begin, end), forward (stage 0) or backward (1); then, of a backward, what sums over blocks (2).
STOKER_HOST_ENTRY(epilogue, const stoker::EpilogueParams *p, int stage, int begin, int end) {
  using namespace stoker::STOKER_ISA;
  const stoker::FlushSubnormals flush;
  if (stage != kForward && p->workspace_bytes < workspace_bytes(*p)) return stoker::kWorkspaceTooSmall;
  if (stage == kSums) {
    add_blocks(*p);
    return 0;
  }
  int error = 0;
  for (int block = begin; block < end && !error; ++block) switch (p->dim) {
      case 32: error = norm_gate<32>(*p, stage, block); break;
      case 64: error = norm_gate<64>(*p, stage, block); break;
      case 128: error = norm_gate<128>(*p, stage, block); break;
      case 256: error = norm_gate<256>(*p, stage, block); break;
      default: error = stoker::kUnsupported;
    }
  return error;
}

// Bytes of workspace that the backward wants.
STOKER_EXPORT int64_t STOKER_JOIN(stoker_epilogue_workspace, STOKER_ISA)(const stoker::EpilogueParams *p) {
  return stoker::STOKER_ISA::workspace_bytes(*p);
}
