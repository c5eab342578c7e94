// Attention's backward on tensor cores, bf16 and fp16. A CTA of four warps owns 64 rows, each warp 16
// of them: queries for dq, keys for dk and dv, so that nothing is added atomically. The other side
// comes through shared memory by tiles, the next while one is used. Where one kernel for all gradients
// is the better one, that runs (attention_mma_fused.cu).
//
// The bias of k adds the same to all scores of a row, that of v the same to all of dP's: `rows_kernel`
// takes the first out of the row's log-sum-exp and puts the second into what dP starts from, so that
// k and v are used as they are.
#include "attention_mma_backward.h"

namespace bert_fast {
namespace cuda {
namespace {

constexpr int kRows = 16 * kWarps;

// Rows of a tile of the other side: what the registers allow, of which others take some.
enum Taken { kNone, kSome, kMany };
template <int kD, Taken kTaken>
constexpr int kOther = kD <= 64 ? (kTaken ? 32 : 64) : kD <= 128 && kTaken < kMany ? 32 : 16;
template <bool kHasTable>
constexpr Taken kTakenOfDq = kHasTable ? kSome : kNone;
template <bool kHasTable, bool kDrop>
constexpr Taken kTakenOfDkv = kHasTable || kDrop ? kMany : kNone;
// How many tiles of the other side are in shared memory, of which Turing has 64 KiB.
template <int kD>
constexpr int kStages = kD <= 64 ? 2 : 1;
// Rows past the last whole tile, and those that causal hides in part, go by so many.
template <int kOther>
constexpr int kTail = kOther < 32 ? kOther : 32;

// Grid: (blocks of rows, heads). kD / 8 lanes share a row.
template <class T, int kD>
__global__ void __launch_bounds__(kThreads) rows_kernel(AttentionBackward a, bool drops, int wide,
                                                     RowValues values) {
  constexpr int kLanes = kD / 8;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / kLanes) + threadIdx.x / kLanes;
  const int head = blockIdx.y, d = threadIdx.x % kLanes * 8, head_dim = static_cast<int>(a.head_dim);
  const int64_t part = a.num_heads * a.head_dim;
  const float* bias = a.bias ? a.bias + head * head_dim : nullptr;
  float delta = 0.0f, start = 0.0f, shifted = 0.0f;
  const auto read = [&](const Strided& t, bool is_wide, Pack<T, 8>& pack) {
    const T* from = row_of<T>(t, row, head) + d;
    if (is_wide) {
      pack = load<Pack<T, 8>>(from);
    } else {
#pragma unroll
      for (int j = 0; j < 8; ++j) pack.values[j] = d + j < head_dim ? from[j] : from_float<T>(0.0f);
    }
  };
  if (row < a.total_q && d < head_dim) {
    Pack<T, 8> dout, out, q;
    read(a.dout, wide & kDout, dout);
    read(a.out, wide & kOut, out);
    if (bias) read(a.q, wide & kQ, q);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      delta += to_float(dout.values[j]) * to_float(out.values[j]);
      if (!bias || d + j >= head_dim) continue;
      start += to_float(dout.values[j]) * bias[2 * part + d + j];
      const T biased = from_float<T>(to_float(q.values[j]) + bias[d + j]);  // as forward rounds it
      shifted += to_float(biased) * bias[part + d + j];
    }
  }
#pragma unroll
  for (int mask = kLanes / 2; mask; mask /= 2) {
    delta += shuffle_xor(delta, mask);
    start += shuffle_xor(start, mask);
    shifted += shuffle_xor(shifted, mask);
  }
  if (row >= a.total_q || d) return;
  const int64_t at = head * a.total_q + row;
  values.delta[at] = delta;
  values.start[at] = drops ? start : start - delta;
  const float lse = a.lse[at];
  values.shift[at] = lse == -INFINITY ? lse : (shifted * a.scale - lse) * kLog2e;
}

template <class T, int kD, bool kDrop, class... Bias>
__global__ void __launch_bounds__(kThreads, 2) dq_kernel(AttentionBackward a, Dropout drop,
                                                      RowValues values, int wide, Bias... table) {
  constexpr bool kHasTable = sizeof...(Bias) > 0, kHeld = kD <= 64;
  constexpr int kKeys = kOther<kD, kTakenOfDq<kHasTable>>, kPipeline = kStages<kD>;
  const int batch = static_cast<int>(a.batch), head = blockIdx.y;
  const Tile tile = find_tile(blockIdx.x, a.cu_q, batch, static_cast<int>(a.total_q), kRows);
  if (tile.first >= tile.length) return;
  int k_begin;
  const int k_length = span(a.cu_k, batch, tile.sequence, k_begin);
  const int head_dim = static_cast<int>(a.head_dim);
  const Side qs = {a.q, tile.begin, tile.length, head, head_dim, (wide & kQ) != 0};
  const Side ds = {a.dout, tile.begin, tile.length, head, head_dim, (wide & kDout) != 0};
  const Side ks = {a.k, k_begin, k_length, head, head_dim, (wide & kK) != 0};
  const Side vs = {a.v, k_begin, k_length, head, head_dim, (wide & kV) != 0};
  T* shared = reinterpret_cast<T*>(shared_memory());
  const Matrix<T, kD> q = {shared}, dout = {shared + kRows * kD};
  auto key_tile = [&](int stage) {
    return Matrix<T, kD>{shared + (2 * kRows + 2 * stage * kKeys) * kD};
  };
  auto value_tile = [&](int stage) {
    return Matrix<T, kD>{shared + (2 * kRows + (2 * stage + 1) * kKeys) * kD};
  };
  const bool piped = is_piped<kPipeline>(wide);
  Loader<T, kD, kKeys> keys(ks, 0), columns_of_v(vs, 0);
  auto load_keys = [&](int stage) {
    keys.load(key_tile(stage));
    columns_of_v.load(value_tile(stage));
    copy_async_commit();
  };
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int local = warp * 16, first_row = tile.first + local;
  const Place<T, kD> left = place_of_left<T, kD>(local), rows = place_of_rows<T, kD>(),
                     columns = place_of_columns<T, kD>();
  const Scale scale(a.scale);
  const float sign = scale.sign, c = scale.c;
  const PhiloxKeys draw = keys_of<kDrop, kD <= 64>(drop);
  const bool drops = kDrop && (!kHasTable || drop.seed);
  const int ahead = k_length - tile.length;
  int last = k_length, warp_last = k_length, whole = k_length;
  if (a.causal) {
    last = min(last, tile.first + kRows + ahead);
    warp_last = min(last, first_row + 16 + ahead);
    whole = min(last, first_row + 1 + ahead);
  }
  if (first_row >= tile.length) warp_last = whole = 0;
  float shift[2], start[2], delta[2], total[1][kD / 8][4] = {};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = first_row + lane / 4 + 8 * i;
    const int64_t at = head * a.total_q + tile.begin + row;
    shift[i] = row < tile.length ? values.shift[at] : -INFINITY;
    start[i] = row < tile.length ? values.start[at] : 0.0f;
    delta[i] = kDrop && row < tile.length ? values.delta[at] : 0.0f;
  }
  uint32_t held[2][kHeld ? kD / 16 : 1][4];
  auto read = [&](int which, int k, uint32_t(&fragment)[4]) {
    if constexpr (kHeld) {
#pragma unroll
      for (int i = 0; i < 4; ++i) fragment[i] = held[which][k][i];
    } else {
      load_matrices<false>(fragment, left.at(which ? dout : q, 0, 2 * k));
    }
  };
  auto step = [&](auto count, auto masked, int stage, int offset, int first) {
    constexpr int kTiles = decltype(count)::value / 8;
    const Block b = {first_row + lane / 4, first + offset + lane % 4 * 4, tile.length, k_length, head,
                     tile.sequence, a.causal};
    float scores[1][kTiles][4] = {}, dscores[1][kTiles][4];
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) dscores[0][n][i] = start[i / 2];
    }
    multiply_rows<T, kD, 1, kTiles>(
        scores, [&](int, int k, uint32_t(&f)[4]) { read(0, k, f); }, key_tile(stage), offset / 16, rows);
    multiply_rows<T, kD, 1, kTiles>(
        dscores, [&](int, int k, uint32_t(&f)[4]) { read(1, k, f); }, value_tile(stage), offset / 16, rows);
    add_table(scores, b, c, table...);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if constexpr (decltype(masked)::value) hide(scores[0], b, 8 * r, r);
