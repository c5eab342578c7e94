// The CPU kernels' interface: raw pointers, sizes and strides (in elements), no torch, no Python.
// Callers have validated everything; kernels check nothing.
#pragma once
#include <cstdint>
#include <cstring>

namespace bert_fast {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };
enum class Gelu : int { kErf = 0, kTanh = 1 };
// What a product's factors are rounded to. Sums are fp32, of int8 factors exact.
enum class Precision : int { kFloat32 = 0, kBFloat16 = 1, kInt8 = 2 };

// A (tokens, heads, head_dim) tensor whose last dimension is contiguous.
struct Strided {
  void* data;
  int64_t token, head;
};

// (num_heads, rows, columns), added to the scaled scores of every sequence; data may be null.
struct PositionBias {
  const float* data;
  int64_t rows, columns;
  float* gradient;              // backward: as large, all of it written; or null
};

struct AttentionShape {
  DType dtype;
  int64_t batch, num_heads, head_dim;
  int64_t total_q, total_k;     // rows of the buffers; rows past cu_seqlens[batch] are a tail to zero
  const int32_t *cu_q, *cu_k;   // (batch + 1)
  float scale;
  bool causal;                  // aligned to the bottom right: the last query sees the last key
  double dropout_p;
  uint64_t seed;
  int num_threads;
  // Of the CPU's kernels alone (those of CUDA have the first in their Call):
  PositionBias position_bias;
  Precision precision;          // of a forward on fp32 tensors without dropout: fp32 or bf16
};

struct AttentionForward : AttentionShape {
  Strided q, k, v, out;
  const float* bias;            // (3, num_heads, head_dim) or null; added to q, k, v as they are read
  float* lse;                   // (num_heads, total_q): log-sum-exp of each row's scaled scores; or null
};

struct AttentionBackward : AttentionShape {
  Strided q, k, v, out, dout, dq, dk, dv;
  const float* bias;
  const float* lse;
};

// out = LN(residual + dropout(x + linear_bias)) * weight + bias, rows of `hidden` elements.
struct LayerNormForward {
  DType dtype;
  int64_t rows, hidden;
  const void *x, *residual;     // residual may be null
  const float *linear_bias;     // (hidden) or null
  const float *weight, *bias;   // (hidden)
  void *out, *sum;              // sum: what was normalised, kept for backward, or null
  float *mean, *rstd;           // (rows) or null
  double eps;
  double dropout_p;
  uint64_t seed;
  int num_threads;
};

struct LayerNormBackward {
  DType dtype;
  int64_t rows, hidden;
  const void *dout, *sum;
  const float *mean, *rstd, *weight;
  void *dsum, *dx;              // dx: dsum through the dropout mask; null when dropout_p == 0
  float *dweight, *dbias;       // (hidden)
  float *dlinear_bias;          // (hidden) or null
  double dropout_p;
  uint64_t seed;
  int num_threads;
};

// A table of embeddings, and which of its rows each token asks for.
struct Table {
  const void* data;             // (rows, hidden)
  int64_t rows;
  const void* ids;              // of each token; null: row 0 for all
  bool wide;                    // ids are int64, not int32
};

// out = LN(word + position + token_type) * weight + bias
struct EmbeddingForward {
  DType tables, dtype;          // of the tables; of out and sum
  int64_t rows, hidden;         // tokens
  Table word, position, token_type;
  const float *weight, *bias;   // (hidden)
  void *out, *sum;              // as LayerNormForward's
  float *mean, *rstd;
  double eps;
  int num_threads;
  bool* outside;                // set where a token's id is outside of its table; its row is not written
};

struct GeluForward {
  DType dtype;
  int64_t rows, width;
  const void* x;
  const float* bias;            // (width) or null
  void* out;                    // may be x
  Gelu approximate;
  int num_threads;
};

struct GeluBackward {
  DType dtype;
  int64_t rows, width;
  const void *dout, *x;
  const float* bias;
  void* dx;                     // may be dout
  float* dbias;                 // (width) or null
  Gelu approximate;
  int num_threads;
};

enum class Activation : int { kNone = 0, kGelu = 1, kGeluTanh = 2 };

// Where rows best begin, in numbers of 4 bytes: at multiples of 2 KB they fall into one or two sets of
// the L1 cache, which have no room for a tile's. (Zen 4, BERT-base's 8 x 128: 890 and 840 ms.)
inline int64_t spaced(int64_t width) { return width % 512 == 0 ? width + 16 : width; }

// Rows of x that linear.cpp multiplies before it reads the weight anew (without AMX).
constexpr int64_t kRowsOfBlock = 144;

// out = activation(x weight^T + bias); x and out are fp32.
struct LinearForward {
  int64_t rows, in_features, out_features;
  const float* x;               // (rows, in_features), x_stride apart
  const void* packed;           // the weight, by the same LinearKernels' pack
  const float* bias;            // (out_features) or null
  float* out;                   // (rows, out_features), out_stride apart
  void* scratch;                // scratch_size bytes, on a cache line; or null where that is 0
  Activation activation;
  int num_threads;
  int64_t x_stride, out_stride;
  bool converted = false;       // whether scratch holds all rows of x already, by convert
};

