// Layer normalisation (Ba et al. 2016, eq. 4) of one row that is summed already.
#pragma once
#include <cmath>

#include "simd.h"

namespace bert_fast {
namespace BERT_FAST_ISA {
namespace {

int64_t scratch_width(int64_t width) { return (width + 8 * kWidth - 1) / (8 * kWidth) * (8 * kWidth); }

// out = (h - mean) * rstd * weight + bias. `total`: h's columns, added lane by lane; columns of h
// past its width may hold anything. mean and rstd may be null.
template <class T>
BERT_FAST_INLINE void normalise_row(const float* h, vf total, int64_t width, double eps,
                                    const float* weight, const float* bias, T* out,
                                    float* mean_out, float* rstd_out) {
  const float inverse_width = 1.0f / static_cast<float>(width);
  const float mean = sum(total) * inverse_width;

  vf squares = {};
  for_columns(width, [&](int64_t col, auto lanes) {
    vf centred = load(h + col) - mean;
    if (lanes < kWidth) centred = select(lane_index() < static_cast<int>(lanes), centred, vf{});
    squares += centred * centred;
  });
  const float variance = sum(squares) * inverse_width;
  const float rstd = static_cast<float>(1.0 / std::sqrt(static_cast<double>(variance) + eps));
  if (mean_out) *mean_out = mean;
  if (rstd_out) *rstd_out = rstd;

  for_columns(width, [&](int64_t col, auto lanes) {
    const vf normal = (load(h + col) - mean) * rstd;
    store_row(out + col, normal * load_row(weight + col, lanes) + load_row(bias + col, lanes),
              lanes);
  });
}

}  // namespace
}  // namespace BERT_FAST_ISA
}  // namespace bert_fast
