// Vectors of kWidth floats, by the compiler's own vector types: the arithmetic below is ordinary
// C++, and the flags a file is compiled with (setup.py) decide what it becomes. Only widening
// multiplies and fp16 conversions need intrinsics.
//
// Everything sits in a namespace named after the instruction set. Without that the linker would
// merge, say, two `exp2` and could leave the AVX-512 one to a processor that has none.
#pragma once
#include <cstdint>
#include <cstring>
#include <new>
#include <type_traits>

#include "../philox.h"
#include "kernels.h"
#include "threads.h"

#ifdef __AVX2__
#include <immintrin.h>
#endif
#ifdef BERT_FAST_X86
#include <cpuid.h>
#endif
#if defined(BERT_FAST_AMX)
#define BERT_FAST_ISA amx
#elif defined(__AVX512F__)
#define BERT_FAST_ISA avx512
#elif defined(__AVX2__)
#define BERT_FAST_ISA avx2
#else
#define BERT_FAST_ISA generic
#endif

#define BERT_FAST_INLINE inline __attribute__((always_inline))

namespace bert_fast {
namespace BERT_FAST_ISA {

#ifdef BERT_FAST_X86
enum class Register { kEax, kEcx, kEdx };
// A bit of what the processor says of itself in leaf 7 (Intel's manual, volume 2, CPUID). Compilers'
// __builtin_cpu_supports does not know all of these names.
inline bool processor_has(unsigned subleaf, Register in, unsigned bit) {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || subleaf > eax) return false;
  if (!__get_cpuid_count(7, subleaf, &eax, &ebx, &ecx, &edx)) return false;
  const unsigned word = in == Register::kEax ? eax : in == Register::kEcx ? ecx : edx;
  return (word >> bit & 1) != 0;
}
#endif

#if defined(__AVX512F__)
constexpr int kWidth = 16, kVectorRegisters = 32;
#elif defined(__AVX2__)
constexpr int kWidth = 8, kVectorRegisters = 16;
#else
constexpr int kWidth = 4, kVectorRegisters = 16;
#endif

typedef float vf __attribute__((vector_size(4 * kWidth)));
typedef int32_t vi __attribute__((vector_size(4 * kWidth)));
typedef uint32_t vu __attribute__((vector_size(4 * kWidth)));
typedef uint16_t vu16 __attribute__((vector_size(2 * kWidth)));

struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };

