// What a call reads of ids and masks, all at once: by torch's ops, each of which finds the caches
// full of weights, this takes a query of 16 tokens as long as its embeddings.
#pragma once
#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "kernels.h"

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
  int64_t count, longest, shortest;  // of all sequences; of one
  bool valid;                        // whether the mask holds ones and zeros alone
};

// cu_seqlens (batch + 1) and index (batch * seqlen, of which count are written), where the ones of
// a (batch, seqlen) mask are.
template <class T>
RealTokens real_tokens(const T* mask, int64_t batch, int64_t seqlen, int32_t* cu_seqlens,
                       int64_t* index) {
  RealTokens found = {0, 0, batch ? seqlen : 0, true};
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
    found.shortest = std::min(found.shortest, found.count - before);
  }
  return found;
}

// A token's id, of a table that has ids.
inline int64_t id_of(const Table& table, int64_t token) {
  return table.wide ? static_cast<const int64_t*>(table.ids)[token]
                    : static_cast<const int32_t*>(table.ids)[token];
}

// What tells the real tokens of a call apart: as Packing in bert_fast/models/packing.py.
struct Tokens {
  int64_t rows;
  int64_t seqlen;             // columns of the padded batch; 0: the ids are packed
  const int32_t* cu_seqlens;  // (batch + 1), up to rows
  const int64_t* index;       // (rows), places in the padded batch; null: all of it
};

// The real tokens' ids, which the table then has; where it has none, their positions: the columns,
// of packed ones the places in their sequences.
inline std::vector<int64_t> pack(Table& table, const Tokens& t, bool positions) {
  if (table.ids ? !t.index : !positions) return {};
  std::vector<int64_t> packed(t.rows);
  for (int64_t i = 0, sequence = 0; i < t.rows; ++i) {
    const int64_t place = t.index ? t.index[i] : i;
    if (table.ids) {
      packed[i] = id_of(table, place);
    } else if (t.seqlen) {
      packed[i] = place % t.seqlen;
    } else {
      while (i >= t.cu_seqlens[sequence + 1]) ++sequence;
      packed[i] = i - t.cu_seqlens[sequence];
    }
  }
  table.ids = packed.data();
  table.wide = true;
  return packed;  // whose memory moves with it
}

// Of each sequence's rows of x (rows, width) the mean, added up in order; zeros where there is none.
// False where the offsets are not those of so many rows.
inline bool mean_rows(const float* x, int64_t rows, const int32_t* cu_seqlens, int64_t batch,
                      int64_t width, float* out) {
  if (cu_seqlens[0] != 0 || cu_seqlens[batch] != rows) return false;
  if (!std::is_sorted(cu_seqlens, cu_seqlens + batch + 1)) return false;
  for (int64_t i = 0; i < batch; ++i, out += width) {
    std::fill(out, out + width, 0.0f);
    for (int64_t row = cu_seqlens[i]; row < cu_seqlens[i + 1]; ++row) {
      for (int64_t k = 0; k < width; ++k) out[k] += x[row * width + k];
    }
    const float count = static_cast<float>(std::max(1, cu_seqlens[i + 1] - cu_seqlens[i]));
    for (int64_t k = 0; k < width; ++k) out[k] /= count;
  }
  return true;
}

}  // namespace bert_fast
