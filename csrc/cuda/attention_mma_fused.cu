// Attention's backward on tensor cores, bf16 and fp16, heads up to 64 wide: all three gradients by five
// products where two kernels need seven. A CTA owns a sequence and head, and goes through its keys by
// tiles: each of its warps has 16, whose dk and dv it sums. Queries come through shared memory by tiles;
// dS of a tile goes there, too, and from it the warps make dq, of the tile's keys at once.
//
// Up to 128 keys are one tile, and nothing is added later. Of more, dq of a tile of queries is summed in
// fp32 in the scratch, from one tile of keys to the next, and leaves it with the last that it sees. Only
// one CTA touches it, and each number always the same thread: nothing is atomic, and the order is fixed.
// The sum is what the next product adds to: of a thread two loads and two stores of 16 bytes a tile.
//
// When it runs, see runs_fused: always where no sequence has more than 128 keys, nor queries; of longer
// ones where sequences and heads are enough for the GPU. That is a rule until a GPU has measured it.
#include "attention_mma_backward.h"

namespace bert_fast {
namespace cuda {
namespace {

// Queries of a tile where eight warps have the keys.
template <int kD>
constexpr int kQueries = kD == 32 ? 64 : 32;

// Where dq is summed tiles lie one after the other, each as its threads have it, so that a warp moves
// whole sectors. A sequence's begin at its first query / kTile + its number, which no other's reach.
template <int kTile>
__host__ __device__ __forceinline__ int64_t tiles_of_sums(const AttentionShape& a) {
  return a.total_q / kTile + a.batch;
}
template <int kD>
int64_t size_of_sums(const AttentionShape& a) {  // of a head
  return tiles_of_sums<kQueries<kD>>(a) * (kQueries<kD> * kD);
}
// After the rows' values, where 16 bytes begin.
inline int64_t first_sum(const AttentionShape& a) { return (3 * a.num_heads * a.total_q + 3) / 4 * 4; }

// Where dS of a tile stands in shared memory, by key: a row of kTile queries. Two chunks have 16 of
// them in the order of a product's columns (key_of). Chunks are twisted so that neither stores of 4
// bytes nor ldmatrix over eight keys meet in a bank.
template <int kTile>
__device__ __forceinline__ unsigned place_by_key(unsigned key, unsigned chunk) {
  const unsigned twist = kTile == 64 ? key % 8 : key / 2 % 4;
  return key * kTile + (chunk ^ twist) * 8;  // of other keys, a multiple of 8 on, too
}

// Zeros, of rows past the last sequence and for want of anything on the other side.
template <class T, int kD, int kTeam>
__device__ __forceinline__ void clear(const Side& s) {
  const int d = threadIdx.x % (kD / 8) * 8;
  Pack<T, 8> zeros;
#pragma unroll
  for (int j = 0; j < 8; ++j) zeros.values[j] = from_float<T>(0.0f);
  for (int row = threadIdx.x / (kD / 8); row < s.length && d < s.head_dim; row += kTeam / (kD / 8)) {
    T* to = row_of<T>(s.tensor, static_cast<int64_t>(s.begin) + row, s.head) + d;
    if (s.wide) {
      store_16(to, &zeros);
    } else {
#pragma unroll 1
      for (int j = 0; j < min(8, s.head_dim - d); ++j) to[j] = zeros.values[0];
    }
  }
}

// Of 16 columns of a row of dq, of which a lane has two of either eight: neighbouring lanes swap, so
// that each has four side by side and a row's make a sector.
__device__ __forceinline__ uint2 side_by_side(uint32_t first, uint32_t second) {
  const bool odd = threadIdx.x & 1;
  const uint32_t theirs = shuffle_xor(odd ? first : second, 1);
  uint2 four = {odd ? theirs : first, odd ? second : theirs};
  keep(four.x), keep(four.y);  // found once, however they are stored
  return four;
}

// Those of `four` that are valid.
template <class T>
__device__ __forceinline__ void store_four(T* to, const uint2& four, int valid, bool wide) {
  if (wide) {
    if (valid > 0) store(to, four);
    return;
  }
  uint64_t left = four.x | static_cast<uint64_t>(four.y) << 32;
#pragma unroll 1
  for (int j = 0; j < min(valid, 4); ++j, left >>= 16) {
    const uint16_t bits = static_cast<uint16_t>(left);
    memcpy(to + j, &bits, 2);
  }
}

// A Place that is moved from one stage's tiles to the other's.
template <class T, int kD>
struct Moving {
  unsigned at_zero;
  __device__ __forceinline__ Moving(const Place<T, kD>& from, unsigned by)
      : at_zero(from.row + from.chunk + by) {}
  __device__ __forceinline__ T* at(const Matrix<T, kD>& m, unsigned rows, unsigned chunks) const {
    return m.data + (at_zero ^ (chunks ^ Matrix<T, kD>::twist(rows)) * 8) + rows * kD;
  }
};

// Grid: (sequences + 1, heads), from the last sequence on, before which come the rows past it: they may
// be many, and their gradients are zeros. Of a tile of kTile queries each of the kCount warps makes a
// part of dq: 16 rows, and 16 columns or more.
template <class T, int kD, int kTile, int kCount, bool kDrop, bool kLong>
__global__ void __launch_bounds__(kCount * kWarp, kCount == 4 ? 2 : 1)
    fused_kernel(AttentionBackward a, Dropout drop, RowValues values, int wide, float* sums) {
  constexpr int kTeam = kCount * kWarp, kKeys = 16 * kCount;
  constexpr int kKinds = kDrop ? 3 : 2, kTiles = kTile / 8;
  if constexpr (!kPins) return;  // Turing has the two kernels
  const int sequence = static_cast<int>(gridDim.x - 1 - blockIdx.x), head = blockIdx.y;
  const int head_dim = static_cast<int>(a.head_dim);
  const bool past = sequence == a.batch;
  const int q_begin = a.cu_q[sequence], k_begin = a.cu_k[sequence];
  const int q_length = (past ? static_cast<int>(a.total_q) : a.cu_q[sequence + 1]) - q_begin;
  const int k_length = (past ? static_cast<int>(a.total_k) : a.cu_k[sequence + 1]) - k_begin;
  const Side dqs = {a.dq, q_begin, q_length, head, head_dim, (wide & kDq) != 0};
  const Side dks = {a.dk, k_begin, k_length, head, head_dim, (wide & kDk) != 0};
  const Side dvs = {a.dv, k_begin, k_length, head, head_dim, (wide & kDv) != 0};
  if (past || !q_length || !k_length) {
    clear<T, kD, kTeam>(dqs);
    clear<T, kD, kTeam>(dks);
    clear<T, kD, kTeam>(dvs);
    return;
  }
  if (!kLong && k_length > kKeys) trap("max_seqlen is below the longest sequence");
  const float* bias = a.bias ? a.bias + head * head_dim : nullptr;
  const Side ks = {a.k, k_begin, k_length, head, head_dim, (wide & kK) != 0};
  const Side vs = {a.v, k_begin, k_length, head, head_dim, (wide & kV) != 0};
  const Side qs = {a.q, q_begin, q_length, head, head_dim, (wide & kQ) != 0};
  const Side ds = {a.dout, q_begin, q_length, head, head_dim, (wide & kDout) != 0};
  T* shared = reinterpret_cast<T*>(shared_memory());
  const Matrix<T, kD> k = {shared}, v = {shared + kKeys * kD};
  const Matrix<T, kD> q = {v.data + kKeys * kD}, dout = {q.data + kTile * kD};  // those of stage 0
  constexpr unsigned kStage = 2 * kTile * kD;
  T* by_key = q.data + 2 * kStage;
  float* shared_values = reinterpret_cast<float*>(by_key + kKeys * kTile);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  constexpr int kApart = kKeysApart<kDrop>;
  const int local = first_key_of<kDrop>(warp), ahead = k_length - q_length;
  const Scale scale(a.scale);
  const float sign = scale.sign, c = scale.c, factor = a.scale * sign;  // of dq: k has the sign, too
  const PhiloxKeys draw = keys_of<kDrop, true>(drop);

  // The warp's part of a tile's dq: 16 rows, and columns from chunk `column` on.
  constexpr int kDown = kTile / 16, kColumns = kD * kDown / kCount, kAcross = kColumns / 16;
  static_assert(kAcross >= 1);
  const int part = warp % kDown * 16, column = warp / kDown * (kColumns / 8);
  const Place<T, kD> rows = place_of_rows<T, kD>(), columns = place_of_columns<T, kD>();
  unsigned put_at = place_by_key<kTile>(local + lane / 4, 0) + lane % 4 * 2;
  unsigned take_at = place_by_key<kTile>(lane / 16 * 8 + lane % 8, part / 8 + lane / 8 % 2);
  keep(put_at), keep(take_at);
  const int row = part + key_of(lane / 4, 0), d = column * 8 + lane % 2 * 8 + lane / 2 % 2 * 4;
  float* sum = nullptr;  // where the thread's first number of the sequence is summed
  if constexpr (kLong) {
    const int64_t tile = head * tiles_of_sums<kTile>(a) + q_begin / kTile + sequence;
    sum = sums + tile * (kTile * kD) + threadIdx.x * 4;
  }

#pragma unroll 1
  for (int first_key = 0;;) {
    // The first tile of queries that see these keys; all come with the first keys, if only for zeros.
    const int begin = kLong && first_key && a.causal ? max(0, first_key - ahead) / kTile * kTile : 0;
    const int next_key = first_key + kKeys;
    // Tiles that end here or before see no later keys: their dq is complete.
    const int complete = !kLong || next_key >= k_length ? INT32_MAX : a.causal ? next_key - ahead : 0;
    Loader<T, kD, kTile, kTeam> queries(qs, begin), douts(ds, begin);
    Loader<T, kD, kKeys, kTeam>(ks, first_key).load(k);
    Loader<T, kD, kKeys, kTeam>(vs, first_key).load(v);
    auto load_queries = [&](int stage) {
      queries.load({q.data + stage * kStage});
      douts.load({dout.data + stage * kStage});
      copy_async_commit();
    };
    ValueLoader<kTile, kKinds, kTeam> row_values(values, a, head, q_begin, q_length, begin);
    const int own_key = first_key + local;
    int least[2];  // the first queries that see the lane's keys
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int key = own_key + lane / 4 + i * kApart;
      least[i] = key >= k_length ? INT32_MAX : a.causal ? key - ahead : 0;
    }
    const int last = own_key + kApart + 7;  // of the warp's keys
    const int whole = last >= k_length ? INT32_MAX : a.causal ? last - ahead : 0;
    const int start = own_key >= k_length ? INT32_MAX : a.causal ? own_key - ahead - kTile + 1 : 0;
    float dk[1][kD / 8][4] = {}, dv[1][kD / 8][4] = {};
    Keys<T, kD, kDrop> mine(k, v, local, lane);
    uint32_t held_columns[kCount][kAcross][4];
    T* dq_at = row_of<T>(a.dq, static_cast<int64_t>(q_begin) + begin + row, head) + d;
    int dq_left = q_length - begin - row;
    float* so_far = kLong ? sum + begin * kD : nullptr;
    auto step = [&](int stage, int first) {
      const Block b = {first + lane % 4 * 4, own_key + lane / 4, q_length, k_length, head, sequence,
                       a.causal};
      const float* at = shared_values + stage * kKinds * kTile + lane % 4 * 4;
      float scores[1][kTiles][4] = {}, dscores[1][kTiles][4];
      multiply_by_key<T, kD, kTile, true>(scores, dscores, mine, q, dout, 0,
                                          Moving<T, kD>(rows, stage * kStage), at);
      if (first < whole) hide_by_key(scores[0], b.query, least);
      uint32_t kept[4] = {};
      if (kDrop) draw_by_key<kTiles>(kept, draw, drop, b, sequence);
      differentiate_by_key<kTile, true, kDrop>(scores, dscores, at, c, kDrop, kept, drop);
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        T* to = by_key + (put_at ^ n * 8);
        store(to, pack_pair<T>(dscores[0][n][0], dscores[0][n][1]));
        store(to + kApart * kTile, pack_pair<T>(dscores[0][n][2], dscores[0][n][3]));
      }
      const Moving<T, kD> right(columns, stage * kStage);
      multiply_weights<T, kD, 1, kTiles>(dv, scores, dout, 0, right);
      multiply_weights<T, kD, 1, kTiles>(dk, dscores, q, 0, right);
    };

