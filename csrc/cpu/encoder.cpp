// A whole stack of encoder layers in one call, for inference with packed weights: at a single
// query eight calls a layer from Python cost more than the arithmetic. What runs is what the
// model in bert_fast/models/bert.py calls one by one, in the same order, to the same bits.
#include <algorithm>
#include <cstring>

#include "kernels.h"
#include "threads.h"

namespace bert_fast {

void encoder_forward(const EncoderForward& e) {
  const OnTeam team;
  const CpuKernels& kernels = cpu_kernels();
  const int64_t head_dim = e.hidden / e.num_heads, rows = e.rows;

  const auto multiply = [&](const float* x, int64_t in, const PackedLinear& by, int64_t out,
                            float* y, const float* bias, Activation activation) {
    linear_kernels(by.precision)
        .forward({rows, in, out, x, by.packed, bias, y, e.scratch, activation, e.num_threads});
  };
  const auto add_and_norm = [&](const float* linear_bias, const Norm& norm) {
    LayerNormForward a = {};
    a.dtype = DType::kFloat32;
    a.rows = rows;
    a.hidden = e.hidden;
    a.x = e.projected;
    a.residual = a.out = e.x;
    a.linear_bias = linear_bias;
    a.weight = norm.weight;
    a.bias = norm.bias;
    a.eps = norm.eps;
    a.num_threads = e.num_threads;
    kernels.layer_norm_forward(a);
  };

  AttentionForward attention = {};
  attention.dtype = DType::kFloat32;
  attention.batch = e.batch;
  attention.num_heads = e.num_heads;
  attention.head_dim = head_dim;
  attention.total_q = attention.total_k = rows;
  attention.cu_q = attention.cu_k = e.cu_seqlens;
  attention.scale = e.scale;
  attention.num_threads = e.num_threads;
  attention.out = {e.context, e.hidden, head_dim};

  const auto project = [&](const PackedLinear* qkv, int count) {
    const int64_t width = 3 / count * e.hidden;
    for (int i = 0; i < count; ++i) {
      multiply(e.x, e.hidden, qkv[i], width, e.qkv + i * e.rows * width, nullptr, Activation::kNone);
      // Side by side, as attention reads them: whatever was written to them since they were bound.
      if (count > 1) std::memcpy(e.bias + i * width, qkv[i].bias, width * sizeof(float));
    }
    attention.bias = count > 1 ? e.bias : qkv[0].bias;
    // As models ask for it: where all that is multiplied came of rounded products.
    const auto is_rounded = [](const PackedLinear& by) { return by.precision != Precision::kFloat32; };
    const bool rounds = std::all_of(qkv, qkv + count, is_rounded);
    attention.precision = rounds ? Precision::kBFloat16 : Precision::kFloat32;
    const int64_t apart = count > 1 ? e.rows * width : e.hidden;  // from q to k, from k to v
    attention.q = {e.qkv, width, head_dim};
    attention.k = {e.qkv + apart, width, head_dim};
    attention.v = {e.qkv + 2 * apart, width, head_dim};
  };

  for (int64_t i = 0; i < e.num_layers; ++i) {
    const EncoderLayer& layer = e.layers[i];
    project(layer.qkv, layer.qkv_products);
    attention_forward(attention);
    multiply(e.context, e.hidden, layer.out, e.hidden, e.projected, nullptr, Activation::kNone);
    add_and_norm(layer.out.bias, layer.attention_norm);
    multiply(e.x, e.hidden, layer.up, e.intermediate, e.wide, layer.up.bias, e.activation);
    multiply(e.wide, e.intermediate, layer.down, e.hidden, e.projected, nullptr, Activation::kNone);
    add_and_norm(layer.down.bias, layer.output_norm);
  }
}

}  // namespace bert_fast
