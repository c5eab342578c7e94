// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): the
// counter-based generator behind every dropout mask. A draw depends on (seed, position) alone, so
// the backward pass redraws the forward's mask, no mask is ever stored, and all backends agree.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define BERT_FAST_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define BERT_FAST_HOST_DEVICE inline
#endif

namespace bert_fast {

constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;

// layer_norm's counter word 3, where attention puts the sequence: one seed given to both ops must
// not give them the same numbers.
constexpr uint32_t kLayerNormStream = 0xFFFFFFFFu;

// The probability p as a threshold on 32 random bits: an element is dropped when bits < threshold.
inline uint32_t dropout_threshold(double p) {
  return static_cast<uint32_t>(p * 4294967296.0);
}

// Four words for the counter (c0, c1, c2, c3). Column `col` of a row takes word col % 4 of the
// counter whose c0 is col / 4.
BERT_FAST_HOST_DEVICE void philox(uint64_t seed, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3,
                                  uint32_t out[4]) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(kPhiloxM0) * c0;
    const uint64_t p1 = static_cast<uint64_t>(kPhiloxM1) * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  out[0] = c0, out[1] = c1, out[2] = c2, out[3] = c3;
}

}  // namespace bert_fast
