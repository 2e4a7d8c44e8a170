// The inverse of a unit lower triangle by a block.
#pragma once

#include "native/block_sums.h"

namespace stoker {
namespace STOKER_ISA {

// T = (I + L)^-1 in blocks of 16. Those on the diagonal, D, are made of inverses of 8 x 8 by substitution; with
// M_kj = -L_kj D_j the rest is T = D + T M, row by row: T_ij = sum over j < k <= i of T_ik M_kj. Operands of products
// are sums of two bfloat16 (at most 2^-16 of a number is lost), and sums are float. There are no powers of L: where its
// entries are ones, those of L^8 are in the thousands, and what is left of them in T is 1.
struct BlockInverse : BlockSums {
  using BlockSums::BlockSums;

  // tile = T - I for the L that acc has below the diagonal: zeros on the diagonal and above. T's unit diagonal is for
  // the caller to add in float, where rounding costs it nothing. The tile is complete on return.
  STOKER_DEVICE void unit_lower_inverse(Tile<64, 64> &tile, const Acc<64, 64> &acc, Scratch<64> &scratch) {
    const int w = uniform(opaque(warp)), stripe = w % 4, part = w / 4;
    const int own = stripe - 2 * part;  // which of the warp's two blocks is on the diagonal, if 0 or 1
    const bool diagonal = own == 0 || own == 1;
    auto block = [&](int r, int c) -> Block & { return scratch.blocks[3 * r + c]; };
    float *system = scratch.systems + stripe * Scratch<64>::kSystem;
    float upper[2], left[2], right[2];  // the diagonal's block: its 8 x 8 at the top left, below that, and on the right
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      upper[i] = own ? acc.x[2][i] : acc.x[0][i];
      left[i] = own ? acc.x[2][i + 2] : acc.x[0][i + 2];
      right[i] = own ? acc.x[3][i + 2] : acc.x[1][i + 2];
    }
    if (diagonal) pose(system, upper, right);
    meet();
    if (diagonal) solve_diagonal(block(stripe, stripe), system, left);
    if (own >= 2) write(block(0, stripe - 1), split(acc.x[2], acc.x[3]));
    meet();
    if (own) {
      // Of L's six blocks warps 1, 2, 3 and 7 take their left ones; 4 and 5 those that 2 and 3 have besides.
      const int r = own > 0 ? stripe : stripe + 2, c = own > 0 ? 2 * part : 1;
      const Split factor = own > 0 ? split(acc.x[0], acc.x[1]) : read<false>(block(0, r - 1));
      Sum sum;
      sum.add(factor, read<true>(block(c, c)));
      write(block(r, c), sum.total(), 0x80008000u);
    }
    meet();
    if (part == 0)
      solve_row(tile, scratch, stripe);
    else
      clear_row(tile, stripe);
    sync();
  }

 private:
  using Block = Scratch<64>::Block;
  // A block as fragments: of a left operand in their order; of a right one, read transposed, columns 0-7 first.
  struct Split {
    uint32_t high[4], low[4];
  };
  STOKER_DEVICE static void split(float first, float second, uint32_t &high, uint32_t &low) {
    high = round_pair(first, second);
    low = round_pair(first - bf16::from_bits(high << 16), second - bf16::from_bits(high & 0xffff0000u));
  }
  STOKER_DEVICE static Split split(const float (&left)[4], const float (&right)[4]) {
    Split s;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      split(left[2 * i], left[2 * i + 1], s.high[i], s.low[i]);
      split(right[2 * i], right[2 * i + 1], s.high[i + 2], s.low[i + 2]);
    }
    return s;
  }
  // A sum of products of blocks, in two chains of instructions.
  struct Sum {
    float x[2][4] = {}, mixed[2][4] = {};
    STOKER_DEVICE void add(const Split &a, const Split &b) {
      add(x, a.high, b.high);
      add(mixed, a.high, b.low);
      add(x, a.low, b.low);
      add(mixed, a.low, b.high);
    }
    STOKER_DEVICE static void add(float (&to)[2][4], const uint32_t (&a)[4], const uint32_t (&b)[4]) {
#pragma unroll
      for (int n = 0; n < 2; ++n) multiply_add(to[n], a, b[2 * n], b[2 * n + 1]);
    }
    STOKER_DEVICE Split total() const {
      float sum[2][4];
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[n][i] = x[n][i] + mixed[n][i];
      return split(sum[0], sum[1]);
    }
  };

