// y = x W^T (+ bias, GELU), W packed once, ahead of time: a library's sgemm packs it in every
// call, which for a single query costs more than the product (4 times as much at 16 rows).
//
// A panel is 2 vectors of W's columns over the whole depth, [step][column], a step as in linear.h:
// it is read as a stream, once for every tile of up to 8 or 12 rows of x, whose products are
// accumulated in registers. Blocks: 144 rows of x over 384 steps of depth stay in a core's L2 while
// all panels pass. Runs of depth (P::kSumSteps, a block at most) are summed on their own, in order,
// and added to y: the bits of a row of y depend on that row of x alone, on no other row, on no number
// of rows or threads. (Goto & van de Geijn 2008, "Anatomy of high-performance matrix multiplication";
// few rows need none of its copies of x.) For AMX, in bf16 and int8, tiles are the unit's (tile_of
// under BERT_FAST_AMX).
//
// In bf16 and int8 the rows of x are converted first; in the layers' one call by layer-norm, as it
// writes them (MiniLM in int8, 32 x 128: 2% less time). GELU sees no row as a whole; were their
// ranges found in its epilogue at no cost, the same model would take 99 to 100% of its time.
//
// int8 (Bhandare et al. 2019, "Efficient 8-bit quantization of Transformer"; Dettmers et al. 2022,
// LLM.int8(): a scale for each row of x and each column of y): x = s (q - z) with q in 0..255, W = t p
// with p in -127..127, so y = s t (q p - z sum(p)), whose sums are exact.
#include "gelu.h"
#include "tiles.h"

