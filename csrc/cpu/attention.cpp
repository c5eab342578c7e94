// Attention over packed sequences: softmax(Q K^T * scale) V (Vaswani et al. 2017, eq. 1), blocked
// over keys with the online softmax of Milakov & Gimelshein 2018, so that no matrix of queries by
// keys is ever stored; backward recomputes the blocks from the log-sum-exp (Dao et al. 2022).
//
// A block is first copied into padded scratch (K and, for backward, V transposed), in fp32 or, for
// forward's products in bf16, in that (attention_products.h). That is
// where strides, 16-bit storage, head sizes that are no multiple of the vector and the projection's
// bias are dealt with, once; the products and the softmax see plain aligned matrices in L1/L2.
#include <algorithm>
#include <cmath>
#include <vector>

#include "attention_products.h"

namespace bert_fast {
namespace BERT_FAST_ISA {
namespace {

constexpr float kNegative = -3.4e38f;  // a masked score: finite, so that no inf - inf arises

// One sequence's place in the packed rows.
struct Sequence {
  int64_t index, q_begin, q_len, k_begin, k_len;

  Sequence(const AttentionShape& s, int64_t index)
      : index(index), q_begin(s.cu_q[index]), q_len(s.cu_q[index + 1] - q_begin),
        k_begin(s.cu_k[index]), k_len(s.cu_k[index + 1] - k_begin) {}

  // How many keys the query row sees.
  int64_t visible(int64_t row, bool causal) const {
    return causal ? std::clamp<int64_t>(row + 1 + k_len - q_len, 0, k_len) : k_len;
  }
};

template <class T>
T* head_data(const Strided& tensor, int64_t token, int64_t head) {
  return static_cast<T*>(tensor.data) + token * tensor.token + head * tensor.head;
}

const float* head_bias(const float* bias, int64_t which, const AttentionShape& s, int64_t head) {
  return bias ? bias + (which * s.num_heads + head) * s.head_dim : nullptr;
}

// Scores in base 2, of one query and the keys from `begin` on, get their position bias.
void add_position_bias(const PositionBias& bias, int64_t head, int64_t row, int64_t begin,
                       int64_t count, float* scores) {
  const float* of_row = bias.data + (head * bias.rows + row) * bias.columns + begin;
  for_columns(count, [&](int64_t col, auto lanes) {
    const vf bias = load_row(of_row + col, lanes);
    // As low as a mask may be, but above what is hidden: -inf alone hides.
    const vf added = vmax(bias * static_cast<float>(kLog2e), splat(-3e38f));
    const vf score = load_row(scores + col, lanes) + added;
    store_row(scores + col, select(bias == -INFINITY, bias, score), lanes);
  });
}

// A piece of work, and what it costs in multiples of head_dim.
struct Task {
  int64_t sequence, head, q_block;
  int64_t cost;
};

// Most expensive first, so that with dynamic scheduling a long sequence is never the last to start.
void sort_by_cost(std::vector<Task>& tasks) {
  std::stable_sort(tasks.begin(), tasks.end(),
                   [](const Task& a, const Task& b) { return a.cost > b.cost; });
}

// Rows past the last sequence (a buffer of fixed capacity has them) are zeroed, not left as found.
template <class T>
void zero_tail(const AttentionShape& s, const Strided& tensor, int64_t begin, int64_t end) {
  for (int64_t token = begin; token < end; ++token) {
    for (int64_t head = 0; head < s.num_heads; ++head) {
      std::memset(head_data<T>(tensor, token, head), 0, s.head_dim * sizeof(T));
    }
  }
}

template <class Products>
class ForwardTask {
 public:
  using T = typename Products::Stored;

  explicit ForwardTask(const AttentionForward& a)
      : a_(a), ld_(round_up(a.head_dim, Products::kColumns)), products_(a.head_dim),
        scores_(Products::kRows * kBlockK), out_(kBlockQ * ld_),
        factors_(kBlockK + 8 * kWidth), top_(kBlockQ + kWidth), total_(kBlockQ + kWidth) {}

