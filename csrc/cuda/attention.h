// What the attention kernels share: which rows a CTA has, and which pairs of them count.
#pragma once
#include "device.h"

namespace bert_fast {
namespace cuda {

constexpr float kLog2e = 1.44269504088896f, kLn2 = 0.693147180559945f;

// A tile of rows of one sequence, found as in kernels/attention.py: tile t belongs to the last s
// with cu[s] / rows + s <= t; s = batch means the rows past the last sequence, which see no keys.
struct Tile {
  int sequence, begin, length, first;  // first: the tile's first row in the sequence
};

// By a whole warp: its lanes look at once, so that two rounds of loads find one of 1,000 sequences.
__device__ __forceinline__ Tile find_tile(int tile, const int32_t* cu, int batch, int total, int rows) {
  const int lane = threadIdx.x % kWarp;
  int low = 0;
  for (int left = batch + 1; left > 1;) {
    const int step = (left + kWarp - 1) / kWarp, at = low + lane * step;
    const int passed = count_bits(ballot(at <= batch && cu[min(at, batch)] / rows + at <= tile)) - 1;
    left = min(step, left - passed * step);
    low += passed * step;
  }
  const int begin = cu[low], end = low < batch ? cu[low + 1] : total;
  return {low, begin, end - begin, (tile - begin / rows - low) * rows};
}

// The grid that covers them all: at most batch + 1 tiles too many, which return at once.
inline dim3 tiles_of(int64_t total, int rows, const AttentionShape& a) {
  return dim3(static_cast<unsigned>(total / rows + a.batch + 1), static_cast<unsigned>(a.num_heads));
}

__device__ __forceinline__ int span(const int32_t* cu, int batch, int sequence, int& begin) {
  begin = cu[sequence];
  return sequence < batch ? cu[sequence + 1] - begin : 0;
}

// Causal is aligned to the bottom right: the last query sees the last key.
__device__ __forceinline__ bool seen(int row, int column, int q_length, int k_length, bool causal) {
  return row < q_length && column < k_length && (!causal || column <= row + k_length - q_length);
}

// Whether a pair counts. With a table its score, in base 2, gets the position bias, whose -inf hides.
__device__ __forceinline__ bool scored(float&, int row, int column, int q_length, int k_length,
                                       bool causal, int) {
  return seen(row, column, q_length, k_length, causal);
}
__device__ __forceinline__ bool scored(float& score, int row, int column, int q_length, int k_length,
                                       bool causal, int head, const Table& table) {
  if (!seen(row, column, q_length, k_length, causal)) return false;
  const float bias = table.data[(head * table.rows + row) * table.columns + column];
  score += bias * kLog2e;
  return bias != -INFINITY;
}

// run(), or run(the table) where there is one: kernels take it as their last argument, or do not.
template <class Run>
auto with_table(const Table& table, const Run& run) {
  return table.data ? run(table) : run();
}

// Which of a row's draws has a key: that of four neighbouring ones and of those 16 further.
__device__ __forceinline__ uint32_t draw_of(uint32_t key) { return key / 32 * 4 + key % 16 / 4; }

// A row's log-sum-exp in base 2, for exp2(score - it). +inf where every score of the row was -inf:
// its weights are zero, not NaN.
__device__ __forceinline__ float log2_of(float lse) {
  return lse == -INFINITY ? INFINITY : lse * kLog2e;
}

template <class T>
__device__ __forceinline__ T* row_of(const Strided& t, int64_t row, int head) {
  return static_cast<T*>(t.data) + row * t.token + head * t.head;
}

// The kernels on tensor cores (16-bit types); false where they do not fit the chip.
template <class T> bool forward_mma(const AttentionForward&, const Dropout&, const Call&);
// `backward_rows` first, in any case: delta is the first of what it leaves in the scratch,
// (3, num_heads, total_q).
template <class T> void backward_rows(const AttentionBackward&, const Dropout&, const Call&);
template <class T> bool backward_mma(const AttentionBackward&, const Dropout&, const Call&);
// The same by one kernel, where it is the better one; else false. And the scratch for either, in floats.
template <class T> bool backward_fused(const AttentionBackward&, const Dropout&, const Call&);
int64_t scratch_mma(const AttentionShape&, const Call&);

}  // namespace cuda
}  // namespace bert_fast