namespace bert_fast {
namespace BERT_FAST_ISA {
namespace {

#ifdef BERT_FAST_AMX
constexpr int64_t kBlockRows = 256, kPanelsFor2 = 1, kPanelsFor4 = 1;  // not measured
#else
constexpr int64_t kBlockRows = kRowsOfBlock;
// Few rows take several panels at once, so that enough sums are under way to hide an FMA's latency.
constexpr int64_t kPanelsFor2 = k512 ? 4 : 2, kPanelsFor4 = kPanelsFor2 / 2;
#endif
// Steps of the panel that are fetched ahead, into L2, by a tile that fetches its own. (Zen 4, 16
// rows, 42 MB of weights in huge pages: 64 steps 99 GFLOP/s, of 118 that the core has; 32 steps,
// into L1, 91. In L2 already: 99.)
constexpr int64_t kAhead = 64;
// So many steps of x at most stay in L2 as a whole: each panel then passes over its whole depth
// before the next, and W is one stream.
constexpr int64_t kFewSteps = 64 * 1024;

template <class P>
constexpr int64_t kPerStep = 4 / sizeof(typename P::Element);
template <class P>
constexpr bool kIsInt8 = P::kPrecision == Precision::kInt8;
template <class P>
constexpr bool kConverts = P::kPrecision != Precision::kFloat32;

template <class P>
int64_t steps_of(int64_t depth) { return ceil_div(depth, kWhole * kPerStep<P>) * kWhole; }
int64_t padded(int64_t out_features) { return ceil_div(out_features, kPanel) * kPanel; }

template <class P>
int64_t packed_size(int64_t out_features, int64_t in_features) {
  const int64_t panels = padded(out_features) * steps_of<P>(in_features);
  return 4 * (panels + (kIsInt8<P> ? 2 * padded(out_features) + in_features + 1 : 0));
}

// After the panels: each column's scale and sum, and if there are any, x's factors.
template <class P>
Factors factors(const void* packed, int64_t out_features, int64_t in_features) {
  if (!kIsInt8<P>) return {};
  const float* scale =
      static_cast<const float*>(packed) + padded(out_features) * steps_of<P>(in_features);
  const float* x_factor = scale + 2 * padded(out_features);
  return {scale, *x_factor != 0.0f ? x_factor + 1 : nullptr,
          reinterpret_cast<const int32_t*>(scale + padded(out_features))};
}

// A product under way: what its rows are converted to, and what the weight was packed with.
struct Call : LinearForward {
  const uint32_t* steps;      // (rows, depth), stride apart: x, or what it was converted to
  int64_t stride, depth;
  const Quantised* quantised;  // (rows), int8
  Factors by;
};

template <class P, class Activate>
BERT_FAST_INLINE void for_each(const Call& a, float* y, int64_t row, int64_t rows, int64_t column,
                               int64_t columns, Activate activate) {
  for_columns(columns, [&](int64_t at, auto lanes) {
    const vf bias = a.bias ? load_row(a.bias + column + at, lanes) : vf{};
    vf scale = {};
    vi sum = {};
    if constexpr (kIsInt8<P>) {
      scale = load(a.by.scale + column + at);
      std::memcpy(&sum, a.by.sum + column + at, sizeof(sum));
    }
    const auto summed = [&](int64_t i) {
      vf value = load_row(y + i * a.out_stride + at, lanes);
      if constexpr (kIsInt8<P>) {
        const Quantised& x = a.quantised[row + i];
        value = __builtin_convertvector(bit_cast<vi>(value) - sum * x.zero, vf) * (scale * x.scale);
      }
      return value + bias;
    };
    int64_t i = 0;
    for (; i + kTogether <= rows; i += kTogether) {
      vf values[kTogether];
      each<kTogether>([&](int j) { values[j] = summed(i + j); });
      activate(values);
      each<kTogether>([&](int j) { store_row(y + (i + j) * a.out_stride + at, values[j], lanes); });
    }
    for (; i < rows; ++i) {
      vf value = summed(i);
      activate(value);
      store_row(y + i * a.out_stride + at, value, lanes);
    }
  });
}

template <Gelu kind>
BERT_FAST_INLINE void gelu_of(vf (&values)[kTogether]) { gelu<kind>(values); }
template <Gelu kind>
BERT_FAST_INLINE void gelu_of(vf& value) { value = gelu<kind>(value); }

// Scales, bias and activation, while the sums are still in the L1 cache.
template <class P>
void finish(const Call& a, float* y, int64_t row, int64_t rows, int64_t column, int64_t columns) {
  if (a.activation == Activation::kGelu) {
    for_each<P>(a, y, row, rows, column, columns, [](auto& v) { gelu_of<Gelu::kErf>(v); });
  } else if (a.activation == Activation::kGeluTanh) {
    for_each<P>(a, y, row, rows, column, columns, [](auto& v) { gelu_of<Gelu::kTanh>(v); });
  } else if (a.bias || kIsInt8<P>) {
    for_each<P>(a, y, row, rows, column, columns, [](auto&) {});
  }
}

const uint32_t* block_of(const Call& a, int64_t panel, int64_t k) {
  return static_cast<const uint32_t*>(a.packed) + (panel * a.depth + k) * kPanel;
}

// What a tile fetches: a share of W from a block on, or, by default, the steps that it comes to.
struct Fetch {
  const uint32_t* block = nullptr;
  int64_t share = 0, shares = 1;
};

// One tile at the panels from `panel` on, over one block of depth. W's last columns are packed
// with zeros after them, y has no room for these: they pass through a buffer.
template <class P, int kPanels, int64_t kMostRows>
void add_tile(const Call& a, int64_t row, int64_t rows, int64_t panel, int64_t k, Fetch fetch = {}) {
  const int64_t column = panel * kPanel, steps = std::min(kBlockSteps, a.depth - k);
  const int64_t columns = std::min(kPanels * kPanel, a.out_features - column);
  float* y = a.out + row * a.out_stride + column;
  const uint32_t* w = block_of(a, panel, k);
  if (!fetch.block) fetch.block = w + kAhead * kPanel;
  const int64_t bytes = ceil_div(4 * kPanel, fetch.shares);  // of a share, a step
  Block block = {a.steps + row * a.stride + k, w,
                 reinterpret_cast<const char*>(fetch.block) + fetch.share * steps * bytes, bytes,
                 y, a.stride, kPanel * a.depth, a.out_stride, steps, k == 0};
  constexpr auto kRows = std::make_integer_sequence<int, kMostRows>{};
  if (columns == kPanels * kPanel) {
    tile_of<P, kPanels>(rows, block, kRows);
  } else {
    alignas(64) float whole[kMostRows * kPanels * kPanel];
    block.y = whole;
    block.y_stride = kPanels * kPanel;
    for (int64_t i = 0; !block.first && i < rows; ++i) {
      std::memcpy(whole + i * block.y_stride, y + i * a.out_stride, columns * sizeof(float));
    }
    tile_of<P, kPanels>(rows, block, kRows);
    for (int64_t i = 0; i < rows; ++i) {
      std::memcpy(y + i * a.out_stride, whole + i * block.y_stride, columns * sizeof(float));
    }
  }
  if (k + steps == a.depth) finish<P>(a, y, row, rows, column, columns);
}

// All tiles of rows [begin, end) at one block. Together they fetch the next one, evenly: all of it
// during the first, two cores ask for more than memory gives. Nobody has fetched the first block,
// nor a lone tile's: such a tile fetches what it comes to itself.
template <class P>
void add_tiles(const Call& a, int64_t begin, int64_t end, int64_t panel, int64_t k,
               const uint32_t* next_block, bool is_first) {
  const int64_t rows = end - begin, tiles = ceil_div(rows, P::kTileRows);
  const int64_t own = is_first || tiles == 1 ? 1 : 0;  // tiles that fetch their own
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t row = begin + rows * t / tiles, next = begin + rows * (t + 1) / tiles;
    const Fetch fetch = t < own ? Fetch{} : Fetch{next_block, t - own, tiles - own};
    add_tile<P, 1, P::kTileRows>(a, row, next - row, panel, k, fetch);
  }
}

// Rows [begin, end), at most kBlockRows, times panels [first, last).
template <class P>
void multiply(const Call& a, int64_t begin, int64_t end, int64_t first, int64_t last) {
  const int64_t rows = end - begin, run = rows * a.depth <= kFewSteps ? a.depth : kBlockSteps;
  for (int64_t from = 0; from < a.depth; from += run) {
    // The panels in turn, `together` at once, each over a run of its depth.
    int64_t panel = first;
    const auto pass = [&](int64_t together, auto add) {
      for (; panel + together <= last; panel += together) {
        for (int64_t k = from; k < std::min(a.depth, from + run); k += kBlockSteps) add(k);
      }
    };
    if (rows <= 2) {
      pass(kPanelsFor2, [&](int64_t k) { add_tile<P, kPanelsFor2, 2>(a, begin, rows, panel, k); });
    }
    if (rows <= 4) {
      pass(kPanelsFor4, [&](int64_t k) { add_tile<P, kPanelsFor4, 4>(a, begin, rows, panel, k); });
    }
    pass(1, [&](int64_t k) {
      const uint32_t* next = run == a.depth     ? block_of(a, panel, k + kBlockSteps)
                             : panel + 1 < last ? block_of(a, panel + 1, k)
                                                : block_of(a, first, k + kBlockSteps);
      add_tiles<P>(a, begin, end, panel, k, next, panel == first && k == from);
    });
  }
}

// Scratch: all rows' steps, with room for whole tiles, then what they were scaled by.
constexpr int64_t kSpareRows = kWhole - 1;

template <class P>
int64_t scratch_size(int64_t rows, int64_t in_features, int) {
  if (!kConverts<P>) return 0;
  return (rows + kSpareRows) * 4 * spaced(steps_of<P>(in_features)) +
         rows * static_cast<int64_t>(sizeof(Quantised));
}

// What scratch holds.
template <class P>
struct Converted {
  using Element = std::conditional_t<kIsInt8<P>, uint8_t, uint16_t>;
  uint32_t* steps;
  int64_t stride;
  Quantised* quantised;