  void run(const Task& task) {
    const Sequence seq(a_, task.sequence);
    const int64_t head = task.head, first = task.q_block * kBlockQ;
    const int64_t rows = std::min(kBlockQ, seq.q_len - first);
    const int64_t keys = seq.visible(first + rows - 1, a_.causal);

    products_.pack_q(head_data<const T>(a_.q, seq.q_begin + first, head), a_.q.token, rows,
                     head_bias(a_.bias, 0, a_, head), static_cast<float>(a_.scale * kLog2e));
    fill(top_, rows + kWidth, kNegative);
    fill(total_, rows + kWidth, 0.0f);
    if (keys == 0) fill(out_, rows * ld_, 0.0f);

    for (int64_t begin = 0; begin < keys; begin += kBlockK) {
      const int64_t count = std::min(kBlockK, keys - begin);
      const int64_t padded = round_up(count, Products::kColumns);
      products_.pack_k(head_data<const T>(a_.k, seq.k_begin + begin, head), a_.k.token, count,
                       head_bias(a_.bias, 1, a_, head));
      products_.pack_v(head_data<const T>(a_.v, seq.k_begin + begin, head), a_.v.token, count,
                       head_bias(a_.bias, 2, a_, head));
      // A few rows at a time from scores to values: they stay in L1.
      for (int64_t row = 0, next; row < rows; row = next) {
        next = std::min(row + Products::kRows, rows);
        products_.multiply_keys(row, next - row, count, scores_);
        if (a_.position_bias.data) {
          for (int64_t i = row; i < next; ++i) {
            add_position_bias(a_.position_bias, head, first + i, begin, count, scores_of(i - row));
          }
        }
        const auto visible = [&](int64_t i) {
          return std::clamp<int64_t>(seq.visible(first + row + i, a_.causal) - begin, 0, count);
        };
        for (int64_t i = 0; i < next - row; i += kWidth) {
          softmax_rows(row, i, std::min<int64_t>(i + kWidth, next - row), padded, begin == 0, visible);
        }
        if (a_.dropout_p > 0.0) {
          for (int64_t i = row; i < next; ++i) drop_row(seq, head, first + i, i - row, begin, padded);
        }
        products_.multiply_values(next - row, count, scores_, out_ + row * ld_, begin != 0);
      }
    }

    T* out = head_data<T>(a_.out, seq.q_begin + first, head);
    for (int64_t row = 0; row < rows; ++row) {
      // A row that sees no key: zeros, and the log of an empty sum. A NaN total passes through.
      const bool empty = total_[row] == 0.0f;
      unpack(out_ + row * ld_, ld_, 1, a_.head_dim, empty ? 0.0f : 1.0f / total_[row],
             out + row * a_.out.token, a_.out.token);
      if (!a_.lse) continue;
      a_.lse[head * a_.total_q + seq.q_begin + first + row] =
          empty ? -INFINITY
                : static_cast<float>((top_[row] + std::log2(double{total_[row]})) * kLn2);
    }
  }

 private:
  float* scores_of(int64_t i) { return scores_ + i * kBlockK; }

  // Turns rows [begin, end) of scores into 2^(score - max), columns from `visible` on into zeros, and
  // rescales what earlier blocks left in out_ and total_ to the new maximum. At most kWidth rows at
  // once: what is one number of a row is one vector of them. They are rows of the block from `first`.
  template <class Visible>
  void softmax_rows(int64_t first, int64_t begin, int64_t end, int64_t padded, bool first_block,
                    Visible visible) {
    const vi given = lane_index() < static_cast<int32_t>(end - begin);
    const auto update = [&](float* numbers, vf by) {
      store(numbers, select(given, by, load(numbers)));
    };
    float *top_of = top_ + first + begin, *total_of = total_ + first + begin;
    vf of_rows[kWidth];
    for (int64_t i = end - begin; i < kWidth; ++i) of_rows[i] = vf{};
    for (int64_t i = begin; i < end; ++i) of_rows[i - begin] = greatest(i, visible(i), padded);
    const vf before = load(top_of), top = vmax(across(of_rows, vmax), before);
    update(top_of, top);
    for (int64_t i = begin; i < end; ++i) {
      of_rows[i - begin] = exponents(i, top_of[i - begin], visible(i), padded);
    }
    const vf rescale = exp2(before - top);
    const vf total = across(of_rows, [](vf a, vf b) { return a + b; });
    update(total_of, load(total_of) * rescale + total);
    for (int64_t i = begin; i < end && !first_block; ++i) {
      float* out = out_ + (first + i) * ld_;
      const float by = rescale[i - begin];
      if (by == 1.0f) continue;
      for (int64_t col = 0; col < ld_; col += kWidth) store(out + col, load(out + col) * by);
    }
  }

  vf greatest(int64_t i, int64_t visible, int64_t padded) {
    float* s = scores_of(i);
    for (int64_t col = visible / kWidth * kWidth; col < padded; col += kWidth) {
      store(s + col, select(lane_index() < static_cast<int32_t>(visible - col), load(s + col),
                            splat(kNegative)));
    }
    vf top = splat(kNegative);
    for (int64_t col = 0; col < padded; col += kWidth) top = vmax(load(s + col), top);
    return top;
  }

