// What the CUDA kernels share: wrappers of the instructions they use, each with a twin for the host
// build (../host); 16-byte packs; reductions; dropout's random numbers; the launch.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "../philox.h"
#include "kernels.h"
#ifdef BERT_FAST_HOST
#include "../host/runtime.h"
#endif

namespace bert_fast {
namespace cuda {

using bf16 = __nv_bfloat16;
using fp16 = __half;
constexpr int kWarp = 32;

// ---- instructions ----

#ifdef BERT_FAST_HOST

inline unsigned char* shared_memory() { return host::shared_memory(); }
inline void barrier() { host::barrier(); }
inline void warp_barrier() { host::exchange("", 1, "warp_barrier"); }
inline void trap(const char* why) { host::fail(why); }

template <class V>
V shuffle_xor(V value, int mask) {
  const unsigned char* all = host::exchange(&value, sizeof(V), "shuffle_xor");
  V found;
  std::memcpy(&found, all + (threadIdx.x % kWarp ^ mask) * sizeof(V), sizeof(V));
  return found;
}

// The warp's lanes where it holds, as bits.
inline uint32_t ballot(bool holds) {
  const unsigned char* all = host::exchange(&holds, sizeof(holds), "ballot");
  uint32_t bits = 0;
  for (int lane = 0; lane < kWarp; ++lane) bits |= static_cast<uint32_t>(all[lane]) << lane;
  return bits;
}
inline int count_bits(uint32_t bits) { return __builtin_popcount(bits); }

inline void store_16(void* global, const void* from) {
  host::check_aligned(global, 16);
  std::memcpy(global, from, 16);
}
inline void copy_async_16(void* shared, const void* global, bool valid) {
  host::copy_async(shared, global, 16, valid);
}
inline void copy_async_commit() { host::copy_async_commit(); }
template <int kLeft>
void copy_async_wait() { host::copy_async_wait(kLeft); }

template <bool kTransposed>
void load_matrices(uint32_t (&r)[4], const void* row) {
  host::check_shared(row, 16);
  const auto* rows = reinterpret_cast<const uint16_t* const*>(
      host::exchange(&row, sizeof(row), kTransposed ? "ldmatrix.trans" : "ldmatrix"));
  const int lane = threadIdx.x % kWarp, i = lane / 4, j = lane % 4 * 2;
  for (int m = 0; m < 4; ++m) {
    const uint16_t* const* matrix = rows + 8 * m;
    const uint16_t low = kTransposed ? matrix[j][i] : matrix[i][j];
    const uint16_t high = kTransposed ? matrix[j + 1][i] : matrix[i][j + 1];
    r[m] = low | static_cast<uint32_t>(high) << 16;
  }
}

template <class T>
float half_of(uint32_t pair, int which) {
  const uint16_t bits = pair >> (16 * which);
  T value;
  std::memcpy(&value, &bits, 2);
  return static_cast<float>(value);
}

template <class T>
void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const uint32_t mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
  const auto* all = reinterpret_cast<const uint32_t(*)[6]>(host::exchange(mine, 24, "mma"));
  const int lane = threadIdx.x % kWarp, group = lane / 4, n = lane % 4 * 2;
  for (int k = 0; k < 16; ++k) {
    const int part = k % 8 / 2, high = k / 8, odd = k % 2;
    for (int i = 0; i < 4; ++i) {
      const uint32_t left = all[group * 4 + part][2 * high + i / 2];
      const uint32_t right = all[(n + i % 2) * 4 + part][4 + high];
      c[i] += half_of<T>(left, odd) * half_of<T>(right, odd);
    }
  }
}

inline float exp2_fast(float x) { return std::exp2(x); }
inline float lesser(float x, float most) { return x > most ? most : x; }
inline float normal_cdf(float x) { return fmaf(0.5f, erff(x * 0.70710678f), 0.5f); }
template <class P>
void check_pack(const void* address) { host::check_aligned(address, sizeof(P)); }

#else

__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char bert_fast_shared[];
  return bert_fast_shared;
}
__device__ __forceinline__ void barrier() { __syncthreads(); }
__device__ __forceinline__ void warp_barrier() { __syncwarp(); }
// Stops the kernel rather than let it compute what is wrong; CUDA then says "unspecified launch
// failure", which no process recovers from.
__device__ __forceinline__ void trap(const char*) { __trap(); }

template <class V>
__device__ __forceinline__ V shuffle_xor(V value, int mask) {
  return __shfl_xor_sync(0xFFFFFFFFu, value, mask);
}

