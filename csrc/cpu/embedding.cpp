// BERT's embeddings (Devlin et al. 2019, section 3.2): three rows gathered, added and normalised
// while they are in the L1 cache, as layer_norm.cpp does it.
#include "layer_norm.h"

namespace bert_fast {
namespace BERT_FAST_ISA {
namespace {

// The row of a table that a token's id names, or null where the table has none.
template <class T>
BERT_FAST_INLINE const T* row_of(const Table& table, int64_t token, int64_t hidden) {
  int64_t id = 0;
  if (table.ids) {
    id = table.wide ? static_cast<const int64_t*>(table.ids)[token]
                    : static_cast<const int32_t*>(table.ids)[token];
  }
  const bool inside = id >= 0 && id < table.rows;
  return inside ? static_cast<const T*>(table.data) + id * hidden : nullptr;
}

template <class T, class U>
void forward(const EmbeddingForward& a) {
  const int threads = threads_for(a.rows * a.hidden, a.num_threads);
  parallel(threads, a.rows, grain_for(a.rows, threads), [&](Work& work) {
    Buffer sum(scratch_width(a.hidden));
    for_each_of(work, [&](int64_t row) {
      const T* word = row_of<T>(a.word, row, a.hidden);
      const T* position = row_of<T>(a.position, row, a.hidden);
      const T* token_type = row_of<T>(a.token_type, row, a.hidden);
      if (!word || !position || !token_type) {
        __atomic_store_n(a.outside, true, __ATOMIC_RELAXED);
        return;
      }
      U* kept = a.sum ? static_cast<U*>(a.sum) + row * a.hidden : nullptr;
      float* h = sum;
      vf total = {};
      for_columns(a.hidden, [&](int64_t col, auto lanes) {
        vf value = load_row(word + col, lanes) + load_row(token_type + col, lanes);
        value += load_row(position + col, lanes);
        if (kept) {  // backward normalises what was kept
          store_row(kept + col, value, lanes);
          value = load_row(kept + col, lanes);
        }
        store(h + col, value);
        total += value;
      });
      normalise_row(h, total, a.hidden, a.eps, a.weight, a.bias,
                    static_cast<U*>(a.out) + row * a.hidden, a.mean ? a.mean + row : nullptr,
                    a.rstd ? a.rstd + row : nullptr);
    });
  });
}

}  // namespace

void embedding_forward(const EmbeddingForward& a) {
  dispatch_dtype(a.tables, [&](auto* from) {
    dispatch_dtype(a.dtype, [&](auto* to) {
      forward<std::remove_pointer_t<decltype(from)>, std::remove_pointer_t<decltype(to)>>(a);
    });
  });
}

}  // namespace BERT_FAST_ISA
}  // namespace bert_fast
