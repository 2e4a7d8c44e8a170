// The gradients of a chunk's pairs by a block of 8 warps: levels in registers, channels apart (kda/native/levels.h).
#pragma once

#include "native/block_levels.h"

namespace stoker {
namespace STOKER_ISA {

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