  // Their sums, too.
  vf exponents(int64_t i, float top, int64_t visible, int64_t padded) {
    float* s = scores_of(i);
    vf total = {};
    for (int64_t col = 0; col < padded; col += kWidth) {
      vf p = exp2(load(s + col) - top);
      // Where no key has been seen yet the maximum is itself kNegative, and 2^0 is not 0.
      if (visible < padded) {
        p = select(lane_index() < static_cast<int32_t>(visible - col), p, vf{});
      }
      Products::store_probability(s, col, p);
      total += p;
    }
    return total;
  }

  void drop_row(const Sequence& seq, int64_t head, int64_t q_row, int64_t i, int64_t begin,
                int64_t padded) {
    dropout_row<true>(factors_, padded, a_.seed, a_.dropout_p, static_cast<uint32_t>(begin),
                      static_cast<uint32_t>(q_row), static_cast<uint32_t>(head),
                      static_cast<uint32_t>(seq.index));
    float* s = scores_of(i);
    for (int64_t col = 0; col < padded; col += kWidth) {
      store(s + col, load(s + col) * load(factors_ + col));
    }
  }

  const AttentionForward& a_;
  int64_t ld_;  // head_dim, padded
  Products products_;
  Buffer scores_, out_, factors_, top_, total_;
};

template <class Products>
void forward(const AttentionForward& a) {
  std::vector<Task> tasks;
  int64_t total_cost = 0;
  for (int64_t b = 0; b < a.batch; ++b) {
    const Sequence seq(a, b);
    for (int64_t block = 0; block * kBlockQ < seq.q_len; ++block) {
      const int64_t rows = std::min(kBlockQ, seq.q_len - block * kBlockQ);
      const int64_t cost = rows * (seq.visible(block * kBlockQ + rows - 1, a.causal) + 1);
      for (int64_t head = 0; head < a.num_heads; ++head) tasks.push_back({b, head, block, cost});
      total_cost += cost * a.num_heads;
    }
  }
  sort_by_cost(tasks);
  const int threads = threads_for(total_cost * a.head_dim / 8, a.num_threads);
  parallel(threads, static_cast<int64_t>(tasks.size()), 1, [&](Work& work) {
    [[maybe_unused]] const Tiles tiles{};
    ForwardTask<Products> worker(a);
    for (int64_t i, end; work.take(i, end);) worker.run(tasks[i]);
  });
  const int64_t end = a.cu_q[a.batch];
  zero_tail<typename Products::Stored>(a, a.out, end, a.total_q);
  for (int64_t head = 0; a.lse && head < a.num_heads; ++head) {
    fill(a.lse + head * a.total_q + end, a.total_q - end, -INFINITY);
  }
}

#ifndef BERT_FAST_AMX
// One sequence and head, with P = exp(S - lse) and Z the dropout factors:
//   dV = (P Z)^T dO,  dP = (dO V^T) Z,  dS = P (dP - delta) with delta = rowsum(dO O),
//   dQ = scale dS K,  dK = scale dS^T Q.
template <class T>
class BackwardTask {
 public:
  BackwardTask(const AttentionBackward& a, int64_t max_q_len)
      : a_(a), ld_(round_up(a.head_dim, kWidth)), q_(kBlockQ * ld_),
        dout_(kBlockQ * ld_), k_(kBlockK * ld_),
        k_transposed_(a.head_dim * kBlockK),
        v_transposed_(a.head_dim * kBlockK),
        p_(kBlockQ * kBlockK), ds_(kBlockQ * kBlockK),
        dk_(kBlockK * ld_), dv_(kBlockK * ld_),
        factors_(kBlockK + 8 * kWidth), dq_(max_q_len * ld_),
        delta_(max_q_len) {}

