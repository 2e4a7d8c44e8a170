// The pairs of a chunk's tokens and their gradients by a block of 8 warps: levels in registers.
//
// A level scales a token by e^-|G_t - G_b| whether it is row or key. The factors of a level are those of the level below,
// those of one half times the decay of the other half: `to_row` is the product of e^g from the start of the half block to
// the token, `to_key` from after the token to the end, `all` that of the whole half block.
#pragma once

#include "kda/native/levels.h"
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
    x.sync();
    between_halves(x);
    x.sync();
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

// What the cotangents of N_q and N_k give to q, k, g and beta. A warp has all tokens of 16 channels (BlockLevels::Strip),
// so rows and keys meet in its registers: products are of channels by tokens, with the cotangents as right operands.
template <int K>
struct BlockTriangleGradient {
  struct alignas(16) Four {
    float x[4];
  };
  struct alignas(8) Two {
    float x[2];
  };
  // By warp, group of 8 tokens and lane: factors inside the group, its whole decay by channel.
  Four to_row[K / 16][8][32], to_key[K / 16][8][32];
  Two all[K / 16][8][32];
  // Cotangents of log decays, by channel: from a lane's two tokens as keys, of all that is after them in the group. And
  // dbeta of the two tokens.
  Four keys_beta[K / 16][8][32];
  Four dq[K / 16][8][32];  // laid by, for want of registers