// A weight to pack: float, bf16 or int8_t elements by the precision.
struct LinearWeight {
  int64_t out_features, in_features;
  const void* elements;         // (out_features, in_features)
  const float* scale;           // int8: (out_features), what an element stands for
  const float* x_factor;        // int8: (in_features), what x is multiplied by first; or null
};

// Sixteen numbers of a float weight, of as many rows where it has them, as they were when it was
// packed. Who writes where PyTorch does not see it changes them all.
class Samples {
 public:
  Samples(const float* weight, int64_t rows, int64_t columns, int64_t row_stride,
          int64_t column_stride) {
    for (int64_t i = 0; i < kCount; ++i) {
      at_[i] = weight + i * (rows - 1) / (kCount - 1) * row_stride + i * 7919 % columns * column_stride;
      std::memcpy(&was_[i], at_[i], sizeof(was_[i]));
    }
  }
  // Each lies in a page of its own: who asks for those of several weights first, waits once.
  void prefetch() const {
    for (const float* at : at_) __builtin_prefetch(at);
  }
  bool hold() const {
    bool same = true;
    for (int64_t i = 0; i < kCount; ++i) {
      same &= std::memcmp(&was_[i], at_[i], sizeof(was_[i])) == 0;
    }
    return same;
  }

 private:
  static constexpr int64_t kCount = 16;
  const float* at_[kCount];
  uint32_t was_[kCount];  // bits: NaN, too, is what it was
};

// A layout of packed weights and the product that reads it.
struct LinearKernels {
  const char* name;             // the instruction set that its products are of
  bool fast;                    // whether the processor has an instruction for them
  int64_t (*packed_size)(int64_t out_features, int64_t in_features);                 // bytes
  int64_t (*scratch_size)(int64_t rows, int64_t in_features, int num_threads);       // bytes
  void (*pack)(const LinearWeight&, void* packed, int num_threads);
  void (*unpack)(const void* packed, const LinearWeight& to);  // elements back
  void (*convert)(const LinearForward&, int64_t row);          // into scratch; null: not row by row
  void (*forward)(const LinearForward&);
};

const LinearKernels& linear_kernels(Precision);      // the best here of the chosen instruction set
const LinearKernels* amx_linear_kernels(Precision);  // null where there is no AMX for it
const LinearKernels& avx512_linear_kernels();        // in fp32, for AMX's few rows: below
constexpr int64_t kFewRows = 32;

// In bf16 where that is asked for and the processor has such a product.
void attention_forward(const AttentionForward&);
void amx_attention_in_bf16(const AttentionForward&);  // only where there is AMX for it

// One set of kernels an instruction set; each .cpp beside this file is compiled once for each.
struct CpuKernels {
  void (*attention_forward)(const AttentionForward&);
  void (*attention_in_bf16)(const AttentionForward&);  // for processors with that product; or null
  void (*attention_backward)(const AttentionBackward&);
  void (*layer_norm_forward)(const LayerNormForward&);
  // Each row of out, fp32, is converted for the product that reads it next, as it is written.
  void (*layer_norm_converted)(const LayerNormForward&, const LinearKernels&, const LinearForward& next);
  void (*layer_norm_backward)(const LayerNormBackward&);
  void (*embedding_forward)(const EmbeddingForward&);
  void (*gelu_forward)(const GeluForward&);
  void (*gelu_backward)(const GeluBackward&);
  const LinearKernels& (*linear)(Precision);
};

// A post-norm encoder (Vaswani et al. 2017; BERT) in inference, packed rows in fp32.
struct PackedLinear {
  const void* packed;
  const float* bias;
  Precision precision;
};
struct Norm {
  const float *weight, *bias;
  double eps;
};
struct EncoderLayer {
  PackedLinear qkv[3];  // of queries, keys and values: one product, or one for each
  int qkv_products;
  PackedLinear out;
  Norm attention_norm;
  PackedLinear up, down;
  Norm output_norm;
};
struct EncoderForward {
  const EncoderLayer* layers;
  int64_t num_layers, rows, batch, hidden, intermediate, num_heads;
  const int32_t* cu_seqlens;    // (batch + 1)
  float scale;
  Activation activation;
  float* x;                     // (rows, hidden): read, and written with the last layer's output
  float* memory;                // of encoder_memory floats, to work in
  int num_threads;
};
int64_t encoder_memory(const EncoderForward&);
void encoder_forward(const EncoderForward&);

const CpuKernels& cpu_kernels();     // those of the chosen instruction set
const char* cpu_isa();               // as dispatch.cpp lists them
bool set_cpu_isa(const char* name);  // false where this processor or build has not got it

}  // namespace bert_fast
