// C = A B (or C += A B) on small fp32 matrices that are already in cache: the products inside
// attention. A tile of C lives in registers while k runs; B's rows are read as vectors, A one
// broadcast element at a time, which is why A may have any strides (a transpose costs nothing).
// Runs of k are summed on their own: short sums round less, as in linear.h.
#pragma once
#include <algorithm>

#include "simd.h"

namespace bert_fast {
namespace BERT_FAST_ISA {
namespace {

struct MatrixA {
  const float* data;
  int64_t row, col;  // strides
};

template <int kRows, int kVectors>
BERT_FAST_INLINE void gemm_tile(int64_t depth, MatrixA a, const float* b, int64_t ldb, float* c,
                                int64_t ldc, bool accumulate) {
  vf acc[kRows][kVectors];
  for (auto& row : acc) {
    for (vf& sum : row) sum = vf{};
  }
  for (int64_t k = 0; k < depth; ++k) {
    vf row_b[kVectors];
    for (int j = 0; j < kVectors; ++j) row_b[j] = load(b + k * ldb + j * kWidth);
    for (int i = 0; i < kRows; ++i) {
      const float element = a.data[i * a.row + k * a.col];
      for (int j = 0; j < kVectors; ++j) acc[i][j] += row_b[j] * element;
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kVectors; ++j) {
      float* to = c + i * ldc + j * kWidth;
      store(to, accumulate ? load(to) + acc[i][j] : acc[i][j]);
    }
  }
}

template <int kRows, int kVectors>
void gemm_rows(int64_t rows, int64_t depth, MatrixA a, const float* b, int64_t ldb, float* c,
               int64_t ldc, bool accumulate) {
  int64_t i = 0;
  for (; i + kRows <= rows; i += kRows) {
    gemm_tile<kRows, kVectors>(depth, {a.data + i * a.row, a.row, a.col}, b, ldb, c + i * ldc, ldc,
                               accumulate);
  }
  if constexpr (kRows > 1) {
    if (i < rows) {
      gemm_rows<kRows / 2, kVectors>(rows - i, depth, {a.data + i * a.row, a.row, a.col}, b, ldb,
                                     c + i * ldc, ldc, accumulate);
    }
  }
}

inline void gemm_run(int64_t rows, int64_t cols, int64_t depth, MatrixA a, const float* b,
                     int64_t ldb, float* c, int64_t ldc, bool accumulate) {
  // Tiles leave registers for B's vectors and the broadcast: 24 + 4 + 1 of 32, or 12 + 2 + 1 of 16.
  constexpr int kVectors = kVectorRegisters == 32 ? 4 : 2;
  int64_t j = 0;
  for (; j + kVectors * kWidth <= cols; j += kVectors * kWidth) {
    gemm_rows<6, kVectors>(rows, depth, a, b + j, ldb, c + j, ldc, accumulate);
  }
  for (; j + 2 * kWidth <= cols; j += 2 * kWidth) {
    gemm_rows<kVectorRegisters == 32 ? 12 : 6, 2>(rows, depth, a, b + j, ldb, c + j, ldc, accumulate);
  }
  for (; j < cols; j += kWidth) {
    gemm_rows<12, 1>(rows, depth, a, b + j, ldb, c + j, ldc, accumulate);
  }
}

// `cols` is a multiple of kWidth: callers pad their buffers.
inline void gemm(int64_t rows, int64_t cols, int64_t depth, MatrixA a, const float* b, int64_t ldb,
                 float* c, int64_t ldc, bool accumulate) {
  constexpr int64_t kRun = 64;
  int64_t k = 0;
  do {
    gemm_run(rows, cols, std::min(kRun, depth - k), {a.data + k * a.col, a.row, a.col}, b + k * ldb,
             ldb, c, ldc, accumulate || k > 0);
  } while ((k += kRun) < depth);
}

}  // namespace
}  // namespace BERT_FAST_ISA
}  // namespace bert_fast
