// The triangle of a chunk, halved: how a decay per channel gets inside a matrix product.
//
// N_ri = sum over channels of z_r k_i e^(G_r - G_i). In a block of 2 m tokens every token of the later half reads every
// token of the earlier half across the last token b of the earlier one: e^(G_r - G_i) = e^(G_r - G_b) e^(G_b - G_i), both
// exponents <= 0 and neither looking beyond the row. So one level is one product of rows scaled by e^-|G_t - G_b|, and a
// token is either a row or a key of it. Levels of m = 32, 16, 8, 4, 2, 1, and every token with itself, make the triangle
// (the derivation and the gradients: kernels/kda/chunked.py).
#pragma once

#include "native/delta_params.h"
#include "native/number.h"

namespace stoker {

// What a level is: half = m = 2^shift, or 0 for every token with itself.
template <class Self>
struct LevelRules {
  STOKER_TILE bool later(int t) const { return self().half && (t >> self().shift & 1); }
  // Does the token of the row read that of the key? The row's half block is odd and follows the key's.
  STOKER_TILE bool reads(int row, int key) const {
    const int r = row >> self().shift, k = key >> self().shift;
    return self().half ? (k & 1) == 0 && r == k + 1 : row == key;
  }
  // The last token of the earlier half (of t's block of 2 m).
  STOKER_TILE int boundary(int t) const { return (t >> (self().shift + 1) << (self().shift + 1)) + self().half - 1; }

 private:
  STOKER_TILE const Self &self() const { return static_cast<const Self &>(*this); }
};

template <int Shift>
struct FixedLevel : LevelRules<FixedLevel<Shift>> {
  static constexpr int half = Shift < 0 ? 0 : 1 << (Shift & 31), shift = Shift < 0 ? 0 : Shift;
};

// f(level) for m = 32, 16, 8, 4, 2, 1 and 0.
template <class F>
STOKER_TILE void for_levels(F f) {
  f(FixedLevel<5>());
  f(FixedLevel<4>());
  f(FixedLevel<3>());
  f(FixedLevel<2>());
  f(FixedLevel<1>());
  f(FixedLevel<0>());
  f(FixedLevel<-1>());
}

}  // namespace stoker
