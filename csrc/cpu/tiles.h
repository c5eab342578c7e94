// A tile of the products that linear.h names: up to P::kTileRows rows of x times a panel of columns,
// or more panels at once. linear.cpp's are of packed weights, attention's of keys and of values.
#pragma once
#include <utility>

#include "linear.h"

namespace bert_fast {
namespace BERT_FAST_ISA {
namespace {

struct Block {
  const uint32_t *x, *panel;       // at the first row, the first step
  const char* fetch;               // into L2, meanwhile: so many bytes a step
  int64_t fetch_stride;
  float* y;                        // sums, of whatever type
  int64_t x_stride, panel_stride, y_stride, steps;
  bool first;                      // of the blocks of depth: sets y, the others add
};

#ifdef BERT_FAST_AMX
// y (rows x a panel) from as many rows of x. The packed panel is what the unit reads, a step a row of
// a tile. Past the last row of x, up to a whole tile, anything may stand: it meets no other's sums.
template <class P, int kPanels, int... kRows>
void tile_of(int64_t rows, const Block& b, std::integer_sequence<int, kRows...>) {
  static_assert(kPanels == 1 && sizeof...(kRows) <= P::kTileRows, "the unit's tiles hold no more");
  using Sum = typename P::Sum;
  constexpr int64_t kStride = 4 * kPanel;  // bytes
  const bool lower = rows > kTile;
  alignas(64) float sums[P::kTileRows * kPanel];
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  const char* fetch = b.fetch;
  for (int64_t k = 0; k < b.steps; k += kTile) {
    const uint32_t *x = b.x + k, *w = b.panel + k * kPanel;
    for (int64_t i = 0; i < kTile * b.fetch_stride; i += 64) __builtin_prefetch(fetch + i, 0, 2);
    fetch += kTile * b.fetch_stride;
    _tile_loadd(6, w, kStride);
    _tile_loadd(7, w + kTile, kStride);
    _tile_loadd(4, x, 4 * b.x_stride);
    P::multiply_upper();
    if (lower) {
      _tile_loadd(5, x + kTile * b.x_stride, 4 * b.x_stride);
      P::multiply_lower();
    }
  }
  _tile_stored(0, sums, kStride);
  _tile_stored(1, sums + kTile, kStride);
  _tile_stored(2, sums + kTile * kPanel, kStride);
  _tile_stored(3, sums + kTile * kPanel + kTile, kStride);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < kPanel; j += kWidth) {
      float* y = b.y + i * b.y_stride + j;
      const Sum sum = bit_cast<Sum>(load(sums + i * kPanel + j));
      store(y, bit_cast<vf>(b.first ? sum : bit_cast<Sum>(load(y)) + sum));
    }
  }
}

#else
// y (kRows x kPanels panels) from kRows rows of x.
template <class P, int kRows, int kPanels>
void tile(const Block& b) {
  using Sum = typename P::Sum;
  constexpr int kVectors = 2 * kPanels;
  const char* fetch = b.fetch;
  for (int64_t begin = 0; begin < b.steps; begin += P::kSumSteps) {
    const int64_t end = std::min(b.steps, begin + P::kSumSteps);
    Sum sums[kRows][kVectors];
    for (auto& row : sums) {
      for (Sum& sum : row) sum = Sum{};
    }
    for (int64_t k = begin; k < end; ++k, fetch += b.fetch_stride) {
      vu w[kVectors];
      for (int p = 0; p < kPanels; ++p) {
        const uint32_t* row = b.panel + p * b.panel_stride + k * kPanel;
        // One by one: GCC copies two of AVX2's by halves through memory, at a sixth of the speed.
        for (int j = 0; j < 2; ++j) std::memcpy(&w[2 * p + j], row + j * kWidth, sizeof(vu));
        const char* line = fetch + 4 * p * b.panel_stride;
        __builtin_prefetch(line, 0, 2);
        if (4 * kPanel > 64) __builtin_prefetch(line + b.fetch_stride / 2, 0, 2);
      }
      for (int i = 0; i < kRows; ++i) {
        uint32_t x;
        std::memcpy(&x, b.x + i * b.x_stride + k, sizeof(x));
        P::add(sums[i], w, kVectors, x);
      }
    }
    // To y at once: an array of totals over the steps' blocks is one that GCC 12 keeps on the stack,
    // where the sums then go in each step, too, which takes a short product a fifth longer.
    const bool sets = b.first && begin == 0;
    for (int i = 0; i < kRows; ++i) {
      for (int j = 0; j < kVectors; ++j) {
        float* y = b.y + i * b.y_stride + j * kWidth;
        store(y, bit_cast<vf>(sets ? sums[i][j] : bit_cast<Sum>(load(y)) + sums[i][j]));
      }
    }
  }
}

template <class P, int kPanels, int... kRows>
void tile_of(int64_t rows, const Block& block, std::integer_sequence<int, kRows...>) {
  static constexpr void (*kTiles[])(const Block&) = {tile<P, kRows + 1, kPanels>...};
  kTiles[rows - 1](block);
}
#endif

}  // namespace
}  // namespace BERT_FAST_ISA
}  // namespace bert_fast
