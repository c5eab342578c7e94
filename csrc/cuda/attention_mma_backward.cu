// Attention on tensor cores, forward and backward, bf16 and fp16: mma.sync m16n8k16 (Turing: two
// m16n8k8). A CTA of four warps owns 64 rows, each warp 16 of them: queries in forward and for dq,
// keys for dk and dv, so that nothing is added atomically. The other side comes through shared
// memory by tiles (cp.async; swizzled, so that ldmatrix meets no bank conflict). Scores stay in
// registers: the accumulators of one product have the layout of the next one's left operand.
#include <type_traits>

#include "attention.h"

namespace bert_fast {
namespace cuda {
namespace {

constexpr int kWarps = 4, kThreads = kWarps * kWarp, kRows = 16 * kWarps;

// Rows of kD elements in shared memory; chunks of 8 are swizzled by row.
template <class T, int kD>
struct Matrix {
  T* data;
  __device__ __forceinline__ T* chunk(int row, int c) const {
    const int twist = kD >= 64 ? row % 8 : row / 2 % 4;
    return data + row * kD + (c ^ twist) * 8;
  }
};

// Which tensors can be moved by 16 bytes.
enum Wide { kQ = 1, kK = 2, kV = 4, kDout = 8, kOut = 16, kDq = 32, kDk = 64, kDv = 128 };

struct Side {  // rows of one tensor, of one sequence and head
  Strided tensor;
  int begin, length, head, head_dim;
  bool wide;
};

// Who loads a tile together and waits for each other: a CTA, or a warp on its own.
template <int kTeam>
__device__ __forceinline__ void team_barrier() {
  if constexpr (kTeam == kWarp) warp_barrier();
  else barrier();
}

template <int kTeam>
__device__ __forceinline__ unsigned team_thread() {
  return kTeam == kThreads ? threadIdx.x : threadIdx.x % kTeam;
}

// Rows `first` on into shared memory; zeros outside. To be waited for, then `add_bias`.
template <class T, int kD, int kCount, int kTeam = kThreads>
__device__ __forceinline__ void load_rows(const Matrix<T, kD>& to, const Side& s, int first) {
  constexpr int kChunks = kD / 8;
#pragma unroll 4
  for (int i = team_thread<kTeam>(); i < kCount * kChunks; i += kTeam) {
    const int row = i / kChunks, c = i % kChunks, d = c * 8;
    const bool inside = first + row < s.length && d < s.head_dim;
    const T* from = row_of<T>(s.tensor, static_cast<int64_t>(s.begin) + (inside ? first + row : 0), s.head);
    if (s.wide) {
      copy_async_16(to.chunk(row, c), from + (inside ? d : 0), inside);
    } else {
      Pack<T, 8> pack;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        pack.values[j] = inside && d + j < s.head_dim ? from[d + j] : from_float<T>(0.0f);
      }
      store(to.chunk(row, c), pack);
    }
  }
}

// Adds the projection's bias to the chunks that this thread has loaded.
template <class T, int kD, int kCount, int kTeam = kThreads>
__device__ __forceinline__ void add_bias(const Matrix<T, kD>& m, const Side& s, int first,
                                         const float* bias) {
  if (!bias) return;
  bias += s.head * s.head_dim;
  constexpr int kChunks = kD / 8;
  for (int i = team_thread<kTeam>(); i < kCount * kChunks; i += kTeam) {
    const int row = i / kChunks, c = i % kChunks;
    if (first + row >= s.length) continue;
    Pack<T, 8> pack = load<Pack<T, 8>>(m.chunk(row, c));
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const int d = c * 8 + j;
      if (d < s.head_dim) pack.values[j] = from_float<T>(to_float(pack.values[j]) + bias[d]);
    }
    store(m.chunk(row, c), pack);
  }
}

// acc (16 x 8 kTiles) = rows of `left` from `row` on times the rows of `right`: left right^T.
template <class T, int kD, int kTiles>
__device__ __forceinline__ void multiply_rows(float (&acc)[kTiles][4], const Matrix<T, kD>& left,
                                              int row, const Matrix<T, kD>& right) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) acc[n][i] = 0.0f;
  }