#pragma unroll
      for (int n = 0; n < kTiles; n += kDrawn<kTiles>) {
        Words w;
        if (drops) w = philox(draw, draw_of(b.key) + n, b.query + 8 * r, head, tile.sequence);
#pragma unroll
        for (int j = 0; j < 2 * kDrawn<kTiles>; ++j) {
          float& score = scores[0][n + j / 2][r * 2 + j % 2];
          float& dscore = dscores[0][n + j / 2][r * 2 + j % 2];
          if constexpr (kDrop) {
            const bool keep = !drops || is_kept<kTiles>(w, j, b, drop);
            differentiate(score, dscore, kHasTable ? 1.0f : c, shift[r], keep, drop.scale,
                          drops ? delta[r] : 0.0f);
          } else {
            differentiate(score, dscore, c, shift[r]);
          }
        }
      }
    }
    multiply_weights<T, kD, 1, kTiles>(total, dscores, key_tile(stage), offset / 16, columns);
  };

  Loader<T, kD, kRows>(qs, tile.first).load(q);
  Loader<T, kD, kRows>(ds, tile.first).load(dout);
  load_keys(0);
  copy_async_wait<0>();
  if (a.bias || sign != 1) {
    add_bias<T, kD, kRows, kThreads>(q, a.bias ? a.bias + head * head_dim : nullptr, head_dim, sign);
  }
  barrier();
  if constexpr (kHeld) {
#pragma unroll
    for (int k = 0; k < kD / 16; ++k) {
      load_matrices<false>(held[0][k], left.at(q, 0, 2 * k));
      load_matrices<false>(held[1][k], left.at(dout, 0, 2 * k));
    }
  }
  for (int first = 0, stage = 0; first < last; first += kKeys) {
    const bool more = first + kKeys < last;
    if (piped && more) load_keys(stage ^ 1);
    if (kKeys > kTail<kKeys> && first + kKeys <= whole) {
      step(std::integral_constant<int, kKeys>(), std::false_type(), stage, 0, first);
    } else {
#pragma unroll 1
      for (int offset = 0; offset < kKeys && first + offset < warp_last; offset += kTail<kKeys>) {
        step(std::integral_constant<int, kTail<kKeys>>(), std::true_type(), stage, offset, first);
      }
    }
    if (!more) break;
    if (!piped) {
      barrier();
      load_keys(0);
    }
    copy_async_wait<0>();
    barrier();  // and all have read what comes next into this stage's place
    if (piped) stage ^= 1;
  }
  const Side os = {a.dq, tile.begin, tile.length, head, head_dim, (wide & kDq) != 0};
  store_rows<T, kD>(total[0], a.scale, a.scale, q, local, os, tile.first);
}

