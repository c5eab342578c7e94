// The CUDA launchers' interface: raw device pointers, sizes, the caller's stream; no torch, no
// Python, and no CUDA header either, so that bindings.cpp compiles without one. A launcher
// allocates nothing and waits for nothing (CUDA graphs may capture it). It returns null, or what
// CUDA said. The structs are the CPU kernels'; their seed, num_threads and sums over rows are not
// read: a backward writes the programs' own sums to scratch, and sum_partials adds those.
#pragma once
#include "../cpu/kernels.h"

namespace bert_fast {
namespace cuda {

// attention's position bias, (num_heads, rows, columns), added to the scaled scores; data may be null.
struct Table {
  const float* data;
  int64_t rows, columns;
};

// (sums, programs, width): what programs have summed.
struct Partials {
  const float* data;
  int sums, programs;
  int64_t width;
};

// The sums over programs of several kinds of partial sums, one after another, each from a multiple
// of kSumColumns elements on.
constexpr int kSumColumns = 32, kSumKinds = 4;
struct Sums {
  DType dtype;                // of out
  Partials kinds[kSumKinds];  // those without sums are left out
  void* out;
};

constexpr int kWeight = 1, kBias = 2, kLinearBias = 4;

struct Call {
  int device;
  void* stream;
  const uint64_t* seed;  // one, on the device, or null without dropout
  float* scratch;        // as each backward says; gelu_backward: null without a bias
  int64_t longest;       // attention: no sequence has more keys; in backward, nor more queries
  int programs;          // how many CTAs share a sum over rows: it sets the order of the sums
  Table table;           // attention
  float* dtable;         // attention_backward: the table's gradient, all of it written; or null
  int low;               // layer_norm, gelu: the parameters that have x's type, not float: kWeight ...
};

const char* attention_forward(const AttentionForward&, const Call&);
const char* attention_backward(const AttentionBackward&, const Call&);  // attention_scratch of them
int64_t attention_scratch(const AttentionShape&, const Call&);  // floats; the Call has no scratch yet
const char* layer_norm_forward(const LayerNormForward&, const Call&);
const char* layer_norm_backward(const LayerNormBackward&, const Call&);  // (3, programs, hidden)
const char* gelu_forward(const GeluForward&, const Call&);
const char* gelu_backward(const GeluBackward&, const Call&);  // (programs, width)
const char* sum_partials(const Sums&, const Call&);

}  // namespace cuda
}  // namespace bert_fast
