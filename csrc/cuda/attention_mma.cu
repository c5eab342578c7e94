// Attention's forward on tensor cores, bf16 and fp16. A CTA of four warps owns 64 or 128 queries,
// each warp 16 or 32 of them. Keys and values come through shared memory by tiles (cp.async), the
// next while one is used; scores stay in registers: the accumulators of one product have the layout
// of the next one's left operand.
#include "attention_mma.h"

namespace bert_fast {
namespace cuda {
namespace {

// How many tiles of keys are in shared memory.
template <int kD>
constexpr int kStages = kD <= 128 ? 2 : 1;

// Rows beyond the last whole tile of keys, and those that causal hides in part, go by so many.
template <int kKeys>
constexpr int kTail = kKeys < 32 ? kKeys : 32;

// Scores may pass the maximum that the weights are taken against by so many powers of two before the
// sums are rescaled: they then stay within fp16, and rows whose maximum creeps up cost nothing.
constexpr float kSlack = 8.0f;

// What a warp has of 16 kM queries: per lane rows lane / 4 + 8 r.
template <int kD, int kM>
struct Sums {
  float top[2 * kM], shift[2 * kM];   // of raw scores; and - top * c, 0 where top is -inf
  float norm[2 * kM], kept[2 * kM];   // of weights; of those that dropout kept. Of this lane's keys
  float total[kM][kD / 8][4];
};

// Softmax's sums over kTiles * 8 keys, from their scores; leaves the weights in their place.
template <bool kMasked, bool kDrop, int kD, int kM, int kTiles>
__device__ __forceinline__ void weigh(float (&scores)[kM][kTiles][4], Sums<kD, kM>& s, const Block& b,
                                      float c, const Dropout& drop, const PhiloxKeys& draw, bool kept) {
  float tops[2 * kM];
  bool grows = false;
#pragma unroll
  for (int r = 0; r < 2 * kM; ++r) {
    if constexpr (kMasked) hide(scores[r / 2], b, 8 * r, r % 2);
    tops[r] = s.top[r];
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int j = 0; j < 2; ++j) tops[r] = fmaxf(tops[r], scores[r / 2][n][r % 2 * 2 + j]);
    }
    grows |= (tops[r] - s.top[r]) * c > kSlack;
  }
  if (ballot(grows)) {
#pragma unroll
    for (int r = 0; r < 2 * kM; ++r) {
      const float top = quad_max(tops[r]), shift = top == -INFINITY ? 0.0f : -top * c;
      const float shrink = exp2_fast(fmaf(s.top[r], c, shift));
      s.top[r] = top, s.shift[r] = shift;
      s.norm[r] *= shrink;
      if constexpr (kDrop) s.kept[r] *= shrink;
#pragma unroll
      for (int n = 0; n < kD / 8; ++n) {
        s.total[r / 2][n][r % 2 * 2] *= shrink;
        s.total[r / 2][n][r % 2 * 2 + 1] *= shrink;
      }
    }
  }
#pragma unroll
  for (int r = 0; r < 2 * kM; ++r) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float& score = scores[r / 2][n][r % 2 * 2 + j];
        score = exp2_fast(fmaf(score, c, s.shift[r]));
        s.norm[r] += score;
      }
    }
  }
  if (!kDrop || !drop.seed) return;
#pragma unroll
  for (int r = 0; r < 2 * kM; ++r) {
#pragma unroll
    for (int n = 0; n < kTiles; n += kDrawn<kTiles>) {
      const Words w = philox(draw, draw_of(b.key) + n, b.query + 8 * r, b.head, b.sequence);
#pragma unroll
      for (int j = 0; j < 2 * kDrawn<kTiles>; ++j) {
        float& weight = scores[r / 2][n + j / 2][r % 2 * 2 + j % 2];
        if (!is_kept<kTiles>(w, j, b, drop)) weight = 0.0f;
      }
    }
  }
  if (!kept) return;
#pragma unroll
  for (int r = 0; r < 2 * kM; ++r) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      s.kept[r] += scores[r / 2][n][r % 2 * 2] + scores[r / 2][n][r % 2 * 2 + 1];
    }
  }
}