// The position bias, where rows are keys and columns queries; `keys`: the lane's two.
template <int kTiles>
__device__ __forceinline__ void add_table_by_key(float (&scores)[1][kTiles][4], const Block& b,
                                                 const int (&keys)[2], float c, const Table& table) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int query = min(b.query + n / 2 * 16 + n % 2 * 2 + i % 2, b.q_length - 1);
      const int key = min(keys[i / 2], b.k_length - 1);
      const float bias = table.data[(b.head * table.rows + query) * table.columns + key];
      scores[0][n][i] = bias == -INFINITY ? bias : fmaf(scores[0][n][i], c, bias * kLog2e);
    }
  }
}
template <int kTiles>
__device__ __forceinline__ void add_table_by_key(float (&)[1][kTiles][4], const Block&, const int (&)[2],
                                                 float) {}

// dk and dv of a tile of keys; for wide heads one of them a launch, which the registers allow. With
// dropout a lane's two keys are 16 apart.
template <class T, int kD, bool kWantsDk, bool kWantsDv, bool kDrop, class... Bias>
__global__ void __launch_bounds__(kThreads, 2) dkv_kernel(AttentionBackward a, Dropout drop,
                                                       RowValues values, int wide, Bias... table) {
  constexpr bool kHasTable = sizeof...(Bias) > 0;
  constexpr int kQueries = kOther<kD, kTakenOfDkv<kHasTable, kDrop>>, kPipeline = kStages<kD>;
  constexpr bool kShiftsAlone = kDrop && !kWantsDk;  // without dropout nvcc has registers for both
  constexpr int kKinds = kShiftsAlone ? 1 : kDrop ? 3 : 2, kValues = kKinds * kQueries;
  if constexpr (!kPins && kD > 64 && kWantsDk && kWantsDv) return;  // see run_kernels
  const int batch = static_cast<int>(a.batch), head = blockIdx.y;
  const Tile tile = find_tile(blockIdx.x, a.cu_k, batch, static_cast<int>(a.total_k), kRows);
  if (tile.first >= tile.length) return;
  int q_begin;
  const int q_length = span(a.cu_q, batch, tile.sequence, q_begin);
  const int head_dim = static_cast<int>(a.head_dim);
  const float* bias = a.bias ? a.bias + head * head_dim : nullptr;
  const Side ks = {a.k, tile.begin, tile.length, head, head_dim, (wide & kK) != 0};
  const Side vs = {a.v, tile.begin, tile.length, head, head_dim, (wide & kV) != 0};
  const Side qs = {a.q, q_begin, q_length, head, head_dim, (wide & kQ) != 0};
  const Side ds = {a.dout, q_begin, q_length, head, head_dim, (wide & kDout) != 0};
  T* shared = reinterpret_cast<T*>(shared_memory());
  const Matrix<T, kD> k = {shared}, v = {shared + kRows * kD};
  auto query_tile = [&](int stage) {
    return Matrix<T, kD>{shared + (2 * kRows + 2 * stage * kQueries) * kD};
  };
  auto dout_tile = [&](int stage) {
    return Matrix<T, kD>{shared + (2 * kRows + (2 * stage + 1) * kQueries) * kD};
  };
  const bool piped = is_piped<kPipeline>(wide);
  float* shared_values = reinterpret_cast<float*>(shared + (2 * kRows + 2 * (1 + piped) * kQueries) * kD);
  const int ahead = tile.length - q_length;
  const int start = a.causal ? max(0, tile.first - ahead) / kQueries * kQueries : 0;
  Loader<T, kD, kQueries> queries(qs, start), douts(ds, start);
  auto load_queries = [&](int stage) {
    queries.load(query_tile(stage));
    douts.load(dout_tile(stage));
    copy_async_commit();
  };
  ValueLoader<kQueries, kKinds, kThreads> row_values(values, a, head, q_begin, q_length, start);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  constexpr int kApart = kKeysApart<kDrop>;
  const int local = first_key_of<kDrop>(warp), first_key = tile.first + local;
  Keys<T, kD, kDrop> mine(k, v, local, lane);
  const Place<T, kD> rows = place_of_rows<T, kD>(), columns = place_of_columns<T, kD>();
  const Scale scale(a.scale);
  const float sign = scale.sign, c = scale.c;
  const PhiloxKeys draw = keys_of<kDrop, kD <= 64>(drop);
  const bool drops = kDrop && (!kHasTable || drop.seed);
  const int keys[2] = {first_key + lane / 4, first_key + lane / 4 + kApart};
  const int least[2] = {keys[0] - ahead, keys[1] - ahead};  // the first queries that see them, if causal
  float dk[1][kWantsDk ? kD / 8 : 1][4] = {}, dv[1][kWantsDv ? kD / 8 : 1][4] = {};
  auto step = [&](auto count, auto masked, int stage, int offset, int first) {
    constexpr int kTiles = decltype(count)::value / 8;
    const Block b = {first + offset + lane % 4 * 4, keys[0], q_length, tile.length, head,
                     tile.sequence, a.causal};
    const float* at = shared_values + stage * kValues + offset + lane % 4 * 4;
    float scores[1][kTiles][4] = {}, dscores[1][kTiles][4];
    multiply_by_key<T, kD, kQueries, kWantsDk>(scores, dscores, mine, query_tile(stage), dout_tile(stage),
                                               offset / 16, rows, at);
    add_table_by_key(scores, b, keys, c, table...);
    if constexpr (decltype(masked)::value) {
      if (a.causal) hide_by_key(scores[0], b.query, least);
    }
    uint32_t kept[4] = {};
    if (drops) draw_by_key<kTiles>(kept, draw, drop, b, tile.sequence);
    differentiate_by_key<kQueries, kWantsDk, kDrop>(scores, dscores, at, kHasTable ? 1.0f : c, drops, kept,
                                                    drop);
    if constexpr (kWantsDv) {
      multiply_weights<T, kD, 1, kTiles>(dv, scores, dout_tile(stage), offset / 16, columns);
    }
    if constexpr (kWantsDk) {
      multiply_weights<T, kD, 1, kTiles>(dk, dscores, query_tile(stage), offset / 16, columns);
    }
  };

  Loader<T, kD, kRows>(ks, tile.first).load(k);
  Loader<T, kD, kRows>(vs, tile.first).load(v);
  load_queries(0);
  row_values.fetch();
  row_values.put(shared_values);
  copy_async_wait<0>();
  if (sign != 1) add_bias<T, kD, kRows, kThreads>(k, nullptr, head_dim, sign);
  if (bias) add_bias<T, kD, kQueries, kThreads>(query_tile(0), bias, head_dim, 1.0f);
  barrier();
  mine.hold();
  const int warp_end = first_key < tile.length ? q_length : 0;
  const int from = a.causal ? first_key - ahead : 0, whole = a.causal ? from + kApart + 7 : 0;
  for (int first = start, stage = 0; first < q_length; first += kQueries) {
    const bool more = first + kQueries < q_length;
    if (piped && more) load_queries(stage ^ 1);
    if (more) row_values.fetch();
    if (kQueries > kTail<kQueries> && first >= whole && first + kQueries <= warp_end) {
      step(std::integral_constant<int, kQueries>(), std::false_type(), stage, 0, first);
    } else {
#pragma unroll 1
      for (int offset = 0; offset < kQueries && first + offset < warp_end; offset += kTail<kQueries>) {
        if (first + offset + kTail<kQueries> <= from) continue;
        step(std::integral_constant<int, kTail<kQueries>>(), std::true_type(), stage, offset, first);
      }
    }
    if (!more) break;
    if (!piped) {
      barrier();
      load_queries(0);
    }
    const int next = piped ? stage ^ 1 : 0;
    row_values.put(shared_values + next * kValues);
    copy_async_wait<0>();
    if (bias) add_bias<T, kD, kQueries, kThreads>(query_tile(next), bias, head_dim, 1.0f);
    barrier();  // and all have read what comes next into this stage's place
    stage = next;
  }
  if constexpr (kWantsDk) {
    const Side os = {a.dk, tile.begin, tile.length, head, head_dim, (wide & kDk) != 0};
    store_rows<T, kD, kApart>(dk[0], a.scale, a.scale, k, local, os, tile.first);
  }
  if constexpr (kWantsDv) {
    const Side os = {a.dv, tile.begin, tile.length, head, head_dim, (wide & kDv) != 0};
    store_rows<T, kD, kApart>(dv[0], drop.scale, drop.scale, v, local, os, tile.first);
  }
}