  // `from_*`: cotangents of N_q and N_k; `reads_*`: these times beta of the key.
  template <class X, class Strip, class Sums, class Tokens, class Pairs, class Beta>
  STOKER_DEVICE void add(X &x, Strip &dq, Strip &dk, Strip &dg, Sums &dbeta, const Tokens &q, const Tokens &k,
                         const Pairs &from_q, const Pairs &from_k, const Pairs &reads_q, const Pairs &reads_k,
                         const Beta &beta, const float *g, int64_t stride, int count) {
    if (!x.template has_strip<K>()) return;
    Work<X, Strip, Tokens, Pairs, Beta> work{x, dk, dg, q, k, from_q, from_k, reads_q, reads_k, beta, {}, {}};
    inside_groups(work, g, stride, count);
    between_groups<4>(work);
    between_groups<2>(work);
    between_groups<1>(work);
    pass_groups(work);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const Four sums = shared_load(&this->dq[x.warp][j][x.lane]);
#pragma unroll
      for (int i = 0; i < 4; ++i) dq.x[j][i] += sums.x[i];
    }
#pragma unroll 1
    for (int j = 0; j < 8; ++j) {
      const Four sums = shared_load(&keys_beta[x.warp][j][x.lane]);
#pragma unroll
      for (int i = 0; i < 2; ++i) x.add_token(dbeta, j * 8 + x.lane % 4 * 2 + i, sums.x[2 + i]);
    }
  }

 private:
  template <class X, class Strip, class Tokens, class Pairs, class Beta>
  struct Work {
    X &x;
    Strip &dk, &dg;
    const Tokens &q, &k;
    const Pairs &from_q, &from_k, &reads_q, &reads_k;
    const Beta &beta;
    // Cotangents of log decays, by group and channel: from a lane's two tokens as rows, of all that is before them in the
    // group; and of the whole group.
    float rows[8][2], whole[8][2];
  };

  // z becomes z `by`, and in pairs of tokens the low and the high channels of an operand.
  STOKER_DEVICE static void scale(uint32_t &low, uint32_t &high, float (&z)[4], const float (&by)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) z[i] *= by[i];
    low = round_pair(z[0], z[1]);
    high = round_pair(z[2], z[3]);
  }
  template <class W>
  STOKER_DEVICE static void load_beta(W &w, int j, float (&beta)[2]) {
    const int t = j * 8 + w.x.lane % 4 * 2;
    beta[0] = w.beta[t], beta[1] = w.beta[t + 1];
  }
  // Two neighbours of a row.
  template <class Pairs>
  STOKER_DEVICE static void load_two(const Pairs &pairs, int row, int column, float &first, float &second) {
    const uint32_t both = shared_load(reinterpret_cast<const uint32_t *>(pairs.at + pairs.index(row, column)));
    first = bf16::from_bits(both << 16);
    second = bf16::from_bits(both & 0xffff0000u);
  }

  // A lane's two tokens: each with itself, and the later one reads the earlier.
  template <class W>
  STOKER_DEVICE static void two_tokens(W &w, int j, const float (&q)[4], const float (&k)[4], const float (&decay)[4],
                                       const float (&beta)[2], float (&dq)[4], float (&dbeta)[2]) {
    const int t = j * 8 + w.x.lane % 4 * 2;
    float own[2], unused, query, key;
    load_two(w.from_q, t, t, own[0], unused);
    load_two(w.from_q, t + 1, t, query, own[1]);
    load_two(w.from_k, t + 1, t, key, unused);
    const float read_query = query * beta[0], read_key = key * beta[0], both[2] = {own[0] * beta[0], own[1] * beta[1]};
#pragma unroll
    for (int h = 0; h < 4; h += 2) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        dq[h + i] = both[i] * k[h + i];
        w.dk.x[j][h + i] += both[i] * q[h + i];
        dbeta[i] += own[i] * (q[h + i] * k[h + i]);
      }
      const float row = query * q[h + 1] + key * k[h + 1], scaled = decay[h + 1] * k[h], pair = row * scaled;
      dq[h + 1] += read_query * scaled;
      w.dk.x[j][h + 1] += read_key * scaled;
      w.dk.x[j][h] += beta[0] * (decay[h + 1] * row);
      dbeta[0] += pair;
      w.dg.x[j][h + 1] += beta[0] * pair;
    }
  }
  // A level inside a group: q and k with the factors `by`. Every token is row or key, and what it is not gives zero.
  template <class W>
  STOKER_DEVICE static void level_inside(W &w, int j, float (&q)[4], float (&k)[4], const float (&by)[4],
                                         const float (&beta)[2], const uint32_t (&reads)[2], const uint32_t (&turned)[2],
                                         float (&dq)[4], float (&dbeta)[2], float (&passing)[4]) {
    uint32_t tokens[4];
    scale(tokens[0], tokens[1], q, by);
    scale(tokens[2], tokens[3], k, by);
    const uint32_t keys[4] = {tokens[2], tokens[3], 0, 0};
    float from_q[4] = {}, from_k[4] = {}, from[4] = {};
    multiply_add(from_q, keys, reads[0], 0);
    multiply_add(from_k, keys, reads[1], 0);
    multiply_add(from, tokens, turned[0], turned[1]);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float along = from[i] * k[i];
      dbeta[i % 2] += along;
      passing[i] = from_q[i] * q[i] + (from_k[i] * k[i] + beta[i % 2] * along);
      dq[i] += by[i] * from_q[i];
      w.dk.x[j][i] += by[i] * (from_k[i] + beta[i % 2] * from[i]);
    }
  }

  template <class W>
  STOKER_DEVICE void inside_groups(W &w, const float *g, int64_t stride, int count) {
    auto &x = w.x;
    const int l = opaque(x.lane), warp = opaque(x.warp), wide = l / 4, pair = l % 4 * 2;
    const float *at = g + pair * stride + warp * 16 + l / 4;
    // Lane l names a row of matrix l / 8: of the queries' and of the keys' cotangents, of two groups each.
    const auto &straight = l / 8 % 2 ? w.reads_k : w.reads_q;
    const auto &other = l / 8 % 2 ? w.from_k : w.from_q;
    // Of two cotangents in a word, those that levels of 2 and 4 tokens have: fragments [row, keys], then [rows, key].
    uint32_t straight_mask[2], turned_mask[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int shift = i + 1;
      auto reads = [&](int row, int key) { return (row >> shift & 1) && (key >> shift) == (row >> shift) - 1; };
      straight_mask[i] = reads(wide, pair) ? 0xffffffffu : 0;
      turned_mask[i] = reads(pair, wide) ? 0xffffffffu : 0;
    }
#pragma unroll
    for (int first = 0; first < 8; first += 2) {
      uint32_t reads[4], turned[4];
      const int token = first * 8 + l / 16 * 8;
      load_matrices<false>(reads, straight.at + straight.index(token + l % 8, token));
      load_matrices<true>(turned, other.at + other.index(token + l % 8, token));
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        const int j = first + side;
        float q[4], k[4], beta[2], to_row[4], to_key[4], all[2], dq[4], dbeta[2] = {};
        take_tokens(w, j, q, k);
        load_beta(w, j, beta);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const bool valid = j * 8 + pair + i % 2 < count;
          const float gate = *(valid ? at + (j * 8 + i % 2) * stride + i / 2 * 8 : g);
          to_row[i] = x.exp(valid ? gate : 0.0f);
        }
        two_tokens(w, j, q, k, to_row, beta, dq, dbeta);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          to_key[2 * h] = to_row[2 * h + 1], to_key[2 * h + 1] = 1;
          all[h] = to_row[2 * h + 1] *= to_row[2 * h];
        }
