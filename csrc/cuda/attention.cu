// Attention's entry points on CUDA, delta, and the kernels in plain FMA: float32, and what the chip
// has no tensor-core instruction for. Derivation of the gradient: kernels/attention.py.
#include <type_traits>

#include "attention.h"

namespace bert_fast {
namespace cuda {
namespace {

constexpr int kSide = 16, kThreads = kSide * kSide;  // a tile has 16 rows, a thread one pair
constexpr int kMostColumns = 256 / kSide;            // of head_dim, a thread
constexpr int kProducts = kSide * (kSide + 1);

// The tiles of a CTA in shared memory, in float, rows padded against bank conflicts.
struct Tiles {
  int stride;
  __device__ float* operator()(int i) const {
    return reinterpret_cast<float*>(shared_memory()) + i * kSide * stride;
  }
};

size_t shared_bytes(int head_dim, int tiles, int products) {
  return (tiles * kSide * (head_dim | 1) + products * kProducts) * sizeof(float);
}

template <class T>
__device__ void load_tile(float* to, int stride, const Strided& t, int begin, int first, int length,
                          int head, int head_dim, const float* bias) {
  for (int i = threadIdx.x; i < kSide * head_dim; i += kThreads) {
    const int row = i / head_dim, d = i % head_dim;
    float value = 0.0f;
    if (first + row < length) {
      value = to_float(row_of<T>(t, static_cast<int64_t>(begin) + first + row, head)[d]);
      if (bias) value += bias[head * head_dim + d];
    }
    to[row * stride + d] = value;
  }
}

// In two sums: a single one waits for itself, and errs more the longer it gets.
__device__ __forceinline__ float dot(const float* a, const float* b, int n) {
  constexpr int kSums = 2;
  float sums[kSums] = {};
  int d = 0;
  for (; d + kSums <= n; d += kSums) {
#pragma unroll
    for (int j = 0; j < kSums; ++j) sums[j] += a[d + j] * b[d + j];
  }
  for (; d < n; ++d) sums[0] += a[d] * b[d];
#pragma unroll
  for (int half = kSums / 2; half; half /= 2) {
#pragma unroll
    for (int j = 0; j < half; ++j) sums[j] += sums[j + half];
  }
  return sums[0];
}

__device__ __forceinline__ float row_max(float x) {
  for (int mask = kSide / 2; mask; mask /= 2) x = fmaxf(x, shuffle_xor(x, mask));
  return x;
}
__device__ __forceinline__ float side_sum(float x) {
  for (int mask = kSide / 2; mask; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}

__device__ __forceinline__ float factor(const Dropout& drop, int row, int column, int head,
                                        int sequence) {
  if (!drop.seed) return 1.0f;
  const Words words = philox(*drop.seed, draw_of(column), row, head, sequence);
  return is_kept(word_of(words, column), column >> 4 & 1, drop) ? drop.scale : 0.0f;
}

// total[j] += sum over i of weights[i] tile[i][c + 16 j]
__device__ __forceinline__ void accumulate(float (&total)[kMostColumns], const float* weights,
                                           const float* tile, int stride, int c, int head_dim) {
#pragma unroll
  for (int j = 0; j < kMostColumns; ++j) {
    const int d = c + kSide * j;
    if (d >= head_dim) break;
    for (int i = 0; i < kSide; ++i) total[j] += weights[i] * tile[i * stride + d];
  }
}

template <class T>
__device__ __forceinline__ void store_row(const Strided& t, int64_t row, int head, int c, int head_dim,
                                          const float (&total)[kMostColumns], float scale) {
#pragma unroll
  for (int j = 0; j < kMostColumns; ++j) {
    const int d = c + kSide * j;
    if (d < head_dim) row_of<T>(t, row, head)[d] = from_float<T>(total[j] * scale);
  }
}

// Grid of every kernel here: (tiles of rows, heads). Thread (r, c) has row r, and column c of pairs.
template <class T, class... Bias>
__global__ void __launch_bounds__(kThreads) forward_kernel(AttentionForward a, Dropout drop,
                                                           Bias... table) {
  const int batch = static_cast<int>(a.batch), head_dim = static_cast<int>(a.head_dim);
  const Tile tile = find_tile(blockIdx.x, a.cu_q, batch, static_cast<int>(a.total_q), kSide);
  if (tile.first >= tile.length) return;
  int k_begin;
  const int k_length = span(a.cu_k, batch, tile.sequence, k_begin), head = blockIdx.y;
  const Tiles tiles = {head_dim | 1};
  float *q = tiles(0), *k = tiles(1), *v = tiles(2), *products = tiles(3);
  const int r = threadIdx.x / kSide, c = threadIdx.x % kSide, row = tile.first + r;
  const int part = static_cast<int>(a.num_heads) * head_dim;  // of the bias
  load_tile<T>(q, tiles.stride, a.q, tile.begin, tile.first, tile.length, head, head_dim, a.bias);
  float top = -INFINITY, norm = 0.0f, total[kMostColumns] = {};
  int last = k_length;
  if (a.causal) last = min(last, tile.first + kSide + k_length - tile.length);
  for (int first = 0; first < last; first += kSide) {
    barrier();
    load_tile<T>(k, tiles.stride, a.k, k_begin, first, k_length, head, head_dim,
                 a.bias ? a.bias + part : nullptr);
    load_tile<T>(v, tiles.stride, a.v, k_begin, first, k_length, head, head_dim,
                 a.bias ? a.bias + 2 * part : nullptr);
    barrier();
    float score = dot(q + r * tiles.stride, k + c * tiles.stride, head_dim) * a.scale * kLog2e;
    if (!scored(score, row, first + c, tile.length, k_length, a.causal, head, table...)) {
      score = -INFINITY;
    }
    const float new_top = fmaxf(top, row_max(score));
    const float finite = new_top == -INFINITY ? 0.0f : new_top;
    const float shrink = exp2_fast(top - finite), weight = exp2_fast(score - finite);
    top = new_top;
    norm = norm * shrink + side_sum(weight);
    products[r * (kSide + 1) + c] = weight * factor(drop, row, first + c, head, tile.sequence);
    barrier();
#pragma unroll
    for (int j = 0; j < kMostColumns; ++j) total[j] *= shrink;
    accumulate(total, products + r * (kSide + 1), v, tiles.stride, c, head_dim);
  }
  if (row >= tile.length) return;
  const int64_t at = static_cast<int64_t>(tile.begin) + row;
  store_row<T>(a.out, at, head, c, head_dim, total, norm > 0 ? 1.0f / norm : 0.0f);
  if (c == 0) a.lse[head * a.total_q + at] = norm > 0 ? (top + log2f(norm)) * kLn2 : -INFINITY;
}

// delta = rowsum(dO * O), a warp a row. Grid: (blocks of rows, heads).
template <class T>
__global__ void __launch_bounds__(kThreads) delta_kernel(AttentionBackward a, float* delta) {
  const int64_t row =
      static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  if (row >= a.total_q) return;
  const int head = blockIdx.y;
  float sum = 0.0f;
  for (int d = threadIdx.x % kWarp; d < a.head_dim; d += kWarp) {
    sum += to_float(row_of<T>(a.dout, row, head)[d]) * to_float(row_of<T>(a.out, row, head)[d]);
  }
  sum = warp_sum(sum);
  if (threadIdx.x % kWarp == 0) delta[head * a.total_q + row] = sum;
}

// The 1 as for dkv_kernel: left alone, nvcc 13 spills on 8.9.
template <class T, class... Bias>
__global__ void __launch_bounds__(kThreads, 1) dq_kernel(AttentionBackward a, Dropout drop,
                                                                    const float* delta, Bias... table) {
  const int batch = static_cast<int>(a.batch), head_dim = static_cast<int>(a.head_dim);
  const Tile tile = find_tile(blockIdx.x, a.cu_q, batch, static_cast<int>(a.total_q), kSide);
  if (tile.first >= tile.length) return;
  int k_begin;
  const int k_length = span(a.cu_k, batch, tile.sequence, k_begin), head = blockIdx.y;
  const Tiles tiles = {head_dim | 1};
  float *q = tiles(0), *dout = tiles(1), *k = tiles(2), *v = tiles(3), *products = tiles(4);
  const int r = threadIdx.x / kSide, c = threadIdx.x % kSide, row = tile.first + r;
  const int part = static_cast<int>(a.num_heads) * head_dim;
  load_tile<T>(q, tiles.stride, a.q, tile.begin, tile.first, tile.length, head, head_dim, a.bias);
  load_tile<T>(dout, tiles.stride, a.dout, tile.begin, tile.first, tile.length, head, head_dim, nullptr);
  const int64_t at = static_cast<int64_t>(tile.begin) + row;
  const float log = row < tile.length ? log2_of(a.lse[head * a.total_q + at]) : INFINITY;
  const float center = row < tile.length ? delta[head * a.total_q + at] : 0.0f;
  float total[kMostColumns] = {};
  int last = k_length;
  if (a.causal) last = min(last, tile.first + kSide + k_length - tile.length);
  for (int first = 0; first < last; first += kSide) {
    barrier();
    load_tile<T>(k, tiles.stride, a.k, k_begin, first, k_length, head, head_dim,
                 a.bias ? a.bias + part : nullptr);
    load_tile<T>(v, tiles.stride, a.v, k_begin, first, k_length, head, head_dim,
                 a.bias ? a.bias + 2 * part : nullptr);
    barrier();
    float score = dot(q + r * tiles.stride, k + c * tiles.stride, head_dim) * a.scale * kLog2e;
    float dscore = 0.0f;
    if (scored(score, row, first + c, tile.length, k_length, a.causal, head, table...)) {
      const float dweight = dot(dout + r * tiles.stride, v + c * tiles.stride, head_dim) *
                            factor(drop, row, first + c, head, tile.sequence);
      dscore = exp2_fast(score - log) * (dweight - center);
    }
    products[r * (kSide + 1) + c] = dscore;
    barrier();
    accumulate(total, products + r * (kSide + 1), k, tiles.stride, c, head_dim);
  }
  if (row < tile.length) store_row<T>(a.dq, at, head, c, head_dim, total, a.scale);
}

// The 1: without it nvcc 13 halves the registers on 12.0, and spills.
template <class T, class... Bias>
__global__ void __launch_bounds__(kThreads, 1) dkv_kernel(AttentionBackward a, Dropout drop,
                                                       const float* delta, Bias... table) {
  const int batch = static_cast<int>(a.batch), head_dim = static_cast<int>(a.head_dim);
  const Tile tile = find_tile(blockIdx.x, a.cu_k, batch, static_cast<int>(a.total_k), kSide);
  if (tile.first >= tile.length) return;
  int q_begin;
  const int q_length = span(a.cu_q, batch, tile.sequence, q_begin), head = blockIdx.y;
  const Tiles tiles = {head_dim | 1};
  float *k = tiles(0), *v = tiles(1), *q = tiles(2), *dout = tiles(3);
  float *weights = tiles(4), *dscores = weights + kProducts;
  const int r = threadIdx.x / kSide, c = threadIdx.x % kSide, column = tile.first + r;
  const int part = static_cast<int>(a.num_heads) * head_dim;
  load_tile<T>(k, tiles.stride, a.k, tile.begin, tile.first, tile.length, head, head_dim,
               a.bias ? a.bias + part : nullptr);
  load_tile<T>(v, tiles.stride, a.v, tile.begin, tile.first, tile.length, head, head_dim,
               a.bias ? a.bias + 2 * part : nullptr);
  float dk[kMostColumns] = {}, dv[kMostColumns] = {};
  // Causal: from the first query that sees the tile's first key.
  const int start = a.causal ? max(0, tile.first - (tile.length - q_length)) / kSide * kSide : 0;
  for (int first = start; first < q_length; first += kSide) {
    barrier();
    load_tile<T>(q, tiles.stride, a.q, q_begin, first, q_length, head, head_dim, a.bias);
    load_tile<T>(dout, tiles.stride, a.dout, q_begin, first, q_length, head, head_dim, nullptr);
    barrier();
    const int row = first + c;
    float weight = 0.0f, dscore = 0.0f;
    float score = dot(k + r * tiles.stride, q + c * tiles.stride, head_dim) * a.scale * kLog2e;
    if (scored(score, row, column, q_length, tile.length, a.causal, head, table...)) {
      const int64_t at = head * a.total_q + q_begin + row;
      const float keep = factor(drop, row, column, head, tile.sequence);
      weight = exp2_fast(score - log2_of(a.lse[at]));
      dscore = weight * (dot(v + r * tiles.stride, dout + c * tiles.stride, head_dim) * keep - delta[at]);
      weight *= keep;
    }
    weights[r * (kSide + 1) + c] = weight;
    dscores[r * (kSide + 1) + c] = dscore;
    barrier();
    accumulate(dv, weights + r * (kSide + 1), dout, tiles.stride, c, head_dim);
    accumulate(dk, dscores + r * (kSide + 1), q, tiles.stride, c, head_dim);
  }
  if (column >= tile.length) return;
  const int64_t at = static_cast<int64_t>(tile.begin) + column;
  store_row<T>(a.dk, at, head, c, head_dim, dk, a.scale);
  store_row<T>(a.dv, at, head, c, head_dim, dv, 1.0f);
}

// The table's gradient, of every dtype: a CTA owns a tile of it and goes through the sequences, so
// that nothing is added atomically. Grid: (tiles of a table, heads).
template <class T>
__global__ void __launch_bounds__(kThreads, 1) dtable_kernel(AttentionBackward a, Dropout drop,
                                                          const float* delta, Table table,
                                                          float* dtable) {
  const int head_dim = static_cast<int>(a.head_dim), head = blockIdx.y;
  const int across = static_cast<int>((table.columns + kSide - 1) / kSide);
  const int first_row = blockIdx.x / across * kSide, first_column = blockIdx.x % across * kSide;
  const Tiles tiles = {head_dim | 1};
  float *q = tiles(0), *dout = tiles(1), *k = tiles(2), *v = tiles(3);
  const int r = threadIdx.x / kSide, c = threadIdx.x % kSide;
  const int row = first_row + r, column = first_column + c;
  const int part = static_cast<int>(a.num_heads) * head_dim;
  float total = 0.0f;
  for (int sequence = 0; sequence < a.batch; ++sequence) {
    const int q_begin = a.cu_q[sequence], q_length = a.cu_q[sequence + 1] - q_begin;
    const int k_begin = a.cu_k[sequence], k_length = a.cu_k[sequence + 1] - k_begin;
    if (!seen(first_row, first_column, q_length, k_length, false)) continue;
    if (a.causal && first_column >= first_row + kSide + k_length - q_length) continue;
    barrier();
    load_tile<T>(q, tiles.stride, a.q, q_begin, first_row, q_length, head, head_dim, a.bias);
    load_tile<T>(dout, tiles.stride, a.dout, q_begin, first_row, q_length, head, head_dim, nullptr);
    load_tile<T>(k, tiles.stride, a.k, k_begin, first_column, k_length, head, head_dim,
                 a.bias ? a.bias + part : nullptr);
    load_tile<T>(v, tiles.stride, a.v, k_begin, first_column, k_length, head, head_dim,
                 a.bias ? a.bias + 2 * part : nullptr);
    barrier();
    float score = dot(q + r * tiles.stride, k + c * tiles.stride, head_dim) * a.scale * kLog2e;
    if (scored(score, row, column, q_length, k_length, a.causal, head, table)) {
      const int64_t at = head * a.total_q + q_begin + row;
      const float dweight = dot(dout + r * tiles.stride, v + c * tiles.stride, head_dim) *
                            factor(drop, row, column, head, sequence);
      total += exp2_fast(score - log2_of(a.lse[at])) * (dweight - delta[at]);
    }
  }
  if (row < table.rows && column < table.columns) {
    dtable[(head * table.rows + row) * table.columns + column] = total;
  }
}

// What CUDA would say of such a launch; every chip has tensor cores for fp16, so without a table there
// is no other.
constexpr const char* kTooWide = "this head_dim needs more shared memory than the chip has";

template <class T>
const char* attend(const AttentionForward& a, const Dropout& drop, const Call& call) {
  if (!a.total_q) return nullptr;
  if constexpr (sizeof(T) == 2) {
    if (forward_mma<T>(a, drop, call)) return nullptr;
  }
  return with_table(call.table, [&](auto... table) -> const char* {
    if constexpr (std::is_same_v<T, fp16> && !sizeof...(table)) {
      return kTooWide;
    } else {
      void (*kernel)(AttentionForward, Dropout, decltype(table)...) = forward_kernel<T>;
      launch(kernel, tiles_of(a.total_q, kSide, a), kThreads,
             shared_bytes(static_cast<int>(a.head_dim), 3, 1), call.stream, a, drop, table...);
      return nullptr;
    }
  });
}

template <class T>
void find_dtable(const AttentionBackward& a, const Dropout& drop, const Call& call) {
  const int64_t down = (call.table.rows + kSide - 1) / kSide;
  const int64_t tiles = down * ((call.table.columns + kSide - 1) / kSide);
  if (!tiles || !a.num_heads) return;
  const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(a.num_heads));
  launch(dtable_kernel<T>, grid, kThreads, shared_bytes(static_cast<int>(a.head_dim), 4, 0),
         call.stream, a, drop, call.scratch, call.table, call.dtable);
}

template <class T>
const char* attend(const AttentionBackward& a, const Dropout& drop, const Call& call) {
  if constexpr (sizeof(T) == 2) {
    if (a.total_q) backward_rows<T>(a, drop, call);
  } else if (a.total_q) {
    const int64_t rows = kThreads / kWarp;
    launch(delta_kernel<T>, dim3(static_cast<unsigned>((a.total_q + rows - 1) / rows),
                                 static_cast<unsigned>(a.num_heads)),
           kThreads, 0, call.stream, a, call.scratch);
  }
  if (call.dtable) find_dtable<T>(a, drop, call);
  if constexpr (sizeof(T) == 2) {
    if (backward_mma<T>(a, drop, call)) return nullptr;
  }
  return with_table(call.table, [&](auto... table) -> const char* {
    if constexpr (std::is_same_v<T, fp16> && !sizeof...(table)) {
      return kTooWide;
    } else {
      const float* delta = call.scratch;
      const size_t tiles = shared_bytes(static_cast<int>(a.head_dim), 4, 2);
      void (*dq)(AttentionBackward, Dropout, const float*, decltype(table)...) = dq_kernel<T>;
      void (*dkv)(AttentionBackward, Dropout, const float*, decltype(table)...) = dkv_kernel<T>;
      const auto run = [&](auto kernel, int64_t total) {
        if (!total) return;
        launch(kernel, tiles_of(total, kSide, a), kThreads, tiles, call.stream, a, drop, delta, table...);
      };
      run(dq, a.total_q);
      run(dkv, a.total_k);
      return nullptr;
    }
  });
}

template <class Args>
const char* run(const Args& a, const Call& call) {
  OnDevice on(call.device);
  const char* refused = nullptr;
  if (on.error == cudaSuccess && a.num_heads) {
    const Dropout drop = dropout_of(a.dropout_p, call);
    refused = by_dtype(a.dtype, [&](auto element) { return attend<decltype(element)>(a, drop, call); });
  }
  return refused ? refused : on.message();
}

}  // namespace

const char* attention_forward(const AttentionForward& a, const Call& call) { return run(a, call); }
const char* attention_backward(const AttentionBackward& a, const Call& call) { return run(a, call); }
int64_t attention_scratch(const AttentionShape& a, const Call& call) {
  return a.dtype == DType::kFloat32 ? a.num_heads * a.total_q : scratch_mma(a, call);
}

}  // namespace cuda
}  // namespace bert_fast