  explicit Converted(const LinearForward& a)
      : steps(static_cast<uint32_t*>(a.scratch)), stride(spaced(steps_of<P>(a.in_features))),
        quantised(reinterpret_cast<Quantised*>(steps + (a.rows + kSpareRows) * stride)) {}
};

template <class P>
void convert_row(const LinearForward& a, int64_t row) {
  using Element = typename Converted<P>::Element;
  const Converted<P> all(a);
  Element* to = reinterpret_cast<Element*>(all.steps + row * all.stride);
  convert(P{}, a.x + row * a.x_stride, a.in_features,
          factors<P>(a.packed, a.out_features, a.in_features), to, all.quantised + row);
  const int64_t bytes = 4 * steps_of<P>(a.in_features);
  std::memset(to + a.in_features, 0, bytes - a.in_features * sizeof(Element));
}

template <class P>
void forward(const LinearForward& a) {
  Call call = {a, reinterpret_cast<const uint32_t*>(a.x), a.x_stride, steps_of<P>(a.in_features),
               nullptr, factors<P>(a.packed, a.out_features, a.in_features)};
  if constexpr (kConverts<P>) {
    if (!a.converted) {
      const int threads = threads_for(a.rows * a.in_features / 4, a.num_threads);
      parallel_for(threads, a.rows, grain_for(a.rows, threads),
                   [&](int64_t row) { convert_row<P>(a, row); });
    }
    const Converted<P> all(a);
    call.steps = all.steps;
    call.stride = all.stride;
    call.quantised = all.quantised;
  }
  const int64_t panels = ceil_div(a.out_features, kPanel), blocks = ceil_div(a.rows, kBlockRows);
  const int threads = threads_for(a.rows * a.out_features * call.depth / 64, a.num_threads);
  // Items are pairs of a row block and a panel, row blocks outermost.
  parallel(threads, blocks * panels, grain_for(blocks * panels, threads), [&](Work& work) {
    [[maybe_unused]] const Tiles tiles{};
    for (int64_t item, end; work.take(item, end);) {
      while (item < end) {
        const int64_t block = item / panels, first = item % panels;
        const int64_t last = std::min(panels, first + end - item);
        multiply<P>(call, a.rows * block / blocks, a.rows * (block + 1) / blocks, first, last);
        item += last - first;
      }
    }
  });
}

// Where an element of W is among the packed ones.
template <class P>
int64_t place(int64_t row, int64_t k, int64_t in_features) {
  const int64_t step = row / kPanel * steps_of<P>(in_features) + k / kPerStep<P>;
  return (step * kPanel + row % kPanel) * kPerStep<P> + k % kPerStep<P>;
}

template <class P>
void pack(const LinearWeight& w, void* packed, int num_threads) {
  using Element = typename P::Element;
  const Element* from = static_cast<const Element*>(w.elements);
  Element* to = static_cast<Element*>(packed);
  float* scale = static_cast<float*>(packed) + padded(w.out_features) * steps_of<P>(w.in_features);
  parallel_for(num_threads, ceil_div(w.out_features, kPanel), 1, [&](int64_t panel) {
    const int64_t first = panel * kPanel;
    const Element* rows = from + first * w.in_features;
    Element* at = to + place<P>(first, 0, w.in_features);
    int32_t sums[kPanel] = {};
    for (int64_t step = 0; step < steps_of<P>(w.in_features); ++step) {
      for (int64_t i = 0; i < kPanel; ++i) {
        for (int64_t k = step * kPerStep<P>; k < (step + 1) * kPerStep<P>; ++k) {
          const bool inside = first + i < w.out_features && k < w.in_features;
          const Element element = inside ? rows[i * w.in_features + k] : Element{};
          *at++ = element;
          if (kIsInt8<P>) sums[i] += static_cast<int32_t>(element);
        }
      }
    }
    for (int64_t i = 0; kIsInt8<P> && i < kPanel; ++i) {
      scale[first + i] = first + i < w.out_features ? w.scale[first + i] : 0.0f;
      std::memcpy(scale + padded(w.out_features) + first + i, &sums[i], sizeof(sums[i]));
    }
  });
  if (kIsInt8<P>) {
    float* x_factor = scale + 2 * padded(w.out_features);
    *x_factor = w.x_factor ? 1.0f : 0.0f;
    for (int64_t k = 0; w.x_factor && k < w.in_features; ++k) x_factor[k + 1] = w.x_factor[k];
  }
}

template <class P>
void unpack(const void* packed, const LinearWeight& w) {
  using Element = typename P::Element;
  Element* to = static_cast<Element*>(const_cast<void*>(w.elements));
  for (int64_t row = 0; row < w.out_features; ++row) {
    for (int64_t k = 0; k < w.in_features; ++k) {
      to[row * w.in_features + k] =
          static_cast<const Element*>(packed)[place<P>(row, k, w.in_features)];
    }
  }
}

template <class P>
constexpr LinearKernels kernels_of(const char* name, bool fast) {
  void (*convert)(const LinearForward&, int64_t) = nullptr;
  if constexpr (kConverts<P>) convert = convert_row<P>;
  return {name, fast, packed_size<P>, scratch_size<P>, pack<P>, unpack<P>, convert, forward<P>};
}

}  // namespace

#ifdef BERT_FAST_AMX
const LinearKernels& linear(Precision precision) {
  static const LinearKernels bfloat16 = kernels_of<BFloat16Tiles>("amx_bf16", true);
  static const LinearKernels int8 = kernels_of<Int8Tiles>("amx_int8", true);
  return precision == Precision::kInt8 ? int8 : bfloat16;
}

#else
const LinearKernels& linear_base(Precision precision) {
  constexpr const char* kIsa = k512 ? "avx512" : kWidth == 8 ? "avx2" : "generic";
  static const LinearKernels kernels[] = {kernels_of<Float32>(kIsa, true),
                                              kernels_of<BFloat16>(kIsa, false),
                                              kernels_of<Int8>(kIsa, false)};
  return kernels[static_cast<int>(precision)];
}

const LinearKernels& linear(Precision precision) {
#if defined(__AVX512F__)
  static const LinearKernels bfloat16 = kernels_of<BFloat16Dot>("avx512_bf16", true);
  static const LinearKernels int8 = kernels_of<Int8Dot>("avx512_vnni", true);
  if (precision == Precision::kBFloat16 && has_avx512_bf16()) return bfloat16;
  if (precision == Precision::kInt8 && has_avx512_vnni()) return int8;
#elif defined(BERT_FAST_AVX_VNNI)
  static const LinearKernels int8 = kernels_of<Int8Dot>("avx_vnni", true);
  if (precision == Precision::kInt8 && has_avx_vnni()) return int8;
#endif
  return linear_base(precision);
}
#endif

}  // namespace BERT_FAST_ISA
}  // namespace bert_fast