// Grid: (tiles of queries, heads). kTeam: a warp where sequences are so short that most of a CTA's
// rows would lie idle; it then has 16 rows and all their keys to itself, four such tiles share a CTA,
// and nobody waits for another.
template <class T, int kD, int kKeys, int kM, int kTeam, bool kDrop, class... Bias>
__global__ void __launch_bounds__(kThreads, 2) forward_kernel(AttentionForward a, Dropout drop,
                                                           int wide, Bias... table) {
  constexpr bool kOnce = kTeam == kWarp, kHeld = kM * kD <= 128, kHasTable = sizeof...(Bias) > 0;
  constexpr int kPipeline = kOnce ? 1 : kStages<kD>, kTeams = kThreads / kTeam;
  constexpr int kMine = 16 * kM, kOwn = kMine * kWarps / kTeams;  // rows of a warp, of a team
  const int team = kTeams == 1 ? 0 : threadIdx.x / kTeam;
  const int batch = static_cast<int>(a.batch), head = blockIdx.y;
  const Tile tile = find_tile(blockIdx.x * kTeams + team, a.cu_q, batch,
                              static_cast<int>(a.total_q), kOwn);
  if (tile.first >= tile.length) return;
  int k_begin;
  const int k_length = span(a.cu_k, batch, tile.sequence, k_begin);
  if (kOnce && k_length > kKeys) trap("max_seqlen is below the longest sequence");
  const int head_dim = static_cast<int>(a.head_dim), part = static_cast<int>(a.num_heads) * head_dim;
  const Side qs = {a.q, tile.begin, tile.length, head, head_dim, (wide & kQ) != 0};
  const Side ks = {a.k, k_begin, k_length, head, head_dim, (wide & kK) != 0};
  const Side vs = {a.v, k_begin, k_length, head, head_dim, (wide & kV) != 0};
  const float* bias = a.bias ? a.bias + head * head_dim : nullptr;
  T* shared = reinterpret_cast<T*>(shared_memory()) + team * (kOwn + 2 * kPipeline * kKeys) * kD;
  const Matrix<T, kD> q = {shared};
  auto key_tile = [&](int stage) {
    return Matrix<T, kD>{shared + (kOwn + 2 * stage * kKeys) * kD};
  };
  auto value_tile = [&](int stage) {
    return Matrix<T, kD>{shared + (kOwn + (2 * stage + 1) * kKeys) * kD};
  };
  const bool piped = is_piped<kPipeline>(wide);
  Loader<T, kD, kKeys, kTeam> keys(ks, 0), values(vs, 0);
  auto load_keys = [&](int stage) {
    keys.load(key_tile(stage));
    values.load(value_tile(stage));
    copy_async_commit();
  };
  const int warp = team_thread<kTeam>() / kWarp, lane = threadIdx.x % kWarp;
  const int local = warp * kMine, first_row = tile.first + local;
  const Place<T, kD> left = place_of_left<T, kD>(local), rows = place_of_rows<T, kD>(),
                      columns = place_of_columns<T, kD>();
  const Scale scale(a.scale);
  const float sign = scale.sign, c = scale.c;
  const PhiloxKeys draw = keys_of<kDrop, kD <= 64>(drop);
  // Keys that some query of the CTA sees, of the warp sees, and that all of the warp's queries see.
  const int ahead = k_length - tile.length;
  int last = k_length, warp_last = k_length, whole = k_length;
  if (a.causal) {
    last = min(last, tile.first + kOwn + ahead);
    warp_last = min(last, first_row + kMine + ahead);
    whole = min(last, first_row + 1 + ahead);
  }
  if (first_row >= tile.length) warp_last = whole = 0;

  Sums<kD, kM> s = {};
#pragma unroll
  for (int r = 0; r < 2 * kM; ++r) s.top[r] = -INFINITY;
  uint32_t held[kHeld ? kM : 1][kHeld ? kD / 16 : 1][4];
  auto read = [&](int m, int k, uint32_t(&fragment)[4]) {
    if constexpr (kHeld) {
#pragma unroll
      for (int i = 0; i < 4; ++i) fragment[i] = held[m][k][i];
    } else {
      load_matrices<false>(fragment, left.at(q, m * 16, 2 * k));
    }
  };
  auto step = [&](auto count, auto masked, int stage, int offset, int first) {
    constexpr int kTiles = decltype(count)::value / 8;
    const Block b = {first_row + lane / 4, first + offset + lane % 4 * 4, tile.length, k_length, head,
                     tile.sequence, a.causal};
    float scores[kM][kTiles][4] = {};
    multiply_rows<T, kD, kM, kTiles>(scores, read, key_tile(stage), offset / 16, rows);
    add_table(scores, b, c, table...);
    weigh<decltype(masked)::value, kDrop>(scores, s, b, kHasTable ? 1.0f : c, drop, draw,
                                         bias != nullptr);
    multiply_weights<T, kD, kM, kTiles>(s.total, scores, value_tile(stage), offset / 16, columns);
  };

  Loader<T, kD, kOwn, kTeam>(qs, tile.first).load(q);
  load_keys(0);
  copy_async_wait<0>();
  if (bias || sign != 1) add_bias<T, kD, kOwn, kTeam>(q, bias, head_dim, sign);
  team_barrier<kTeam>();
  if constexpr (kHeld) {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int k = 0; k < kD / 16; ++k) load_matrices<false>(held[m][k], left.at(q, m * 16, 2 * k));
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
      team_barrier<kTeam>();
      load_keys(0);
    }
    copy_async_wait<0>();
    team_barrier<kTeam>();  // and all have read what comes next into this stage's place
    if (piped) stage ^= 1;
  }
  if (first_row >= tile.length) return;
  const Side os = {a.out, tile.begin, tile.length, head, head_dim, (wide & kOut) != 0};
