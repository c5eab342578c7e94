// The products that linear.cpp's one skeleton is made of. All read four bytes of a row of x at a
// time, a step: a float, two bf16 or four int8, and as many of each column of the weight, whose
// products are added to one sum a column.
#pragma once
#include <algorithm>

#include "simd.h"

#ifdef BERT_FAST_AMX
#include "amx.h"
#endif

namespace bert_fast {
namespace BERT_FAST_ISA {
namespace {

constexpr bool k512 = kVectorRegisters == 32;
constexpr int64_t kBlockSteps = 384;
#ifdef BERT_FAST_AMX
constexpr int64_t kTile = 16;                         // rows of a tile, and steps in each of them
constexpr int64_t kPanel = 2 * kTile, kWhole = kTile;
#else
constexpr int64_t kPanel = 2 * kWidth, kWhole = 1;    // columns; what steps are a multiple of
struct Tiles {};
#endif

// What int8 is scaled by, which follows a packed weight's panels: of each column its scale and the
// sum of its elements; of x its factors, or null.
struct Factors {
  const float *scale, *x_factor;
  const int32_t* sum;
};

// A row of x in int8: x = scale (q - zero).
struct Quantised {
  float scale;
  int32_t zero;
};

struct Float32 {
  using Element = float;
  using Sum = vf;
  static constexpr Precision kPrecision = Precision::kFloat32;
  static constexpr int64_t kTileRows = k512 ? 12 : 6;
  static constexpr int64_t kSumSteps = 64;  // summed on their own: short sums round less than sgemm's

  static BERT_FAST_INLINE void add(Sum* sums, const vu* w, int vectors, uint32_t x) {
    for (int j = 0; j < vectors; ++j) sums[j] += bit_cast<vf>(w[j]) * bit_cast<float>(x);
  }
};

struct BFloat16 {
  using Element = uint16_t;
  using Sum = vf;
  static constexpr Precision kPrecision = Precision::kBFloat16;
  static constexpr int64_t kTileRows = k512 ? 8 : 4;
  static constexpr int64_t kSumSteps = kBlockSteps;

  static BERT_FAST_INLINE void add(Sum* sums, const vu* w, int vectors, uint32_t x) {
    const float low = bit_cast<float>(x << 16), high = bit_cast<float>(x & 0xFFFF0000u);
    for (int j = 0; j < vectors; ++j) {
      sums[j] += bit_cast<vf>(w[j] << 16) * low;
      sums[j] += bit_cast<vf>(w[j] & 0xFFFF0000u) * high;
    }
  }
  static BERT_FAST_INLINE vu16 round(vf x) {
    vu16 bits;
    store(reinterpret_cast<bf16*>(&bits), x);
    return bits;
  }
};

// Without an instruction for four: two by two in 16 bits, where vpmaddubsw would saturate.
struct Int8 {
  using Element = int8_t;
  using Sum = vi;
  static constexpr Precision kPrecision = Precision::kInt8;
  static constexpr int64_t kTileRows = k512 ? 8 : 4;
  static constexpr int64_t kSumSteps = kBlockSteps;

