// The inverse of a unit lower triangle by a block.
#pragma once

#include "native/block_sums.h"

namespace stoker {
namespace STOKER_ISA {

struct BlockInverse : BlockSums {
  // tile = (I + L)^-1, L = acc below the diagonal: blocks of 16 by substitution, then two merges
  // [[A, 0], [B, C]]^-1 = [[A', 0], [-C' B A', C']].
  STOKER_DEVICE void unit_lower_inverse(Tile<64, 64> &tile, Acc<64, 64> &acc, Scratch<64> &scratch) {
    each([&](int r, int c, float &x) { scratch.at[r][c] = c < r ? x : r == c ? 1.0f : 0.0f; }, acc);
    sync();
    float column[16];
    const int base = thread / 16 * 16, c = thread % 16;
    if (thread < 64) {
#pragma unroll
      for (int r = 0; r < 16; ++r) {
        float x = r == c ? 1.0f : 0.0f;
#pragma unroll
        for (int i = 0; i < r; ++i) x -= float(scratch.at[base + r][base + i]) * column[i];
        column[r] = x;
      }
    }
    sync();
    if (thread < 64) {
#pragma unroll
      for (int r = 0; r < 16; ++r) scratch.at[base + r][base + c] = column[r];
    }
    sync();
    merge<16>(scratch);
    merge<32>(scratch);
    for (int i = opaque(thread); i < 64 * 32; i += kThreads) {
      int r = i / 32, c2 = i % 32 * 2;
      uint32_t pair = round_pair(float(scratch.at[r][c2]), float(scratch.at[r][c2 + 1]));
      shared_store(reinterpret_cast<uint32_t *>(tile.at + tile.index(r, c2)), pair);
    }
    sync();
  }
  // Every second pair of blocks of N: B := -C' (B A'). A thread has elements of one column, so it reads A' once for all.
  template <int N>
  STOKER_DEVICE void merge(Scratch<64> &s) {
    constexpr int outputs = 64 / (2 * N) * N * N / kThreads;
    struct Place {
      int row, column, pair;
    };
    auto place = [&](int o) {
      const int i = thread + o * kThreads, pair = i / (N * N) * 2 * N;
      return Place{pair + N + i / N % N, pair + i % N, pair};
    };
    auto multiply = [&](int left, int right, float sign) {
      float sums[outputs] = {};
#pragma unroll 4
      for (int t = 0; t < N; ++t)
#pragma unroll
        for (int o = 0; o < outputs; ++o) {
          const Place at = place(o);
          sums[o] += float(s.at[at.row][at.pair + left + t]) * float(s.at[at.pair + right + t][at.column]);
        }
      sync();
#pragma unroll
      for (int o = 0; o < outputs; ++o) s.at[place(o).row][place(o).column] = sign * sums[o];
      sync();
    };
    multiply(0, 0, 1);
    multiply(N, N, -1);
  }
};

}  // namespace STOKER_ISA
}  // namespace stoker
