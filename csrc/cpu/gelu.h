// GELU and its derivative on a vector of floats.
#pragma once
#include "simd.h"

namespace bert_fast {
namespace BERT_FAST_ISA {
namespace {

// Phi(x) = (1 + erf(x / sqrt 2)) / 2 by its lower tail: with t = |x| / sqrt 2,
// Phi(-|x|) = erfc(t) / 2 = exp(-t Q(t)) / 2, Q the minimax polynomial of -ln(erfc(t)) / t on
// [0, 5.5] (within 1e-7, fitted by iteratively reweighted least squares in float64). Near zero that
// is as exact as 0.5 allows; for x << 0 nothing cancels, as it does in 1 + erf(x). Past t = 5.5
// (|x| = 7.8) the tail, 3e-15, stands still.
BERT_FAST_INLINE vf normal_cdf(vf x) {
  const vf t = vmin(vmax(x, -x) * 0.707106781186547524f, splat(5.5f));
  vf q = splat(4.189181148e-09f);
  q = q * t - 1.566267280e-07f;
  q = q * t + 2.612650891e-06f;
  q = q * t - 2.555856704e-05f;
  q = q * t + 1.610707664e-04f;
  q = q * t - 6.623210961e-04f;
  q = q * t + 1.562299296e-03f;
  q = q * t + 1.221001095e-04f;
  q = q * t - 1.945586200e-02f;
  q = q * t + 1.029394769e-01f;
  q = q * t + 6.365792722e-01f;
  q = q * t + 1.128382518e+00f;
  const vf tail = exp_bounded(q * -t) * 0.5f;
  return select(x > 0.0f, 1.0f - tail, tail);
}

constexpr float kTanhScale = 0.797884560802865f;  // sqrt(2 / pi)
constexpr float kTanhCubic = 0.044715f;

// exp(-2u), of which (1 + tanh u) / 2 = 1 / (1 + exp(-2u)).
BERT_FAST_INLINE vf tanh_exponential(vf x) {
  return exp(x * (x * x * kTanhCubic + 1.0f) * (-2.0f * kTanhScale));
}

// Below -13 both forms are zero in fp32, and stopping there keeps infinities out of the products.
BERT_FAST_INLINE vf clamp_low(vf x) { return vmax(splat(-13.0f), x); }

template <Gelu kind>
BERT_FAST_INLINE vf gelu(vf x) {
  x = clamp_low(x);
  return x * (kind == Gelu::kErf ? normal_cdf(x) : 1.0f / (1.0f + tanh_exponential(x)));
}

// gelu'(x) = Phi(x) + x phi(x)
template <Gelu kind>
BERT_FAST_INLINE vf gelu_derivative(vf x) {
  x = clamp_low(x);
  x = vmin(splat(13.0f), x);
  if (kind == Gelu::kErf) {
    return normal_cdf(x) + x * exp_bounded(x * x * -0.5f) * 0.398942280401432678f;
  }
  const vf e = tanh_exponential(x);
  const vf cdf = 1.0f / (1.0f + e);
  const vf slope = x * x * (3.0f * kTanhCubic) + 1.0f;
  return cdf + x * cdf * (e * cdf) * slope * (2.0f * kTanhScale);  // e cdf = 1 - cdf, uncancelled
}

}  // namespace
}  // namespace BERT_FAST_ISA
}  // namespace bert_fast
