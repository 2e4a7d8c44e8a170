// Small dense products on one core: acc [R, C] += op(a) op(b), sizes known to the compiler.
//
// Blocks of accumulators stay in registers while the inner index runs; an element is one chain of fused multiply-adds in
// the order of the inner index, so every instruction set that has them gives the same bits.
#pragma once

#include <type_traits>

#include "native/number.h"

namespace stoker {
namespace STOKER_ISA {

template <class Real>
struct Vector {
#if defined(__AVX512F__)
  static constexpr int bytes = 64;
#elif defined(__AVX2__)
  static constexpr int bytes = 32;
#else
  static constexpr int bytes = 16;
#endif
  static constexpr int lanes = bytes / int(sizeof(Real));
  typedef Real type __attribute__((vector_size(bytes), aligned(sizeof(Real)), may_alias));
  // Rows and vectors of one register block: 16 accumulators of the 32 or 16 registers, 8 of 16 without wide vectors.
#if defined(__AVX512F__)
  static constexpr int rows = 8, columns = 2;
#else
  static constexpr int rows = 4, columns = 2;
#endif
};

template <bool TransA, int Inner, int Rows, int Columns, class Real>
inline void block(Real* acc, int acc_stride, const Real* a, int a_stride, const Real* b, int b_stride) {
  using V = typename Vector<Real>::type;
  constexpr int lanes = Vector<Real>::lanes;
  V sum[Rows][Columns];
  for (int i = 0; i < Rows; ++i)
    for (int j = 0; j < Columns; ++j) sum[i][j] = *(const V*)(acc + i * acc_stride + j * lanes);
  for (int t = 0; t < Inner; ++t) {
    V right[Columns];
    for (int j = 0; j < Columns; ++j) right[j] = *(const V*)(b + t * b_stride + j * lanes);
    for (int i = 0; i < Rows; ++i) {
      Real left = TransA ? a[t * a_stride + i] : a[i * a_stride + t];
      for (int j = 0; j < Columns; ++j) sum[i][j] += left * right[j];
    }
  }
  for (int i = 0; i < Rows; ++i)
    for (int j = 0; j < Columns; ++j) *(V*)(acc + i * acc_stride + j * lanes) = sum[i][j];
}

template <bool TransA, int R, int C, int Inner, class Real>
inline void multiply_part(Real* acc, int acc_stride, const Real* a, int a_stride, const Real* b, int b_stride) {
  constexpr int rows = Vector<Real>::rows, lanes = Vector<Real>::lanes;
  constexpr int columns = C % (lanes * Vector<Real>::columns) ? 1 : Vector<Real>::columns;
  static_assert(R % rows == 0 && C % (lanes * columns) == 0);
  for (int c = 0; c < C; c += lanes * columns)
    for (int r = 0; r < R; r += rows)
      block<TransA, Inner, rows, columns>(acc + r * acc_stride + c, acc_stride, a + (TransA ? r : r * a_stride), a_stride, b + c, b_stride);
}

template <bool TransA, int R, int C, int Inner, class Real>
inline void multiply_real(Real* acc, const Real* a, int a_stride, const Real* b, int b_stride) {
  multiply_part<TransA, R, C, Inner>(acc, C, a, a_stride, b, b_stride);
}

// to [Columns, Rows] = transpose of from [Rows, Columns].
template <int Rows, int Columns, class To, class From>
inline void transpose(To* to, const From* from, int from_stride) {
  constexpr int B = 8;
  static_assert(Rows % B == 0 && Columns % B == 0);
  for (int r = 0; r < Rows; r += B)
    for (int c = 0; c < Columns; c += B)
      for (int j = 0; j < B; ++j)
        for (int i = 0; i < B; ++i) to[(c + j) * Rows + r + i] = To(from[(r + i) * from_stride + c + j]);
}

template <bool TransA, bool TransB, int R, int C, int Inner, class Real, class E>
inline void multiply(Real* acc, const E* a, int a_stride, const E* b, int b_stride) {
  if constexpr (!std::is_same_v<Real, E>) {
    alignas(64) Real wide_a[R * Inner], wide_b[C * Inner];
    constexpr int a_rows = TransA ? Inner : R, a_columns = TransA ? R : Inner;
    for (int r = 0; r < a_rows; ++r)
      for (int c = 0; c < a_columns; ++c) wide_a[r * a_columns + c] = Real(a[r * a_stride + c]);
    if constexpr (TransB)
      transpose<C, Inner>(wide_b, b, b_stride);
    else
      for (int r = 0; r < Inner; ++r)
        for (int c = 0; c < C; ++c) wide_b[r * C + c] = Real(b[r * b_stride + c]);
    multiply_real<TransA, R, C, Inner>(acc, wide_a, a_columns, wide_b, C);
  } else if constexpr (TransB) {
    alignas(64) Real turned[C * Inner];
    transpose<C, Inner>(turned, b, b_stride);
    multiply_real<TransA, R, C, Inner>(acc, a, a_stride, turned, C);
  } else {
    multiply_real<TransA, R, C, Inner>(acc, a, a_stride, b, b_stride);
  }
}

}  // namespace STOKER_ISA
}  // namespace stoker