    load_queries(0);
    row_values.fetch();
    row_values.put(shared_values);
    copy_async_wait<0>();
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {  // for keys that no query sees, or none yet
      store(by_key + (put_at ^ n * 8), 0u);
      store(by_key + (put_at ^ n * 8) + kApart * kTile, 0u);
    }
    if (sign != 1) add_bias<T, kD, kKeys, kTeam>(k, nullptr, head_dim, sign);
    if (bias) add_bias<T, kD, kTile, kTeam>(q, bias, head_dim, 1.0f);
    barrier();
    mine.hold();
    {
      const Place<T, kD> natural(lane % 16, column + lane / 16);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
#pragma unroll
        for (int n = 0; n < kAcross; ++n) {
          load_matrices<true>(held_columns[i][n], natural.at(k, i * 16, 2 * n));
        }
      }
    }
    for (int first = begin, stage = 0; first < q_length; first += kTile) {
      const bool more = first + kTile < q_length;
      if (more) {
        load_queries(stage ^ 1);
        row_values.fetch();
      }
      if (first >= start) step(stage, first);
      float dq[2 * kAcross][4] = {};
      if (kLong && first_key) {  // comes while others are waited for
#pragma unroll
        for (int n = 0; n < 2 * kAcross; ++n) {
          const Pack<float, 4> four = load<Pack<float, 4>>(so_far + n * kTeam * 4);
#pragma unroll
          for (int i = 0; i < 4; ++i) dq[n][i] = four.values[i];
        }
      }
      barrier();  // all of dS is there
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        uint32_t left[4];
        load_matrices<true>(left, by_key + take_at + i * 16 * kTile);
#pragma unroll
        for (int n = 0; n < kAcross; ++n) {
          mma<T>(dq[2 * n], left, held_columns[i][n][0], held_columns[i][n][1]);
          mma<T>(dq[2 * n + 1], left, held_columns[i][n][2], held_columns[i][n][3]);
        }
      }
      if (first + kTile <= complete) {
#pragma unroll
        for (int n = 0; n < kAcross; ++n) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const uint2 four = side_by_side(
                pack_pair<T>(dq[2 * n][2 * i] * factor, dq[2 * n][2 * i + 1] * factor),
                pack_pair<T>(dq[2 * n + 1][2 * i] * factor, dq[2 * n + 1][2 * i + 1] * factor));
            store_four(dq_at + 2 * i * a.dq.token + n * 16, four,
                       2 * i < dq_left ? head_dim - d - n * 16 : 0, dqs.wide);
          }
        }
      } else {
#pragma unroll
        for (int n = 0; n < 2 * kAcross; ++n) store_16(so_far + n * kTeam * 4, dq[n]);
      }
      dq_left -= kTile;
      dq_at += kTile * a.dq.token;
      if (kLong) so_far += kTile * kD;
      if (!more) break;
      stage ^= 1;
      row_values.put(shared_values + stage * kKinds * kTile);
      copy_async_wait<0>();
      if (bias) {
        add_bias<T, kD, kTile, kTeam>(Matrix<T, kD>{q.data + stage * kStage}, bias, head_dim, 1.0f);
      }
      barrier();  // and all have read dS
    }
    store_rows<T, kD, kApart>(dk[0], a.scale, a.scale, k, local, dks, first_key);
    store_rows<T, kD, kApart>(dv[0], drop.scale, drop.scale, v, local, dvs, first_key);
    if (!kLong || next_key >= k_length) break;
    first_key = next_key;
    barrier();  // all have read dS, and what they put in the place of keys and values
  }
}

