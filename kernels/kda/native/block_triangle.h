// The pairs of a chunk's tokens by a block of 8 warps: levels in registers (kda/native/levels.h).
//
// A level scales a token by e^-|G_t - G_b| whether it is row or key. The factors of a level are those of the level below,
// those of one half times the decay of the other half: `to_row` is the product of e^g from the start of the half block to
// the token, `to_key` from after the token to the end, `all` that of the whole half block.
#pragma once

#include "native/block_levels.h"

namespace stoker {
namespace STOKER_ISA {

// Products over ever larger blocks of tokens, of which two lanes or registers have one half each.
struct Factors {
  float to_row, to_key, all;
  STOKER_DEVICE explicit Factors(float decay) : to_row(decay), to_key(1), all(decay) {}
  STOKER_DEVICE Factors(float to_row, float to_key, float all) : to_row(to_row), to_key(to_key), all(all) {}
  STOKER_DEVICE void join(float other, bool later) {
    if (later)
      to_row *= other;
    else
      to_key *= other;
    all *= other;
  }
};

// N_q and N_k. Warps share out the chunk's halves of 32 tokens and quarters of the channels; row r of a group of 8 tokens
// is lane / 4 of a fragment, queries above keys, so that the keys' half of a left operand is the right one as well.
template <int K>
struct BlockTriangle {
  static constexpr int kSquares = 10, kParts = 4;  // of 8 x 8 in a half; quarters of the channels
  struct alignas(16) Square {
    float x[32][4];  // by lane: N_q, N_q, N_k, N_k of row lane / 4, keys lane % 4 * 2 and the next
  };
  Square inside[2][kParts][kSquares], across[4][4];  // across: rows of the later half by keys of the earlier one
  BlockTiles::Tile<32, K> row_q, row_k, keys;        // scaled to meet there

  template <class X>
  STOKER_DEVICE void products(X &x, typename X::template Acc<64, 64> &n_q, typename X::template Acc<64, 64> &n_k,
                              const typename X::template Tile<64, K> &q, const typename X::template Tile<64, K> &k,
                              const float *g, int64_t stride, int rows) {
    halves(x, q, k, g, stride, rows);
    x.meet();
    between_halves(x);
    x.meet();
    gather(x, n_q, n_k);
  }

 private:
  STOKER_DEVICE static int square(int row, int key) { return row * (row + 1) / 2 + key; }

  using Fragment = uint32_t[4];  // low channels of q, of k; high channels of q, of k
  template <int First, int Step>
  STOKER_DEVICE static void scale(Fragment &to, const Fragment &from, const float (&by)[4]) {
#pragma unroll
    for (int i = First; i < 4; i += Step)
      to[i] = round_pair(bf16::from_bits(from[i] << 16) * by[i / 2 * 2],
                         bf16::from_bits(from[i] & 0xffff0000u) * by[i / 2 * 2 + 1]);
  }
  // Keys have only the right operand.
  STOKER_DEVICE static void scale_rows(Fragment &to, const Fragment &from, const float (&by)[4]) {
    scale<0, 1>(to, from, by);
  }
  STOKER_DEVICE static void scale_keys(Fragment &to, const Fragment &from, const float (&by)[4]) {
    scale<1, 2>(to, from, by);
  }
  STOKER_DEVICE static void multiply(float (&to)[4], const Fragment &rows, const Fragment &keys) {
    multiply_add(to, rows, keys[1], keys[3]);
  }

