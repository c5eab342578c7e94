// Chooses the instruction set once, at load, by what the processor has; BERT_FAST_CPU_ISA overrides.
#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace bert_fast {

#define BERT_FAST_DECLARE(isa)                                       \
  namespace isa {                                                    \
  void attention_forward(const AttentionForward&);                   \
  void attention_backward(const AttentionBackward&);                 \
  void layer_norm_forward(const LayerNormForward&);                  \
  void layer_norm_converted(const LayerNormForward&, const LinearKernels&, const LinearForward&); \
  void layer_norm_backward(const LayerNormBackward&);                \
  void embedding_forward(const EmbeddingForward&);                   \
  void gelu_forward(const GeluForward&);                             \
  void gelu_backward(const GeluBackward&);                           \
  const LinearKernels& linear(Precision);                            \
  const LinearKernels& linear_base(Precision);                       \
  constexpr CpuKernels with(const LinearKernels& (*products)(Precision), \
                            void (*in_bf16)(const AttentionForward&) = nullptr) { \
    return {attention_forward,  in_bf16,                             \
            attention_backward,                                      \
            layer_norm_forward, layer_norm_converted, layer_norm_backward, \
            embedding_forward,                                       \
            gelu_forward,       gelu_backward,                       \
            products};                                               \
  }                                                                  \
  constexpr CpuKernels base = with(linear_base);                     \
  }

BERT_FAST_DECLARE(generic)
namespace generic { constexpr CpuKernels kernels = with(linear); }
#ifdef BERT_FAST_X86
BERT_FAST_DECLARE(avx2)
namespace avx2 { constexpr CpuKernels kernels = with(linear); }
BERT_FAST_DECLARE(avx512)
namespace avx512 {
void attention_in_bf16(const AttentionForward&);
constexpr CpuKernels kernels = with(linear, attention_in_bf16);
}
#endif

namespace {

struct Isa {
  const char* name;
  const CpuKernels* kernels;
  bool (*supported)();
};

bool always() { return true; }
#ifdef BERT_FAST_X86
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("fma");
}
// Every processor with AVX2 has F16C, which older compilers cannot ask about.
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
#endif

// Best first. The features are those setup.py compiles each set with; "base" is without the later
// instructions for products in bf16 and int8, as a processor without them has it.
const Isa kIsas[] = {
#ifdef BERT_FAST_X86
    {"avx512", &avx512::kernels, has_avx512},  // and AMX, where it is
    {"avx512_no_amx", &avx512::kernels, has_avx512},
    {"avx512_base", &avx512::base, has_avx512},
    {"avx2", &avx2::kernels, has_avx2},
    {"avx2_base", &avx2::base, has_avx2},
#endif
    {"generic", &generic::kernels, always},
};

const Isa* find(const char* name) {
  for (const Isa& isa : kIsas) {
    if (isa.supported() && (!name || std::strcmp(name, isa.name) == 0)) return &isa;
  }
  return nullptr;
}

const Isa*& chosen() {
  static const Isa* isa = [] {
    const char* name = std::getenv("BERT_FAST_CPU_ISA");
    const Isa* found = name && *name ? find(name) : nullptr;
    return found ? found : find(nullptr);
  }();
  return isa;
}

}  // namespace

const CpuKernels& cpu_kernels() { return *chosen()->kernels; }
const char* cpu_isa() { return chosen()->name; }

// Null where there is no AMX; whoever asks for a lesser instruction set than AVX-512 gets none either.
static const LinearKernels* amx_kernels(Precision precision) {
  return std::strcmp(cpu_isa(), "avx512") == 0 ? amx_linear_kernels(precision) : nullptr;
}

const LinearKernels& linear_kernels(Precision precision) {
  const LinearKernels* kernels = amx_kernels(precision);
  return kernels ? *kernels : cpu_kernels().linear(precision);
}

void attention_forward(const AttentionForward& a) {
  const CpuKernels& kernels = cpu_kernels();
  const bool rounds = a.precision == Precision::kBFloat16 && a.dtype == DType::kFloat32 &&
                      a.dropout_p == 0.0;
  if (rounds && amx_kernels(Precision::kBFloat16)) return amx_attention_in_bf16(a);
  if (rounds && kernels.attention_in_bf16 && kernels.linear(Precision::kBFloat16).fast) {
    return kernels.attention_in_bf16(a);
  }
  kernels.attention_forward(a);
}

#ifdef BERT_FAST_X86
const LinearKernels& avx512_linear_kernels() { return avx512::linear(Precision::kFloat32); }
#endif

bool set_cpu_isa(const char* name) {
  const Isa* isa = find(name);
  if (isa) chosen() = isa;
  return isa != nullptr;
}

}  // namespace bert_fast
