// Layer normalisation (Ba et al. 2016, eq. 4) with what BERT does just before it, in one pass:
// sum = residual + dropout(x + linear_bias);  out = (sum - mean) * rstd * weight + bias.
#include "layer_norm.h"

namespace bert_fast {
namespace BERT_FAST_ISA {
namespace {

// then(row): what follows a row, while it is in the L1 cache.
template <class T, class Then>
void forward(const LayerNormForward& a, Then then) {
  const int threads = threads_for(a.rows * a.hidden, a.num_threads);
  parallel(threads, a.rows, grain_for(a.rows, threads), [&](Work& work) {
    // The row being normalised, in fp32, and its dropout factors: both stay in the L1 cache.
    Buffer row_sum(scratch_width(a.hidden));
    Buffer factors(a.dropout_p > 0.0f ? scratch_width(a.hidden) : 0);
    for_each_of(work, [&](int64_t row) {
      const T* x = static_cast<const T*>(a.x) + row * a.hidden;
      const T* residual = a.residual ? static_cast<const T*>(a.residual) + row * a.hidden : nullptr;
      T* out = static_cast<T*>(a.out) + row * a.hidden;
      T* kept = a.sum ? static_cast<T*>(a.sum) + row * a.hidden : nullptr;
      float* h = row_sum;
      if (a.dropout_p > 0.0f) {
        dropout_row<false>(factors, a.hidden, a.seed, a.dropout_p, 0, static_cast<uint32_t>(row), 0,
                           kLayerNormStream);
      }

      vf total = {};
      for_columns(a.hidden, [&](int64_t col, auto lanes) {
        vf value = load_row(x + col, lanes);
        if (a.linear_bias) value += load_row(a.linear_bias + col, lanes);
        if (a.dropout_p > 0.0f) value *= load(factors + col);
        if (residual) value += load_row(residual + col, lanes);
        if (kept) {
          // Backward normalises what was kept, so forward does too: the rounded sum.
          store_row(kept + col, value, lanes);
          value = load_row(kept + col, lanes);
        }
        store(h + col, value);
        total += value;
      });
      normalise_row(h, total, a.hidden, a.eps, a.weight, a.bias, out,
                    a.mean ? a.mean + row : nullptr, a.rstd ? a.rstd + row : nullptr);
      then(row);
    });
  });
}

// With g = dout * weight and n = (sum - mean) * rstd:
//   dsum = rstd * (g - mean(g) - n * mean(g * n)),  dx = dropout(dsum),
//   dweight = sum over rows of dout * n,  dbias = of dout,  dlinear_bias = of dx.
//
// kRows rows at once read and write the sums over rows once, in the rows' order.
template <int kRows, class T>
BERT_FAST_INLINE void backward_rows(const LayerNormBackward& a, int64_t first, float* dweight,
                                    float* dbias, float* dlinear_bias, float* factors) {
  const int64_t hidden = a.hidden, begin = first * hidden, width = scratch_width(hidden);
  const T* dout = static_cast<const T*>(a.dout) + begin;
  const T* kept = static_cast<const T*>(a.sum) + begin;
  T* dsum = static_cast<T*>(a.dsum) + begin;
  T* dx = a.dx ? static_cast<T*>(a.dx) + begin : nullptr;
  const float inverse_width = 1.0f / static_cast<float>(hidden);
  float mean[kRows], rstd[kRows], mean_g[kRows], slope[kRows];
  vf total_g[kRows] = {}, total_gn[kRows] = {};
  each<kRows>([&](int r) {
    mean[r] = a.mean[first + r];
    rstd[r] = a.rstd[first + r];
  });
  for_columns(hidden, [&](int64_t col, auto lanes) {
    const vf weight = load_row(a.weight + col, lanes);
    vf weight_sum = load_row(dweight + col, lanes), bias_sum = load_row(dbias + col, lanes);
    each<kRows>([&](int r) {
      const vf gradient = load_row(dout + r * hidden + col, lanes);
      const vf normal = (load_row(kept + r * hidden + col, lanes) - mean[r]) * rstd[r];
      const vf product = gradient * normal;
      total_g[r] += gradient * weight;
      total_gn[r] += product * weight;
      weight_sum += product;
      bias_sum += gradient;
    });
    store_row(dweight + col, weight_sum, lanes);
    store_row(dbias + col, bias_sum, lanes);
  });
  each<kRows>([&](int r) {
    mean_g[r] = sum(total_g[r]) * inverse_width;
    slope[r] = sum(total_gn[r]) * inverse_width * rstd[r];
    if (dx) {
      dropout_row<false>(factors + r * width, hidden, a.seed, a.dropout_p, 0,
                         static_cast<uint32_t>(first + r), 0, kLayerNormStream);
    }
  });
  for_columns(hidden, [&](int64_t col, auto lanes) {
    const vf weight = load_row(a.weight + col, lanes);
    vf linear_sum = dlinear_bias ? load_row(dlinear_bias + col, lanes) : vf{};
    each<kRows>([&](int r) {
      const vf g = load_row(dout + r * hidden + col, lanes) * weight;
      const vf centred = load_row(kept + r * hidden + col, lanes) - mean[r];
      vf gradient = (g - mean_g[r] - centred * slope[r]) * rstd[r];
      store_row(dsum + r * hidden + col, gradient, lanes);
      if (dx) {
        gradient *= load(factors + r * width + col);
        store_row(dx + r * hidden + col, gradient, lanes);
      }
      linear_sum += gradient;
    });
    if (dlinear_bias) store_row(dlinear_bias + col, linear_sum, lanes);
  });
}

// Rows at once, if all of their data fits in L1; else one: it is read twice, and a processor
// fetches ahead for few streams. (Zen 4, 1024 rows, two threads: 384 wide, four rows 52 us and one
// 59; 768 wide, 125 and 112.)
constexpr int kRowsTogether = kVectorRegisters / 8;
template <class T>
bool fit_together(int64_t hidden) {
  constexpr int64_t kBytes = 20 << 10;
  return kRowsTogether * 3 * hidden * static_cast<int64_t>(sizeof(T)) <= kBytes;
}

template <class T>
void backward(const LayerNormBackward& a) {
  const RowChunks chunks(a.rows, 32);  // sums of 16 rows: 3 to 19% slower, 768 wide
  const int64_t sums = a.dlinear_bias ? 3 : 2;
  Buffer partial(chunks.count * sums * a.hidden);
  const int threads = threads_for(a.rows * a.hidden, a.num_threads);
  const int64_t together = fit_together<T>(a.hidden) ? kRowsTogether : 1;
  // Runs of chunks, as in forward: neighbouring rows stay in one core's cache (measured with two
  // cores and 1024 x 384: 108 us; one chunk at a time 133).
  parallel(threads, chunks.count, grain_for(chunks.count, threads), [&](Work& work) {
    Buffer factors(a.dx ? together * scratch_width(a.hidden) : 0);
    for_each_of(work, [&](int64_t chunk) {
      float* dweight = partial + chunk * sums * a.hidden;
      fill(dweight, sums * a.hidden, 0.0f);
      float* dbias = dweight + a.hidden;
      float* dlinear_bias = a.dlinear_bias ? dbias + a.hidden : nullptr;
      int64_t row = chunks.begin(chunk);
      const int64_t end = chunks.begin(chunk + 1);
      for (; together > 1 && row + together <= end; row += together) {
        backward_rows<kRowsTogether, T>(a, row, dweight, dbias, dlinear_bias, factors);
      }
      for (; row < end; ++row) backward_rows<1, T>(a, row, dweight, dbias, dlinear_bias, factors);
    });
  });
  Buffer total(sums * a.hidden);
  chunks.sum(partial, sums * a.hidden, total);
  std::memcpy(a.dweight, total, a.hidden * sizeof(float));
  std::memcpy(a.dbias, total + a.hidden, a.hidden * sizeof(float));
  if (a.dlinear_bias) {
    std::memcpy(a.dlinear_bias, total + 2 * a.hidden, a.hidden * sizeof(float));
  }
}

}  // namespace

void layer_norm_forward(const LayerNormForward& a) {
  dispatch_dtype(a.dtype, [&](auto* type) {
    forward<std::remove_pointer_t<decltype(type)>>(a, [](int64_t) {});
  });
}

void layer_norm_converted(const LayerNormForward& a, const LinearKernels& by,
                          const LinearForward& next) {
  forward<float>(a, [&](int64_t row) { by.convert(next, row); });
}

void layer_norm_backward(const LayerNormBackward& a) {
  dispatch_dtype(a.dtype, [&](auto* type) { backward<std::remove_pointer_t<decltype(type)>>(a); });
}

}  // namespace BERT_FAST_ISA
}  // namespace bert_fast