BERT_FAST_INLINE vf splat(float x) { return x - vf{}; }
BERT_FAST_INLINE vf select(vi mask, vf a, vf b) { return mask ? a : b; }
// Where either is NaN these give b, as the instructions do (which the compiler does not find in
// a > b ? a : b by itself).
#if defined(__AVX512F__)
BERT_FAST_INLINE vf vmax(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
BERT_FAST_INLINE vf vmin(vf a, vf b) { return (vf)_mm512_min_ps((__m512)a, (__m512)b); }
#elif defined(__AVX2__)
BERT_FAST_INLINE vf vmax(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
BERT_FAST_INLINE vf vmin(vf a, vf b) { return (vf)_mm256_min_ps((__m256)a, (__m256)b); }
#else
BERT_FAST_INLINE vf vmax(vf a, vf b) { return a > b ? a : b; }
BERT_FAST_INLINE vf vmin(vf a, vf b) { return a < b ? a : b; }
#endif
template <class To, class From>
BERT_FAST_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// Over a vector's lanes, halving it again and again: a row ends in one of these, and lane by lane
// they would cost as much as the row.
#if defined(__AVX512F__)
BERT_FAST_INLINE float sum(vf x) { return _mm512_reduce_add_ps((__m512)x); }
BERT_FAST_INLINE float max(vf x) { return _mm512_reduce_max_ps((__m512)x); }
#elif defined(__AVX2__)
BERT_FAST_INLINE float sum(vf x) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
BERT_FAST_INLINE float max(vf x) {
  __m128 half = _mm_max_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
  half = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}
#else
BERT_FAST_INLINE float sum(vf x) { return (x[0] + x[2]) + (x[1] + x[3]); }
BERT_FAST_INLINE float max(vf x) {
  const float a = x[0] > x[1] ? x[0] : x[1], b = x[2] > x[3] ? x[2] : x[3];
  return a > b ? a : b;
}
#endif
BERT_FAST_INLINE vi lane_index() {
  vi lanes = {};
  for (int i = 0; i < kWidth; ++i) lanes[i] = i;
  return lanes;
}

// ---- loads and stores of the three storage types; arithmetic is always fp32 ----

BERT_FAST_INLINE vf load(const float* p) {
  vf x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}
BERT_FAST_INLINE void store(float* p, vf x) { std::memcpy(p, &x, sizeof(x)); }

BERT_FAST_INLINE vf load(const bf16* p) {
  vu16 bits;
  std::memcpy(&bits, p, sizeof(bits));
  return bit_cast<vf>(__builtin_convertvector(bits, vu) << 16);
}
// Round to nearest even; a NaN keeps its sign and stays a NaN (rounding could carry it to infinity).
BERT_FAST_INLINE void store(bf16* p, vf x) {
  const vu bits = bit_cast<vu>(x);
  const vu rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  const vu quiet_nan = (bits >> 16) | 0x40;
  const vu16 out = __builtin_convertvector(x == x ? rounded : quiet_nan, vu16);
  std::memcpy(p, &out, sizeof(out));
}

#if defined(__AVX512F__)
BERT_FAST_INLINE vf load(const fp16* p) {
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
BERT_FAST_INLINE void store(fp16* p, vf x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif defined(__AVX2__)
BERT_FAST_INLINE vf load(const fp16* p) {
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
BERT_FAST_INLINE void store(fp16* p, vf x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
}
#else
// Multiplying by 2^112 (and 2^-112) moves between the two formats' exponents and lets the hardware
// deal with subnormals.
BERT_FAST_INLINE vf load(const fp16* p) {
  vu16 raw;
  std::memcpy(&raw, p, sizeof(raw));
  const vu bits = __builtin_convertvector(raw, vu);
  const vf magnitude = bit_cast<vf>((bits & 0x7FFF) << 13) * 0x1p112f;
  const vu finite = bit_cast<vu>(magnitude);
  const vu special = 0x7F800000u | ((bits & 0x3FF) << 13);
  const vu out = (bits & 0x7C00) == 0x7C00 ? special : finite;
  return bit_cast<vf>(out | ((bits & 0x8000) << 16));
}
BERT_FAST_INLINE void store(fp16* p, vf x) {
  const vu bits = bit_cast<vu>(x);
  const vu magnitude = bits & 0x7FFFFFFFu;
  const vu normal = (magnitude - 0x38000000u + 0xFFF + ((magnitude >> 13) & 1)) >> 13;
  // Below 2^-14: adding 0.5 makes the hardware round to fp16's subnormal spacing of 2^-24.
  const vu subnormal = bit_cast<vu>(bit_cast<vf>(magnitude) + 0.5f) - 0x3F000000u;
  vu out = magnitude < 0x38800000u ? subnormal : normal;
  out = out > 0x7C00u ? vu{} + 0x7C00u : out;
  out = magnitude > 0x7F800000u ? vu{} + 0x7E00u : out;
  const vu16 packed = __builtin_convertvector(out | ((bits >> 16) & 0x8000), vu16);
  std::memcpy(p, &packed, sizeof(packed));
}
#endif

// The first n < kWidth elements; the rest read as zero and are not written.
template <class T>
BERT_FAST_INLINE vf load_n(const T* p, int n) {
  T padded[kWidth] = {};
  std::memcpy(padded, p, n * sizeof(T));
  return load(padded);
}
template <class T>
BERT_FAST_INLINE void store_n(T* p, vf x, int n) {
  T padded[kWidth];
  store(padded, x);
  std::memcpy(p, padded, n * sizeof(T));
}

// Calls body(column, lanes) along a row. `lanes` is the type AllLanes but for the last, partial
// vector: the body is compiled once for each, and the main loop has no trace of the other.
struct AllLanes {
  constexpr operator int() const { return kWidth; }
};
template <class Body>
BERT_FAST_INLINE void for_columns(int64_t width, Body body) {
  int64_t col = 0;
  for (; col + kWidth <= width; col += kWidth) body(col, AllLanes{});
  if (col < width) body(col, static_cast<int>(width - col));
}
template <class T>
BERT_FAST_INLINE vf load_row(const T* p, AllLanes) { return load(p); }
template <class T>
BERT_FAST_INLINE vf load_row(const T* p, int lanes) { return load_n(p, lanes); }
template <class T>
BERT_FAST_INLINE void store_row(T* p, vf x, AllLanes) { store(p, x); }
template <class T>
BERT_FAST_INLINE void store_row(T* p, vf x, int lanes) { store_n(p, x, lanes); }

// Calls step(0) ... step(N - 1), without a loop.
template <int N, class Step>
BERT_FAST_INLINE void each(Step step) {
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i) step(i);
}

// ---- functions ----

// 2^r for |r| <= 1/2, by a Taylor series whose next term is below half an ulp.
BERT_FAST_INLINE vf exp2_of_half(vf r) {
  vf p = splat(1.5403530393e-4f);
  p = p * r + 1.3333558146e-3f;
  p = p * r + 9.6181291076e-3f;
  p = p * r + 5.5504108665e-2f;
  p = p * r + 2.4022650696e-1f;
  p = p * r + 6.9314718056e-1f;
  return p * r + 1.0f;
}
// 2^x for x <= 0, to 1 ulp or so: 2^r, and 2^n by the instruction for it or by the exponent bits.
// x <= -127 gives 0, which is what a softmax wants there; a NaN stays one, so that a poisoned score
// poisons its row and is not lost.
#if defined(__AVX512F__)
BERT_FAST_INLINE vf exp2(vf x) {
  const __mmask16 counts = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-127.0f), _CMP_NLE_UQ);
  const vf clamped = vmax(splat(-127.0f), x);  // a NaN stays
  const vf n = (vf)_mm512_roundscale_ps((__m512)clamped, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return (vf)_mm512_maskz_scalef_ps(counts, (__m512)exp2_of_half(clamped - n), (__m512)n);
}
#else
BERT_FAST_INLINE vf exp2(vf x) {
  const vf clamped = vmax(x, splat(-127.0f));
  const vf shifted = clamped + 0x1.8p23f;  // rounds to an integer, held in the low bits
  const vf p = exp2_of_half(clamped - (shifted - 0x1.8p23f));
  const vf scaled = bit_cast<vf>(bit_cast<vi>(p) + (bit_cast<vi>(shifted) << 23));
  return select(x > -127.0f, scaled, select(x < -127.0f, vf{}, x * 0.0f));
}
#endif

constexpr double kLog2e = 1.44269504088896341, kLn2 = 0.693147180559945309;

// e^x to 1 ulp or so for |x| <= 87, by Cephes' expf: ln 2 in two parts, so that the reduced
// argument is exact.
BERT_FAST_INLINE vf exp_bounded(vf x) {
  const vf shifted = x * static_cast<float>(kLog2e) + 0x1.8p23f;
  const vf n = shifted - 0x1.8p23f;
  const vf r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  vf p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  return bit_cast<vf>(bit_cast<vi>(p) + (bit_cast<vi>(shifted) << 23));
}

// The same for any x: arguments past the bounds are taken as the bounds. NaN gives anything.
BERT_FAST_INLINE vf exp(vf x) { return exp_bounded(vmin(vmax(x, splat(-87.0f)), splat(87.0f))); }

// ---- dropout ----

// The high and low halves of 32 x 32 bit products.
BERT_FAST_INLINE void multiply_wide(vu a, uint32_t m, vu& high, vu& low) {
#if defined(__AVX512F__)
  const __m512i x = (__m512i)a, y = _mm512_set1_epi32(static_cast<int>(m));
  const __m512i even = _mm512_mul_epu32(x, y);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(x, 32), y);
  high = (vu)_mm512_mask_blend_epi32(0xAAAA, _mm512_srli_epi64(even, 32), odd);
#elif defined(__AVX2__)
  const __m256i x = (__m256i)a, y = _mm256_set1_epi32(static_cast<int>(m));
  const __m256i even = _mm256_mul_epu32(x, y);
  const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), y);
  high = (vu)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
#else
  for (int i = 0; i < kWidth; ++i) {
    high[i] = static_cast<uint32_t>((static_cast<uint64_t>(a[i]) * m) >> 32);
  }
#endif
  low = a * m;
}