  template <class X>
  STOKER_DEVICE void halves(X &x, const typename X::template Tile<64, K> &q, const typename X::template Tile<64, K> &k,
                            const float *g, int64_t stride, int rows) {
    const int w = opaque(x.warp), l = opaque(x.lane), half = w / kParts, part = w % kParts, row = l / 4;
    float squares[kSquares][4];
#pragma unroll
    for (auto &s : squares)
#pragma unroll
      for (float &y : s) y = 0;
#pragma unroll 1
    for (int channel = part * (K / kParts); channel < (part + 1) * (K / kParts); channel += 16) {
      Fragment raw[4];
      float to_row[4][4], to_key[4][4], all[4][4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int token = half * 32 + j * 8;
        // Lane l names a row of matrix l / 8: q's low channels, k's, and the high ones.
        const auto &tile = l / 8 % 2 ? k : q;
        load_matrices<false>(raw[j], tile.at + tile.index(token + l % 8, channel + l / 16 * 8));
        float decay[4];
        const float *at = g + (token + row) * stride + channel + l % 4 * 2;
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
          const bool valid = token + row < rows;
          const Pair pair = *reinterpret_cast<const Pair *>(valid ? at + i * 4 : g);
          decay[i] = x.exp(valid ? pair.first : 0.0f);
          decay[i + 1] = x.exp(valid ? pair.second : 0.0f);
        }
        group(x, squares[square(j, j)], raw[j], decay, to_row[j], to_key[j], all[j]);
      }
      Fragment row_side[2], key_side[2];
#pragma unroll
      for (int j = 0; j < 4; j += 2) {  // 8 and 8 tokens
        scale_rows(row_side[0], raw[j + 1], to_row[j + 1]);
        scale_keys(key_side[0], raw[j], to_key[j]);
        multiply(squares[square(j + 1, j)], row_side[0], key_side[0]);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          to_row[j + 1][i] *= all[j][i];
          to_key[j][i] *= all[j + 1][i];
          all[j][i] *= all[j + 1][i];
        }
      }
#pragma unroll
      for (int j = 0; j < 2; ++j) {  // 16 and 16
        scale_rows(row_side[j], raw[2 + j], to_row[2 + j]);
        scale_keys(key_side[j], raw[j], to_key[j]);
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) multiply(squares[square(2 + j / 2, j % 2)], row_side[j / 2], key_side[j % 2]);
      // What the halves need to meet.
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int t = j * 8 + row, c = channel + l % 4 * 2, low = keys.index(t, c), high = keys.index(t, c + 8);
        float by[4];
        Fragment scaled;
#pragma unroll
        for (int i = 0; i < 4; ++i)
          by[i] = half ? to_row[j][i] * (j < 2 ? 1.0f : all[0][i]) : to_key[j][i] * (j < 2 ? all[2][i] : 1.0f);
        if (half) {
          scale_rows(scaled, raw[j], by);
          shared_store(reinterpret_cast<uint32_t *>(row_q.at + low), scaled[0]);
          shared_store(reinterpret_cast<uint32_t *>(row_q.at + high), scaled[2]);
        } else {
          scale_keys(scaled, raw[j], by);
        }
        uint16_t *to = half ? row_k.at : keys.at;
        shared_store(reinterpret_cast<uint32_t *>(to + low), scaled[1]);
        shared_store(reinterpret_cast<uint32_t *>(to + high), scaled[3]);
      }
    }
#pragma unroll
    for (int i = 0; i < kSquares; ++i) put(inside[half][part][i], squares[i], l);
  }

  // The levels inside 8 tokens; what each does beyond its own pairs is not taken.
  template <class X>
  STOKER_DEVICE static void group(X &x, float (&to)[4], const Fragment &raw, const float (&decay)[4], float (&to_row)[4],
                                  float (&to_key)[4], float (&all)[4]) {
    const int row = x.lane / 4, key = x.lane % 4 * 2;
    float own[4] = {};
    multiply(own, raw, raw);
    to[0] += row == key ? own[0] : 0.0f;
    to[1] += row == key + 1 ? own[1] : 0.0f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Factors f(decay[i]);
      to_row[i] = f.to_row, to_key[i] = f.to_key, all[i] = f.all;
    }
#pragma unroll
    for (int shift = 0; shift < 3; ++shift) {
      const bool later = row >> shift & 1;
      float by[4], level[4] = {};
#pragma unroll
      for (int i = 0; i < 4; ++i) by[i] = later ? to_row[i] : to_key[i];
      Fragment scaled;
      scale_rows(scaled, raw, by);
      multiply(level, scaled, scaled);
#pragma unroll
      for (int i = 0; i < 4; ++i) to[i] += later && (row >> shift) == ((key + i % 2) >> shift) + 1 ? level[i] : 0.0f;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        Factors f(to_row[i], to_key[i], all[i]);
        f.join(shuffle_xor(all[i], 4 << shift), later);
        to_row[i] = f.to_row, to_key[i] = f.to_key, all[i] = f.all;
      }
    }
  }

  template <class X>
  STOKER_DEVICE void between_halves(X &x) {
    const int w = opaque(x.warp), l = opaque(x.lane), row = w % 4, key = w / 4 * 2;
    const auto &tile = l / 8 % 2 ? row_k : row_q;
    const int rows_at = tile.index(row * 8 + l % 8, l / 16 * 8);
    const int keys_at = keys.index(key * 8 + l % 8 + l / 16 * 8, l / 8 % 2 * 8);
    float squares[2][4] = {};
#pragma unroll 2
    for (int t = 0; t < K; t += 16) {
      uint32_t left[4], right[4];
      load_matrices<false>(left, tile.at + tile.along(rows_at, t));
      load_matrices<false>(right, keys.at + keys.along(keys_at, t));
      multiply_add(squares[0], left, right[0], right[1]);
      multiply_add(squares[1], left, right[2], right[3]);
    }
    put(across[row][key], squares[0], l);
    put(across[row][key + 1], squares[1], l);
  }

  // From squares to accumulators, which have the same lanes.
  template <class X>
  STOKER_DEVICE void gather(X &x, typename X::template Acc<64, 64> &n_q, typename X::template Acc<64, 64> &n_k) {
    const int w = opaque(x.warp), l = opaque(x.lane);
#pragma unroll
    for (int i = 0; i < 4; i += 2)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int row = w % 4 * 2 + i / 2, key = w / 4 * 4 + j;
        float sum[4] = {};
        if (row / 4 == key / 4 && row >= key) {
#pragma unroll
          for (int part = 0; part < kParts; ++part) add(sum, inside[row / 4][part][square(row % 4, key % 4)], l);
        } else if (row > key) {
          add(sum, across[row - 4][key], l);
        }
        n_q.x[j][i] = sum[0], n_q.x[j][i + 1] = sum[1];
        n_k.x[j][i] = sum[2], n_k.x[j][i + 1] = sum[3];
      }
  }

  struct alignas(8) Pair {
    float first, second;
  };
  struct alignas(16) Lane {
    float x[4];
  };
  STOKER_DEVICE static void put(Square &to, const float (&x)[4], int lane) {
    shared_store(reinterpret_cast<Lane *>(to.x[lane]), Lane{{x[0], x[1], x[2], x[3]}});
  }
  STOKER_DEVICE static void add(float (&sum)[4], const Square &from, int lane) {
    const Lane x = shared_load(reinterpret_cast<const Lane *>(from.x[lane]));
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[i] += x.x[i];
  }
};

}  // namespace STOKER_ISA
}  // namespace stoker