template <class T, int kD>
void run_rows(const AttentionBackward& a, const Dropout& drop, const Call& call) {
  const int wide = is_wide(a.dout, a) * kDout | is_wide(a.out, a) * kOut | is_wide(a.q, a) * kQ;
  const int64_t rows = kThreads / (kD / 8);
  launch(rows_kernel<T, kD>, dim3(static_cast<unsigned>((a.total_q + rows - 1) / rows),
                                  static_cast<unsigned>(a.num_heads)),
         kThreads, 0, call.stream, a, drop.seed != nullptr, wide, RowValues(call.scratch, a));
}

template <class T, int kD, bool kDrop, class... Bias>
bool run_kernels(const AttentionBackward& a, const Dropout& drop, const Call& call, Bias... table) {
  constexpr bool kHasTable = sizeof...(Bias) > 0;
  constexpr int kKeys = kOther<kD, kTakenOfDq<kHasTable>>;
  constexpr int kQueries = kOther<kD, kTakenOfDkv<kHasTable, kDrop>>;
  constexpr size_t kRow = kD * sizeof(T), kValues = (kDrop ? 3 : 2) * sizeof(float);
  const auto dq_bytes = [](int stages) { return (2 * kRows + 2 * stages * kKeys) * kRow; };
  const auto dkv_bytes = [](int stages) {
    return (2 * kRows + 2 * stages * kQueries) * kRow + stages * kQueries * kValues;
  };
  const int dq_one = one_tile(dq_bytes, kStages<kD>, call.device);
  const int dkv_one = one_tile(dkv_bytes, kStages<kD>, call.device);
  const size_t dq_shared = dq_bytes(dq_one ? 1 : kStages<kD>);
  const size_t dkv_shared = dkv_bytes(dkv_one ? 1 : kStages<kD>);
  if (!fits<T>(max(dq_shared, dkv_shared), call.device)) return false;
  const int wide = which_are_wide(a);
  using Kernel = void (*)(AttentionBackward, Dropout, RowValues, int, Bias...);
  const auto run = [&](Kernel kernel, int64_t total, size_t bytes, int one) {
    if (!total) return;
    launch(kernel, tiles_of(total, kRows, a), kThreads, bytes, call.stream, a, drop,
           RowValues(call.scratch, a), wide | one, table...);
  };
  run(dq_kernel<T, kD, kDrop, Bias...>, a.total_q, dq_shared, dq_one);
  if constexpr (kD <= 128) {
    if (kD <= 64 || !is_turing(call.device)) {
      run(dkv_kernel<T, kD, true, true, kDrop, Bias...>, a.total_k, dkv_shared, dkv_one);
      return true;
    }
  }
  if constexpr (kD > 64) {  // Turing has no registers for both, nor has any chip for the widest
    run(dkv_kernel<T, kD, true, false, kDrop, Bias...>, a.total_k, dkv_shared, dkv_one);
    run(dkv_kernel<T, kD, false, true, kDrop, Bias...>, a.total_k, dkv_shared, dkv_one);
  }
  return true;
}

