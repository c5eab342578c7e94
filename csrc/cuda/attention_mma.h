// What attention's kernels on tensor cores share, bf16 and fp16: tiles of rows in shared memory,
// products of them by mma.sync m16n8k16 (Turing: two m16n8k8), dropout in their layouts.
//
// Of a product's 16 columns a lane has four that lie side by side, in two accumulator tiles: the
// rows of the right operand are read in that order (key_of), by ldmatrix at no cost. So a draw of
// dropout's, which is of four keys side by side and the four 16 further, is one lane's.
#pragma once
#include <type_traits>

#include "attention.h"

namespace bert_fast {
namespace cuda {
namespace {

constexpr int kWarps = 4, kThreads = kWarps * kWarp;

// Turing's copies pass through registers: few at a time, and little else is kept in them. Nobody
// computes meanwhile, so a second tile in shared memory is worth less than a second CTA (kOneTile).
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr int kInFlight = 2;
constexpr bool kPins = false;
#else
constexpr int kInFlight = 16;
constexpr bool kPins = true;
#endif
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
constexpr bool kMayHaveOneTile = false;
#else  // the host build takes any chip's part
constexpr bool kMayHaveOneTile = true;
#endif

// Rows of kD elements in shared memory. The chunks of 8 are twisted by row, so that ldmatrix meets no
// bank conflict over eight rows side by side, and none over the eight that `key_of` picks of 16.
template <class T, int kD>
struct Matrix {
  T* data;
  static __device__ __forceinline__ unsigned twist(unsigned row) {
    const unsigned pair = row / 4 % 2 * 2 + (row / 2 ^ row / 8) % 2;
    return kD >= 64 ? pair * 2 + row % 2 : pair;
  }
  __device__ __forceinline__ T* chunk(unsigned row, unsigned c) const {
    return data + row * kD + (c ^ twist(row)) * 8;
  }
};

// Which of 16 rows is number j, of 8, of the even or the odd tile of accumulators.
__device__ __forceinline__ unsigned key_of(unsigned j, unsigned odd) {
  return j / 2 * 4 + j % 2 + odd * 2;
}

// A thread's row and chunk of a matrix: their place is found once, for others it moves by what the
// compiler knows.
template <class T, int kD>
struct Place {
  unsigned row, chunk;  // in elements
  __device__ __forceinline__ Place(unsigned first, unsigned c)
      : row(first * kD), chunk((c ^ Matrix<T, kD>::twist(first)) * 8) {
    if constexpr (kPins) keep(row), keep(chunk);
  }
  // `rows` on, which have no bit in common with the first, and chunk c ^ `chunks`.
  __device__ __forceinline__ T* at(const Matrix<T, kD>& m, unsigned rows, unsigned chunks) const {
    return m.data + (row + (chunk ^ (chunks ^ Matrix<T, kD>::twist(rows)) * 8)) + rows * kD;
  }
};

// What a lane hands to ldmatrix: for 16 x 16 of a left operand, of rows (left right^T), of columns.
template <class T, int kD>
__device__ __forceinline__ Place<T, kD> place_of_left(unsigned row) {  // a multiple of 16
  const unsigned lane = threadIdx.x % kWarp;
  return {row + lane % 16, lane / 16};
}
template <class T, int kD>
__device__ __forceinline__ Place<T, kD> place_of_rows() {
  const unsigned lane = threadIdx.x % kWarp;
  return {key_of(lane % 8, lane / 16), lane / 8 % 2};
}
template <class T, int kD>
__device__ __forceinline__ Place<T, kD> place_of_columns() {
  const unsigned lane = threadIdx.x % kWarp;
  return {key_of(lane % 8, lane / 8 % 2), lane / 16};
}

template <class T>
__device__ __forceinline__ float element_of(uint32_t pair, int which) {
  union { uint32_t bits; T values[2]; } u = {pair};
  return to_float(u.values[which]);
}

// Which tensors can be moved by 16 bytes; and that there is one tile of the other side at a time.
enum Wide { kQ = 1, kK = 2, kV = 4, kDout = 8, kOut = 16, kDq = 32, kDk = 64, kDv = 128, kOneTile = 256 };

// Whether the next tile of the other side, of kStages, comes while one is used.
template <int kStages>
__device__ __forceinline__ bool is_piped(int wide) {
  return kStages == 2 && !(kMayHaveOneTile && wide & kOneTile);
}

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

// Into how many parts a thread's chunk is cut in loops that seldom run and are to be small: they have a
// pass for each of its rows, and where that is one alone, two of half a chunk.
template <unsigned kRowsOfThread>
constexpr unsigned kPartsOfChunk = kRowsOfThread == 1 ? 2 : 1;

// Brings tiles of kCount rows, one after the other, into shared memory; zeros outside. A thread has
// one chunk of every kStep-th row.
template <class T, int kD, int kCount, int kTeam = kThreads>
struct Loader {
  static constexpr unsigned kChunks = kD / 8, kStep = kTeam / kChunks;
  static_assert(kTeam % kChunks == 0 && kCount % kStep == 0);
  const char* from;   // the thread's first row
  int64_t step;       // bytes to its next one
  int left;           // rows of the sequence from it on; none where the chunk is past head_dim
  int head_dim;
  bool wide;
  Place<T, kD> place;

