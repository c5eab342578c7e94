// GELU(x + bias) and its gradient on CUDA; formulas in ../cpu/gelu.cpp. Bound by memory: 16-byte
// accesses, the bias through the cache.
#include "device.h"

namespace bert_fast {
namespace cuda {
namespace {

constexpr int kThreads = 256, kRows = kThreads / kWarp;

template <Gelu kind>
__device__ __forceinline__ float gelu(float x) {
  if (kind == Gelu::kErf) return x * normal_cdf(x);
  const float v = 0.797884560802865f * x * (1.0f + 0.044715f * x * x);
  return x / (1.0f + expf(-2.0f * v));
}

template <Gelu kind>
__device__ __forceinline__ float gelu_gradient(float x) {
  if (kind == Gelu::kErf) return normal_cdf(x) + x * 0.398942280401433f * expf(-0.5f * x * x);
  x = x > 12.0f ? 12.0f : x < -12.0f ? -12.0f : x;  // flat beyond: no infinity times zero; NaN stays
  const float v = 0.797884560802865f * x * (1.0f + 0.044715f * x * x);
  const float e = expf(-2.0f * fabsf(v)), inverse = 1.0f / (1.0f + e);
  const float share = v > 0 ? inverse : e * inverse;  // (1 + tanh v) / 2
  const float slope = 0.797884560802865f * (1.0f + 3.0f * 0.044715f * x * x);
  return share + 2.0f * x * e * inverse * inverse * slope;
}

template <class T, int kCount, Gelu kind>
__global__ void __launch_bounds__(kThreads) forward(const T* x, const float* bias, T* out,
                                                    int64_t packs, int64_t packs_per_row) {
  using P = Pack<T, kCount>;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < packs; i += step) {
    P pack = load<P>(x + i * kCount);
    const float* b = bias ? bias + (i % packs_per_row) * kCount : nullptr;
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const float value = to_float(pack.values[j]) + (b ? b[j] : 0.0f);
      pack.values[j] = from_float<T>(gelu<kind>(value));
    }
    store(out + i * kCount, pack);
  }
}

// Grid: (blocks of 32 packs of columns, programs); a warp takes every (8 programs)-th row.
template <class T, int kCount, Gelu kind>
__global__ void __launch_bounds__(kThreads) backward(const T* dout, const T* x, const float* bias,
                                                     T* dx, float* partials, int64_t rows,
                                                     int64_t width) {
  using P = Pack<T, kCount>;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t column = (static_cast<int64_t>(blockIdx.x) * kWarp + lane) * kCount;
  const bool inside = column < width;
  float shift[kCount] = {}, total[kCount] = {};
  if (bias && inside) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) shift[j] = bias[column + j];
  }
  const int64_t step = static_cast<int64_t>(gridDim.y) * kRows;
  for (int64_t row = static_cast<int64_t>(blockIdx.y) * kRows + warp; row < rows && inside; row += step) {
    const int64_t at = row * width + column;
    const P u = load<P>(x + at), dy = load<P>(dout + at);
    P result;
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const float gradient =
          to_float(dy.values[j]) * gelu_gradient<kind>(to_float(u.values[j]) + shift[j]);
      total[j] += gradient;
      result.values[j] = from_float<T>(gradient);
    }
    store(dx + at, result);
  }
  if (!partials) return;
  auto* sums = reinterpret_cast<float(*)[kWarp * kCount]>(shared_memory());  // one a warp
#pragma unroll
  for (int j = 0; j < kCount; ++j) sums[warp][lane * kCount + j] = total[j];
  barrier();
  for (int c = threadIdx.x; c < kWarp * kCount; c += kThreads) {
    const int64_t at = static_cast<int64_t>(blockIdx.x) * kWarp * kCount + c;
    if (at >= width) continue;
    float sum = 0.0f;
    for (int w = 0; w < kRows; ++w) sum += sums[w][c];
    partials[blockIdx.y * width + at] = sum;
  }
}

template <class T, int kCount, Gelu kind>
void launch_kernel(const GeluForward& a, const Call& call) {
  const int64_t packs = a.rows * a.width / kCount, blocks = (packs + kThreads - 1) / kThreads;
  // A grid-stride loop over at most this many blocks: some 30 a multiprocessor on today's largest.
  launch(forward<T, kCount, kind>, dim3(static_cast<unsigned>(blocks < 4096 ? blocks : 4096)),
         kThreads, 0, call.stream, static_cast<const T*>(a.x), a.bias, static_cast<T*>(a.out), packs,
         a.width / kCount);
}

template <class T, int kCount, Gelu kind>
void launch_kernel(const GeluBackward& a, const Call& call) {
  const unsigned columns = static_cast<unsigned>((a.width + kWarp * kCount - 1) / (kWarp * kCount));
  launch(backward<T, kCount, kind>, dim3(columns, call.programs), kThreads,
         kRows * kWarp * kCount * sizeof(float), call.stream, static_cast<const T*>(a.dout),
         static_cast<const T*>(a.x), a.bias, static_cast<T*>(a.dx),
         a.dbias ? call.scratch : nullptr, a.rows, a.width);
}

template <class Args>
void by_kind(const Args& a, const Call& call, bool packs) {
  by_dtype(a.dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int kCount = 16 / sizeof(T);
    const bool wide = packs && a.width % kCount == 0;
    if (a.approximate == Gelu::kErf) {
      wide ? launch_kernel<T, kCount, Gelu::kErf>(a, call) : launch_kernel<T, 1, Gelu::kErf>(a, call);
    } else {
      wide ? launch_kernel<T, kCount, Gelu::kTanh>(a, call) : launch_kernel<T, 1, Gelu::kTanh>(a, call);
    }
  });
}

// One thread a column.
__global__ void __launch_bounds__(kThreads) sum_kernel(const float* partials, int programs,
                                                       int64_t width, float* out0, float* out1,
                                                       float* out2) {
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  float* out = blockIdx.y == 0 ? out0 : blockIdx.y == 1 ? out1 : out2;
  if (column >= width) return;
  const float* p = partials + blockIdx.y * programs * width + column;
  float sum = 0.0f;
  for (int i = 0; i < programs; ++i) sum += p[i * width];
  out[column] = sum;
}

}  // namespace

void sum_partials(const float* partials, int sums, int programs, int64_t width,
                  float* const (&out)[3], void* stream) {
  launch(sum_kernel, dim3(static_cast<unsigned>((width + kThreads - 1) / kThreads), sums), kThreads,
         0, stream, partials, programs, width, out[0], out[1], out[2]);
}

const char* gelu_forward(const GeluForward& a, const Call& call) {
  OnDevice on(call.device);
  if (on.error == cudaSuccess && a.rows * a.width) {
    by_kind(a, call, aligned(a.x) && aligned(a.out));
  }
  return on.message();
}

const char* gelu_backward(const GeluBackward& a, const Call& call) {
  OnDevice on(call.device);
  if (on.error == cudaSuccess && a.width) {
    by_kind(a, call, aligned(a.dout) && aligned(a.x) && aligned(a.dx));
    if (a.dbias) {
      sum_partials(call.scratch, 1, call.programs, a.width, {a.dbias, nullptr, nullptr}, call.stream);
    }
  }
  return on.message();
}

}  // namespace cuda
}  // namespace bert_fast