  void run(const Task& task) {
    const Sequence seq(a_, task.sequence);
    const int64_t head = task.head;
    compute_delta(seq, head);
    fill(dq_, seq.q_len * ld_, 0.0f);

    for (int64_t k_begin = 0; k_begin < seq.k_len; k_begin += kBlockK) {
      const int64_t keys = std::min(kBlockK, seq.k_len - k_begin);
      const T* k = head_data<const T>(a_.k, seq.k_begin + k_begin, head);
      const T* v = head_data<const T>(a_.v, seq.k_begin + k_begin, head);
      const float *k_bias = head_bias(a_.bias, 1, a_, head), *v_bias = head_bias(a_.bias, 2, a_, head);
      pack(k, a_.k.token, keys, a_.head_dim, k_bias, 1.0f, k_, ld_);
      pack_transposed(k, a_.k.token, keys, a_.head_dim, k_bias, k_transposed_, kBlockK);
      pack_transposed(v, a_.v.token, keys, a_.head_dim, v_bias, v_transposed_, kBlockK);
      fill(dk_, keys * ld_, 0.0f);
      fill(dv_, keys * ld_, 0.0f);
      for (int64_t q_begin = 0; q_begin < seq.q_len; q_begin += kBlockQ) {
        const int64_t rows = std::min(kBlockQ, seq.q_len - q_begin);
        if (seq.visible(q_begin + rows - 1, a_.causal) > k_begin) {
          add_block(seq, head, q_begin, rows, k_begin, keys);
        }
      }
      // q_ holds q * scale * log2(e); dK wants q * scale.
      unpack(dk_, ld_, keys, a_.head_dim, static_cast<float>(kLn2),
             head_data<T>(a_.dk, seq.k_begin + k_begin, head), a_.dk.token);
      unpack(dv_, ld_, keys, a_.head_dim, 1.0f,
             head_data<T>(a_.dv, seq.k_begin + k_begin, head), a_.dv.token);
    }
    unpack(dq_, ld_, seq.q_len, a_.head_dim, a_.scale, head_data<T>(a_.dq, seq.q_begin, head),
           a_.dq.token);
  }

 private:
  void compute_delta(const Sequence& seq, int64_t head) {
    for (int64_t row = 0; row < seq.q_len; ++row) {
      const T* out = head_data<const T>(a_.out, seq.q_begin + row, head);
      const T* dout = head_data<const T>(a_.dout, seq.q_begin + row, head);
      vf total = {};
      for_columns(a_.head_dim, [&](int64_t col, auto lanes) {
        total += load_row(out + col, lanes) * load_row(dout + col, lanes);
      });
      delta_[row] = sum(total);
    }
  }

  void add_block(const Sequence& seq, int64_t head, int64_t q_begin, int64_t rows, int64_t k_begin,
                 int64_t keys) {
    const int64_t padded = round_up(keys, kWidth);
    const int64_t token = seq.q_begin + q_begin;
    pack(head_data<const T>(a_.q, token, head), a_.q.token, rows, a_.head_dim,
         head_bias(a_.bias, 0, a_, head), static_cast<float>(a_.scale * kLog2e), q_, ld_);
    pack(head_data<const T>(a_.dout, token, head), a_.dout.token, rows, a_.head_dim, nullptr, 1.0f,
         dout_, ld_);
    gemm(rows, padded, a_.head_dim, {q_, ld_, 1}, k_transposed_, kBlockK, p_, kBlockK, false);
    gemm(rows, padded, a_.head_dim, {dout_, ld_, 1}, v_transposed_, kBlockK, ds_, kBlockK, false);

    const float* lse = a_.lse + head * a_.total_q + token;
    for (int64_t row = 0; row < rows; ++row) {
      int64_t visible = seq.visible(q_begin + row, a_.causal) - k_begin;
      if (lse[row] == -INFINITY) visible = 0;  // every score that it sees is -inf
      if (a_.position_bias.data) {
        add_position_bias(a_.position_bias, head, q_begin + row, k_begin, keys,
                          p_ + row * kBlockK);
      }
      gradient_row(seq, head, q_begin + row, row, k_begin, std::clamp<int64_t>(visible, 0, keys),
                   padded, static_cast<float>(lse[row] * kLog2e));
      if (a_.position_bias.gradient) {
        float* to = a_.position_bias.gradient + k_begin +
                    (head * a_.position_bias.rows + q_begin + row) * a_.position_bias.columns;
        for (int64_t col = 0; col < keys; ++col) to[col] += ds_[row * kBlockK + col];
      }
    }
    gemm(keys, ld_, rows, {p_, 1, kBlockK}, dout_, ld_, dv_, ld_, true);
    gemm(keys, ld_, rows, {ds_, 1, kBlockK}, q_, ld_, dk_, ld_, true);
    gemm(rows, ld_, keys, {ds_, kBlockK, 1}, k_, ld_, dq_ + q_begin * ld_, ld_, true);
  }