#pragma unroll
  for (int k = 0; k < kD / 16; ++k) {
    uint32_t a[4];
    load_matrices<false>(a, left.chunk(row + lane % 16, 2 * k + lane / 16));
#pragma unroll
    for (int n = 0; n < kTiles; n += 2) {
      uint32_t b[4];
      load_matrices<false>(b, right.chunk(n * 8 + lane % 8 + lane / 16 * 8, 2 * k + lane / 8 % 2));
      mma<T>(acc[n], a, b[0], b[1]);
      mma<T>(acc[n + 1], a, b[2], b[3]);
    }
  }
}

// acc (16 x kD) += weights (16 x 8 kTiles, accumulators of a product) times the rows of `right`.
template <class T, int kD, int kTiles>
__device__ __forceinline__ void multiply_weights(float (&acc)[kD / 8][4],
                                                 const float (&weights)[kTiles][4],
                                                 const Matrix<T, kD>& right) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int k = 0; k < kTiles / 2; ++k) {
    const float(&low)[4] = weights[2 * k], (&high)[4] = weights[2 * k + 1];
    const uint32_t a[4] = {pack_pair<T>(low[0], low[1]), pack_pair<T>(low[2], low[3]),
                           pack_pair<T>(high[0], high[1]), pack_pair<T>(high[2], high[3])};
#pragma unroll
    for (int n = 0; n < kD / 8; n += 2) {
      uint32_t b[4];
      load_matrices<true>(b, right.chunk(k * 16 + lane % 16, n + lane / 16));
      mma<T>(acc[n], a, b[0], b[1]);
      mma<T>(acc[n + 1], a, b[2], b[3]);
    }
  }
}

// A warp's 16 rows of accumulators to memory, by way of its own rows of shared memory, which nobody
// may still be reading.
template <class T, int kD>
__device__ __forceinline__ void store_rows(const float (&acc)[kD / 8][4], float scale0, float scale1,
                                           const Matrix<T, kD>& m, int row, const Side& s, int first) {
  const int lane = threadIdx.x % kWarp, group = lane / 4, pair = lane % 4 * 2;
#pragma unroll
  for (int n = 0; n < kD / 8; ++n) {
    const uint32_t top = pack_pair<T>(acc[n][0] * scale0, acc[n][1] * scale0);
    const uint32_t bottom = pack_pair<T>(acc[n][2] * scale1, acc[n][3] * scale1);
    store(m.chunk(row + group, n) + pair, top);
    store(m.chunk(row + group + 8, n) + pair, bottom);
  }
  warp_barrier();
  for (int i = lane; i < 16 * (kD / 8); i += kWarp) {
    const int r = row + i / (kD / 8), c = i % (kD / 8), d = c * 8;
    if (first + r >= s.length || d >= s.head_dim) continue;
    T* to = row_of<T>(s.tensor, static_cast<int64_t>(s.begin) + first + r, s.head) + d;
    const Pack<T, 8> pack = load<Pack<T, 8>>(m.chunk(r, c));
    if (s.wide) {
      store_16(to, &pack);
    } else {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        if (d + j < s.head_dim) to[j] = pack.values[j];
      }
    }
  }
}

// Dropout's factors of an accumulator tile whose rows are queries. Lanes share their draws: of two
// neighbours one draws for the upper rows, the other for the lower, four keys each.
__device__ __forceinline__ void factors_by_query(float (&keep)[4], const Dropout& drop, int row,
                                                 int column, int head, int sequence) {
  const int lane = threadIdx.x % kWarp, odd = lane % 2;
  const int mine = row + lane / 4 + 8 * odd, group = (column + lane % 4 / 2 * 4) / 4;
  const Words w = philox(*drop.seed, group, mine, head, sequence);
  // Even lanes keep words 0, 1 of the upper row and get those of the lower; odd lanes 2 and 3.
  const uint32_t other0 = shuffle_xor(odd ? w.w[0] : w.w[2], 1);
  const uint32_t other1 = shuffle_xor(odd ? w.w[1] : w.w[3], 1);
  const uint32_t words[4] = {odd ? other0 : w.w[0], odd ? other1 : w.w[1],
                             odd ? w.w[2] : other0, odd ? w.w[3] : other1};
#pragma unroll
  for (int i = 0; i < 4; ++i) keep[i] = words[i] >= drop.cut ? drop.scale : 0.0f;
}

