// What the kernels of attention's backward on tensor cores share: what rows of queries bring, and the
// scores and their gradients where a warp owns keys, 16 of them, and queries come by tiles.
#pragma once
#include "attention_mma.h"

namespace bert_fast {
namespace cuda {
namespace {

// What each row of queries brings, (3, num_heads, total_q): delta = rowsum(dO * O); what dP starts
// from; and minus its log-sum-exp in base 2 (-inf where every score was: its weights are zero).
struct RowValues {
  float *delta, *start, *shift;
  RowValues(float* scratch, const AttentionShape& a)
      : delta(scratch), start(delta + a.num_heads * a.total_q), shift(start + a.num_heads * a.total_q) {}
};

// Those that can be moved by 16 bytes.
inline int which_are_wide(const AttentionBackward& a) {
  return is_wide(a.q, a) * kQ | is_wide(a.k, a) * kK | is_wide(a.v, a) * kV | is_wide(a.dout, a) * kDout |
         is_wide(a.dq, a) * kDq | is_wide(a.dk, a) * kDk | is_wide(a.dv, a) * kDv;
}

// Where a warp owns keys: how far a lane's two are apart, and the warp's two eights of them, and which
// is its first. With dropout two warps have 32 keys between them.
template <bool kDrop>
constexpr int kKeysApart = kDrop ? 16 : 8;
template <bool kDrop>
__device__ __forceinline__ int first_key_of(int warp) {
  return kDrop ? warp / 2 * 32 + warp % 2 * 8 : warp * 16;
}

// A warp's keys and values as left operands, 16 x 16 of them at a time: (0, n, f) the keys', (1, n, f)
// the values'. They stay in registers once `hold` was called; wide heads have none for them.
template <class T, int kD, bool kDrop>
struct Keys {
  static constexpr bool kHeld = kD <= 64;
  Matrix<T, kD> k, v;
  Place<T, kD> left;
  uint32_t held[2][kHeld ? kD / 16 : 1][4];

  __device__ __forceinline__ Keys(const Matrix<T, kD>& k, const Matrix<T, kD>& v, int local, int lane)
      : k(k), v(v), left(local + lane % 8 + lane / 8 % 2 * kKeysApart<kDrop>, lane / 16) {}
  __device__ __forceinline__ void hold() {
    if constexpr (kHeld) {
#pragma unroll
      for (int n = 0; n < kD / 16; ++n) {
        load_matrices<false>(held[0][n], left.at(k, 0, 2 * n));
        load_matrices<false>(held[1][n], left.at(v, 0, 2 * n));
      }
    }
  }
  __device__ __forceinline__ void operator()(int which, int n, uint32_t (&fragment)[4]) const {
    if constexpr (kHeld) {
#pragma unroll
      for (int i = 0; i < 4; ++i) fragment[i] = held[which][n][i];
    } else {
      load_matrices<false>(fragment, left.at(which ? v : k, 0, 2 * n));
    }
  }
};

// Weights, and dscores from dP, of a tile of pairs; `scale` is dropout's for what it keeps. Without
// dropout delta is in dP already.
__device__ __forceinline__ void differentiate(float& score, float& dscore, float c, float shift) {
  score = exp2_fast(fmaf(score, c, shift));
  dscore *= score;
}
__device__ __forceinline__ void differentiate(float& score, float& dscore, float c, float shift,
                                              bool keep, float scale, float delta) {
  const float weight = exp2_fast(fmaf(score, c, shift));
  dscore = weight * fmaf(dscore, keep ? scale : 0.0f, -delta);
  score = keep ? weight : 0.0f;
}

// What dropout keeps of a lane's two keys by kTiles * 8 queries: bit 8 p + 4 half of kept[j] of query
// 16 p + j of the lane's. Four lanes have the eight keys of a draw, and each draws for a quarter of
// their queries.
template <int kTiles>
__device__ __forceinline__ void draw_by_key(uint32_t (&kept)[4], const PhiloxKeys& draw,
                                            const Dropout& drop, const Block& b, int sequence) {
  const int own = threadIdx.x / 4 % 4;  // of the queries, and of the draw's neighbouring keys
  uint32_t drawn = 0;
#pragma unroll
  for (int p = 0; p < kTiles / 2; ++p) {
    const Words w = philox(draw, draw_of(b.key), b.query + 16 * p + own, b.head, sequence);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      drawn |= static_cast<uint32_t>(is_kept(w.w[i % 4], i / 4, drop)) << (8 * p + i);
    }
  }
  // That of lane own ^ j is [j], until each stands at its own query.
  uint32_t of[4] = {drawn, shuffle_xor(drawn, 4), shuffle_xor(drawn, 8), shuffle_xor(drawn, 12)};
#pragma unroll
  for (int bit = 1; bit < 4; bit *= 2) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (j & bit) continue;
      const uint32_t low = of[j], high = of[j ^ bit];
      of[j] = own & bit ? high : low;
      of[j ^ bit] = own & bit ? low : high;
    }
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) kept[j] = of[j] >> own;
}

