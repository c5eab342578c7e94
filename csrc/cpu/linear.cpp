// y = x W^T (+ bias, GELU) in fp32, W packed once, ahead of time: a library's sgemm packs it in
// every call, which for a single query costs more than the product (4 times as much at 16 rows).
//
// A panel is 2 vectors of W's columns over the whole depth, [depth][columns]: it is read as a
// stream, once for every tile of up to 8 rows of x, whose products are accumulated in registers.
// Blocks: 144 rows of x over 384 of depth stay in a core's L2 while all panels pass. Each block of
// depth is summed on its own, in order, and added to y: the bits of a row of y depend on that row
// of x alone, on no other row, on no number of rows or threads. (Goto & van de Geijn 2008,
// "Anatomy of high-performance matrix multiplication"; few rows need none of its copies of x.)
#include <algorithm>
#include <utility>

#include "gelu.h"

namespace bert_fast {
namespace BERT_FAST_ISA {
namespace {

constexpr int64_t kPanel = 2 * kWidth;
constexpr int64_t kTileRows = kVectorRegisters == 32 ? 8 : 6;
constexpr int64_t kBlockRows = 144, kBlockDepth = 384;
constexpr int64_t kSumDepth = 64;  // summed on their own: short sums round less than sgemm's
// Few rows take several panels at once, so that enough sums are under way to hide an FMA's latency.
constexpr int64_t kPanelsFor2 = kVectorRegisters == 32 ? 4 : 2, kPanelsFor4 = kPanelsFor2 / 2;
constexpr int64_t kAhead = 32;  // rows of the panel that are fetched ahead

struct Block {
  const float *x, *panel;          // at the first row, the first of depth
  float* y;
  int64_t x_stride, panel_stride, y_stride, depth;
  bool first;                      // of the blocks of depth: sets y, the others add
};

// y (kRows x kPanels panels) from kRows rows of x.
template <int kRows, int kPanels>
void tile(const Block& b) {
  vf total[kRows][2 * kPanels];
  for (int64_t begin = 0; begin < b.depth; begin += kSumDepth) {
    const int64_t end = std::min(b.depth, begin + kSumDepth);
    vf acc[kRows][2 * kPanels];
    for (auto& row : acc) {
      for (vf& sum : row) sum = vf{};
    }
    for (int64_t k = begin; k < end; ++k) {
      vf w[2 * kPanels];
      for (int p = 0; p < kPanels; ++p) {
        const float* row = b.panel + p * b.panel_stride + k * kPanel;
        w[2 * p] = load(row);
        w[2 * p + 1] = load(row + kWidth);
        __builtin_prefetch(row + kAhead * kPanel);
        if (kPanel * sizeof(float) > 64) __builtin_prefetch(row + kAhead * kPanel + kWidth);
      }
      for (int i = 0; i < kRows; ++i) {
        const float x = b.x[i * b.x_stride + k];
        for (int j = 0; j < 2 * kPanels; ++j) acc[i][j] += w[j] * x;
      }
    }
    for (int i = 0; i < kRows; ++i) {
      for (int j = 0; j < 2 * kPanels; ++j) {
        total[i][j] = begin == 0 ? acc[i][j] : total[i][j] + acc[i][j];
      }
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < 2 * kPanels; ++j) {
      float* y = b.y + i * b.y_stride + j * kWidth;
      store(y, b.first ? total[i][j] : load(y) + total[i][j]);
    }
  }
}

template <int kPanels, int... kRows>
void tile_of(int64_t rows, const Block& block, std::integer_sequence<int, kRows...>) {
  static constexpr void (*kTiles[])(const Block&) = {tile<kRows + 1, kPanels>...};
  kTiles[rows - 1](block);
}

template <class Finish>
BERT_FAST_INLINE void for_each(float* y, int64_t stride, int64_t rows, int64_t columns,
                               const float* bias, Finish finish) {
  for_columns(columns, [&](int64_t column, auto lanes) {
    const vf b = bias ? load_row(bias + column, lanes) : vf{};
    for (int64_t row = 0; row < rows; ++row) {
      float* at = y + row * stride + column;
      store_row(at, finish(load_row(at, lanes) + b), lanes);
    }
  });
}

// Bias and activation, while the sums are still in the L1 cache.
void finish(const LinearForward& a, float* y, int64_t rows, int64_t column, int64_t columns) {
  const float* bias = a.bias ? a.bias + column : nullptr;
  const int64_t stride = a.out_features;
  if (a.activation == Activation::kGelu) {
    for_each(y, stride, rows, columns, bias, [](vf v) { return gelu<Gelu::kErf>(v); });
  } else if (a.activation == Activation::kGeluTanh) {
    for_each(y, stride, rows, columns, bias, [](vf v) { return gelu<Gelu::kTanh>(v); });
  } else if (bias) {
    for_each(y, stride, rows, columns, bias, [](vf v) { return v; });
  }
}

// One tile at the panels from `panel` on, over one block of depth. W's last columns are packed
// with zeros after them, y has no room for these: they pass through a buffer.
template <int kPanels, int64_t kMostRows>
void add_tile(const LinearForward& a, int64_t row, int64_t rows, int64_t panel, int64_t k) {
  const int64_t column = panel * kPanel, depth = std::min(kBlockDepth, a.in_features - k);
  const int64_t columns = std::min(kPanels * kPanel, a.out_features - column);
  float* y = a.out + row * a.out_features + column;
  Block block = {a.x + row * a.in_features + k,
                 static_cast<const float*>(a.packed) + column * a.in_features + k * kPanel,
                 y, a.in_features, kPanel * a.in_features, a.out_features, depth, k == 0};
  constexpr auto kRows = std::make_integer_sequence<int, kMostRows>{};
  if (columns == kPanels * kPanel) {
    tile_of<kPanels>(rows, block, kRows);
  } else {
    alignas(64) float whole[kMostRows * kPanels * kPanel];
    block.y = whole;
    block.y_stride = kPanels * kPanel;
    for (int64_t i = 0; !block.first && i < rows; ++i) {
      std::memcpy(whole + i * block.y_stride, y + i * a.out_features, columns * sizeof(float));
    }
    tile_of<kPanels>(rows, block, kRows);
    for (int64_t i = 0; i < rows; ++i) {
      std::memcpy(y + i * a.out_features, whole + i * block.y_stride, columns * sizeof(float));
    }
  }
  if (k + depth == a.in_features) finish(a, y, rows, column, columns);
}

// Rows [begin, end), at most kBlockRows, times panels [first, last).
void multiply(const LinearForward& a, int64_t begin, int64_t end, int64_t first, int64_t last) {
  const int64_t rows = end - begin, tiles = ceil_div(rows, kTileRows);
  for (int64_t k = 0; k < a.in_features; k += kBlockDepth) {
    int64_t panel = first;
    if (rows <= 2) {
      for (; panel + kPanelsFor2 <= last; panel += kPanelsFor2) {
        add_tile<kPanelsFor2, 2>(a, begin, rows, panel, k);
      }
    }
    if (rows <= 4) {
      for (; panel + kPanelsFor4 <= last; panel += kPanelsFor4) {
        add_tile<kPanelsFor4, 4>(a, begin, rows, panel, k);
      }
    }
    for (; panel < last; ++panel) {
      for (int64_t t = 0; t < tiles; ++t) {
        const int64_t row = begin + rows * t / tiles, next = begin + rows * (t + 1) / tiles;
        add_tile<1, kTileRows>(a, row, next - row, panel, k);
      }
    }
  }
}

}  // namespace

int64_t linear_packed_size(int64_t out_features, int64_t in_features) {
  return ceil_div(out_features, kPanel) * kPanel * in_features * sizeof(float);
}

void linear_pack(const float* weight, int64_t out_features, int64_t in_features, void* packed,
                 int num_threads) {
  parallel_for(num_threads, ceil_div(out_features, kPanel), 1, [&](int64_t panel) {
    float* to = static_cast<float*>(packed) + panel * kPanel * in_features;
    const int64_t first = panel * kPanel, columns = std::min(kPanel, out_features - first);
    for (int64_t k = 0; k < in_features; ++k) {
      for (int64_t i = 0; i < kPanel; ++i) {
        to[k * kPanel + i] = i < columns ? weight[(first + i) * in_features + k] : 0.0f;
      }
    }
  });
}

bool linear_matches(const float* weight, int64_t out_features, int64_t in_features,
                    const void* packed) {
  constexpr int64_t kSamples = 16;
  for (int64_t i = 0; i < kSamples; ++i) {
    const int64_t row = i * (out_features - 1) / (kSamples - 1), k = i * 7919 % in_features;
    const float* at = static_cast<const float*>(packed) + row / kPanel * kPanel * in_features +
                      k * kPanel + row % kPanel;
    if (std::memcmp(at, weight + row * in_features + k, sizeof(float)) != 0) return false;
  }
  return true;
}

void linear_forward(const LinearForward& a) {
  const int64_t panels = ceil_div(a.out_features, kPanel), blocks = ceil_div(a.rows, kBlockRows);
  const int threads = threads_for(a.rows * a.out_features * a.in_features / 64, a.num_threads);
  // Items are pairs of a row block and a panel, row blocks outermost.
  parallel(threads, blocks * panels, grain_for(blocks * panels, threads), [&](Work& work) {
    for (int64_t item, end; work.take(item, end);) {
      while (item < end) {
        const int64_t block = item / panels, first = item % panels;
        const int64_t last = std::min(panels, first + end - item);
        multiply(a, a.rows * block / blocks, a.rows * (block + 1) / blocks, first, last);
        item += last - first;
      }
    }
  });
}

}  // namespace BERT_FAST_ISA
}  // namespace bert_fast