  template <bool Transposed>
  STOKER_DEVICE Split read(const Block &block) {
    const int l = opaque(lane), at = Block::index(l % 16, l / 16 * 8);
    Split s;
    load_matrices<Transposed>(s.high, block.high + at);
    load_matrices<Transposed>(s.low, block.low + at);
    return s;
  }
  // With the signs that `flip` changes.
  STOKER_DEVICE void write(Block &block, const Split &s, uint32_t flip = 0) {
    const int l = opaque(lane), at = Block::index(l / 4, l % 4 * 2);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int to = (i / 2 ? at ^ 8 : at) + i % 2 * 128;
      shared_store(reinterpret_cast<uint32_t *>(block.high + to), s.high[i] ^ flip);
      shared_store(reinterpret_cast<uint32_t *>(block.low + to), s.low[i] ^ flip);
    }
  }

  // A row of `upper` and, eight numbers on, one of `right` turned over its other diagonal: a lower triangle again, the
  // columns of whose inverse are the rows of right's, backwards. Rows are 20 numbers apart to spread over the banks.
  STOKER_DEVICE void pose(float *system, const float (&upper)[2], const float (&right)[2]) {
    const int l = opaque(lane), g = l / 4, t = l % 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      shared_store(system + g * 20 + 2 * t + i, upper[i]);
      shared_store(system + (7 - 2 * t - i) * 20 + 8 + 7 - g, right[i]);
    }
  }
  // D = [[A', 0], [-C' B A', C']] for the posed A and C, and the fragment of B. Lane (g, t) finds column g of A' or, if
  // t > 1, row g of C'; the fragment of an operand is numbers 2 t and 2 t + 1 of either.
  STOKER_DEVICE void solve_diagonal(Block &block, const float *system, const float (&left)[2]) {
    const int l = opaque(lane), g = l / 4, t = l % 4;
    const bool row = t > 1, outer = t == 0 || t == 3;
    float x[8];
#pragma unroll
    for (int r = 0; r < 8; ++r) {
      x[r] = r == (row ? 7 - g : g) ? 1.0f : 0.0f;
#pragma unroll
      for (int c = 0; c < r; c += 4) {
        const Four four = Four::load(system + r * 20 + (row ? 8 : 0) + c);
#pragma unroll
        for (int i = c; i < c + 4 && i < r; ++i) x[r] -= four.x[i - c] * x[i];
      }
    }
    // A lane keeps two of its numbers and gives two to one that has the other matrix.
    float kept[2], given[2], column_of_a[2], row_of_c[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      kept[i] = outer ? x[i] : x[i + 2];
      given[i] = outer ? x[i + 4] : x[i + 6];
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float mine = row ? kept[1 - i] : kept[i], other = shuffle_xor(row ? given[1 - i] : given[i], 2);
      column_of_a[i] = row ? other : mine;
      row_of_c[i] = row ? mine : other;
    }
    // Two columns side by side are two rows.
    const int odd = g % 2;
    const float beside = shuffle_xor(odd ? column_of_a[0] : column_of_a[1], 4);

    uint32_t a[2], b[2], c[2], product[2], d[2], rows[2];
    split(column_of_a[0], column_of_a[1], a[0], a[1]);
    split(row_of_c[0], row_of_c[1], c[0], c[1]);
    split(left[0], left[1], b[0], b[1]);
    split(odd ? beside : column_of_a[0], odd ? column_of_a[1] : beside, rows[0], rows[1]);
    float y[2], z[2];
    multiply8(y, a, b);  // (B A')^T, whose fragment is that of B A' as a right operand
    split(y[0], y[1], product[0], product[1]);
    multiply8(z, c, product);
    split(-z[0], -z[1], d[0], d[1]);
    const int at = Block::index(g, 2 * t);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      uint32_t *words = reinterpret_cast<uint32_t *>(i ? block.low : block.high);
      shared_store(words + Block::index(2 * t + odd, g - odd) / 2, rows[i]);
      shared_store(words + (at ^ 8) / 2, 0u);
      shared_store(words + (at + 128) / 2, d[i]);
      shared_store(words + ((at ^ 8) + 128) / 2, c[i]);
    }
  }
  // A product of 8 x 8 in one instruction: a's high and low part are rows of it, b's are the halves of its sum.
  STOKER_DEVICE static void multiply8(float (&to)[2], const uint32_t (&a)[2], const uint32_t (&b)[2]) {
    const uint32_t left[4] = {a[0], a[1], a[0], a[1]};
    float x[4] = {};
    multiply_add(x, left, b[0], b[1]);
    to[0] = x[0] + x[2];
    to[1] = x[1] + x[3];
  }

  // Row i of blocks of T - I, from the diagonal to the left. The high part of a number is the number rounded.
  STOKER_DEVICE void solve_row(Tile<64, 64> &tile, const Scratch<64> &scratch, int i) {
    const int l = opaque(lane), g = l / 4, t = l % 4;
    const int first = Tile<64, 64>::index(16 * i + g, 2 * t);
    auto put = [&](int j, const uint32_t (&rounded)[4]) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        uint16_t *to = tile.at + (first ^ (16 * j + k / 2 * 8)) + k % 2 * 8 * 64;
        shared_store(reinterpret_cast<uint32_t *>(to), rounded[k]);
      }
    };
    const Block *diagonal = scratch.blocks + 4 * i;  // M's block in row i - m and column i - n is 3 m + n before it
    Split row[3];
    row[0] = read<false>(diagonal[0]);
    const uint32_t strictly = g == 2 * t ? 0xffff0000u : g == 2 * t + 1 ? 0x0000ffffu : 0xffffffffu;
    put(i, {row[0].high[0] & strictly, row[0].high[1], row[0].high[2], row[0].high[3] & strictly});
#pragma unroll
    for (int n = 1; n <= 3; ++n) {
      if (n > i) break;
      Sum sum;
#pragma unroll
      for (int m = 0; m < n; ++m) sum.add(row[m], read<true>(diagonal[-3 * m - n]));
      const Split s = sum.total();
      put(i - n, s.high);
      if (n < 3) row[n] = s;
    }
  }
  // Zeros right of the diagonal's block.
  STOKER_DEVICE void clear_row(Tile<64, 64> &tile, int i) {
    const int l = opaque(lane);
#pragma unroll 1
    for (int j = i + 1; j < 4; ++j)
      shared_store(reinterpret_cast<Part *>(tile.at + Tile<64, 64>::index(16 * i + l / 2, 16 * j + l % 2 * 8)), Part{});
  }
};

}  // namespace STOKER_ISA
}  // namespace stoker
