// What attention's forward multiplies by: the blocks of Q, K and V in scratch, Q K^T and P V.
#pragma once
#include <algorithm>

#include "blocks.h"
#include "gemm.h"
#include "tiles.h"

namespace bert_fast {
namespace BERT_FAST_ISA {
namespace {

// Rows of a query block and columns of a key block. At head_dim 64 the K, V, Q, O blocks are 32 KB
// each, and backward's two of scores 64 KB: all within a core's L2.
constexpr int64_t kBlockQ = 128, kBlockK = 128;

// In fp32, of tensors of any type.
template <class T>
class Float32Products {
 public:
  using Stored = T;
  static constexpr int64_t kColumns = kWidth;  // what a block's keys and head_dim are padded to
  static constexpr int64_t kRows = 12;         // of scores, at once

  explicit Float32Products(int64_t head_dim)
      : head_dim_(head_dim), ld_(round_up(head_dim, kColumns)), q_(kBlockQ * ld_),
        k_(head_dim * kBlockK), v_(kBlockK * ld_) {}

  void pack_q(const T* q, int64_t stride, int64_t rows, const float* bias, float factor) {
    pack(q, stride, rows, head_dim_, bias, factor, q_, ld_);
  }
  void pack_k(const T* k, int64_t stride, int64_t keys, const float* bias) {
    pack_transposed(k, stride, keys, head_dim_, bias, k_, kBlockK);
  }
  void pack_v(const T* v, int64_t stride, int64_t keys, const float* bias) {
    pack(v, stride, keys, head_dim_, bias, 1.0f, v_, ld_);
  }
  // scores (rows, keys), kBlockK apart, of as many rows of q from the first on
  void multiply_keys(int64_t first, int64_t rows, int64_t keys, float* scores) {
    gemm(rows, round_up(keys, kColumns), head_dim_, {q_ + first * ld_, ld_, 1}, k_, kBlockK, scores,
         kBlockK, false);
  }
  // Where multiply_values finds a probability, in the place of scores that were read.
  static BERT_FAST_INLINE void store_probability(float* row, int64_t col, vf p) { store(row + col, p); }
  // out (rows, head_dim), or added to it
  void multiply_values(int64_t rows, int64_t keys, const float* p, float* out, bool add) {
    gemm(rows, ld_, keys, {p, kBlockK, 1}, v_, ld_, out, ld_, add);
  }

 private:
  int64_t head_dim_, ld_;
  Buffer q_, k_, v_;
};

#if defined(__AVX512F__) || defined(BERT_FAST_AMX)
// By the tiles of bf16 products: steps are two elements of a row of Q and of K; two keys of P and V.
template <class P>
class BFloat16Products {
 public:
  using Stored = float;
  static constexpr int64_t kColumns = kPanel, kRows = P::kTileRows;

  explicit BFloat16Products(int64_t head_dim)
      : head_dim_(head_dim), steps_(round_up(ceil_div(head_dim, 2), kWhole)),
        row_(round_up(steps_, kWidth)), panels_(ceil_div(head_dim, kPanel)), q_(kBlockQ * row_),
        k_(kBlockK * steps_), v_(panels_ * kBlockK / 2 * kPanel), rows_(kWidth * row_) {
    if (head_dim % kPanel) fill(v_, panels_ * kBlockK / 2 * kPanel, 0.0f);  // what pack_v leaves out
  }

  void pack_q(const float* q, int64_t stride, int64_t rows, const float* bias, float factor) {
    for (int64_t r = 0; r < rows; ++r) round_row(q + r * stride, bias, factor, q_ + r * row_);
  }
  void pack_k(const float* k, int64_t stride, int64_t keys, const float* bias) {
    for (int64_t key = 0; key < round_up(keys, kPanel); key += kWidth) {
      for (int64_t i = 0; i < kWidth; ++i) {
        float* row = rows_ + i * row_;
        if (key + i < keys) round_row(k + (key + i) * stride, bias, 1.0f, row);
        else fill(row, row_, 0.0f);
      }
      float* to = k_ + key / kPanel * steps_ * kPanel + key % kPanel;
      for (int64_t step = 0; step < steps_; step += kWidth) {
        vf tile[kWidth];
        for (int i = 0; i < kWidth; ++i) tile[i] = load(rows_ + i * row_ + step);
        transpose(tile);
        for (int i = 0; i < kWidth && step + i < steps_; ++i) store(to + (step + i) * kPanel, tile[i]);
      }
    }
  }
  void pack_v(const float* v, int64_t stride, int64_t keys, const float* bias) {
    for (int64_t key = 0; key < round_up(keys, kPanel); key += 2) {
      for_columns(head_dim_, [&](int64_t col, auto lanes) {
        const auto bits = [&](int64_t at) {
          if (at >= keys) return vu{};  // meets a probability of zero
          return __builtin_convertvector(P::round(load_biased(v + at * stride, bias, col, lanes)), vu);
        };
        float* to = v_ + (col / kPanel * (kBlockK / 2) + key / 2) * kPanel + col % kPanel;
        store(to, bit_cast<vf>(bits(key) | bits(key + 1) << 16));
      });
    }
  }
  void multiply_keys(int64_t first, int64_t rows, int64_t keys, float* scores) {
    for (int64_t key = 0; key < keys; key += kPanel) {
      multiply(rows, q_ + first * row_, row_, k_ + key * steps_, steps_, scores + key, kBlockK, true);
    }
  }
  static BERT_FAST_INLINE void store_probability(float* row, int64_t col, vf p) {
    const vu16 bits = P::round(p);
    std::memcpy(reinterpret_cast<uint16_t*>(row) + col, &bits, sizeof(bits));
  }
  void multiply_values(int64_t rows, int64_t keys, const float* p, float* out, bool add) {
    for (int64_t panel = 0; panel < panels_; ++panel) {
      multiply(rows, p, kBlockK, v_ + panel * kBlockK / 2 * kPanel, round_up(keys, kPanel) / 2,
               out + panel * kPanel, panels_ * kPanel, !add);
    }
  }

 private:
  // to (row_ steps): (x + bias) * factor
  void round_row(const float* x, const float* bias, float factor, float* to) {
    uint16_t* bits = reinterpret_cast<uint16_t*>(to);
    for_columns(head_dim_, [&](int64_t col, auto lanes) {
      const vu16 rounded = P::round(load_biased(x, bias, col, lanes) * factor);
      std::memcpy(bits + col, &rounded, sizeof(rounded));
    });
    const int64_t end = round_up(head_dim_, kWidth);
    std::memset(bits + end, 0, (2 * row_ - end) * sizeof(uint16_t));
  }

  static void multiply(int64_t rows, const float* x, int64_t x_stride, const float* panel,
                       int64_t steps, float* y, int64_t y_stride, bool first) {
#ifdef BERT_FAST_AMX
    before_loads();
#endif
    const auto* w = reinterpret_cast<const uint32_t*>(panel);
    tile_of<P, 1>(rows,
                  {reinterpret_cast<const uint32_t*>(x), w, reinterpret_cast<const char*>(w), 0, y,
                   x_stride, 0, y_stride, steps, first},
                  std::make_integer_sequence<int, kRows>{});
  }

  int64_t head_dim_, steps_, row_, panels_;  // steps of a row that are multiplied; room for them
  Buffer q_, k_, v_, rows_;                  // rows_: of keys, before they are transposed
};
#endif

}  // namespace
}  // namespace BERT_FAST_ISA
}  // namespace bert_fast
