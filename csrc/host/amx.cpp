// The products on AMX with that unit emulated, as functions of C for tests/amx_host.py; the linear
// ones' arguments are those of bindings.cpp's functions of the same names. For few rows there are this
// processor's other instructions.
#undef BERT_FAST_AMX
#include "../cpu/linear.cpp"

namespace bert_fast {
const LinearKernels& avx512_linear_kernels() { return BERT_FAST_ISA::linear(Precision::kFloat32); }
}  // namespace bert_fast

using namespace bert_fast;

namespace {
const LinearKernels& kernels(int precision) {
  return *amx_linear_kernels(static_cast<Precision>(precision));
}
}  // namespace

extern "C" {

const char* linear_kind(int precision) { return kernels(precision).name; }
bool linear_is_fast(int precision) { return kernels(precision).fast; }
int64_t linear_packed_size(int precision, int64_t out_features, int64_t in_features) {
  return kernels(precision).packed_size(out_features, in_features);
}
int64_t linear_scratch_size(int precision, int64_t rows, int64_t in_features, int threads) {
  return kernels(precision).scratch_size(rows, in_features, threads);
}
void linear_pack(int precision, int64_t out_features, int64_t in_features, const void* elements,
                 const float* scale, const float* x_factor, void* packed, int threads) {
  kernels(precision).pack({out_features, in_features, elements, scale, x_factor}, packed, threads);
}
void linear_unpack(int precision, int64_t out_features, int64_t in_features, void* elements,
                   const void* packed) {
  kernels(precision).unpack(packed, {out_features, in_features, elements, nullptr, nullptr});
}
void linear_forward(int precision, int64_t rows, int64_t in_features, int64_t out_features,
                    const float* x, const void* packed, const float* bias, float* out,
                    void* scratch, int activation, int threads, int64_t x_stride,
                    int64_t out_stride) {
  kernels(precision).forward({rows, in_features, out_features, x, packed, bias, out, scratch,
                              static_cast<Activation>(activation), threads, x_stride, out_stride});
}

// A Strided of each of q, k, v and out in 3 numbers; (data, rows, columns) of the position bias.
void attention_in_bf16(int64_t batch, int64_t num_heads, int64_t head_dim, int64_t total_q,
                       int64_t total_k, const int32_t* cu_q, const int32_t* cu_k, float scale,
                       bool causal, int threads, const int64_t* position_bias,
                       const int64_t* strided, const float* bias, float* lse) {
  const auto at = [&](int i) {
    return Strided{reinterpret_cast<void*>(strided[3 * i]), strided[3 * i + 1], strided[3 * i + 2]};
  };
  AttentionForward a = {};
  a.batch = batch;
  a.num_heads = num_heads;
  a.head_dim = head_dim;
  a.total_q = total_q;
  a.total_k = total_k;
  a.cu_q = cu_q;
  a.cu_k = cu_k;
  a.scale = scale;
  a.causal = causal;
  a.num_threads = threads;
  a.position_bias = {reinterpret_cast<const float*>(position_bias[0]), position_bias[1],
                     position_bias[2], nullptr};
  a.q = at(0);
  a.k = at(1);
  a.v = at(2);
  a.out = at(3);
  a.bias = bias;
  a.lse = lse;
  amx_attention_in_bf16(a);
}

}  // extern "C"
