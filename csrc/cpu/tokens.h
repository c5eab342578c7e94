// What a call reads of ids and masks, all at once: by torch's ops, each of which finds the caches
// full of weights, this takes a query of 16 tokens as long as its embeddings.
#pragma once
#include <algorithm>
#include <cstdint>
#include <utility>

namespace bert_fast {

// The least and the greatest of at least one id.
template <class T>
std::pair<int64_t, int64_t> range_of(const T* ids, int64_t count) {
  T low = ids[0], high = ids[0];
  for (int64_t i = 1; i < count; ++i) {
    low = std::min(low, ids[i]);
    high = std::max(high, ids[i]);
  }
  return {low, high};
}

struct RealTokens {
  int64_t count, longest;  // of all sequences; of one
  bool valid;              // whether the mask holds ones and zeros alone
};

// cu_seqlens (batch + 1) and index (batch * seqlen, of which count are written), where the ones of
// a (batch, seqlen) mask are.
template <class T>
RealTokens real_tokens(const T* mask, int64_t batch, int64_t seqlen, int32_t* cu_seqlens,
                       int64_t* index) {
  RealTokens found = {0, 0, true};
  cu_seqlens[0] = 0;
  for (int64_t i = 0; i < batch; ++i) {
    const int64_t before = found.count;
    for (int64_t at = i * seqlen; at < (i + 1) * seqlen; ++at) {
      const T value = mask[at];
      found.valid &= value == T(0) || value == T(1);
      index[found.count] = at;
      found.count += value == T(1);
    }
    cu_seqlens[i + 1] = static_cast<int32_t>(found.count);
    found.longest = std::max(found.longest, found.count - before);
  }
  return found;
}

}  // namespace bert_fast
