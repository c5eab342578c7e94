// GELU(x + bias) and its gradient on CUDA; formulas in ../cpu/gelu.cpp. Bound by memory: 16-byte
// accesses, many of them under way.
#include <type_traits>

#include "device.h"

namespace bert_fast {
namespace cuda {
namespace {

// Threads stand side by side along a row and take so many rows at once.
constexpr int kThreads = 128, kForwardRows = 8, kBackwardRows = 4;

// Results of 16 bits, as in kernels/gelu.py: with v = |x| both Phi(-v) and GELU'(-v) / (kRoot - v)
// are 2 to the power of a polynomial, whose error stays below half a rounding of T. kAbove keeps
// bfloat16's smallest numbers from being flushed.
constexpr float kAbove = 1.0f / (1 << 24), kRoot = 0.75179152f;

template <class T> constexpr float kLargest = 14.5f;  // from here on results round to 0, or 1
template <> constexpr float kLargest<fp16> = 6.5f;

__device__ __forceinline__ float power(float v, float c0, float c1, float c2, float c3, float c4,
                                       float c5, float c6, float c7) {
  return exp2_fast(((((((c7 * v + c6) * v + c5) * v + c4) * v + c3) * v + c2) * v + c1) * v + c0);
}

template <class T>
__device__ __forceinline__ float tail(float v) {
  return std::is_same<T, bf16>::value
             ? power(v, 22.999561f, -1.146008f, -0.46867555f, -0.046510149f, 0.0059254551f,
                     -0.00047065184f, 2.0638754e-05f, -3.7864913e-07f)
             : power(v, 23.000004f, -1.1512511f, -0.45846438f, -0.053960066f, 0.0085078888f,
                     -0.00093052437f, 6.1598235e-05f, -1.8348086e-06f);
}

template <class T>
__device__ __forceinline__ float slope(float v) {
  return std::is_same<T, bf16>::value
             ? power(v, 23.410786f, -0.37213421f, -0.58560717f, -0.03289723f, 0.0049505509f,
                     -0.00043670984f, 2.0519818e-05f, -3.9482524e-07f)
             : power(v, 23.411554f, -0.38224807f, -0.56420118f, -0.049853861f, 0.011388059f,
                     -0.001708372f, 0.0001476093f, -5.5034557e-06f);
}

template <class T, Gelu kind>
__device__ __forceinline__ float gelu(float x) {
  if (kind == Gelu::kTanh) {
    const float v = 0.797884560802865f * x * (1.0f + 0.044715f * x * x);
    return x / (1.0f + expf(-2.0f * v));
  }
  if (std::is_same<T, float>::value) return x * normal_cdf(x);
  const float v = lesser(fabsf(x), kLargest<T>);
  return fmaxf(x, 0.0f) - v * (tail<T>(v) * kAbove);
}

template <class T, Gelu kind>
__device__ __forceinline__ float gelu_gradient(float x) {
  if (kind == Gelu::kTanh) {
    x = x > 12.0f ? 12.0f : x < -12.0f ? -12.0f : x;  // flat beyond: no infinity times zero; NaN stays
    const float v = 0.797884560802865f * x * (1.0f + 0.044715f * x * x);
    const float e = expf(-2.0f * fabsf(v)), inverse = 1.0f / (1.0f + e);
    const float share = v > 0 ? inverse : e * inverse;  // (1 + tanh v) / 2
    const float slope = 0.797884560802865f * (1.0f + 3.0f * 0.044715f * x * x);
    return share + 2.0f * x * e * inverse * inverse * slope;
  }
  if (std::is_same<T, float>::value) {
    return normal_cdf(x) + x * 0.398942280401433f * expf(-0.5f * x * x);
  }
  const float v = lesser(fabsf(x), kLargest<T>);
  const float below = (kRoot * kAbove - v * kAbove) * slope<T>(v);
  return x < 0.0f ? below : 1.0f - below;
}

// Grid: blocks of columns, for each block of kForwardRows rows in turn.
template <class T, int kCount, Gelu kind>
__global__ void __launch_bounds__(kThreads) forward(const T* x, Vector bias, T* out, int64_t rows,
                                                    int64_t width, unsigned columns) {
  using P = Pack<T, kCount>;
  const unsigned block = blockIdx.x / columns;
  const int64_t column =
      static_cast<int64_t>((blockIdx.x - block * columns) * kThreads + threadIdx.x) * kCount;
  if (column >= width) return;
  const int64_t first = static_cast<int64_t>(block) * kForwardRows;
  const int64_t at = first * width + column;
  const int count = static_cast<int>(rows - first < kForwardRows ? rows - first : kForwardRows);
  P packs[kForwardRows];
#pragma unroll
  for (int i = 0; i < kForwardRows; ++i) {
    if (i < count) packs[i] = load<P>(x + at + i * width);
  }
  float shift[kCount] = {};
  if (bias.data) load_vector<T>(bias, column, shift);
#pragma unroll
  for (int i = 0; i < kForwardRows; ++i) {
    if (i >= count) break;
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      packs[i].values[j] = from_float<T>(gelu<T, kind>(to_float(packs[i].values[j]) + shift[j]));
    }
    store_global(out + at + i * width, packs[i]);
  }
}

// Grid: (blocks of columns, programs); a program takes every programs-th kBackwardRows rows.
template <class T, int kCount, Gelu kind>
__global__ void __launch_bounds__(kThreads, 4) backward(const T* dout, const T* x, Vector bias, T* dx,
                                                     float* partials, int64_t rows, int64_t width) {
  using P = Pack<T, kCount>;
  const int64_t column = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kCount;
  if (column >= width) return;
  float shift[kCount] = {}, total[kCount] = {};
  if (bias.data) load_vector<T>(bias, column, shift);
  const int64_t step = static_cast<int64_t>(gridDim.y) * kBackwardRows;
  for (int64_t row = static_cast<int64_t>(blockIdx.y) * kBackwardRows; row < rows; row += step) {
    const int64_t at = row * width + column;
    const int count = static_cast<int>(rows - row < kBackwardRows ? rows - row : kBackwardRows);
    P u[kBackwardRows], dy[kBackwardRows];
#pragma unroll
    for (int i = 0; i < kBackwardRows; ++i) {
      if (i < count) u[i] = load<P>(x + at + i * width), dy[i] = load<P>(dout + at + i * width);
    }
#pragma unroll
    for (int i = 0; i < kBackwardRows; ++i) {
      if (i >= count) break;
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        const float gradient = to_float(dy[i].values[j]) *
                               gelu_gradient<T, kind>(to_float(u[i].values[j]) + shift[j]);
        total[j] += gradient;
        u[i].values[j] = from_float<T>(gradient);
      }
      store_global(dx + at + i * width, u[i]);
    }
  }
  if (!partials) return;
  constexpr int kPart = kCount < 4 ? kCount : 4;
#pragma unroll
  for (int j = 0; j < kCount; j += kPart) {
    Pack<float, kPart> part;
#pragma unroll
    for (int i = 0; i < kPart; ++i) part.values[i] = total[j + i];
    store_global(partials + blockIdx.y * width + column + j, part);
  }
}

template <class T, int kCount>
unsigned columns_of(int64_t width) {
  return static_cast<unsigned>((width + kThreads * kCount - 1) / (kThreads * kCount));
}

template <class T, int kCount, Gelu kind>
void launch_kernel(const GeluForward& a, const Call& call) {
  const unsigned columns = columns_of<T, kCount>(a.width);
  const int64_t blocks = (a.rows + kForwardRows - 1) / kForwardRows;
  launch(forward<T, kCount, kind>, dim3(static_cast<unsigned>(blocks * columns)), kThreads, 0,
         call.stream, static_cast<const T*>(a.x), Vector{a.bias, (call.low & kBias) != 0},
         static_cast<T*>(a.out), a.rows, a.width, columns);
}

template <class T, int kCount, Gelu kind>
void launch_kernel(const GeluBackward& a, const Call& call) {
  launch(backward<T, kCount, kind>, dim3(columns_of<T, kCount>(a.width), call.programs), kThreads, 0,
         call.stream, static_cast<const T*>(a.dout), static_cast<const T*>(a.x),
         Vector{a.bias, (call.low & kBias) != 0}, static_cast<T*>(a.dx), call.scratch, a.rows,
         a.width);
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

}  // namespace

const char* gelu_forward(const GeluForward& a, const Call& call) {
  OnDevice on(call.device);
  if (on.error == cudaSuccess && a.rows * a.width) {
    by_kind(a, call, aligned(a.x) && aligned(a.bias) && aligned(a.out));
  }
  return on.message();
}

const char* gelu_backward(const GeluBackward& a, const Call& call) {
  OnDevice on(call.device);
  if (on.error == cudaSuccess && a.width) {
    by_kind(a, call, aligned(a.dout) && aligned(a.x) && aligned(a.bias) && aligned(a.dx));
  }
  return on.message();
}

}  // namespace cuda
}  // namespace bert_fast