  __device__ __forceinline__ Loader(const Side& s, int first)
      : step(kStep * s.tensor.token * static_cast<int64_t>(sizeof(T))),
        head_dim(s.head_dim), wide(s.wide),
        place(team_thread<kTeam>() / kChunks, team_thread<kTeam>() % kChunks) {
    const int row = first + static_cast<int>(team_thread<kTeam>() / kChunks);
    const int d = static_cast<int>(team_thread<kTeam>() % kChunks * 8);
    left = d < s.head_dim ? s.length - row : 0;
    from = reinterpret_cast<const char*>(
        row_of<T>(s.tensor, static_cast<int64_t>(s.begin) + row, s.head) + d);
  }

  // The next tile. To be committed and waited for.
  __device__ __forceinline__ void load(const Matrix<T, kD>& to) {
    constexpr unsigned kParts = kPartsOfChunk<kCount / kStep>, kPart = 8 / kParts;
    if (wide) {
#pragma unroll kInFlight
      for (unsigned i = 0; i < kCount / kStep; ++i) {
        copy_async_16(place.at(to, i * kStep, 0), from, static_cast<int>(i * kStep) < left);
        if (kParts == 1) from += step;
      }
    } else {
#pragma unroll 1
      for (unsigned i = 0; i < kCount / kStep * kParts; ++i) {
        const unsigned row = i / kParts * kStep, part = i % kParts * kPart;
        Pack<T, kPart> pack;
        const T* element = reinterpret_cast<const T*>(from) + part;
#pragma unroll
        for (unsigned j = 0; j < kPart; ++j) {
          const int d = static_cast<int>(team_thread<kTeam>() % kChunks * 8 + part + j);
          const bool inside = static_cast<int>(row) < left && d < head_dim;
          pack.values[j] = inside ? element[j] : from_float<T>(0.0f);
        }
        store(place.at(to, row, 0) + part, pack);
        if (kParts == 1) from += step;
      }
    }
    if (kParts > 1) from += step;  // of a row alone, of either kind: at once it is fewer instructions
    left -= kCount;
  }
};

// (Rows + the projection's bias) * factor, of the chunks that this thread has loaded.
template <class T, int kD, int kCount, int kTeam>
__device__ __forceinline__ void add_bias(const Matrix<T, kD>& m, const float* bias,
                                         int head_dim, float factor) {
  constexpr unsigned kChunks = kD / 8, kStep = kTeam / kChunks;
  constexpr unsigned kParts = kPartsOfChunk<kCount / kStep>, kPart = 8 / kParts;
  const unsigned c = team_thread<kTeam>() % kChunks;
  const Place<T, kD> place(team_thread<kTeam>() / kChunks, c);
  float add[kPart];
  const auto fetch = [&](unsigned part) {
#pragma unroll
    for (unsigned j = 0; j < kPart; ++j) {
      const int d = static_cast<int>(c * 8 + part + j);
      add[j] = bias && d < head_dim ? bias[d] : 0.0f;
    }
  };
  const auto change = [&](unsigned row, unsigned part) {
    T* at = place.at(m, row, 0) + part;
    Pack<T, kPart> pack = load<Pack<T, kPart>>(at);
#pragma unroll
    for (unsigned j = 0; j < kPart; ++j) {
      pack.values[j] = from_float<T>((to_float(pack.values[j]) + add[j]) * factor);
    }
    store(at, pack);
  };
  if constexpr (kParts == 1) {
    fetch(0);
#pragma unroll (kCount / kStep > 2 ? 2 : 1)
    for (unsigned i = 0; i < kCount; i += kStep) change(i, 0);
  } else {
#pragma unroll 1
    for (unsigned part = 0; part < 8; part += kPart) {
      fetch(part);
      change(0, part);
    }
  }
}

// acc (16 x kD) += weights (16 x 8 kTiles, accumulators of a product) times rows of `right`, kM
// times.
template <class T, int kD, int kM, int kTiles, class Places>
__device__ __forceinline__ void multiply_weights(float (&acc)[kM][kD / 8][4],
                                                 const float (&weights)[kM][kTiles][4],
                                                 const Matrix<T, kD>& right, unsigned from,
                                                 const Places& columns) {
#pragma unroll
  for (int k = 0; k < kTiles / 2; ++k) {
    uint32_t a[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      const float(&low)[4] = weights[m][2 * k], (&high)[4] = weights[m][2 * k + 1];
      a[m][0] = pack_pair<T>(low[0], low[1]), a[m][1] = pack_pair<T>(low[2], low[3]);
      a[m][2] = pack_pair<T>(high[0], high[1]), a[m][3] = pack_pair<T>(high[2], high[3]);
    }
#pragma unroll
    for (int n = 0; n < kD / 16; ++n) {
      uint32_t b[4];
      load_matrices<true>(b, columns.at(right, (from + k) * 16, 2 * n));
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        mma<T>(acc[m][2 * n], a[m], b[0], b[1]);
        mma<T>(acc[m][2 * n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// acc (16 x 8 kTiles), kM times, += rows of the left operand times rows 16 `from` on of `right`: left
// right^T. read(m, k, a) gives the left operand's 16 x 16.
template <class T, int kD, int kM, int kTiles, class Read, class Places>
__device__ __forceinline__ void multiply_rows(float (&acc)[kM][kTiles][4], const Read& read,
                                              const Matrix<T, kD>& right, unsigned from,
                                              const Places& rows) {
#pragma unroll
  for (int k = 0; k < kD / 16; ++k) {
    uint32_t a[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m) read(m, k, a[m]);
#pragma unroll
    for (int n = 0; n < kTiles / 2; ++n) {
      uint32_t b[4];
      load_matrices<false>(b, rows.at(right, (from + n) * 16, 2 * k));
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        mma<T>(acc[m][2 * n], a[m], b[0], b[1]);
        mma<T>(acc[m][2 * n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// Where scores are in their sequence: the lane's first query and first key.
struct Block {
  int query, key, q_length, k_length, head, sequence;
  bool causal;
};

// -inf for the keys that do not count, in row `half` of a tile's two, the lane's first + `down`.
template <int kTiles>
__device__ __forceinline__ void hide(float (&scores)[kTiles][4], const Block& b, int down, int half) {
  const int seen = b.query + down + 1 + b.k_length - b.q_length;
  const int left = (b.causal ? min(b.k_length, seen) : b.k_length) - b.key;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      if (n / 2 * 16 + n % 2 * 2 + j >= left) scores[n][half * 2 + j] = -INFINITY;
    }
  }
}

// Scores, of queries by keys, in base 2 and with the position bias.
template <int kM, int kTiles>
__device__ __forceinline__ void add_table(float (&scores)[kM][kTiles][4], const Block& b, float c,
                                          const Table& table) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = min(b.query + 16 * m + i / 2 * 8, b.q_length - 1);  // past the end: anything
      const float* from = table.data + (b.head * table.rows + row) * table.columns + b.key + i % 2;
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        const int at = n / 2 * 16 + n % 2 * 2;
        const float bias = b.key + at + i % 2 < b.k_length ? from[at] : -INFINITY;
        scores[m][n][i] = bias == -INFINITY ? bias : fmaf(scores[m][n][i], c, bias * kLog2e);
      }
    }
  }
}
template <int kM, int kTiles>
__device__ __forceinline__ void add_table(float (&)[kM][kTiles][4], const Block&, float) {}

// A warp's 16 rows of accumulators to memory, by way of its own rows of shared memory, which no other
// warp may still be reading: eight from `row` on, and eight kApart further.
template <class T, int kD, int kApart = 8>
__device__ __forceinline__ void store_rows(const float (&acc)[kD / 8][4], float scale0, float scale1,
                                           const Matrix<T, kD>& m, int row, const Side& s, int first) {
  const int lane = threadIdx.x % kWarp, pair = lane % 4 * 2;
  const Place<T, kD> mine(row + lane / 4, 0);
  warp_barrier();  // all lanes have read what was there
#pragma unroll
  for (int n = 0; n < kD / 8; ++n) {
    const uint32_t top = pack_pair<T>(acc[n][0] * scale0, acc[n][1] * scale0);
    const uint32_t bottom = pack_pair<T>(acc[n][2] * scale1, acc[n][3] * scale1);
    store(mine.at(m, 0, n) + pair, top);
    store(mine.at(m, kApart, n) + pair, bottom);
  }
  warp_barrier();
  constexpr int kChunks = kD / 8, kStep = kWarp / kChunks;
  const int c = lane % kChunks, d = c * 8, r = row + lane / kChunks;
  const int left = d < s.head_dim ? s.length - first - r : 0;
  T* to = row_of<T>(s.tensor, static_cast<int64_t>(s.begin) + first + r, s.head) + d;
  const Place<T, kD> place(r, c);
#pragma unroll 4
  for (int i = 0; i < 16; i += kStep, to += kStep * s.tensor.token) {
    if (kApart != 8 && i == 8) to += (kApart - 8) * s.tensor.token;
    const int at = i < 8 ? i : i + kApart - 8;
    if (at >= left) break;
    const Pack<T, 8> pack = load<Pack<T, 8>>(place.at(m, at, 0));
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

// Of so many tiles of 8 keys, those that a draw is for.
template <int kTiles>
constexpr int kDrawn = kTiles < 4 ? kTiles : 4;

// Whether dropout keeps element j of a lane's in these tiles. Two tiles are one half of a draw.
template <int kTiles>
__device__ __forceinline__ bool is_kept(const Words& words, int j, const Block& b, const Dropout& drop) {
  return is_kept(words.w[j % 4], kTiles < 4 ? b.key >> 4 & 1 : j / 4, drop);
}

// Philox's keys; kPinned: they stay in registers.
template <bool kDrop, bool kPinned>
__device__ __forceinline__ PhiloxKeys keys_of(const Dropout& drop) {
  PhiloxKeys draw = philox_keys(kDrop && drop.seed ? *drop.seed : 0);
  if constexpr (kDrop && kPinned && kPins) {
#pragma unroll
    for (uint32_t& word : draw.words) keep(word);
  }
  return draw;
}

// The scale by its sign, which one operand is multiplied by, and its size, in base 2: so the greatest
// product is the greatest score, and -inf stays what hides one.
struct Scale {
  float sign, c;
  explicit __device__ __forceinline__ Scale(float scale)
      : sign(scale > 0 ? 1.0f : scale < 0 ? -1.0f : 0.0f),
        c((scale != 0 ? fabsf(scale) : 1.0f) * kLog2e) {}
};

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, shuffle_xor(x, 1));
  return fmaxf(x, shuffle_xor(x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
  x += shuffle_xor(x, 1);
  return x + shuffle_xor(x, 2);
}

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

inline bool is_turing(int device) {
  return device_attribute(cudaDevAttrComputeCapabilityMajor, device) < 8;
}

// kOneTile where on Turing two CTAs fit an SM's 64 KiB of shared memory with one tile each, and do not
// with two; else 0. bytes(stages): a CTA's.
template <class Bytes>
int one_tile(const Bytes& bytes, int stages, int device) {
  const auto pair_fits = [&](int count) { return 2 * bytes(count) <= (64 << 10); };
  return stages == 2 && is_turing(device) && pair_fits(1) && !pair_fits(2) ? kOneTile : 0;
}

// Whether the chip has tensor cores for T and so much shared memory.
template <class T>
bool fits(size_t bytes, int device) {
  if (is_turing(device) && std::is_same_v<T, bf16>) return false;
  return bytes <= static_cast<size_t>(
                      device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
}

}  // namespace
}  // namespace cuda
}  // namespace bert_fast
