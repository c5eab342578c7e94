// GELU (Hendrycks & Gimpel 2016): gelu(x) = x * Phi(x), Phi the normal distribution function,
// exact by erf or by the paper's tanh; with the linear layer's bias added first.
#include "gelu.h"

namespace bert_fast {
namespace BERT_FAST_ISA {
namespace {

template <Gelu kind, class T>
void forward(const GeluForward& a) {
  const int threads = threads_for(a.rows * a.width, a.num_threads);
  parallel_for(threads, a.rows, grain_for(a.rows, threads), [&](int64_t row) {
    const T* x = static_cast<const T*>(a.x) + row * a.width;
    T* out = static_cast<T*>(a.out) + row * a.width;
    int64_t done = 0;
    for (; done + kTogether * kWidth <= a.width; done += kTogether * kWidth) {
      vf value[kTogether];
      each<kTogether>([&](int i) {
        value[i] = load(x + done + i * kWidth);
        if (a.bias) value[i] += load(a.bias + done + i * kWidth);
      });
      gelu<kind>(value);
      each<kTogether>([&](int i) { store(out + done + i * kWidth, value[i]); });
    }
    for_columns(a.width - done, [&](int64_t col, auto lanes) {
      vf value = load_row(x + done + col, lanes);
      if (a.bias) value += load_row(a.bias + done + col, lanes);
      store_row(out + done + col, gelu<kind>(value), lanes);
    });
  });
}

template <Gelu kind, class T>
void backward(const GeluBackward& a) {
  const RowChunks chunks(a.rows);
  Buffer partial(a.dbias ? chunks.count * a.width : 0);
  const int threads = threads_for(a.rows * a.width, a.num_threads);
  parallel_for(threads, chunks.count, 1, [&](int64_t chunk) {
    float* dbias = a.dbias ? partial + chunk * a.width : nullptr;
    if (dbias) fill(dbias, a.width, 0.0f);
    for (int64_t row = chunks.begin(chunk); row < chunks.begin(chunk + 1); ++row) {
      const T* x = static_cast<const T*>(a.x) + row * a.width;
      const T* dout = static_cast<const T*>(a.dout) + row * a.width;
      T* dx = static_cast<T*>(a.dx) + row * a.width;
      for_columns(a.width, [&](int64_t col, auto lanes) {
        vf value = load_row(x + col, lanes);
        if (a.bias) value += load_row(a.bias + col, lanes);
        const vf gradient = load_row(dout + col, lanes) * gelu_derivative<kind>(value);
        store_row(dx + col, gradient, lanes);
        if (dbias) store_row(dbias + col, load_row(dbias + col, lanes) + gradient, lanes);
      });
    }
  });
  if (a.dbias) chunks.sum(partial, a.width, a.dbias);
}

}  // namespace

void gelu_forward(const GeluForward& a) {
  dispatch_dtype(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    a.approximate == Gelu::kErf ? forward<Gelu::kErf, T>(a) : forward<Gelu::kTanh, T>(a);
  });
}

void gelu_backward(const GeluBackward& a) {
  dispatch_dtype(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    a.approximate == Gelu::kErf ? backward<Gelu::kErf, T>(a) : backward<Gelu::kTanh, T>(a);
  });
}

}  // namespace BERT_FAST_ISA
}  // namespace bert_fast
