// Layer normalisation (Ba et al. 2016, eq. 4) with what BERT does just before it, in one pass:
// sum = residual + dropout(x + linear_bias);  out = (sum - mean) * rstd * weight + bias.
#include "layer_norm.h"

namespace bert_fast {
namespace BERT_FAST_ISA {
namespace {

template <class T>
void forward(const LayerNormForward& a) {
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
        dropout_row(factors, a.hidden, a.seed, a.dropout_p, 0, static_cast<uint32_t>(row), 0,
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
    });
  });
}

// With g = dout * weight and n = (sum - mean) * rstd:
//   dsum = rstd * (g - mean(g) - n * mean(g * n)),  dx = dropout(dsum),
//   dweight = sum over rows of dout * n,  dbias = of dout,  dlinear_bias = of dx.
template <class T>
void backward(const LayerNormBackward& a) {
  const float inverse_width = 1.0f / static_cast<float>(a.hidden);
  const RowChunks chunks(a.rows);
  const int64_t sums = a.dlinear_bias ? 3 : 2;
  Buffer partial(chunks.count * sums * a.hidden);
  const int threads = threads_for(a.rows * a.hidden, a.num_threads);
  // Runs of chunks, as in forward: neighbouring rows stay in one core's cache (measured with two
  // cores and 1024 x 384: 108 us; one chunk at a time 133).
  parallel(threads, chunks.count, grain_for(chunks.count, threads), [&](Work& work) {
    Buffer factors(a.dropout_p > 0.0f ? scratch_width(a.hidden) : 0);
    for_each_of(work, [&](int64_t chunk) {
      float* dweight = partial + chunk * sums * a.hidden;
      fill(dweight, sums * a.hidden, 0.0f);
      float* dbias = dweight + a.hidden;
      float* dlinear_bias = a.dlinear_bias ? dbias + a.hidden : nullptr;
      // Several rows at once read and write the sums over rows once, in the rows' order.
      constexpr int kRows = kVectorRegisters / 8;
      const auto first_pass = [&](int64_t first, auto rows, float* mean_g, float* mean_gn) {
        constexpr int R = decltype(rows)::value;
        const T* dout[R];
        const T* kept[R];
        float mean[R], rstd[R];
        vf total_g[R] = {}, total_gn[R] = {};
        each<R>([&](int r) {
          dout[r] = static_cast<const T*>(a.dout) + (first + r) * a.hidden;
          kept[r] = static_cast<const T*>(a.sum) + (first + r) * a.hidden;
          mean[r] = a.mean[first + r];
          rstd[r] = a.rstd[first + r];
        });
        for_columns(a.hidden, [&](int64_t col, auto lanes) {
          const vf weight = load_row(a.weight + col, lanes);
          vf weight_sum = load_row(dweight + col, lanes), bias_sum = load_row(dbias + col, lanes);
          each<R>([&](int r) {
            const vf gradient = load_row(dout[r] + col, lanes);
            const vf normal = (load_row(kept[r] + col, lanes) - mean[r]) * rstd[r];
            const vf g = gradient * weight;
            total_g[r] += g;
            total_gn[r] += g * normal;
            weight_sum += gradient * normal;
            bias_sum += gradient;
          });
          store_row(dweight + col, weight_sum, lanes);
          store_row(dbias + col, bias_sum, lanes);
        });
        each<R>([&](int r) {
          mean_g[r] = sum(total_g[r]) * inverse_width;
          mean_gn[r] = sum(total_gn[r]) * inverse_width;
        });
      };
      const auto second_pass = [&](int64_t row, float mean_g, float mean_gn) {
        const T* dout = static_cast<const T*>(a.dout) + row * a.hidden;
        const T* kept = static_cast<const T*>(a.sum) + row * a.hidden;
        T* dsum = static_cast<T*>(a.dsum) + row * a.hidden;
        T* dx = a.dx ? static_cast<T*>(a.dx) + row * a.hidden : nullptr;
        const float mean = a.mean[row], rstd = a.rstd[row];
        if (dx) {
          dropout_row(factors, a.hidden, a.seed, a.dropout_p, 0, static_cast<uint32_t>(row),
                      0, kLayerNormStream);
        }
        for_columns(a.hidden, [&](int64_t col, auto lanes) {
          const vf normal = (load_row(kept + col, lanes) - mean) * rstd;
          const vf g = load_row(dout + col, lanes) * load_row(a.weight + col, lanes);
          vf gradient = (g - mean_g - normal * mean_gn) * rstd;
          store_row(dsum + col, gradient, lanes);
          if (dx) {
            gradient *= load(factors + col);
            store_row(dx + col, gradient, lanes);
          }
          if (dlinear_bias) {
            store_row(dlinear_bias + col, load_row(dlinear_bias + col, lanes) + gradient, lanes);
          }
        });
      };
      int64_t row = chunks.begin(chunk);
      const int64_t end = chunks.begin(chunk + 1);
      float mean_g[kRows], mean_gn[kRows];
      for (; row + kRows <= end; row += kRows) {
        first_pass(row, std::integral_constant<int, kRows>{}, mean_g, mean_gn);
        for (int r = 0; r < kRows; ++r) second_pass(row + r, mean_g[r], mean_gn[r]);
      }
      for (; row < end; ++row) {
        first_pass(row, std::integral_constant<int, 1>{}, mean_g, mean_gn);
        second_pass(row, mean_g[0], mean_gn[0]);
      }
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
  dispatch_dtype(a.dtype, [&](auto* type) { forward<std::remove_pointer_t<decltype(type)>>(a); });
}

void layer_norm_backward(const LayerNormBackward& a) {
  dispatch_dtype(a.dtype, [&](auto* type) { backward<std::remove_pointer_t<decltype(type)>>(a); });
}

}  // namespace BERT_FAST_ISA
}  // namespace bert_fast
