// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): the
// counter-based generator behind every dropout mask. A draw depends on (seed, position) alone, so
// the backward pass redraws the forward's mask, no mask is ever stored, and all backends agree.
#pragma once
#include <cstdint>

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

}  // namespace bert_fast