// The same where rows are keys and columns queries: the four lanes whose keys share a draw make one
// each, of the tile's four (two queries, keys above and below), and transpose them.
__device__ __forceinline__ void factors_by_key(float (&keep)[4], const Dropout& drop, int key,
                                               int query, int head, int sequence) {
  const int lane = threadIdx.x % kWarp, j = lane / 4 % 4;
  const int mine = query + lane % 4 * 2 + j % 2, group = (key + lane / 16 * 4 + j / 2 * 8) / 4;
  Words w = philox(*drop.seed, group, mine, head, sequence);
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2) {  // swaps word i of lane j with word j of lane i
    const bool upper = j & bit;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & bit) continue;
      const uint32_t got = shuffle_xor(upper ? w.w[i] : w.w[i + bit], 4 * bit);
      if (upper) w.w[i] = got;
      else w.w[i + bit] = got;
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) keep[i] = w.w[i] >= drop.cut ? drop.scale : 0.0f;
}

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, shuffle_xor(x, 1));
  return fmaxf(x, shuffle_xor(x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
  x += shuffle_xor(x, 1);
  return x + shuffle_xor(x, 2);
}

// Rows of a tile of the other side, in backward: what the registers allow, of which a table (kBiased)
// takes some.
template <int kD, bool kBiased>
constexpr int kOther = kD <= 64 && !kBiased ? 64 : kD <= 128 ? 32 : 16;

template <class T, int kD, class... Bias>
__global__ void __launch_bounds__(kThreads, 2) dq_kernel(AttentionBackward a, Dropout drop,
                                                      const float* delta, int wide, Bias... table) {
  constexpr int kKeys = kOther<kD, (sizeof...(Bias) > 0)>, kTiles = kKeys / 8;
  const int batch = static_cast<int>(a.batch), head = blockIdx.y;
  const Tile tile = find_tile(blockIdx.x, a.cu_q, batch, static_cast<int>(a.total_q), kRows);
  if (tile.first >= tile.length) return;
  int k_begin;
  const int k_length = span(a.cu_k, batch, tile.sequence, k_begin);
  const int head_dim = static_cast<int>(a.head_dim), part = static_cast<int>(a.num_heads) * head_dim;
  const Side qs = {a.q, tile.begin, tile.length, head, head_dim, (wide & kQ) != 0};
  const Side ds = {a.dout, tile.begin, tile.length, head, head_dim, (wide & kDout) != 0};
  const Side ks = {a.k, k_begin, k_length, head, head_dim, (wide & kK) != 0};
  const Side vs = {a.v, k_begin, k_length, head, head_dim, (wide & kV) != 0};
  T* shared = reinterpret_cast<T*>(shared_memory());
  const Matrix<T, kD> q = {shared}, dout = {q.data + kRows * kD}, k = {dout.data + kRows * kD},
                      v = {k.data + kKeys * kD};
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int local = warp * 16, row = tile.first + local + lane / 4;
  float log[2], center[2], total[kD / 8][4] = {};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const bool inside = row + 8 * i < tile.length;
    const int64_t at = head * a.total_q + tile.begin + row + 8 * i;
    log[i] = inside ? log2_of(a.lse[at]) : 0.0f;
    center[i] = inside ? delta[at] : 0.0f;
  }
  int last = k_length;
  if (a.causal) last = min(last, tile.first + kRows + k_length - tile.length);
  load_rows<T, kD, kRows>(q, qs, tile.first);
  load_rows<T, kD, kRows>(dout, ds, tile.first);
  copy_async_commit();
  for (int first = 0; first < last; first += kKeys) {
    load_rows<T, kD, kKeys>(k, ks, first);
    load_rows<T, kD, kKeys>(v, vs, first);
    copy_async_commit();
    copy_async_wait<0>();
    if (first == 0) add_bias<T, kD, kRows>(q, qs, tile.first, a.bias);
    add_bias<T, kD, kKeys>(k, ks, first, a.bias ? a.bias + part : nullptr);
    add_bias<T, kD, kKeys>(v, vs, first, a.bias ? a.bias + 2 * part : nullptr);
    barrier();
    float scores[kTiles][4], dscores[kTiles][4];
    multiply_rows<T, kD, kTiles>(scores, q, local, k);
    multiply_rows<T, kD, kTiles>(dscores, dout, local, v);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      float keep[4] = {1.0f, 1.0f, 1.0f, 1.0f};
      if (drop.seed) factors_by_query(keep, drop, tile.first + local, first + n * 8, head, tile.sequence);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int column = first + n * 8 + lane % 4 * 2 + i % 2;
        float score = scores[n][i] * (a.scale * kLog2e);
        const bool counts =
            scored(score, row + i / 2 * 8, column, tile.length, k_length, a.causal, head, table...);
        const float weight = exp2_fast(score - log[i / 2]);
        dscores[n][i] = counts ? weight * (dscores[n][i] * keep[i] - center[i / 2]) : 0.0f;
      }
    }
    multiply_weights<T, kD, kTiles>(total, dscores, k);
    barrier();
  }
  if (last <= 0) {
    copy_async_wait<0>();
    barrier();
  }
  const Side os = {a.dq, tile.begin, tile.length, head, head_dim, (wide & kDq) != 0};
  store_rows<T, kD>(total, a.scale, a.scale, q, local, os, tile.first);
}