#pragma unroll
        for (int level = 0; level < 2; ++level) {
          const bool later = l >> level & 1;
          float by[4], level_q[4], level_k[4], passing[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            by[i] = later ? to_row[i] : to_key[i];
            level_q[i] = q[i], level_k[i] = k[i];
          }
          const uint32_t rows = straight_mask[level], keys = turned_mask[level];
          const uint32_t straight_pairs[2] = {reads[side * 2] & rows, reads[side * 2 + 1] & rows};
          const uint32_t turned_pairs[2] = {turned[side * 2] & keys, turned[side * 2 + 1] & keys};
          level_inside(w, j, level_q, level_k, by, beta, straight_pairs, turned_pairs, dq, dbeta, passing);
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            // Rows pass what is before them, keys what is after: of two tokens, and of two pairs of them.
            const float both = passing[2 * h] + passing[2 * h + 1];
            float before = later ? both : 0.0f, after = later ? passing[2 * h + 1] : passing[2 * h];
            if (level) {
              const float near = shuffle_xor(both, 1), counts = later != (l & 1) ? near : 0.0f;
              before += counts, after += counts;
            }
            w.dg.x[j][2 * h] += before;
            w.dg.x[j][2 * h + 1] += after;
            const float half = shuffle_xor(all[h], 1 << level);
#pragma unroll
            for (int i = 2 * h; i < 2 * h + 2; ++i)
              if (later)
                to_row[i] *= half;
              else
                to_key[i] *= half;
            all[h] *= half;
          }
        }
        shared_store(&this->to_row[warp][j][l], Four{{to_row[0], to_row[1], to_row[2], to_row[3]}});
        shared_store(&this->to_key[warp][j][l], Four{{to_key[0], to_key[1], to_key[2], to_key[3]}});
        shared_store(&this->dq[warp][j][l], Four{{dq[0], dq[1], dq[2], dq[3]}});
        shared_store(&this->all[warp][j][l], Two{{all[0], all[1]}});
        shared_store(&keys_beta[warp][j][l], Four{{0, 0, dbeta[0], dbeta[1]}});
      }
    }
  }

  // The level whose halves have `Half` groups of 8 tokens.
  template <int Half, class W>
  STOKER_DEVICE void between_groups(W &w) {
    auto &x = w.x;
    const int l = opaque(x.lane), warp = opaque(x.warp);
#pragma unroll
    for (int first = 0; first < 8; first += 2 * Half) {
      const int later = first + Half;
      uint32_t keys[Half == 1 ? 2 : Half][2] = {};
      float from_keys[Half][4] = {};
      each_key<Half>(w, first, [&](int i, float(&k)[4], const float(&by)[4]) { scale(keys[i][0], keys[i][1], k, by); });
      float before[2] = {1, 1};
#pragma unroll
      for (int j = later; j < later + Half; ++j) {
        float q[4], k[4], by[4];
        uint32_t tokens[4];
        take_tokens(w, j, q, k);
        factors(by, to_row[warp][j][l], before);
        scale(tokens[0], tokens[1], q, by);
        scale(tokens[2], tokens[3], k, by);
        float from_q[4] = {}, from_k[4] = {};
#pragma unroll
        for (int n = 0; n < Half; n += 2) {
          // Two groups of keys, or one: for the rows the queries' cotangents before the keys'; turned both for each group.
          uint32_t reads[4], turned[4];
          const auto &straight = l / 16 ? w.reads_k : w.reads_q;
          const auto &other = l / 8 % 2 ? w.from_k : w.from_q;
          const int next = Half == 1 ? 0 : 8, second = Half == 1 ? 1 : n + 1;
          load_matrices<false>(reads, straight.at + straight.index(j * 8 + l % 8, (first + n) * 8 + l / 8 % 2 * next));
          load_matrices<true>(turned, other.at + other.index(j * 8 + l % 8, (first + n) * 8 + l / 16 * next));
          const uint32_t left[4] = {keys[n][0], keys[n][1], keys[second][0], keys[second][1]};
          multiply_add(from_q, left, reads[0], Half == 1 ? 0 : reads[1]);
          multiply_add(from_k, left, reads[2], Half == 1 ? 0 : reads[3]);
          multiply_add(from_keys[n], tokens, turned[0], turned[1]);
          if constexpr (Half > 1) multiply_add(from_keys[n + 1], tokens, turned[2], turned[3]);
        }
        float passing[4];
        Four &dq_at = dq[warp][j][l], dq_sum = shared_load(&dq_at);
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          dq_sum.x[n] += by[n] * from_q[n];
          w.dk.x[j][n] += by[n] * from_k[n];
          passing[n] = from_q[n] * q[n] + from_k[n] * k[n];
        }
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float both = passing[2 * h] + passing[2 * h + 1];
          w.dg.x[j][2 * h + 1] += passing[2 * h + 1];
          w.rows[j][h] += both;
#pragma unroll
          for (int n = later; n < j; ++n) w.whole[n][h] += both;
        }
        shared_store(&dq_at, dq_sum);
        join(before, all[warp][j][l]);
      }
      each_key<Half>(w, first, [&](int i, float(&k)[4], const float(&by)[4]) {
        float beta[2];
        load_beta(w, first + i, beta);
        Four &at = keys_beta[warp][first + i][l], sums = shared_load(&at);
        float passing[4];
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          const float scaled = by[n] * from_keys[i][n], along = scaled * k[n];
          sums.x[2 + n % 2] += along;
          passing[n] = beta[n % 2] * along;
          w.dk.x[first + i][n] += beta[n % 2] * scaled;
        }
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float both = passing[2 * h] + passing[2 * h + 1];
          w.dg.x[first + i][2 * h + 1] += passing[2 * h];
          sums.x[h] += both;
#pragma unroll
          for (int n = i + 1; n < Half; ++n) w.whole[first + n][h] += both;
        }
        shared_store(&at, sums);
      });
    }
  }
  // f(i, keys, factors) for the groups first + i of an earlier half, the last one first.
  template <int Half, class W, class F>
  STOKER_DEVICE void each_key(W &w, int first, F f) {
    const int l = opaque(w.x.lane), warp = opaque(w.x.warp);
    float after[2] = {1, 1}, k[2][4];
#pragma unroll
    for (int j = first + Half - 1; j >= first; --j) {
      float by[4];
      if (j % 2 || Half == 1) w.x.template take_groups<2>(k, w.k, warp * 16, j / 2 * 2 * 8);
      factors(by, to_key[warp][j][l], after);
      f(j - first, k[j % 2], by);
      join(after, all[warp][j][l]);
    }
  }
  STOKER_DEVICE static void factors(float (&by)[4], const Four &inside, const float (&outside)[2]) {
    const Four f = shared_load(&inside);
#pragma unroll
    for (int i = 0; i < 4; ++i) by[i] = f.x[i] * outside[i / 2];
  }
  STOKER_DEVICE static void join(float (&outside)[2], const Two &all) {
    const Two more = shared_load(&all);
    outside[0] *= more.x[0], outside[1] *= more.x[1];
  }
  // A group's queries and keys.
  template <class W>
  STOKER_DEVICE static void take_tokens(W &w, int j, float (&q)[4], float (&k)[4]) {
    const int l = opaque(w.x.lane);
    const auto &tile = l / 16 ? w.k : w.q;
    uint32_t pairs[4];
    load_matrices<true>(pairs, tile.at + tile.index(j * 8 + l % 8, opaque(w.x.warp) * 16 + l / 8 % 2 * 8));
    widen(q, pairs[0], pairs[1]);
    widen(k, pairs[2], pairs[3]);
  }

  // Inside groups: what later pairs read, what earlier ones write, and what passes the whole group.
  template <class W>
  STOKER_DEVICE void pass_groups(W &w) {
    const int l = opaque(w.x.lane), warp = opaque(w.x.warp);
    const bool odd = l & 1, high = l & 2;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const Four as_keys = shared_load(&keys_beta[warp][j][l]);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float sum = w.whole[j][h], before = w.rows[j][h] + sum, after = as_keys.x[h] + sum;
        const float near_before = shuffle_xor(before, 1), near_after = shuffle_xor(after, 1);
        sum += odd ? near_after : near_before;
        before += near_before;
        after += near_after;
        const float far_before = shuffle_xor(before, 2), far_after = shuffle_xor(after, 2);
        sum += high ? far_after : far_before;
        w.dg.x[j][2 * h] += sum + w.rows[j][h];
        w.dg.x[j][2 * h + 1] += sum;
      }
    }
  }
};

}  // namespace STOKER_ISA
}  // namespace stoker
