// Decays per channel by a block of 8 warps (what the levels are: kda/native/levels.h).
//
// A decay between two tokens is a product of e^g over the tokens between them: an exponential is made once for a token
// and channel, and everything else is multiplied up in registers, across lanes by shuffles. All factors are <= 1, and no
// level waits for another warp.
#pragma once

#include "native/block_inverse.h"

namespace stoker {
namespace STOKER_ISA {

template <int K>
struct BlockTriangle;  // kda/native/block_triangle.h
template <int K>
struct BlockTriangleGradient;

// Two pairs of elements.
STOKER_DEVICE void widen(float (&to)[4], uint32_t low, uint32_t high) {
  to[0] = bf16::from_bits(low << 16);
  to[1] = bf16::from_bits(low & 0xffff0000u);
  to[2] = bf16::from_bits(high << 16);
  to[3] = bf16::from_bits(high & 0xffff0000u);
}
// A lane's four numbers of a group of 8 tokens, in memory.
template <class T>
struct LaneGroup;
template <>
struct alignas(16) LaneGroup<float> {
  float x[4];
  LaneGroup() = default;
  STOKER_DEVICE explicit LaneGroup(const float (&from)[4]) : x{from[0], from[1], from[2], from[3]} {}
  STOKER_DEVICE void add_to(float (&to)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i] += x[i];
  }
};
template <>
struct alignas(8) LaneGroup<bf16> {
  uint32_t low, high;
  LaneGroup() = default;
  STOKER_DEVICE explicit LaneGroup(const float (&from)[4])
      : low(round_pair(from[0], from[1])), high(round_pair(from[2], from[3])) {}
  STOKER_DEVICE void add_to(float (&to)[4]) const {
    float x[4];
    widen(x, low, high);
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i] += x[i];
  }
};

struct BlockLevels : BlockInverse {
  using BlockInverse::BlockInverse;

  // Numbers by token and channel that are summed or multiplied along the tokens: a stripe of channels is a warp's, so
  // that the tokens of a channel meet in registers and by two shuffles. Tiles made of them have the channels as rows.
  static constexpr bool kChannelsFirst = true;
  template <int K>
  using Channels = Acc<K, 64>;
  template <int K>
  using ChannelTile = Tile<K, 64>;
  template <int K>
  struct Gates {
    static constexpr int stride = K + 4;  // a lane's two tokens and those of its neighbours lie in different banks
    alignas(16) float at[64 * stride];
    Vector<K> halves[2];  // what the two warps of a channel tell each other where K is 64
  };
  // One warp has all tokens of 16 channels: element i of group j is token 8 j + lane % 4 * 2 + i % 2, channel 16 warp +
  // lane / 4 + i / 2 * 8. With K = 64 four warps have nothing.
  struct Strip {
    float x[8][4];
  };
  template <int K>
  using Strips = Strip;
  template <int K>
  using Triangle = BlockTriangle<K>;
  template <int K>
  using TriangleGradient = BlockTriangleGradient<K>;
  template <int N>
  struct TokenSums {
    static constexpr int parts = kWarps;
    Vector<N> part[parts];
  };

  template <int K>
  STOKER_DEVICE void load_gates(Gates<K> &gates, const float *from, int64_t stride, int rows) {
    constexpr int step = kThreads / (K / 4);
    const int i = opaque(thread), r = i / (K / 4), c = i % (K / 4) * 4;
    const float *at = from + r * stride + c;
    float *to = gates.at + r * Gates<K>::stride + c;
#pragma unroll
    for (int j = 0; j < 64 / step; ++j, at += step * stride)
      copy16_async(to + j * step * Gates<K>::stride, at, r + j * step < rows);
  }