// With a table, dropout is decided in the kernel.
template <class T, int kD>
bool run_backward(const AttentionBackward& a, const Dropout& drop, const Call& call) {
  if constexpr (kD <= kWidestBiased) {
    if (call.table.data) return run_kernels<T, kD, true>(a, drop, call, call.table);
  }
  if (drop.seed) return run_kernels<T, kD, true>(a, drop, call);
  return run_kernels<T, kD, false>(a, drop, call);
}

}  // namespace

template <class T>
void backward_rows(const AttentionBackward& a, const Dropout& drop, const Call& call) {
  if (a.head_dim <= 32) run_rows<T, 32>(a, drop, call);
  else if (a.head_dim <= 64) run_rows<T, 64>(a, drop, call);
  else if (a.head_dim <= 128) run_rows<T, 128>(a, drop, call);
  else run_rows<T, 256>(a, drop, call);
}

template <class T>
bool backward_mma(const AttentionBackward& a, const Dropout& drop, const Call& call) {
  if (backward_fused<T>(a, drop, call)) return true;
  if (call.table.data && a.head_dim > kWidestBiased) return false;
  if (a.head_dim <= 32) return run_backward<T, 32>(a, drop, call);
  if (a.head_dim <= 64) return run_backward<T, 64>(a, drop, call);
  if (a.head_dim <= 128) return run_backward<T, 128>(a, drop, call);
  return run_backward<T, 256>(a, drop, call);
}

template void backward_rows<bf16>(const AttentionBackward&, const Dropout&, const Call&);
template void backward_rows<fp16>(const AttentionBackward&, const Dropout&, const Call&);
template bool backward_mma<bf16>(const AttentionBackward&, const Dropout&, const Call&);
template bool backward_mma<fp16>(const AttentionBackward&, const Dropout&, const Call&);

}  // namespace cuda
}  // namespace bert_fast
