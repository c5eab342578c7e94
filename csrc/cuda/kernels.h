// The CUDA launchers' interface: raw device pointers, sizes, the caller's stream; no torch, no
// Python, and no CUDA header either, so that bindings.cpp compiles without one. A launcher
// allocates nothing and waits for nothing (CUDA graphs may capture it). It returns null, or what
// CUDA said. The structs are the CPU kernels'; their seed and num_threads are not read.
#pragma once
#include "../cpu/kernels.h"

namespace bert_fast {
namespace cuda {

// attention's position bias, (num_heads, rows, columns), added to the scaled scores; data may be null.
struct Table {
  const float* data;
  int64_t rows, columns;
};

constexpr int kWeight = 1, kBias = 2, kLinearBias = 4;

struct Call {
  int device;
  void* stream;
  const uint64_t* seed;  // one, on the device, or null without dropout
  float* scratch;        // as each backward says
  int64_t longest_k;     // attention: no sequence has more keys
  int programs;          // how many CTAs share a sum over rows: it sets the order of the sums
  Table table;           // attention
  float* dtable;         // attention_backward: the table's gradient, all of it written; or null
  int low;               // layer_norm, gelu: the parameters that have x's type, not float: kWeight ...
};

const char* attention_forward(const AttentionForward&, const Call&);
const char* attention_backward(const AttentionBackward&, const Call&);  // (3, num_heads, total_q)
const char* layer_norm_forward(const LayerNormForward&, const Call&);
const char* layer_norm_backward(const LayerNormBackward&, const Call&);  // (3, programs, hidden)
const char* gelu_forward(const GeluForward&, const Call&);
const char* gelu_backward(const GeluBackward&, const Call&);  // (programs, width)

}  // namespace cuda
}  // namespace bert_fast
