// Chooses the instruction set once, at load, by what the processor has; BERT_FAST_CPU_ISA overrides.
#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace bert_fast {

inline int64_t no_scratch(int) { return 0; }

#define BERT_FAST_DECLARE(isa)                                       \
  namespace isa {                                                    \
  void attention_forward(const AttentionForward&);                   \
  void attention_backward(const AttentionBackward&);                 \
  void layer_norm_forward(const LayerNormForward&);                  \
  void layer_norm_backward(const LayerNormBackward&);                \
  void embedding_forward(const EmbeddingForward&);                   \
  void gelu_forward(const GeluForward&);                             \
  void gelu_backward(const GeluBackward&);                           \
  int64_t linear_packed_size(int64_t, int64_t);                      \
  void linear_pack(const float*, int64_t, int64_t, void*, int);      \
  void linear_forward(const LinearForward&);                         \
  bool linear_matches(const float*, int64_t, int64_t, const void*);  \
  constexpr CpuKernels kernels = {                                   \
      attention_forward,  attention_backward,                        \
      layer_norm_forward, layer_norm_backward,                       \
      embedding_forward,                                             \
      gelu_forward,       gelu_backward,                             \
      {#isa, 1, linear_packed_size, no_scratch, linear_pack, linear_forward, \
       linear_matches}}; \
  }

BERT_FAST_DECLARE(generic)
#ifdef BERT_FAST_X86
BERT_FAST_DECLARE(avx2)
BERT_FAST_DECLARE(avx512)
#endif

namespace {

struct Isa {
  const char* name;
  const CpuKernels* kernels;
  bool (*supported)();
};

// Best first. The features are those setup.py compiles each set with.
const Isa kIsas[] = {
#ifdef BERT_FAST_X86
    {"avx512", &avx512::kernels,
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
              __builtin_cpu_supports("fma");
     }},
    // Every processor with AVX2 has F16C, which older compilers cannot ask about.
    {"avx2", &avx2::kernels,
     [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }},
#endif
    {"generic", &generic::kernels, [] { return true; }},
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

// Whoever asks for a lesser instruction set than AVX-512 gets no AMX either.
const LinearKernels& linear_kernels() {
  const LinearKernels* amx = std::strcmp(cpu_isa(), "avx512") == 0 ? amx_linear_kernels() : nullptr;
  return amx ? *amx : cpu_kernels().linear;
}

bool set_cpu_isa(const char* name) {
  const Isa* isa = find(name);
  if (isa) chosen() = isa;
  return isa != nullptr;
}

}  // namespace bert_fast