// dk and dv of a tile of keys; for wide heads one of them a launch, which the registers allow.
template <class T, int kD, bool kWantsDk, bool kWantsDv, class... Bias>
__global__ void __launch_bounds__(kThreads, 2) dkv_kernel(AttentionBackward a, Dropout drop,
                                                       const float* delta, int wide, Bias... table) {
  constexpr int kQueries = kOther<kD, (sizeof...(Bias) > 0)>, kTiles = kQueries / 8;
  const int batch = static_cast<int>(a.batch), head = blockIdx.y;
  const Tile tile = find_tile(blockIdx.x, a.cu_k, batch, static_cast<int>(a.total_k), kRows);
  if (tile.first >= tile.length) return;
  int q_begin;
  const int q_length = span(a.cu_q, batch, tile.sequence, q_begin);
  const int head_dim = static_cast<int>(a.head_dim), part = static_cast<int>(a.num_heads) * head_dim;
  const Side ks = {a.k, tile.begin, tile.length, head, head_dim, (wide & kK) != 0};
  const Side vs = {a.v, tile.begin, tile.length, head, head_dim, (wide & kV) != 0};
  const Side qs = {a.q, q_begin, q_length, head, head_dim, (wide & kQ) != 0};
  const Side ds = {a.dout, q_begin, q_length, head, head_dim, (wide & kDout) != 0};
  T* shared = reinterpret_cast<T*>(shared_memory());
  const Matrix<T, kD> k = {shared}, v = {k.data + kRows * kD}, q = {v.data + kRows * kD},
                      dout = {q.data + kQueries * kD};
  float* logs = reinterpret_cast<float*>(dout.data + kQueries * kD);  // then the deltas
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int local = warp * 16, column = tile.first + local + lane / 4;  // the keys
  float dk[kWantsDk ? kD / 8 : 1][4] = {}, dv[kWantsDv ? kD / 8 : 1][4] = {};
  load_rows<T, kD, kRows>(k, ks, tile.first);
  load_rows<T, kD, kRows>(v, vs, tile.first);
  copy_async_commit();
  const int start = a.causal ? max(0, tile.first - (tile.length - q_length)) / kQueries * kQueries : 0;
  for (int first = start; first < q_length; first += kQueries) {
    load_rows<T, kD, kQueries>(q, qs, first);
    load_rows<T, kD, kQueries>(dout, ds, first);
    copy_async_commit();
    for (int i = threadIdx.x; i < kQueries; i += kThreads) {
      const bool inside = first + i < q_length;
      const int64_t at = head * a.total_q + q_begin + first + i;
      logs[i] = inside ? log2_of(a.lse[at]) : 0.0f;
      logs[kQueries + i] = inside ? delta[at] : 0.0f;
    }
    copy_async_wait<0>();
    if (first == start) {
      add_bias<T, kD, kRows>(k, ks, tile.first, a.bias ? a.bias + part : nullptr);
      add_bias<T, kD, kRows>(v, vs, tile.first, a.bias ? a.bias + 2 * part : nullptr);
    }
    add_bias<T, kD, kQueries>(q, qs, first, a.bias);
    barrier();
    float scores[kTiles][4], dscores[kTiles][4];
    multiply_rows<T, kD, kTiles>(scores, k, local, q);
    if (kWantsDk) multiply_rows<T, kD, kTiles>(dscores, v, local, dout);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      float keep[4] = {1.0f, 1.0f, 1.0f, 1.0f};
      if (drop.seed) factors_by_key(keep, drop, tile.first + local, first + n * 8, head, tile.sequence);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int query = n * 8 + lane % 4 * 2 + i % 2;
        float score = scores[n][i] * (a.scale * kLog2e);
        const bool counts = scored(score, first + query, column + i / 2 * 8, q_length, tile.length,
                                   a.causal, head, table...);
        const float weight = counts ? exp2_fast(score - logs[query]) : 0.0f;
        if (kWantsDk) {
          dscores[n][i] = counts ? weight * (dscores[n][i] * keep[i] - logs[kQueries + query]) : 0.0f;
        }
        scores[n][i] = weight * keep[i];
      }
    }
    if constexpr (kWantsDv) multiply_weights<T, kD, kTiles>(dv, scores, dout);
    if constexpr (kWantsDk) multiply_weights<T, kD, kTiles>(dk, dscores, q);
    barrier();
  }
  if (start >= q_length) {
    copy_async_wait<0>();
    barrier();
  }
  if constexpr (kWantsDk) {
    const Side os = {a.dk, tile.begin, tile.length, head, head_dim, (wide & kDk) != 0};
    store_rows<T, kD>(dk, a.scale, a.scale, k, local, os, tile.first);
  }
  if constexpr (kWantsDv) {
    const Side os = {a.dv, tile.begin, tile.length, head, head_dim, (wide & kDv) != 0};
    store_rows<T, kD>(dv, 1.0f, 1.0f, v, local, os, tile.first);
  }
}