__device__ __forceinline__ uint32_t ballot(bool holds) { return __ballot_sync(0xFFFFFFFFu, holds); }
__device__ __forceinline__ int count_bits(uint32_t bits) { return __popc(bits); }

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// 16 bytes to global memory at once: left to itself, nvcc splits what a branch may do in parts.
__device__ __forceinline__ void store_16(void* global, const void* from) {
  uint4 bits;
  memcpy(&bits, from, 16);
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(global)),
               "r"(bits.x), "r"(bits.y), "r"(bits.z), "r"(bits.w) : "memory");
}

// 16 bytes to shared memory, zeros where not valid.
__device__ __forceinline__ void copy_async_16(void* shared, const void* global, bool valid) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(global), "r"(valid ? 16 : 0) : "memory");
#else
  const uint4 zeros = {0, 0, 0, 0};
  *static_cast<uint4*>(shared) = valid ? *static_cast<const uint4*>(global) : zeros;
#endif
}
__device__ __forceinline__ void copy_async_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int kLeft>
__device__ __forceinline__ void copy_async_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
#endif
}

// Four 8 x 8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
template <bool kTransposed>
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void* row) {
  if (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
  }
}

// c (16 x 8, float) += a (16 x 16) b (16 x 8), of T.
template <class T>
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
__device__ __forceinline__ void mma<bf16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                          uint32_t b1) {
#if __CUDA_ARCH__ >= 800
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
               "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  __trap();  // launchers send bf16 to the FMA kernels before 8.0
#endif
}

template <>
__device__ __forceinline__ void mma<fp16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                          uint32_t b1) {
#if __CUDA_ARCH__ >= 800
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, "
               "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  for (int half = 0; half < 2; ++half) {  // Turing's is half as deep
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, "
                 "{%6}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[2 * half]), "r"(a[2 * half + 1]), "r"(half ? b1 : b0));
  }
#endif
}

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// The lesser of two; NaN where x is.
__device__ __forceinline__ float lesser(float x, float most) {
#if __CUDA_ARCH__ >= 800
  asm("min.NaN.f32 %0, %0, %1;" : "+f"(x) : "f"(most));
  return x;
#else
  return x > most ? most : x;
#endif
}
// By torch's formula. normcdff errs by up to 5 ulp where this errs by 1; only far below -1, where the
// result no longer counts beside x, is it the other way round.
__device__ __forceinline__ float normal_cdf(float x) {
  return fmaf(0.5f, erff(x * 0.70710678f), 0.5f);
}
template <class P>
__device__ __forceinline__ void check_pack(const void*) {}

#endif

// ---- elements ----

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(fp16 x) { return __half2float(x); }
template <class T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <> __device__ __forceinline__ bf16 from_float<bf16>(float x) { return __float2bfloat16(x); }
template <> __device__ __forceinline__ fp16 from_float<fp16>(float x) { return __float2half(x); }

// Two floats as a register of two T, the first in the low half.
template <class T>
__device__ __forceinline__ uint32_t pack_pair(float low, float high) {
  union { T values[2]; uint32_t bits; } u;
  u.values[0] = from_float<T>(low);
  u.values[1] = from_float<T>(high);
  return u.bits;
}

// What one thread moves at once: 16 bytes, or one element where rows are not made of those.
template <class T, int kCount>
struct alignas(sizeof(T) * kCount) Pack {
  T values[kCount];
};

template <class P>
__device__ __forceinline__ P load(const void* address) {
  check_pack<P>(address);
  return *static_cast<const P*>(address);
}
template <class P>
__device__ __forceinline__ void store(void* address, const P& pack) {
  check_pack<P>(address);
  *static_cast<P*>(address) = pack;
}

// To global memory, never in parts.
template <class P>
__device__ __forceinline__ void store_global(void* address, const P& pack) {
  if (sizeof(P) == 16) {
    store_16(address, &pack);
  } else {
    store(address, pack);
  }
}

// Parameters: of the activations' type T where `low`, else float; null: none.
struct Vector {
  const void* data;
  bool low;
};

// kCount of them from `column` on, as floats, 16 bytes at a time.
template <class T, int kCount>
__device__ __forceinline__ void load_vector(Vector vector, int64_t column, float (&out)[kCount]) {
  if (vector.low) {
    const auto pack = load<Pack<T, kCount>>(static_cast<const T*>(vector.data) + column);
#pragma unroll
    for (int j = 0; j < kCount; ++j) out[j] = to_float(pack.values[j]);
    return;
  }
  constexpr int kPart = kCount < 4 ? kCount : 4;
#pragma unroll
  for (int j = 0; j < kCount; j += kPart) {
    const auto pack = load<Pack<float, kPart>>(static_cast<const float*>(vector.data) + column + j);
#pragma unroll
    for (int i = 0; i < kPart; ++i) out[j + i] = pack.values[i];
  }
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int mask = kWarp / 2; mask; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}

