// y = x W^T (+ bias, GELU) in fp32 on the AMX matrix unit, which multiplies bf16 and int8 only. (Those
// are linear.cpp's.)
//
// A float is the exact sum of three bf16: high, middle and low, 8 bits each of its 24. Of the nine
// products of two such sums the six largest are taken; the three that are left out are below 2^-26
// of the whole, under fp32's own rounding. The unit adds in fp32. Its rate is 16 times that of
// fp32 FMA, so six products still leave it ahead by 2.7. (Henry, Tang, Heinecke 2019, "Leveraging
// the bfloat16 artificial intelligence datatype for higher-precision computations".)
//
// W is packed once, ahead of time; x in each call. Blocks: a panel of 32 columns of W and 256 rows
// of x, both over at most 768 of depth, share a core's 2 MB L2; a tile of 32 x 32 results is
// accumulated in four tile registers. Each block of depth is summed on its own and added to y in
// fp32, which also keeps the rounding error of long sums below sgemm's.
//
// Three parts are 6 bytes of memory for a weight's 4, which is all that counts for few rows, and the
// unit takes as long for one row as for 32: below that AVX-512 multiplies, by panels of its own
// before the unit's. (MiniLM, 2 hardware threads of a Xeon, by AVX-512 and by the unit: 1 x 16
// tokens 2.0 and 3.7 ms, 1 x 32 4.1 and 4.2, 1 x 128 17.8 and 15.8.)
#include "kernels.h"

#ifdef BERT_FAST_AMX
#include <algorithm>
#include <atomic>
#include <cstring>

#include "amx.h"
#include "gelu.h"

