// A whole stack of encoder layers in one call, for inference with packed weights: at a single
// query eight calls a layer from Python cost more than the arithmetic. What runs is what the
// model in bert_fast/models/bert.py calls one by one, in the same order, to the same bits.
//
// Many sequences pass through all layers run by run, a run in one thread: what a layer writes stays
// in that core's caches, and no thread waits for another before the end. Those that would leave a
// thread idle, as a few do, all threads compute together. (Zen 4, two threads, MiniLM at 32 x 128,
// before and so: float32 474 and 450 ms, bfloat16 287 and 250, int8 200 and 150.)
#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <utility>
#include <vector>

#include "kernels.h"
#include "threads.h"

namespace bert_fast {
namespace {

// Rows of a run. In one thread: at most a block of linear.cpp's, but for a longer sequence, so that
// weights are read once; and at least kLeast, as near the end, where runs are smaller so that all
// threads have equal shares. Of all threads: for each. (Measured with two threads, without AMX.)
constexpr int64_t kApart = kRowsOfBlock, kLeast = 96, kTogether = 256;
static_assert(kLeast >= kFewRows, "else rows would be multiplied otherwise than in a whole batch");

struct Run {
  int64_t first, last;  // sequences
  int64_t begin, end;   // rows
  int64_t rows() const { return end - begin; }
};

// Where each part of a run's memory begins, in floats, on a cache line; and the end.
using Parts = std::array<int64_t, 7>;

struct Plan {
  std::vector<Run> runs;  // first those that are each in one thread, at_once of them at a time
  int64_t apart;          // how many these are; all threads compute the others
  int at_once;
  Parts alone, together;  // of the largest of either kind
};

// Adds the sequences from `first` on, as many at once as have at most rows_at(rows left) rows, but
// kLeast at the least. Rows after the last sequence are its.
template <class Limit>
void add_runs(const EncoderForward& e, int64_t first, Limit rows_at, std::vector<Run>& runs) {
  const size_t before = runs.size();
  const auto begin_of = [&](int64_t b) {
    return b < e.batch ? static_cast<int64_t>(e.cu_seqlens[b]) : e.rows;
  };
  for (int64_t last, begin; first < e.batch; first = last) {
    begin = begin_of(first);
    const int64_t most = begin + rows_at(e.rows - begin);
    last = first + 1;
    const auto takes_more = [&] {
      return begin_of(last) < begin + kLeast || begin_of(last + 1) <= most;
    };
    while (last < e.batch && takes_more()) ++last;
    runs.push_back({first, last, begin, begin_of(last)});
  }
  if (runs.size() > before + 1 && runs.back().rows() < kLeast) {
    const Run rest = runs.back();
    runs.pop_back();
    runs.back().last = rest.last;
    runs.back().end = rest.end;
  }
}

// How many of the first end at nearly the same time in all threads, which take them in turn.
int64_t even_ones(const EncoderForward& e, const std::vector<Run>& runs) {
  std::vector<int64_t> shares(e.num_threads);
  int64_t even = 0, total = 0;
  for (const Run& run : runs) {
    int64_t cost = run.rows() * (2 * e.hidden + e.intermediate);  // 1 is 2 hidden products
    for (int64_t b = run.first; b < run.last; ++b) {
      const int64_t length = e.cu_seqlens[b + 1] - e.cu_seqlens[b];
      cost += length * length;
    }
    *std::min_element(shares.begin(), shares.end()) += cost;
    total += cost;
    const int64_t longest = *std::max_element(shares.begin(), shares.end());
    if (longest * e.num_threads <= total + total / 16) even = &run - runs.data() + 1;
  }
  return even;
}

Parts parts_of(const EncoderForward& e, int64_t rows, int num_threads) {
  int64_t scratch = 0;
  bool seen[3] = {};
  const auto look_at = [&](const PackedLinear& by) {
    if (std::exchange(seen[static_cast<int>(by.precision)], true)) return;
    for (int64_t width : {e.hidden, e.intermediate}) {
      const auto size = linear_kernels(by.precision).scratch_size;
      scratch = std::max(scratch, size(rows, width, num_threads));
    }
  };
  for (int64_t i = 0; i < e.num_layers; ++i) {
    const EncoderLayer& layer = e.layers[i];
    std::for_each_n(layer.qkv, layer.qkv_products, look_at);
    for (const PackedLinear* by : {&layer.out, &layer.up, &layer.down}) look_at(*by);
  }
  const int64_t hidden = spaced(e.hidden);
  const int64_t floats[] = {3 * rows * hidden,             rows * hidden, rows * hidden,
                            rows * spaced(e.intermediate), 3 * hidden,    ceil_div(scratch, 4)};
  Parts begins = {};
  for (int i = 0; i < 6; ++i) begins[i + 1] = begins[i] + ceil_div(floats[i], 16) * 16;
  return begins;
}

Plan plan_of(const EncoderForward& e) {
  Plan plan = {};
  std::vector<Run>& runs = plan.runs;
  if (e.batch > 1) {
    add_runs(e, 0, [&](int64_t left) {
      return std::clamp(left / (2 * e.num_threads), kLeast, kApart);
    }, runs);
    plan.apart = even_ones(e, runs);
    runs.resize(plan.apart);
  }
  add_runs(e, runs.empty() ? 0 : runs.back().last, [&](int64_t) {
    return kTogether * e.num_threads;
  }, runs);
  if (runs.empty()) runs.push_back({0, 0, 0, e.rows});
  plan.at_once = static_cast<int>(std::min<int64_t>(e.num_threads, plan.apart));
  const auto most = [](const auto from, const auto to) {
    int64_t rows = 0;
    std::for_each(from, to, [&](const Run& run) { rows = std::max(rows, run.rows()); });
    return rows;
  };
  const auto others = runs.begin() + plan.apart;
  if (others > runs.begin()) plan.alone = parts_of(e, most(runs.begin(), others), 1);
  if (others < runs.end()) plan.together = parts_of(e, most(others, runs.end()), e.num_threads);
  return plan;
}

struct Rows {
  float* at;
  int64_t width, stride;  // from one to the next
};

// Through all layers.
void forward(const EncoderForward& e, const Run& run, const Parts& parts, float* memory,
             int num_threads) {
  const CpuKernels& kernels = cpu_kernels();
  const auto part = [&](int i) { return memory + parts[i]; };
  const Rows x = {e.x + run.begin * e.hidden, e.hidden, e.hidden};
  const Rows context = {part(1), e.hidden, spaced(e.hidden)};
  const Rows projected = {part(2), e.hidden, e.hidden};
  const Rows wide = {part(3), e.intermediate, spaced(e.intermediate)};
  float *const bias_of_qkv = part(4), *const scratch = part(5);
  const int64_t head_dim = e.hidden / e.num_heads, rows = run.rows();
  std::vector<int32_t> cu_seqlens(e.cu_seqlens + run.first, e.cu_seqlens + run.last + 1);
  for (int32_t& start : cu_seqlens) start -= static_cast<int32_t>(run.begin);

  const auto product = [&](const Rows& from, const PackedLinear& by, const Rows& to) {
    return LinearForward{rows,        from.width, to.width, from.at,           by.packed,
                         nullptr,     to.at,      scratch,  Activation::kNone, num_threads,
                         from.stride, to.stride};
  };
  const auto qkv = [&](int i, int count) {  // (rows, 3 hidden), or three times (rows, hidden)
    const int64_t width = 3 / count * e.hidden, stride = spaced(width);
    return Rows{part(0) + i * rows * stride, width, stride};
  };
  const auto multiply = [&](const Rows& from, const PackedLinear& by, const Rows& to,
                            bool converted = false, const float* bias = nullptr,
                            Activation activation = Activation::kNone) {
    LinearForward a = product(from, by, to);
    a.converted = converted;
    a.bias = bias;
    a.activation = activation;
    linear_kernels(by.precision).forward(a);
  };
  // Whether it has converted x for the product by `by` that reads it next, if there is one.
  const auto add_and_norm = [&](const float* linear_bias, const Norm& norm, const PackedLinear* by,
                                const Rows& to) {
    LayerNormForward a = {};
    a.dtype = DType::kFloat32;
    a.rows = rows;
    a.hidden = e.hidden;
    a.x = projected.at;
    a.residual = a.out = x.at;
    a.linear_bias = linear_bias;
    a.weight = norm.weight;
    a.bias = norm.bias;
    a.eps = norm.eps;
    a.num_threads = num_threads;
    const LinearKernels* next = by ? &linear_kernels(by->precision) : nullptr;
    const bool converts = next && next->convert;
    if (converts) kernels.layer_norm_converted(a, *next, product(x, *by, to));
    else kernels.layer_norm_forward(a);
    return converts;
  };

  AttentionForward attention = {};
  attention.dtype = DType::kFloat32;
  attention.batch = run.last - run.first;
  attention.num_heads = e.num_heads;
  attention.head_dim = head_dim;
  attention.total_q = attention.total_k = rows;
  attention.cu_q = attention.cu_k = cu_seqlens.data();
  attention.scale = e.scale;
  attention.num_threads = num_threads;
  attention.out = {context.at, context.stride, head_dim};

  const auto project = [&](const PackedLinear* weights, int count, bool converted) {
    const auto [q, width, stride] = qkv(0, count);
    for (int i = 0; i < count; ++i) {
      multiply(x, weights[i], qkv(i, count), converted);
      // Side by side, as attention reads them: whatever was written to them since they were bound.
      if (count > 1) std::memcpy(bias_of_qkv + i * width, weights[i].bias, width * sizeof(float));
    }
    attention.bias = count > 1 ? bias_of_qkv : weights[0].bias;
    // As models ask for it: where all that is multiplied came of rounded products.
    const auto is_rounded = [](const PackedLinear& by) { return by.precision != Precision::kFloat32; };
    const bool rounds = std::all_of(weights, weights + count, is_rounded);
    attention.precision = rounds ? Precision::kBFloat16 : Precision::kFloat32;
    const int64_t apart = count > 1 ? rows * stride : e.hidden;  // from q to k, from k to v
    attention.q = {q, stride, head_dim};
    attention.k = {q + apart, stride, head_dim};
    attention.v = {q + 2 * apart, stride, head_dim};
  };

  bool converted = false;  // whether scratch holds x as the next product reads it
  for (int64_t i = 0; i < e.num_layers; ++i) {
    const EncoderLayer &layer = e.layers[i], *next = i + 1 < e.num_layers ? &layer + 1 : nullptr;
    project(layer.qkv, layer.qkv_products, converted);
    attention_forward(attention);
    multiply(context, layer.out, projected);
    converted = add_and_norm(layer.out.bias, layer.attention_norm, &layer.up, wide);
    multiply(x, layer.up, wide, converted, layer.up.bias, e.activation);
    multiply(wide, layer.down, projected);
    converted = add_and_norm(layer.down.bias, layer.output_norm,
                             next && next->qkv_products == 1 ? next->qkv : nullptr, qkv(0, 1));
  }
}

}  // namespace

int64_t encoder_memory(const EncoderForward& e) {
  const Plan plan = plan_of(e);
  return std::max(plan.at_once * plan.alone.back(), plan.together.back());
}

void encoder_forward(const EncoderForward& e) {
  const OnTeam team;
  const Plan plan = plan_of(e);
  std::atomic<int> threads{0};
  parallel(plan.at_once, plan.apart, 1, [&](Work& work) {
    float* memory = e.memory + threads.fetch_add(1) * plan.alone.back();
    for_each_of(work, [&](int64_t i) { forward(e, plan.runs[i], plan.alone, memory, 1); });
  });
  std::for_each(plan.runs.begin() + plan.apart, plan.runs.end(), [&](const Run& run) {
    forward(e, run, plan.together, e.memory, e.num_threads);
  });
}

}  // namespace bert_fast