  // Scores in p_ become P Z, products in ds_ become dS. A row whose keys all lie in this block is
  // normalised by its own sum and its delta taken from P itself, as PyTorch does: free of the
  // rounding of lse, and exactly zero on a lone key.
  void gradient_row(const Sequence& seq, int64_t head, int64_t q_row, int64_t row, int64_t k_begin,
                    int64_t visible, int64_t padded, float lse2) {
    float *p_row = p_ + row * kBlockK, *ds_row = ds_ + row * kBlockK;
    const bool drop = a_.dropout_p > 0.0f, whole = seq.k_len <= kBlockK;
    if (drop) {
      dropout_row<true>(factors_, padded, a_.seed, a_.dropout_p, static_cast<uint32_t>(k_begin),
                        static_cast<uint32_t>(q_row), static_cast<uint32_t>(head),
                        static_cast<uint32_t>(seq.index));
    }
    const vi lanes = lane_index();
    vf total = {};
    for (int64_t col = 0; col < padded; col += kWidth) {
      vf p = exp2(load(p_row + col) - lse2);
      p = select(lanes < static_cast<int32_t>(visible - col), p, vf{});
      store(p_row + col, p);
      total += p;
      if (drop) store(ds_row + col, load(ds_row + col) * load(factors_ + col));
    }
    float delta = delta_[q_row];
    if (whole && visible > 0) {
      const float normalise = 1.0f / sum(total);
      vf weighted = {};
      for (int64_t col = 0; col < padded; col += kWidth) {
        const vf p = load(p_row + col) * normalise;
        store(p_row + col, p);
        weighted += p * load(ds_row + col);
      }
      delta = sum(weighted);
    }
    for (int64_t col = 0; col < padded; col += kWidth) {
      const vf p = load(p_row + col);
      store(ds_row + col, p * (load(ds_row + col) - delta));
      if (drop) store(p_row + col, p * load(factors_ + col));
    }
  }

  const AttentionBackward& a_;
  int64_t ld_;  // head_dim rounded up to whole vectors
  Buffer q_, dout_, k_, k_transposed_, v_transposed_, p_, ds_, dk_, dv_, factors_, dq_, delta_;
};

template <class T>
void backward(const AttentionBackward& a) {
  std::vector<Task> tasks;
  int64_t max_q_len = 0, total_cost = 0;
  for (int64_t b = 0; b < a.batch; ++b) {
    const Sequence seq(a, b);
    const int64_t cost = (seq.q_len + 1) * (seq.k_len + 1);
    for (int64_t head = 0; head < a.num_heads; ++head) tasks.push_back({b, head, 0, cost});
    max_q_len = std::max(max_q_len, seq.q_len);
    total_cost += cost * a.num_heads;
  }
  const PositionBias& position = a.position_bias;
  // The gradient of the position bias is a sum over sequences: a head's are added in order, by one
  // thread. (Tasks lie head by head within a sequence.)
  const int64_t together = position.gradient ? a.batch : 1;
  if (position.gradient) {
    fill(position.gradient, a.num_heads * position.rows * position.columns, 0.0f);
  } else {
    sort_by_cost(tasks);
  }
  const int threads = threads_for(total_cost * a.head_dim / 8, a.num_threads);
  const int64_t count = static_cast<int64_t>(tasks.size());
  parallel(threads, count / std::max<int64_t>(1, together), 1, [&](Work& work) {
    BackwardTask<T> worker(a, max_q_len);
    for_each_of(work, [&](int64_t item) {
      for (int64_t b = 0; b < together; ++b) worker.run(tasks[b * a.num_heads + item]);
    });
  });
  zero_tail<T>(a, a.dq, a.cu_q[a.batch], a.total_q);
  zero_tail<T>(a, a.dk, a.cu_k[a.batch], a.total_k);
  zero_tail<T>(a, a.dv, a.cu_k[a.batch], a.total_k);
}

#endif

}  // namespace

#ifdef BERT_FAST_AMX
void attention_in_bf16(const AttentionForward& a) { forward<BFloat16Products<BFloat16Tiles>>(a); }

#else
#ifdef __AVX512F__
void attention_in_bf16(const AttentionForward& a) { forward<BFloat16Products<BFloat16Dot>>(a); }
#endif

void attention_forward(const AttentionForward& a) {
  dispatch_dtype(a.dtype, [&](auto* type) {
    forward<Float32Products<std::remove_pointer_t<decltype(type)>>>(a);
  });
}

void attention_backward(const AttentionBackward& a) {
  dispatch_dtype(a.dtype, [&](auto* type) { backward<std::remove_pointer_t<decltype(type)>>(a); });
}
#endif

}  // namespace BERT_FAST_ISA
}  // namespace bert_fast