  static BERT_FAST_INLINE vi multiply_pairs(vu a, vu b) {
#if defined(__AVX512F__)
    return (vi)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return (vi)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
    const vi x = bit_cast<vi>(a), y = bit_cast<vi>(b);
    return ((x << 16) >> 16) * ((y << 16) >> 16) + (x >> 16) * (y >> 16);
#endif
  }
  static BERT_FAST_INLINE vu sign_extend(vu bytes) {  // the low byte of each 16 bits
    typedef int16_t vi16 __attribute__((vector_size(4 * kWidth)));
    return bit_cast<vu>((bit_cast<vi16>(bytes) << 8) >> 8);
  }
  static BERT_FAST_INLINE void add(Sum* sums, const vu* w, int vectors, uint32_t x) {
    const vu even = vu{} + (x & 0x00FF00FFu), odd = vu{} + (x >> 8 & 0x00FF00FFu);
    for (int j = 0; j < vectors; ++j) {
      sums[j] += multiply_pairs(sign_extend(w[j]), even);
      sums[j] += multiply_pairs(sign_extend(w[j] >> 8), odd);
    }
  }
};

#ifdef BERT_FAST_AMX
// Tiles 0 to 3 are sums, 4 and 5 hold x, 6 and 7 W.
struct BFloat16Tiles : BFloat16 {
  static constexpr int64_t kTileRows = 2 * kTile;
  static BERT_FAST_INLINE void multiply_upper() {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
  }
  static BERT_FAST_INLINE void multiply_lower() {
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
};
struct Int8Tiles : Int8 {
  static constexpr int64_t kTileRows = 2 * kTile;
  static BERT_FAST_INLINE void multiply_upper() {
    _tile_dpbusd(0, 4, 6);
    _tile_dpbusd(1, 4, 7);
  }
  static BERT_FAST_INLINE void multiply_lower() {
    _tile_dpbusd(2, 5, 6);
    _tile_dpbusd(3, 5, 7);
  }
};

#else
// The instructions, by name: compiling files once more for each would take three more sets of
// flags, and compilers that know them.
#if defined(__AVX512F__)
struct BFloat16Dot : BFloat16 {
  static constexpr int64_t kTileRows = 12;
  static BERT_FAST_INLINE void add(Sum* sums, const vu* w, int vectors, uint32_t x) {
    const vu all = vu{} + x;
    for (int j = 0; j < vectors; ++j) {
      asm("vdpbf16ps %2, %1, %0" : "+v"(sums[j]) : "v"(all), "v"(w[j]));
    }
  }
  static BERT_FAST_INLINE vu16 round(vf x) {  // below 2^-126 to zero, as the product takes them
    vu16 bits;
    asm("vcvtneps2bf16 %1, %0" : "=v"(bits) : "v"(x));
    return bits;
  }
};
struct Int8Dot : Int8 {
  static constexpr int64_t kTileRows = 12;
  static BERT_FAST_INLINE void add(Sum* sums, const vu* w, int vectors, uint32_t x) {
    const vu all = vu{} + x;
    for (int j = 0; j < vectors; ++j) {
      asm("vpdpbusd %2, %1, %0" : "+v"(sums[j]) : "v"(all), "v"(w[j]));
    }
  }
};
#elif defined(__AVX2__) && (__GNUC__ >= 11 || __clang_major__ >= 12)
#define BERT_FAST_AVX_VNNI
struct Int8Dot : Int8 {
  static constexpr int64_t kTileRows = 6;
  static BERT_FAST_INLINE void add(Sum* sums, const vu* w, int vectors, uint32_t x) {
    const vu all = vu{} + x;
    for (int j = 0; j < vectors; ++j) {
      asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sums[j]) : "x"(all), "x"(w[j]));
    }
  }
};
#endif
#endif

#ifdef BERT_FAST_X86
inline bool has_avx512_vnni() {
  static const bool has = processor_has(0, Register::kEcx, 11);
  return has;
}
inline bool has_avx512_bf16() {
  static const bool has = processor_has(1, Register::kEax, 5);
  return has;
}
inline bool has_avx_vnni() {
  static const bool has = processor_has(1, Register::kEax, 4);
  return has;
}
#endif

// ---- a row of x, converted: what follows its last element is for the caller to fill ----

template <class P, class = std::enable_if_t<P::kPrecision == Precision::kBFloat16>>
void convert(P, const float* x, int64_t depth, const Factors&, uint16_t* to, Quantised*) {
  for_columns(depth, [&](int64_t k, auto lanes) {
    const vu16 bits = P::round(load_row(x + k, lanes));
    std::memcpy(to + k, &bits, lanes * sizeof(uint16_t));
  });
}

// By token, asymmetric: from the row's least to its greatest number, zero among them. A row with an
// infinity or a NaN gives NaN in all columns.
inline void convert(Int8, const float* x, int64_t depth, const Factors& by, uint8_t* to,
                    Quantised* row) {
  const auto value = [&](int64_t k, auto lanes) {
    const vf v = load_row(x + k, lanes);
    return by.x_factor ? v * load_row(by.x_factor + k, lanes) : v;
  };
  vf low = {}, high = {}, odd = {};  // odd: 0, but NaN after infinities and NaN
  for_columns(depth, [&](int64_t k, auto lanes) {
    const vf v = value(k, lanes);
    low = vmin(v, low);
    high = vmax(v, high);
    odd += v * 0.0f;
  });
  const float least = -max(-low), range = max(high) - least;
  const float inverse = range > 0x1p-100f ? 255.0f / range : 0.0f;
  const float zero = std::min(255.0f, std::max(0.0f, -least * inverse)) + 0x1.8p23f;
  row->scale = (range > 0x1p-100f ? range / 255.0f : 0.0f) + sum(odd);
  row->zero = bit_cast<int32_t>(zero) & 0xFF;
  const float shift = zero - 0x1.8p23f;  // -least / scale, rounded
  typedef uint8_t Bytes __attribute__((vector_size(kWidth)));
  for_columns(depth, [&](int64_t k, auto lanes) {
    const vf q = vmin(vmax(value(k, lanes) * inverse + shift, vf{}), splat(255.0f)) + 0x1.8p23f;
    const Bytes bytes = __builtin_convertvector(bit_cast<vu>(q) & 0xFF, Bytes);
    std::memcpy(to + k, &bytes, static_cast<int>(lanes));
  });
}

}  // namespace
}  // namespace BERT_FAST_ISA
}  // namespace bert_fast