// factors[col] = 0 where the element is dropped, else 1 / (1 - p), for the columns [0, width) of
// the row that counter words c1..c3 name. kKeys: columns are attention's keys, and a draw has four
// neighbours and those 16 further (column_of_key in reference.py); first_col is a multiple of 32.
// `factors` has room for width rounded up to 8 * kWidth.
template <bool kKeys>
inline void dropout_row(float* factors, int64_t width, uint64_t seed, double p, uint32_t first_col,
                        uint32_t c1, uint32_t c2, uint32_t c3) {
  const uint32_t cut = dropout_cut(p);
  const float keep = dropout_scale(p);
  const vu lanes = bit_cast<vu>(lane_index());
  for (int64_t col = 0; col < width; col += 8 * kWidth) {
    vu word[4] = {lanes + (first_col + static_cast<uint32_t>(col)) / 8, vu{} + c1, vu{} + c2, vu{} + c3};
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < kPhiloxRounds; ++round) {
      vu high0, low0, high1, low1;
      multiply_wide(word[0], kPhiloxM0, high0, low0);
      multiply_wide(word[2], kPhiloxM1, high1, low1);
      word[0] = high1 ^ word[1] ^ k0;
      word[2] = high0 ^ word[3] ^ k1;
      word[1] = low1;
      word[3] = low0;
      k0 += kPhiloxW0;
      k1 += kPhiloxW1;
    }
    for (int lane = 0; lane < kWidth; ++lane) {
      float* to = factors + col + (kKeys ? lane / 4 * 32 + lane % 4 * 4 : lane * 8);
      for (int w = 0; w < 4; ++w) {
        to[kKeys ? w : 2 * w] = (word[w][lane] & 0xFFFF) < cut ? 0.0f : keep;
        to[kKeys ? w + 16 : 2 * w + 1] = word[w][lane] >> 16 < cut ? 0.0f : keep;
      }
    }
  }
}