#pragma unroll
  for (int m = 0; m < kM; ++m) {
    // The bias of k adds the same to all scores of a row: to its lse, that is, and to nothing else.
    float shifted[2] = {}, share[2];
    if (bias) {
#pragma unroll 1
      for (int k = 0; k < kD / 16; ++k) {
        uint32_t pairs[4];
        load_matrices<false>(pairs, left.at(q, m * 16, 2 * k));
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const int d = k * 16 + i / 4 * 8 + lane % 4 * 2 + i % 2;
          if (d < head_dim) shifted[i / 2 % 2] += element_of<T>(pairs[i / 2], i % 2) * bias[part + d];
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int r = 2 * m + i, row = first_row + lane / 4 + 8 * r;
      const float norm = quad_sum(s.norm[r]), extra = quad_sum(shifted[i]);
      share[i] = norm > 0 ? 1.0f / norm : 0.0f;
      if (lane % 4 == 0 && row < tile.length) {
        a.lse[head * a.total_q + tile.begin + row] =
            norm > 0 ? (log2f(norm) - s.shift[r] + extra * c) * kLn2 : -INFINITY;
      }
      const float kept = kDrop && drop.seed ? quad_sum(s.kept[r]) * share[i] : norm > 0 ? 1.0f : 0.0f;
      if (kDrop) share[i] *= drop.scale;
      if (bias) {
#pragma unroll
        for (int n = 0; n < kD / 8; ++n) {
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const int d = n * 8 + lane % 4 * 2 + j;
            const float add = d < head_dim ? bias[2 * part + d] * kept * drop.scale : 0.0f;
            float& total = s.total[m][n][2 * i + j];
            total = total * share[i] + add;
          }
        }
        share[i] = 1.0f;
      }
    }
    store_rows<T, kD>(s.total[m], share[0], share[1], q, local + 16 * m, os, tile.first);
  }
}

template <class T, int kD, int kKeys, int kM, int kTeam, bool kDrop, class... Bias>
bool run_kernel(const AttentionForward& a, const Dropout& drop, const Call& call, Bias... table) {
  constexpr int kPipeline = kTeam == kWarp ? 1 : kStages<kD>, kTeams = kThreads / kTeam;
  constexpr int kOwn = 16 * kM * kWarps / kTeams;
  const auto bytes = [](int stages) { return kTeams * (kOwn + 2 * stages * kKeys) * kD * sizeof(T); };
  const int one = one_tile(bytes, kPipeline, call.device);
  const size_t shared = bytes(one ? 1 : kPipeline);
  if (!fits<T>(shared, call.device)) return false;
  const int wide = one | is_wide(a.q, a) * kQ | is_wide(a.k, a) * kK | is_wide(a.v, a) * kV |
                   is_wide(a.out, a) * kOut;
  dim3 grid = tiles_of(a.total_q, kOwn, a);
  grid.x = (grid.x + kTeams - 1) / kTeams;
  launch(forward_kernel<T, kD, kKeys, kM, kTeam, kDrop, Bias...>, grid, kThreads, shared, call.stream,
         a, drop, wide, table...);
  return true;
}

// With a table, dropout is decided in the kernel. With either a warp has 16 rows, and of wide heads 16
// keys at a time: registers are scarce.
template <class T, int kD, int kKeys, int kM, int kTeam = kThreads>
bool run_forward(const AttentionForward& a, const Dropout& drop, const Call& call) {
  constexpr int kFewer = kD > 128 ? 16 : kKeys;
  if constexpr (kD <= kWidestBiased) {
    if (call.table.data) return run_kernel<T, kD, kKeys, 1, kTeam, true>(a, drop, call, call.table);
  }
  if (drop.seed) return run_kernel<T, kD, kFewer, 1, kTeam, true>(a, drop, call);
  return run_kernel<T, kD, kKeys, kM, kTeam, false>(a, drop, call);
}

}  // namespace

template <class T>
bool forward_mma(const AttentionForward& a, const Dropout& drop, const Call& call) {
  if (call.table.data && a.head_dim > kWidestBiased) return false;
  const bool tiny = call.longest <= 32;
  if (a.head_dim <= 32) {
    if (tiny) return run_forward<T, 32, 32, 1, kWarp>(a, drop, call);
    return run_forward<T, 32, 64, 2>(a, drop, call);
  }
  if (a.head_dim <= 64) {
    if (tiny) return run_forward<T, 64, 32, 1, kWarp>(a, drop, call);
    return run_forward<T, 64, 64, 2>(a, drop, call);
  }
  if (a.head_dim <= 128) return run_forward<T, 128, 32, 1>(a, drop, call);
  return run_forward<T, 256, 32, 1>(a, drop, call);
}

template bool forward_mma<bf16>(const AttentionForward&, const Dropout&, const Call&);
template bool forward_mma<fp16>(const AttentionForward&, const Dropout&, const Call&);

}  // namespace cuda
}  // namespace bert_fast
