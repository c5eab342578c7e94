// Philox4x32-7 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011: the fewest
// rounds that pass BigCrush): the counter-based generator behind every dropout mask. A draw depends on
// (seed, position) alone, so the backward pass redraws the forward's mask, no mask is ever stored,
// and all backends agree. Its four words are eight halves, the low one first, for eight elements
// (bert_fast/ops/reference.py says which).
#pragma once
#include <cstdint>

namespace bert_fast {

constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 7;

// layer_norm's counter word 3, where attention puts the sequence: one seed given to both ops must
// not give them the same numbers.
constexpr uint32_t kLayerNormStream = 0xFFFFFFFFu;

// The probability p in 65536ths, some and not all: what 16 random bits are below is dropped.
inline uint32_t dropout_cut(double p) {
  const uint32_t cut = static_cast<uint32_t>(p * 65536.0 + 0.5);
  return cut < 1 ? 1 : cut > 65535 ? 65535 : cut;
}

// The factor of what is kept, so that nothing changes on average.
inline float dropout_scale(double p) {
  return static_cast<float>(65536.0 / (65536 - dropout_cut(p)));
}

}  // namespace bert_fast