template <class T, int kD, int kTile, int kCount, bool kDrop, bool kLong>
bool run_kernel(const AttentionBackward& a, const Dropout& drop, const Call& call) {
  constexpr int kKeys = 16 * kCount;
  constexpr size_t bytes = ((2 * kKeys + 4 * kTile) * kD + kKeys * kTile) * sizeof(T) +
                           2 * kTile * (kDrop ? 3 : 2) * sizeof(float);
  if (!fits<T>(bytes, call.device)) return false;
  const dim3 grid(static_cast<unsigned>(a.batch + 1), static_cast<unsigned>(a.num_heads));
  launch(fused_kernel<T, kD, kTile, kCount, kDrop, kLong>, grid, kCount * kWarp, bytes, call.stream, a, drop,
         RowValues(call.scratch, a), which_are_wide(a), call.scratch + first_sum(a));
  return true;
}

template <class T, int kD, int kTile, int kCount, bool kLong>
bool run_fused(const AttentionBackward& a, const Dropout& drop, const Call& call) {
  return drop.seed ? run_kernel<T, kD, kTile, kCount, true, kLong>(a, drop, call)
                   : run_kernel<T, kD, kTile, kCount, false, kLong>(a, drop, call);
}

template <class T, int kD>
bool run_fused(const AttentionBackward& a, const Dropout& drop, const Call& call) {
  if (call.longest <= 64) return run_fused<T, kD, 32, 4, false>(a, drop, call);
  if (call.longest <= 128) return run_fused<T, kD, kQueries<kD>, 8, false>(a, drop, call);
  return run_fused<T, kD, kQueries<kD>, 8, true>(a, drop, call);
}

