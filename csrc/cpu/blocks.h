// Blocks of a strided matrix in padded fp32 scratch, as they are or transposed, and back.
#pragma once
#include <algorithm>
#include <utility>

#include "simd.h"

namespace bert_fast {
namespace BERT_FAST_ISA {
namespace {

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

template <int... I>
BERT_FAST_INLINE vf interleave_low(vf a, vf b, std::integer_sequence<int, I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, (I % 2 ? kWidth : 0) + I / 2 ...);
#else
  return __builtin_shuffle(a, b, vi{(I % 2 ? kWidth : 0) + I / 2 ...});
#endif
}
template <int... I>
BERT_FAST_INLINE vf interleave_high(vf a, vf b, std::integer_sequence<int, I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, (I % 2 ? kWidth : 0) + kWidth / 2 + I / 2 ...);
#else
  return __builtin_shuffle(a, b, vi{(I % 2 ? kWidth : 0) + kWidth / 2 + I / 2 ...});
#endif
}

// A kWidth x kWidth transpose: log2(kWidth) rounds, each a perfect shuffle of the rows.
BERT_FAST_INLINE void transpose(vf (&rows)[kWidth]) {
  constexpr auto lanes = std::make_integer_sequence<int, kWidth>{};
  for (int step = 1; step < kWidth; step *= 2) {
    vf next[kWidth];
    for (int i = 0; i < kWidth / 2; ++i) {
      next[2 * i] = interleave_low(rows[i], rows[i + kWidth / 2], lanes);
      next[2 * i + 1] = interleave_high(rows[i], rows[i + kWidth / 2], lanes);
    }
    for (int i = 0; i < kWidth; ++i) rows[i] = next[i];
  }
}

// Of each row all lanes in one, side by side: a round halves the rows, and a row's lanes lie twice as
// far apart. op(a, b) is commutative.
template <class Op>
BERT_FAST_INLINE vf across(vf (&rows)[kWidth], Op op) {
  constexpr auto lanes = std::make_integer_sequence<int, kWidth>{};
  for (int half = kWidth / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) {
      rows[i] = op(interleave_low(rows[i], rows[i + half], lanes),
                   interleave_high(rows[i], rows[i + half], lanes));
    }
  }
  return rows[0];
}

template <class T, class Lanes>
BERT_FAST_INLINE vf load_biased(const T* row, const float* bias, int64_t col, Lanes lanes) {
  const vf value = load_row(row + col, lanes);
  return bias ? value + load_row(bias + col, lanes) : value;
}

// scratch[r][c] = (source[r][c] + bias[c]) * factor, columns past head_dim zero.
template <class T>
void pack(const T* source, int64_t stride, int64_t rows, int64_t head_dim, const float* bias,
          float factor, float* scratch, int64_t ld) {
  for (int64_t r = 0; r < rows; ++r) {
    const T* row = source + r * stride;
    for_columns(head_dim, [&](int64_t col, auto lanes) {
      store(scratch + r * ld + col, load_biased(row, bias, col, lanes) * factor);
    });
  }
}

// scratch[c][r] = source[r][c] + bias[c]; rows past `rows`, up to a multiple of kWidth, zero.
template <class T>
void pack_transposed(const T* source, int64_t stride, int64_t rows, int64_t head_dim,
                     const float* bias, float* scratch, int64_t ld) {
  for (int64_t r = 0; r < rows; r += kWidth) {
    const int count = static_cast<int>(std::min<int64_t>(kWidth, rows - r));
    for_columns(head_dim, [&](int64_t col, auto lanes) {
      vf tile[kWidth];
      for (int i = 0; i < kWidth; ++i) {
        tile[i] = i < count ? load_biased(source + (r + i) * stride, bias, col, lanes) : vf{};
      }
      transpose(tile);
      for (int i = 0; i < lanes; ++i) store(scratch + (col + i) * ld + r, tile[i]);
    });
  }
}

template <class T>
void unpack(const float* scratch, int64_t ld, int64_t rows, int64_t head_dim, float factor,
            T* target, int64_t stride) {
  for (int64_t r = 0; r < rows; ++r) {
    for_columns(head_dim, [&](int64_t col, auto lanes) {
      store_row(target + r * stride + col, load(scratch + r * ld + col) * factor, lanes);
    });
  }
}

}  // namespace
}  // namespace BERT_FAST_ISA
}  // namespace bert_fast
