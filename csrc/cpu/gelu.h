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
// (|x| = 7.8) the tail, 3e-15, stands still. The coefficients are those of a power of two of |x|,
// -log2(e) t Q(t); half of 2^r is a minimax polynomial, too (within 3e-9).
//
// N vectors go through it step by step: one after another, each would wait for its own last
// product, and a processor looks no more than some sixty operations ahead.
template <int N>
BERT_FAST_INLINE void normal_cdf(const vf (&x)[N], vf (&cdf)[N]) {
  constexpr float kQ[] = {
      -9.443298231e-11f, 4.993159488e-09f, -1.177893276e-07f, 1.629581402e-06f,
      -1.452349974e-05f, 8.445748456e-05f, -2.817401808e-04f, -3.113978453e-05f,
      7.017218906e-03f, -5.250631050e-02f, -4.591948796e-01f, -1.151107517e+00f,
  };
  constexpr float kHalfExp2[] = {
      7.685352410e-05f, 6.699924146e-04f, 4.809186626e-03f, 2.775164518e-02f,
      1.201132423e-01f, 3.465736028e-01f, 5.000000000e-01f,
  };
  vf t[N], q[N], shifted[N];
  each<N>([&](int i) {
    t[i] = vmin(bit_cast<vf>(bit_cast<vi>(x[i]) & 0x7FFFFFFF), splat(7.778174593f));
    q[i] = splat(kQ[0]);
  });
  each<11>([&](int k) { each<N>([&](int i) { q[i] = q[i] * t[i] + kQ[k + 1]; }); });
  each<N>([&](int i) {
    q[i] *= t[i];
    shifted[i] = q[i] + 0x1.8p23f;  // rounds to an integer, held in the low bits
    q[i] -= shifted[i] - 0x1.8p23f;
    cdf[i] = splat(kHalfExp2[0]);
  });
  each<6>([&](int k) { each<N>([&](int i) { cdf[i] = cdf[i] * q[i] + kHalfExp2[k + 1]; }); });
  each<N>([&](int i) {
    const vf tail = bit_cast<vf>(bit_cast<vi>(cdf[i]) + (bit_cast<vi>(shifted[i]) << 23));
    cdf[i] = select(x[i] > 0.0f, 1.0f - tail, tail);
  });
}

BERT_FAST_INLINE vf normal_cdf(vf x) {
  const vf one[1] = {x};
  vf cdf[1];
  normal_cdf(one, cdf);
  return cdf[0];
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

constexpr int kTogether = kVectorRegisters / 8;

// Of kTogether vectors, to the same bits.
template <Gelu kind>
BERT_FAST_INLINE void gelu(vf (&x)[kTogether]) {
  if constexpr (kind == Gelu::kErf) {
    vf cdf[kTogether];
    each<kTogether>([&](int i) { x[i] = clamp_low(x[i]); });
    normal_cdf(x, cdf);
    each<kTogether>([&](int i) { x[i] *= cdf[i]; });
  } else {
    each<kTogether>([&](int i) { x[i] = gelu<kind>(x[i]); });
  }
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