// ---- dropout ----

struct Words {
  uint32_t w[4];
};

// words.w[i % 4] of an i that the compiler does not know, for which it would put them into local memory.
__device__ __forceinline__ uint32_t word_of(const Words& words, unsigned i) {
  const uint32_t low = i & 1 ? words.w[1] : words.w[0], high = i & 1 ? words.w[3] : words.w[2];
  return i & 2 ? high : low;
}

// Philox4x32-7, see ../philox.h: its rounds' keys, and a draw by them. Kernels that draw again and
// again keep the keys in registers.
struct PhiloxKeys {
  uint32_t words[2 * kPhiloxRounds];
};

__device__ __forceinline__ PhiloxKeys philox_keys(uint64_t seed) {
  PhiloxKeys keys;
#pragma unroll
  for (int i = 0; i < kPhiloxRounds; ++i) {
    keys.words[2 * i] = static_cast<uint32_t>(seed) + i * kPhiloxW0;
    keys.words[2 * i + 1] = static_cast<uint32_t>(seed >> 32) + i * kPhiloxW1;
  }
  return keys;
}

__device__ __forceinline__ Words philox(const PhiloxKeys& keys, uint32_t c0, uint32_t c1, uint32_t c2,
                                        uint32_t c3) {
#pragma unroll
  for (int i = 0; i < kPhiloxRounds; ++i) {
    // One product of 64 bits, which nvcc does not make of its halves.
    const uint64_t first = static_cast<uint64_t>(kPhiloxM0) * c0;
    const uint64_t second = static_cast<uint64_t>(kPhiloxM1) * c2;
    c0 = static_cast<uint32_t>(second >> 32) ^ c1 ^ keys.words[2 * i];
    c1 = static_cast<uint32_t>(second);
    c2 = static_cast<uint32_t>(first >> 32) ^ c3 ^ keys.words[2 * i + 1];
    c3 = static_cast<uint32_t>(first);
  }
  return {{c0, c1, c2, c3}};
}

__device__ __forceinline__ Words philox(uint64_t seed, uint32_t c0, uint32_t c1, uint32_t c2,
                                        uint32_t c3) {
  return philox(philox_keys(seed), c0, c1, c2, c3);
}

// A value that nvcc then neither finds anew nor knows anything about, so nor what follows from it.
__device__ __forceinline__ void keep(uint32_t& value) {
#ifndef BERT_FAST_HOST
  asm volatile("" : "+r"(value));
#endif
}

struct Dropout {
  const uint64_t* seed;  // null: no dropout
  uint32_t cut;          // the probability in 65536ths, in the upper half
  float scale;           // of what is kept
};

// Whether an element is kept by one half of its word; half 0: the lower one.
__device__ __forceinline__ bool is_kept(uint32_t word, unsigned half, const Dropout& drop) {
  return word << (16 - 16 * half) >= drop.cut;
}

inline Dropout dropout_of(double p, const Call& call) {
  if (p == 0) return {nullptr, 0, 1.0f};
  return {call.seed, dropout_cut(p) << 16, dropout_scale(p)};
}

// ---- launch ----

// The device the call is for, and what was current before. CUDA keeps a thread's last error until it
// is asked for: what others left is dropped first, so that it is not said of this call, and what this
// call leaves is taken along, so that it is not said of the next.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    cudaGetLastError();
    int current = device;
    error = cudaGetDevice(&current);
    if (error != cudaSuccess || current == device) return;
    error = cudaSetDevice(device);
    if (error == cudaSuccess) previous_ = current;
  }
  ~OnDevice() {
    if (previous_ >= 0) cudaSetDevice(previous_);
  }
  const char* message() {
    const cudaError_t last = cudaGetLastError();
    if (error == cudaSuccess) error = last;
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
  }
  cudaError_t error;

 private:
  int previous_ = -1;  // none to go back to
};

inline int device_attribute(cudaDeviceAttr attribute, int device) {
  int value = 0;
  cudaDeviceGetAttribute(&value, attribute, device);
  return value;
}

template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, int threads, size_t shared, void* stream, A... args) {
#ifdef BERT_FAST_HOST
  host::run(grid, threads, shared, [&] { kernel(args...); });
#else
  if (shared > 48 * 1024) {
    cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                         cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
  }
  kernel<<<grid, threads, shared, static_cast<cudaStream_t>(stream)>>>(args...);
#endif
}

// f(a value of the type that dtype names)
template <class F>
auto by_dtype(DType dtype, F f) {
  switch (dtype) {
    case DType::kBFloat16: return f(bf16());
    case DType::kFloat16: return f(fp16());
    default: return f(float());
  }
}

inline bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

}  // namespace cuda
}  // namespace bert_fast