  // from_start = e^G, to_end = e^(G_C - G), whole[c] = e^G_C; `whole` is there after the next barrier. It is made of the sum
  // of g, since it decays the state chunk after chunk: a product of rounded factors would be off by the same every time.
  template <int K>
  STOKER_DEVICE void decays(Channels<K> &from_start, Channels<K> &to_end, Vector<K> &whole, Gates<K> &gates) {
    using A = Channels<K>;
    sum_gates(whole, gates);
    const Place<K, 64> at(*this);
    const bool odd = lane & 1, high = lane & 2;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int c = at.row(2 * h);
      float groups[A::tiles], before = 1;
#pragma unroll
      for (int j = 0; j < A::tiles; ++j) {
        const float *g = gates.at + at.column(j, 0) * Gates<K>::stride + c;
        const float first = exp(shared_load(g)), second = exp(shared_load(g + Gates<K>::stride)), both = first * second;
        const float near = shuffle_xor(both, 1), four = both * near, far = shuffle_xor(four, 2);
        const float earlier = (odd ? near : 1.0f) * (high ? far : 1.0f) * before;
        const float later = (odd ? 1.0f : near) * (high ? 1.0f : far);
        from_start.x[j][2 * h] = earlier * first;
        from_start.x[j][2 * h + 1] = earlier * both;
        to_end.x[j][2 * h] = later * second;
        to_end.x[j][2 * h + 1] = later;
        groups[j] = four * far;
        before *= groups[j];
      }
      float after = 1;
      if constexpr (A::parts == 2) {
        const int part = warp / A::stripes;
        if (lane % 4 == 0) gates.halves[part][c] = before;
        meet();
        const float other = gates.halves[1 - part][c];
        if (part)
          scale(from_start, h, other);
        else
          after = other;
      }
#pragma unroll
      for (int j = A::tiles - 1; j >= 0; --j) {
        to_end.x[j][2 * h] *= after;
        to_end.x[j][2 * h + 1] *= after;
        after *= groups[j];
      }
    }
  }
  // x_t = sum of x from t on; of all x before t.
  template <int K>
  STOKER_DEVICE void sums_from(Channels<K> &x, Gates<K> &gates) {
    sums_along<true>(x, gates);
  }
  template <int K>
  STOKER_DEVICE void sums_before(Channels<K> &x, Gates<K> &gates) {
    sums_along<false>(x, gates);
  }
  // Numbers laid by in place of the gates, and taken up again; every thread must have had its gates.
  template <int K>
  STOKER_DEVICE void lay_by(Gates<K> &gates, const Channels<K> &acc) {
    LaneGroup<float> *at = reinterpret_cast<LaneGroup<float> *>(gates.at) + opaque(thread);
#pragma unroll
    for (int j = 0; j < Channels<K>::tiles; ++j) shared_store(at + j * kThreads, LaneGroup<float>(acc.x[j]));
  }
  template <int K>
  STOKER_DEVICE void take_up(Channels<K> &acc, const Gates<K> &gates) {
    const LaneGroup<float> *at = reinterpret_cast<const LaneGroup<float> *>(gates.at) + opaque(thread);
#pragma unroll
    for (int j = 0; j < Channels<K>::tiles; ++j) {
      const LaneGroup<float> x = shared_load(at + j * kThreads);
#pragma unroll
      for (int i = 0; i < 4; ++i) acc.x[j][i] = x.x[i];
    }
  }
  // The elements of a tile by channels.
  template <int K>
  STOKER_DEVICE void take(Channels<K> &to, const Tile<64, K> &tile) {
    using A = Channels<K>;
    const int w = opaque(warp);
    take_groups<A::tiles>(to.x, tile, w % A::stripes * 16, w / A::stripes * A::columns);
  }
  // to.part[t] += sum over channels of f(t, c, x).
  template <int K, class F>
  STOKER_DEVICE void token_sums(TokenSums<64> &to, F f, Channels<K> &acc) {
    using A = Channels<K>;
    const Place<K, 64> at(*this);
#pragma unroll
    for (int j = 0; j < A::tiles; ++j)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float sum = f(at.column(j, i), at.row(0), acc.x[j][i]) + f(at.column(j, i), at.row(2), acc.x[j][i + 2]);
        add_token(to, at.column(j, i), sum);
      }
  }
  // A chunk's numbers in memory and back, in an order that is only theirs: 64 K of them.
  template <int K, class T>
  STOKER_DEVICE void keep(T *to, const Channels<K> &acc) {
    using A = Channels<K>;
    const int w = opaque(warp), first = w % A::stripes * 8 + w / A::stripes * A::tiles;
    LaneGroup<T> *at = reinterpret_cast<LaneGroup<T> *>(to) + first * 32 + opaque(lane);
#pragma unroll
    for (int j = 0; j < A::tiles; ++j) at[j * 32] = LaneGroup<T>(acc.x[j]);
  }
  template <int K>
  STOKER_DEVICE bool has_strip() const {
    return K == 16 * kWarps || warp < K / 16;
  }
  template <int K, class T>
  STOKER_DEVICE void recall(Strip &acc, const T *from) {
    if (!has_strip<K>()) return;
    const LaneGroup<T> *at = reinterpret_cast<const LaneGroup<T> *>(from) + opaque(warp) * 8 * 32 + opaque(lane);
#pragma unroll
    for (int j = 0; j < 8; ++j) at[j * 32].add_to(acc.x[j]);
  }
  template <int K>
  STOKER_DEVICE void zero_strip(Strip &acc) {
#pragma unroll
    for (auto &group : acc.x)
#pragma unroll
      for (float &x : group) x = 0;
  }
  // Rows of tokens in memory.
  template <int K, class T>
  STOKER_DEVICE void add_strip(Strip &acc, const T *from, int64_t stride, int rows) {
    const int w = opaque(warp), l = opaque(lane);
    if (!has_strip<K>()) return;
    const int t = l % 4 * 2;
    const T *at = from + t * stride + w * 16 + l / 4;
#pragma unroll
    for (int j = 0; j < 8; ++j, at += 8 * stride)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (t + j * 8 + i % 2 < rows) acc.x[j][i] += float(at[i % 2 * stride + i / 2 * 8]);
  }
  template <int K>
  STOKER_DEVICE void store_strip(float *to, int64_t stride, int rows, const Strip &acc) {
    const int w = opaque(warp), l = opaque(lane);
    if (!has_strip<K>()) return;
    const int t = l % 4 * 2;
    float *at = to + t * stride + w * 16 + l / 4;
#pragma unroll
    for (int j = 0; j < 8; ++j, at += 8 * stride)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (t + j * 8 + i % 2 < rows) at[i % 2 * stride + i / 2 * 8] = acc.x[j][i];
  }
  // Two lanes swap so that each has two channels of one token.
  template <int K>
  STOKER_DEVICE void store_strip(bf16 *to, int64_t stride, int rows, const Strip &acc) {
    const int w = opaque(warp), l = opaque(lane);
    if (!has_strip<K>()) return;
    const bool odd = l / 4 % 2;
    const int t = l % 4 * 2 + odd;
    bf16 *at = to + t * stride + w * 16 + l / 4 - odd;
#pragma unroll
    for (int j = 0; j < 8; ++j, at += 8 * stride)
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        const float mine = odd ? acc.x[j][i + 1] : acc.x[j][i], given = odd ? acc.x[j][i] : acc.x[j][i + 1];
        const float other = shuffle_xor(given, 4);
        const uint32_t pair = odd ? round_pair(other, mine) : round_pair(mine, other);
        if (t + j * 8 < rows) *reinterpret_cast<uint32_t *>(at + i * 4) = pair;
      }
  }

  template <int Groups, int K>
  STOKER_DEVICE void take_groups(float (*to)[4], const Tile<64, K> &tile, int channel, int token) {
    static_assert(Groups % 2 == 0);
    const int l = opaque(lane);
    const uint16_t *at = tile.at + tile.index(token + l % 8 + l / 16 * 8, channel + l / 8 % 2 * 8);
#pragma unroll
    for (int j = 0; j < Groups; j += 2) {
      uint32_t pairs[4];
      load_matrices<true>(pairs, at + j * 8 * 64);
      widen(to[j], pairs[0], pairs[1]);
      widen(to[j + 1], pairs[2], pairs[3]);
    }
  }
  // The share of one lane of a warp in the sum of token t over the warp's channels.
  STOKER_DEVICE void add_token(TokenSums<64> &to, int t, float sum) {
    sum += shuffle_xor(sum, 4);
    sum += shuffle_xor(sum, 8);
    sum += shuffle_xor(sum, 16);
    if (lane < 4) to.part[warp][t] += sum;
  }

 private:
  // whole[c] = e^G_C: neighbouring threads share out the tokens of a channel.
  template <int K>
  STOKER_DEVICE void sum_gates(Vector<K> &whole, const Gates<K> &gates) {
    constexpr int threads = kThreads / K, tokens = 64 / threads;
    const int i = opaque(thread), c = i / threads;
    const float *at = gates.at + i % threads * tokens * Gates<K>::stride + c;
    float sum = 0;
#pragma unroll 8
    for (int t = 0; t < tokens; ++t) sum += shared_load(at + t * Gates<K>::stride);
#pragma unroll
    for (int mask = 1; mask < threads; mask *= 2) sum += shuffle_xor(sum, mask);
    if (i % threads == 0) whole[c] = exp(sum);
  }
  template <bool FromHere, int K>
  STOKER_DEVICE void sums_along(Acc<K, 64> &x, Gates<K> &gates) {
    using A = Acc<K, 64>;
    // Is the neighbour in question beyond this lane, on the side that is summed?
    const bool near_counts = (lane & 1) != FromHere, far_counts = (lane & 2) / 2 != FromHere;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float beyond = 0;
#pragma unroll
      for (int i = 0; i < A::tiles; ++i) {
        const int j = FromHere ? A::tiles - 1 - i : i;
        float &first = x.x[j][2 * h], &second = x.x[j][2 * h + 1];
        const float both = first + second, near = shuffle_xor(both, 1), four = both + near, far = shuffle_xor(four, 2);
        const float sum = beyond + (near_counts ? near : 0.0f) + (far_counts ? far : 0.0f);
        if (FromHere) {
          second += sum;
          first += second;
        } else {
          second = sum + first;
          first = sum;
        }
        beyond += four + far;
      }
      if constexpr (A::parts == 2) {
        const int part = warp / A::stripes, c = warp % A::stripes * 16 + lane / 4 + h * 8;
        meet();
        if (lane % 4 == 0) gates.halves[part][c] = beyond;
        meet();
        if ((part == 0) == FromHere) {
          const float other = gates.halves[1 - part][c];
#pragma unroll
          for (int j = 0; j < A::tiles; ++j) x.x[j][2 * h] += other, x.x[j][2 * h + 1] += other;
        }
      }
    }
  }
  template <int K>
  STOKER_DEVICE static void scale(Channels<K> &acc, int h, float by) {
#pragma unroll
    for (auto &group : acc.x) group[2 * h] *= by, group[2 * h + 1] *= by;
  }
};

}  // namespace STOKER_ISA
}  // namespace stoker