// What rows of queries bring, a tile after the other, to shared memory: shifts, and then starts and
// deltas where so many kinds are wanted.
template <int kQueries, int kKinds, int kTeam>
struct ValueLoader {
  static constexpr int kValues = kKinds * kQueries, kFetches = (kValues + kTeam - 1) / kTeam;
  float fetched[kFetches];
  const float* from[kFetches];
  int left[kFetches];  // rows of the sequence from the value's on

  __device__ __forceinline__ ValueLoader(const RowValues& values, const AttentionShape& a, int head,
                                         int begin, int length, int first) {
#pragma unroll
    for (int j = 0; j < kFetches; ++j) {
      const int i = threadIdx.x + j * kTeam, row = first + i % kQueries;
      from[j] = values.shift - (kKinds == 1 ? 0 : i / kQueries) * a.num_heads * a.total_q +
                head * a.total_q + begin + row;
      left[j] = i < kValues ? length - row : 0;
    }
  }
  __device__ __forceinline__ void fetch() {
#pragma unroll
    for (int j = 0; j < kFetches; ++j) {
      fetched[j] = left[j] > 0 ? *from[j] : threadIdx.x + j * kTeam < kQueries ? -INFINITY : 0.0f;
      from[j] += kQueries, left[j] -= kQueries;
    }
  }
  __device__ __forceinline__ void put(float* to) const {
#pragma unroll
    for (int j = 0; j < kFetches; ++j) {
      const int i = threadIdx.x + j * kTeam;
      if (i < kValues) to[i] = fetched[j];
    }
  }
};

// Scores of a warp's 16 keys by 8 kTiles queries from row 16 `from` on, and where dk is wanted dP.
// read(0, n, f): the keys' 16 x 16; read(1, n, f): the values'. `at`: the lane's first query's values.
template <class T, int kD, int kQueries, bool kWantsDk, int kTiles, class Read, class Places>
__device__ __forceinline__ void multiply_by_key(float (&scores)[1][kTiles][4],
                                                float (&dscores)[1][kTiles][4], const Read& read,
                                                const Matrix<T, kD>& queries, const Matrix<T, kD>& douts,
                                                unsigned from, const Places& rows, const float* at) {
  multiply_rows<T, kD, 1, kTiles>(
      scores, [&](int, int n, uint32_t(&f)[4]) { read(0, n, f); }, queries, from, rows);
  if constexpr (kWantsDk) {
#pragma unroll
    for (int n = 0; n < kTiles; n += 2) {
      const Pack<float, 4> start = load<Pack<float, 4>>(at + kQueries + n * 8);
#pragma unroll
      for (int i = 0; i < 8; ++i) dscores[0][n + i / 4][i % 4] = start.values[i / 4 * 2 + i % 2];
    }
    multiply_rows<T, kD, 1, kTiles>(
        dscores, [&](int, int n, uint32_t(&f)[4]) { read(1, n, f); }, douts, from, rows);
  }
}

// -inf for the lane's two keys in queries before least[0], least[1].
template <int kTiles>
__device__ __forceinline__ void hide_by_key(float (&scores)[kTiles][4], int query, const int (&least)[2]) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (n / 2 * 16 + n % 2 * 2 + i % 2 < least[i / 2] - query) scores[n][i] = -INFINITY;
    }
  }
}

// Weights in the place of scores, and dscores in dP's. `kept`: of draw_by_key, where `drops`.
template <int kQueries, bool kWantsDk, bool kDrop, int kTiles>
__device__ __forceinline__ void differentiate_by_key(float (&scores)[1][kTiles][4],
                                                     float (&dscores)[1][kTiles][4], const float* at,
                                                     float c, bool drops, const uint32_t (&kept)[4],
                                                     const Dropout& drop) {
#pragma unroll
  for (int n = 0; n < kTiles; n += 2) {
    const Pack<float, 4> shift = load<Pack<float, 4>>(at + n * 8);
    Pack<float, 4> delta = {};
    if (kWantsDk && drops) delta = load<Pack<float, 4>>(at + 2 * kQueries + n * 8);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int j = i / 4 * 2 + i % 2, half = i / 2 % 2;  // which of the lane's queries, and keys
      float &score = scores[0][n + i / 4][i % 4], &dscore = dscores[0][n + i / 4][i % 4];
      if constexpr (kDrop) {
        const bool keep = !drops || kept[j] >> (n * 4 + half * 4) & 1;
        differentiate(score, dscore, c, shift.values[j], keep, drop.scale, delta.values[j]);
      } else {
        differentiate(score, dscore, c, shift.values[j]);
      }
    }
  }
}

}  // namespace
}  // namespace cuda
}  // namespace bert_fast