// ---- parallel work ----

// Starting threads costs more than a small tensor is worth: of OpenMP's, not measured finely, some
// ten microseconds of work; of a team, which is awake in a model's call, some three. (An int8 MiniLM
// takes 0.9 of its time at 1 x 16 tokens since a team has a limit of its own, on two cores of an EPYC.)
inline int threads_for(int64_t elements, int num_threads) {
  return elements < (is_on_team() ? 1 << 12 : 1 << 14) ? 1 : num_threads;
}

inline void fill(float* p, int64_t count, float value) {
  for (int64_t i = 0; i < count; ++i) p[i] = value;
}

// Uninitialised fp32 memory that starts on a cache line. Not a std::vector: the library's templates
// are shared between instruction sets by the linker, as the comment at the top explains.
class Buffer {
 public:
  explicit Buffer(int64_t floats) : data_(static_cast<float*>(::operator new(
      static_cast<size_t>(floats) * sizeof(float), std::align_val_t{64}))) {}
  ~Buffer() { ::operator delete(data_, std::align_val_t{64}); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  operator float*() { return data_; }
 private:
  float* data_;
};

// Rows cut into chunks for sums over rows. The cut depends on the row count alone, never on the
// number of threads, and chunks are added in order: the same input gives the same bits.
struct RowChunks {
  explicit RowChunks(int64_t rows, int64_t least = 16)
      : rows(rows), size(rows > 64 * least ? (rows + 63) / 64 : least),
        count((rows + size - 1) / size) {}

  int64_t begin(int64_t chunk) const { return chunk * size < rows ? chunk * size : rows; }

  void sum(const float* partial, int64_t width, float* out) const {
    fill(out, width, 0.0f);
    for (int64_t chunk = 0; chunk < count; ++chunk) {
      for (int64_t col = 0; col < width; ++col) out[col] += partial[chunk * width + col];
    }
  }

  int64_t rows, size, count;
};

template <class Kernel>
BERT_FAST_INLINE void dispatch_dtype(DType dtype, Kernel kernel) {
  switch (dtype) {
    case DType::kFloat32: kernel(static_cast<float*>(nullptr)); break;
    case DType::kBFloat16: kernel(static_cast<bf16*>(nullptr)); break;
    case DType::kFloat16: kernel(static_cast<fp16*>(nullptr)); break;
  }
}

}  // namespace BERT_FAST_ISA
}  // namespace bert_fast
