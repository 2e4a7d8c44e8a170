// Decoding on the GPU: a block holds some columns of one head's state in registers, from the first token to the last.
#define STOKER_ISA cuda
#include "decode/native/params.h"
#include "native/abi.h"
#include "native/activation.h"
#include "native/launch.h"

namespace stoker {
namespace cuda {

// A thread has 16 bytes of every 16th row of the state; eight threads side by side have a block's columns.
constexpr int kDecodeThreads = 128, kDecodeWarps = kDecodeThreads / 32, kAcross = 8;
constexpr int kRowGroups = kDecodeThreads / kAcross;

template <class S>
struct alignas(16) StatePart {
  static constexpr int kWide = 16 / sizeof(S), kColumns = kAcross * kWide;
  S at[kWide];
};

// What each warp's rows add to the products of a token; the next token's while a slow warp still reads this one's.
template <int Sums>
struct DecodeShared {
  float sums[2][kDecodeWarps][kAcross][Sums];
};

// Columns of a value head (x) of a sequence (y).
template <int K, class S>
__global__ void __launch_bounds__(kDecodeThreads) decode_kernel(DecodeParams p) {
  using Part = StatePart<S>;
  constexpr int kWide = Part::kWide, kRows = K / kRowGroups, kSums = 2 * kWide + 1;
  auto &shared = shared_memory<DecodeShared<kSums>>();
  const int blocks = p.value_dim / Part::kColumns, thread = thread_index(), across = thread % kAcross;
  const int group = thread / kAcross, warp = thread / 32, column = block_x() % blocks * Part::kColumns + across * kWide;
  const DecodeHead at(p, block_y(), block_x() / blocks);
  bf16 *o = (bf16 *)p.o + at.v + column;
  if (at.state < 0) {  // no state has this number: nothing is touched, and what is returned says so
    for (int t = 0; t < p.num_tokens; ++t)
      if (group == 0)
        for (int c = 0; c < kWide; ++c) o[t * at.v_step + c] = bf16(bf16::from_bits(0x7fc00000u));
    return;
  }
  S *const from = (S *)p.state + at.state + int64_t(group) * p.value_dim + column;
  float state[kRows][kWide];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const Part part = *(const Part *)(from + int64_t(r) * kRowGroups * p.value_dim);
#pragma unroll
    for (int c = 0; c < kWide; ++c) state[r][c] = float(part.at[c]);
  }
  for (int t = 0; t < p.num_tokens; ++t) {
    const bf16 *const q = (const bf16 *)p.q + at.qk + t * at.qk_step + group;
    const bf16 *const k = (const bf16 *)p.k + at.qk + t * at.qk_step + group;
    const bf16 *const v = (const bf16 *)p.v + at.v + t * at.v_step + column;
    const float *const g = p.g + at.g + t * at.g_step;
    const float beta = p.beta[at.beta + t * at.beta_step];
    float keys[kRows], sums[kSums] = {};
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float decay = exponential(g[p.per_channel ? group + r * kRowGroups : 0]);
      const float query = float(q[r * kRowGroups]);
      keys[r] = float(k[r * kRowGroups]);
#pragma unroll
      for (int c = 0; c < kWide; ++c) {
        state[r][c] *= decay;
        sums[c] += keys[r] * state[r][c];
        sums[kWide + c] += query * state[r][c];
      }
      sums[2 * kWide] += keys[r] * query;
    }
    float *const mine = shared.sums[t % 2][warp][across];
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      sums[i] += shuffle_xor(sums[i], kAcross);
      sums[i] += shuffle_xor(sums[i], 2 * kAcross);
      if (thread % 32 < kAcross) shared_store(mine + i, sums[i]);
    }
    block_barrier();
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      sums[i] = 0;
#pragma unroll
      for (int w = 0; w < kDecodeWarps; ++w) sums[i] += shared_load(shared.sums[t % 2][w][across] + i);
    }
#pragma unroll
    for (int c = 0; c < kWide; ++c) {
      const float error = beta * (float(v[c]) - sums[c]);
      if (group == 0) o[t * at.v_step + c] = bf16(p.scale * (sums[kWide + c] + sums[2 * kWide] * error));
#pragma unroll
      for (int r = 0; r < kRows; ++r) state[r][c] += keys[r] * error;
    }
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    Part part;
#pragma unroll
    for (int c = 0; c < kWide; ++c) part.at[c] = S(state[r][c]);
    *(Part *)(from + int64_t(r) * kRowGroups * p.value_dim) = part;
  }
}

template <int K, class S>
int decode_states(const DecodeParams &p, void *stream) {
  using Part = StatePart<S>;
  if (p.value_dim % Part::kColumns) return kUnsupported;
  return launch("decode", decode_kernel<K, S>, p.num_v_heads * (p.value_dim / Part::kColumns), p.batch, kDecodeThreads,
                sizeof(DecodeShared<2 * Part::kWide + 1>), stream, p);
}

template <class S>
int decode_keys(const DecodeParams &p, void *stream) {
  switch (p.key_dim) {
    case 32: return decode_states<32, S>(p, stream);
    case 64: return decode_states<64, S>(p, stream);
    case 128: return decode_states<128, S>(p, stream);
    case 256: return decode_states<256, S>(p, stream);
  }
  return kUnsupported;
}

}  // namespace cuda
}  // namespace stoker

STOKER_PARAMS(DecodeParams)

// 0, a cudaError_t, or a code of native/abi.h. `stream` is a cudaStream_t.
STOKER_EXPORT int stoker_decode_forward(const stoker::DecodeParams *p, void *stream) {
  return p->narrow_state ? stoker::cuda::decode_keys<stoker::bf16>(*p, stream)
                         : stoker::cuda::decode_keys<float>(*p, stream);
}