namespace bert_fast {
namespace BERT_FAST_ISA {
namespace {

constexpr int64_t kTileRows = 16, kTileDepth = 32;      // a register: 16 rows of 32 bf16
constexpr int64_t kTileSize = kTileRows * kTileDepth;   // in bf16
constexpr int64_t kParts = 3;                           // high, middle, low
constexpr int64_t kGroup = 2 * kTileRows;               // rows or columns handled together
constexpr int64_t kStep = kParts * 2 * kTileSize;       // bf16 of one group over one tile's depth
constexpr int64_t kLine = 32;                           // bf16 in a cache line
constexpr int64_t kNextLines = kStep / kLine / 8;       // lines of the next panel fetched a step
constexpr int64_t kBlockGroups = 8, kBlockSteps = 24;  // 256 rows by 768 of depth

struct Parts {
  vf part[kParts];
};

BERT_FAST_INLINE vf round_to_bf16(vf x) {
  const vu bits = bit_cast<vu>(x);
  return bit_cast<vf>((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000u);
}
BERT_FAST_INLINE Parts split(vf x) {
  const vf high = round_to_bf16(x);
  vf rest = x - high;
  rest = select(rest == rest, rest, vf{});  // inf - inf: the high part says it all
  const vf middle = round_to_bf16(rest);
  return {{high, middle, rest - middle}};
}

// ---- packing: groups of 32 rows, for each 32 of depth three parts of two tiles ----

// x: a tile is 16 rows of 32 consecutive elements. Rows and depth past the end are zero.
void pack_rows(const float* x, int64_t rows, int64_t depth, int64_t stride, uint16_t* packed) {
  constexpr int64_t kRun = 4 * kTileDepth;  // long enough to stream, short enough for L1
  for (int64_t begin = 0; begin < depth; begin += kRun) {
    for (int64_t row = 0; row < kGroup; ++row) {
      uint16_t* line = packed + begin / kTileDepth * kStep + row / kTileRows * kTileSize +
                       row % kTileRows * kTileDepth;
      for (int64_t k = begin; k < depth && k < begin + kRun; k += kTileDepth, line += kStep) {
        for (int64_t half = 0; half < kTileDepth; half += kWidth) {
          const int64_t left = row < rows ? depth - k - half : 0;
          vf value = {};
          if (left >= kWidth) value = load(x + row * stride + k + half);
          else if (left > 0) value = load_n(x + row * stride + k + half, static_cast<int>(left));
          const Parts parts = split(value);
          for (int64_t p = 0; p < kParts; ++p) {
            store(reinterpret_cast<bf16*>(line + p * 2 * kTileSize + half), parts.part[p]);
          }
        }
      }
    }
  }
}

// W: the unit wants B's rows in pairs, element [k / 2][column][k % 2]. Not fast: done once.
void pack_panel(const float* w, int64_t columns, int64_t depth, int64_t stride, uint16_t* packed) {
  for (int64_t k = 0; k < ceil_div(depth, kTileDepth) * kTileDepth; ++k) {
    uint16_t* step = packed + k / kTileDepth * kStep;
    for (int64_t column = 0; column < kGroup; column += kWidth) {
      float values[kWidth] = {};
      for (int64_t i = 0; i < kWidth && column + i < columns && k < depth; ++i) {
        values[i] = w[(column + i) * stride + k];
      }
      const Parts parts = split(load(values));
      for (int64_t p = 0; p < kParts; ++p) {
        bf16 bits[kWidth];
        store(bits, parts.part[p]);
        uint16_t* tile = step + (p * 2 + column / kTileRows) * kTileSize;
        uint16_t* pairs = tile + k % kTileDepth / 2 * 32 + column % kTileRows * 2;
        for (int64_t i = 0; i < kWidth; ++i) pairs[i * 2 + k % 2] = bits[i].bits;
      }
    }
  }
}

// ---- the product ----

// Registers 0-3 accumulate the 2 x 2 tiles of a 32 x 32 result, 4-5 hold x, 6-7 hold W.
BERT_FAST_INLINE void load_x(const uint16_t* tiles) {
  _tile_loadd(4, tiles, 64);
  _tile_loadd(5, tiles + kTileSize, 64);
}
BERT_FAST_INLINE void load_w(const uint16_t* tiles) {
  _tile_loadd(6, tiles, 64);
  _tile_loadd(7, tiles + kTileSize, 64);
}
// Four products, 64 cycles; meanwhile a sixth of the next step's x and W comes from L2 into L1, and
// a little of the next panel of W from memory into L2.
BERT_FAST_INLINE void multiply(const uint16_t* x, const uint16_t* w, const uint16_t* next,
                               int sixth) {
  constexpr int64_t kLines = kStep / kLine / 6;
  x += kStep + sixth * kLines * kLine;
  w += kStep + sixth * kLines * kLine;
  next += sixth * kNextLines / 6 * kLine;
  for (int i = 0; i < kNextLines / 6; ++i) __builtin_prefetch(next + i * kLine, 0, 2);
  _tile_dpbf16ps(0, 4, 6);
  for (int i = 0; i < kLines; i += 2) __builtin_prefetch(x + i * kLine);
  _tile_dpbf16ps(1, 4, 7);
  for (int i = 0; i < kLines; i += 2) __builtin_prefetch(w + i * kLine);
  _tile_dpbf16ps(2, 5, 6);
  for (int i = 1; i < kLines; i += 2) __builtin_prefetch(x + i * kLine);
  _tile_dpbf16ps(3, 5, 7);
  for (int i = 1; i < kLines; i += 2) __builtin_prefetch(w + i * kLine);
}

// result (32 x 32) = x group times W panel over `steps` tiles of depth. `next` is what to fetch.
void multiply_group(const uint16_t* x, const uint16_t* w, const uint16_t* next, int64_t steps,
                    float* result) {
  constexpr int64_t kPart = 2 * kTileSize;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t step = 0; step < steps; ++step) {
    load_w(w);  // high, with every part of x
    load_x(x);
    multiply(x, w, next, 0);
    load_x(x + kPart);
    multiply(x, w, next, 1);
    load_x(x + 2 * kPart);
    multiply(x, w, next, 2);
    load_w(w + kPart);  // middle, with high and middle
    load_x(x);
    multiply(x, w, next, 3);
    load_x(x + kPart);
    multiply(x, w, next, 4);
    load_w(w + 2 * kPart);  // low, with high
    load_x(x);
    multiply(x, w, next, 5);
    x += kStep;
    w += kStep;
    next += kNextLines * kLine;
  }
  constexpr int64_t kStride = kGroup * sizeof(float);
  _tile_stored(0, result, kStride);
  _tile_stored(1, result + kTileRows, kStride);
  _tile_stored(2, result + kTileRows * kGroup, kStride);
  _tile_stored(3, result + kTileRows * kGroup + kTileRows, kStride);
}

// Adds a group's result to y (the first block of depth sets it); the last adds bias and GELU.
template <bool kFirst, class Finish>
BERT_FAST_INLINE void add_group(const LinearForward& a, const float* result, int64_t first_row,
                                int64_t first_column, Finish finish) {
  const int64_t rows = std::min(kGroup, a.rows - first_row);
  const int64_t columns = std::min(kGroup, a.out_features - first_column);
  for_columns(columns, [&](int64_t column, auto lanes) {
    const int64_t at = first_column + column;
    const vf bias = a.bias ? load_row(a.bias + at, lanes) : vf{};
    for (int64_t row = 0; row < rows; ++row) {
      float* y = a.out + (first_row + row) * a.out_stride + at;
      vf value = load(result + row * kGroup + column);
      if (!kFirst) value += load_row(y, lanes);
      store_row(y, finish(value, bias), lanes);
    }
  });
}

template <bool kFirst>
void finish_group(const LinearForward& a, const float* result, int64_t row, int64_t column,
                  bool last) {
  if (!last) {
    add_group<kFirst>(a, result, row, column, [](vf y, vf) { return y; });
  } else if (a.activation == Activation::kNone) {
    add_group<kFirst>(a, result, row, column, [](vf y, vf bias) { return y + bias; });
  } else if (a.activation == Activation::kGelu) {
    add_group<kFirst>(a, result, row, column,
                      [](vf y, vf bias) { return gelu<Gelu::kErf>(y + bias); });
  } else {
    add_group<kFirst>(a, result, row, column,
                      [](vf y, vf bias) { return gelu<Gelu::kTanh>(y + bias); });
  }
}

// Asks for the lines of y that finish_group will write, while the product is still to be computed:
// they lie a row apart, each on a page of its own, and waiting for them cost a fifth of the time.
void prefetch_group(const LinearForward& a, int64_t first_row, int64_t first_column) {
  const int64_t rows = std::min(kGroup, a.rows - first_row);
  const float* y = a.out + first_row * a.out_stride + first_column;
  for (int64_t row = 0; row < rows; ++row, y += a.out_stride) {
    __builtin_prefetch(y, 1);
    __builtin_prefetch(y + kWidth, 1);
  }
}

// Where the unit's panels begin, in bytes: a line of the cache.
int64_t begin_of_parts(int64_t out_features, int64_t in_features) {
  return ceil_div(avx512_linear_kernels().packed_size(out_features, in_features), 64) * 64;
}

int64_t packed_size(int64_t out_features, int64_t in_features) {
  return begin_of_parts(out_features, in_features) +
         ceil_div(out_features, kGroup) * ceil_div(in_features, kTileDepth) * kStep *
             static_cast<int64_t>(sizeof(uint16_t));
}

void pack(const LinearWeight& w, void* to, int num_threads) {
  avx512_linear_kernels().pack(w, to, num_threads);
  uint16_t* packed = reinterpret_cast<uint16_t*>(static_cast<char*>(to) +
                                                 begin_of_parts(w.out_features, w.in_features));
  const int64_t panel_size = ceil_div(w.in_features, kTileDepth) * kStep;
  parallel_for(num_threads, ceil_div(w.out_features, kGroup), 1, [&](int64_t panel) {
    pack_panel(static_cast<const float*>(w.elements) + panel * kGroup * w.in_features,
               std::min(kGroup, w.out_features - panel * kGroup), w.in_features, w.in_features,
               packed + panel * panel_size);
  });
}

void multiply_block(const LinearForward& a, int64_t first_group, int64_t last_group,
                    int64_t first_panel, int64_t last_panel, uint16_t* scratch) {
  const int64_t steps = ceil_div(a.in_features, kTileDepth);
  alignas(64) float result[kGroup * kGroup];
  for (int64_t step = 0; step < steps; step += kBlockSteps) {
    const int64_t count = std::min(kBlockSteps, steps - step);
    const int64_t depth = std::min(a.in_features - step * kTileDepth, count * kTileDepth);
    const auto finish = step == 0 ? finish_group<true> : finish_group<false>;
    for (int64_t group = first_group; group < last_group; ++group) {
      const int64_t row = group * kGroup;
      pack_rows(a.x + row * a.x_stride + step * kTileDepth, std::min(kGroup, a.rows - row),
                depth, a.x_stride, scratch + (group - first_group) * count * kStep);
    }
    before_loads();
    for (int64_t panel = first_panel; panel < last_panel; ++panel) {
      const uint16_t* w = static_cast<const uint16_t*>(a.packed) + (panel * steps + step) * kStep;
      for (int64_t group = first_group; group < last_group; ++group) {
        prefetch_group(a, group * kGroup, panel * kGroup);
        const int64_t turn = group - first_group;
        multiply_group(scratch + turn * count * kStep, w,
                       w + (steps + turn * count / kBlockGroups) * kStep, count, result);
        finish(a, result, group * kGroup, panel * kGroup, step + count == steps);
      }
    }
  }
}

int64_t scratch_size() { return kBlockGroups * kBlockSteps * kStep; }
int64_t scratch_bytes(int64_t rows, int64_t, int threads) {
  return rows < kFewRows ? 0 : threads * scratch_size() * static_cast<int64_t>(sizeof(uint16_t));
}

void forward(const LinearForward& given) {
  if (given.rows < kFewRows) return avx512_linear_kernels().forward(given);
  LinearForward a = given;
  a.packed = static_cast<const char*>(a.packed) + begin_of_parts(a.out_features, a.in_features);
  const int64_t groups = ceil_div(a.rows, kGroup), panels = ceil_div(a.out_features, kGroup);
  const int64_t blocks = ceil_div(groups, kBlockGroups), block_groups = ceil_div(groups, blocks);
  // Work is cut into (row block, panel) pairs, row blocks outermost, and every thread takes an equal
  // run of them: it then packs each row block that it meets once, into scratch of its own that
  // stays in its L2, and the threads share nothing.
  std::atomic<int64_t> threads{0};
  parallel(a.num_threads, blocks * panels, ceil_div(blocks * panels, a.num_threads), [&](Work& items) {
    const Tiles tiles;
    uint16_t* scratch = static_cast<uint16_t*>(a.scratch) + threads.fetch_add(1) * scratch_size();
    for (int64_t work, end; items.take(work, end);) {
      while (work < end) {
        const int64_t block = work / panels, first_panel = work % panels;
        const int64_t last_panel = std::min(panels, first_panel + end - work);
        multiply_block(a, block * block_groups, std::min(groups, (block + 1) * block_groups),
                       first_panel, last_panel, scratch);
        work += last_panel - first_panel;
      }
    }
  });
}

}  // namespace
}  // namespace BERT_FAST_ISA

namespace BERT_FAST_ISA {
const LinearKernels& linear(Precision);  // bf16, int8: linear.cpp
void attention_in_bf16(const AttentionForward&);
}

void amx_attention_in_bf16(const AttentionForward& a) { BERT_FAST_ISA::attention_in_bf16(a); }

const LinearKernels* amx_linear_kernels(Precision precision) {
  static const LinearKernels kernels = {"amx", true, BERT_FAST_ISA::packed_size,
                                        BERT_FAST_ISA::scratch_bytes, BERT_FAST_ISA::pack,
                                        avx512_linear_kernels().unpack, nullptr,
                                        BERT_FAST_ISA::forward};
  if (!BERT_FAST_ISA::has_amx(precision)) return nullptr;
  return precision == Precision::kFloat32 ? &kernels : &BERT_FAST_ISA::linear(precision);
}

}  // namespace bert_fast

#else  // a processor or compiler without AMX
namespace bert_fast {
const LinearKernels* amx_linear_kernels(Precision) { return nullptr; }
void amx_attention_in_bf16(const AttentionForward&) {}
}  // namespace bert_fast
#endif