// ---- launch ----

bool is_wide(const Strided& t, const AttentionShape& a) {
  return aligned(t.data) && a.head_dim % 8 == 0 && t.token % 8 == 0 && t.head % 8 == 0;
}

// Wider heads have no register left for a table: those run in plain FMA.
constexpr int kWidestBiased = 128;

template <int kD, class Run>
void with_table(const Table& table, const Run& run) {
  if constexpr (kD <= kWidestBiased) cuda::with_table(table, run);
  else run();
}

// Whether the chip has tensor cores for T and so much shared memory.
template <class T>
bool fits(size_t bytes, int device) {
  const bool turing = device_attribute(cudaDevAttrComputeCapabilityMajor, device) < 8;
  if (turing && std::is_same_v<T, bf16>) return false;
  return bytes <= static_cast<size_t>(
                      device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
}

template <class T, int kD>
bool run_backward(const AttentionBackward& a, const Dropout& drop, const Call& call) {
  constexpr int kMost = kOther<kD, false>;  // without a table: room enough with one
  constexpr size_t kTiles = (2 * kRows + 2 * kMost) * kD * sizeof(T);
  constexpr size_t kBytes = kTiles + 2 * kMost * sizeof(float);
  if (!fits<T>(kBytes, call.device)) return false;
  const int wide = is_wide(a.q, a) * kQ | is_wide(a.k, a) * kK | is_wide(a.v, a) * kV |
                   is_wide(a.dout, a) * kDout | is_wide(a.dq, a) * kDq | is_wide(a.dk, a) * kDk |
                   is_wide(a.dv, a) * kDv;
  with_table<kD>(call.table, [&](auto... table) {
    using Kernel = void (*)(AttentionBackward, Dropout, const float*, int, decltype(table)...);
    const auto run = [&](Kernel kernel, int64_t total, size_t bytes) {
      if (!total) return;
      launch(kernel, tiles_of(total, kRows, a), kThreads, bytes, call.stream, a, drop,
             static_cast<const float*>(call.scratch), wide, table...);
    };
    run(dq_kernel<T, kD>, a.total_q, kTiles);
    if constexpr (kD <= 128) {
      run(dkv_kernel<T, kD, true, true>, a.total_k, kBytes);
    } else {
      run(dkv_kernel<T, kD, true, false>, a.total_k, kBytes);
      run(dkv_kernel<T, kD, false, true>, a.total_k, kBytes);
    }
  });
  return true;
}

}  // namespace

template <class T>
bool backward_mma(const AttentionBackward& a, const Dropout& drop, const Call& call) {
  if (call.table.data && a.head_dim > kWidestBiased) return false;
  if (a.head_dim <= 32) return run_backward<T, 32>(a, drop, call);
  if (a.head_dim <= 64) return run_backward<T, 64>(a, drop, call);
  if (a.head_dim <= 128) return run_backward<T, 128>(a, drop, call);
  return run_backward<T, 256>(a, drop, call);
}

template bool backward_mma<bf16>(const AttentionBackward&, const Dropout&, const Call&);
template bool backward_mma<fp16>(const AttentionBackward&, const Dropout&, const Call&);

}  // namespace cuda
}  // namespace bert_fast
