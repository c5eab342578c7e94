// GELU (Hendrycks & Gimpel 2016): gelu(x) = x * Phi(x), Phi the normal distribution function,
// exact by erf or by the paper's tanh; with the linear layer's bias added first.
#include "simd.h"

namespace bert_fast {
namespace BERT_FAST_ISA {
namespace {

// Phi(x) = (1 + erf(x / sqrt 2)) / 2, within 2 ulp over erf's range. Two minimax fits: near zero
// erf is x times a polynomial in x^2; beyond, 1 - erf(t) = exp(-t * polynomial(t)). The tail is
// kept as exp(...) and never as 1 - (1 - ...), so gelu keeps its digits for x << 0 too.
BERT_FAST_INLINE vf normal_cdf(vf x) {
  const vf a = x * 0.707106781186547524f;
  const vf t = a < 0.0f ? -a : a;
  const vf s = a * a;

  vf tail = t * 1.72948930e-5f - 3.83208680e-4f;
  const vf middle = t * 3.88393435e-3f - 2.42545605e-2f;
  tail = tail * s + middle;
  tail = tail * t + 1.06777847e-1f;
  tail = tail * t + 6.34846687e-1f;
  tail = tail * t + 1.28717512e-1f;
  tail = exp(-(tail * t + t)) * 0.5f;

  vf near = splat(-5.99104969e-4f);
  near = near * s + 4.99339588e-3f;
  near = near * s - 2.67667342e-2f;
  near = near * s + 1.12818025e-1f;
  near = near * s - 3.76124859e-1f;
  near = near * s + 1.28379151e-1f;
  near = (near * a + a) * 0.5f + 0.5f;

  return select(t > 0.921875f, select(a > 0.0f, 1.0f - tail, tail), near);
}

constexpr float kTanhScale = 0.797884560802865f;  // sqrt(2 / pi)
constexpr float kTanhCubic = 0.044715f;

// (1 + tanh u) / 2 = 1 / (1 + exp(-2u))
BERT_FAST_INLINE vf tanh_cdf(vf x) {
  return 1.0f / (1.0f + exp(x * (x * x * kTanhCubic + 1.0f) * (-2.0f * kTanhScale)));
}

template <Gelu kind>
BERT_FAST_INLINE vf gelu(vf x) {
  return x * (kind == Gelu::kErf ? normal_cdf(x) : tanh_cdf(x));
}

// gelu'(x) = Phi(x) + x phi(x)
template <Gelu kind>
BERT_FAST_INLINE vf gelu_derivative(vf x) {
  if (kind == Gelu::kErf) {
    return normal_cdf(x) + x * exp(x * x * -0.5f) * 0.398942280401432678f;
  }
  const vf cdf = tanh_cdf(x);
  const vf slope = x * x * (3.0f * kTanhCubic) + 1.0f;
  return cdf + x * cdf * (1.0f - cdf) * slope * (2.0f * kTanhScale);
}

template <Gelu kind, class T>
void forward(const GeluForward& a) {
#pragma omp parallel for num_threads(threads_for(a.rows * a.width, a.num_threads)) schedule(static)
  for (int64_t row = 0; row < a.rows; ++row) {
    const T* x = static_cast<const T*>(a.x) + row * a.width;
    T* out = static_cast<T*>(a.out) + row * a.width;
    for_columns(a.width, [&](int64_t col, int lanes) {
      vf value = load_row(x + col, lanes);
      if (a.bias) value += load_row(a.bias + col, lanes);
      store_row(out + col, gelu<kind>(value), lanes);
    });
  }
}

template <Gelu kind, class T>
void backward(const GeluBackward& a) {
  const RowChunks chunks(a.rows);
  Buffer partial(a.dbias ? chunks.count * a.width : 0);
#pragma omp parallel for num_threads(threads_for(a.rows * a.width, a.num_threads)) schedule(static)
  for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
    float* dbias = a.dbias ? partial + chunk * a.width : nullptr;
    if (dbias) fill(dbias, a.width, 0.0f);
    for (int64_t row = chunks.begin(chunk); row < chunks.begin(chunk + 1); ++row) {
      const T* x = static_cast<const T*>(a.x) + row * a.width;
      const T* dout = static_cast<const T*>(a.dout) + row * a.width;
      T* dx = static_cast<T*>(a.dx) + row * a.width;
      for_columns(a.width, [&](int64_t col, int lanes) {
        vf value = load_row(x + col, lanes);
        if (a.bias) value += load_row(a.bias + col, lanes);
        const vf gradient = load_row(dout + col, lanes) * gelu_derivative<kind>(value);
        store_row(dx + col, gradient, lanes);
        if (dbias) store_row(dbias + col, load_row(dbias + col, lanes) + gradient, lanes);
      });
    }
  }
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