// Whether a CTA for each sequence and head, one at a time an SM, is enough for the GPU, where the two
// kernels have several times more: two turns, so that few long ones do not set the time, of which a
// quarter is idle at most. By counts a quarter is about what five products for seven gain.
bool fills(const AttentionShape& a, int device) {
  const int64_t at_once = device_attribute(cudaDevAttrMultiProcessorCount, device);
  const int64_t ctas = a.batch * a.num_heads, turns = at_once ? (ctas + at_once - 1) / at_once : 0;
  return turns >= 2 && 4 * ctas >= 3 * turns * at_once;
}

// The scratch is as large as this says: nothing else may decide.
bool runs_fused(const AttentionShape& a, const Call& call) {
  if (a.head_dim > 64 || call.table.data || is_turing(call.device)) return false;
  return call.longest <= 128 || fills(a, call.device);
}

}  // namespace

int64_t scratch_mma(const AttentionShape& a, const Call& call) {
  if (call.longest <= 128 || !runs_fused(a, call)) return first_sum(a);
  return first_sum(a) + a.num_heads * (a.head_dim <= 32 ? size_of_sums<32>(a) : size_of_sums<64>(a));
}

template <class T>
bool backward_fused(const AttentionBackward& a, const Dropout& drop, const Call& call) {
  if (!runs_fused(a, call)) return false;
  return a.head_dim <= 32 ? run_fused<T, 32>(a, drop, call) : run_fused<T, 64>(a, drop, call);
}

template bool backward_fused<bf16>(const AttentionBackward&, const Dropout&, const Call&);
template bool backward_fused<fp16>(const AttentionBackward&, const Dropout&, const Call&);

}  // namespace cuda
}  // namespace bert_fast
