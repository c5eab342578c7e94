// GELU forward with the linear layer's bias, on CUDA. See ../cpu/gelu.cpp for the formulas.
// Bound by memory: 16-byte accesses, one block a row segment, bias read through the cache.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "kernels.h"

namespace bert_fast {
namespace cuda {
namespace {

constexpr int kThreads = 256;

template <Gelu kind>
__device__ __forceinline__ float gelu(float x) {
  if (kind == Gelu::kErf) return x * normcdff(x);
  const float u = 0.797884560802865f * x * (1.0f + 0.044715f * x * x);
  return x / (1.0f + __expf(-2.0f * u));
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
template <class T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <> __device__ __forceinline__ __nv_bfloat16 from_float(float x) { return __float2bfloat16(x); }
template <> __device__ __forceinline__ __half from_float(float x) { return __float2half(x); }

// What one thread moves: 16 bytes of storage, or one element where rows are not made of those.
template <class T, int kCount>
struct alignas(sizeof(T) * kCount) Pack {
  T values[kCount];
};

template <class T, int kCount, Gelu kind>
__global__ void __launch_bounds__(kThreads) gelu_kernel(const T* __restrict__ x,
                                                        const float* __restrict__ bias,
                                                        T* __restrict__ out, int64_t packs,
                                                        int64_t packs_per_row) {
  using P = Pack<T, kCount>;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < packs; i += step) {
    P pack = reinterpret_cast<const P*>(x)[i];
    const float* b = bias ? bias + (i % packs_per_row) * kCount : nullptr;
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const float value = to_float(pack.values[j]) + (b ? b[j] : 0.0f);
      pack.values[j] = from_float<T>(gelu<kind>(value));
    }
    reinterpret_cast<P*>(out)[i] = pack;
  }
}

template <class T, int kCount, Gelu kind>
void launch(const GeluForward& a, cudaStream_t stream) {
  const int64_t packs = a.rows * a.width / kCount;
  const int64_t blocks = (packs + kThreads - 1) / kThreads;
  // A grid-stride loop over at most this many blocks: some 30 a multiprocessor on today's largest.
  const unsigned grid = static_cast<unsigned>(blocks < 4096 ? blocks : 4096);
  gelu_kernel<T, kCount, kind><<<grid, kThreads, 0, stream>>>(
      static_cast<const T*>(a.x), a.bias, static_cast<T*>(a.out), packs, a.width / kCount);
}

template <class T>
void launch(const GeluForward& a, cudaStream_t stream) {
  constexpr int kCount = 16 / sizeof(T);
  const bool aligned = a.width % kCount == 0 && reinterpret_cast<uintptr_t>(a.x) % 16 == 0 &&
                       reinterpret_cast<uintptr_t>(a.out) % 16 == 0;
  if (a.approximate == Gelu::kErf) {
    aligned ? launch<T, kCount, Gelu::kErf>(a, stream) : launch<T, 1, Gelu::kErf>(a, stream);
  } else {
    aligned ? launch<T, kCount, Gelu::kTanh>(a, stream) : launch<T, 1, Gelu::kTanh>(a, stream);
  }
}

}  // namespace

const char* gelu_forward(const GeluForward& a, int device, void* stream) {
  if (a.rows * a.width == 0) return nullptr;
  int previous = 0;
  cudaError_t error = cudaGetDevice(&previous);
  if (error == cudaSuccess && previous != device) error = cudaSetDevice(device);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  const auto s = static_cast<cudaStream_t>(stream);
  switch (a.dtype) {
    case DType::kFloat32: launch<float>(a, s); break;
    case DType::kBFloat16: launch<__nv_bfloat16>(a, s); break;
    case DType::kFloat16: launch<__half>(a, s); break;
  }
  error = cudaGetLastError();
  if (previous != device) cudaSetDevice(previous);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace cuda
}  // namespace bert_fast
