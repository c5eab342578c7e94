// LN(residual + dropout(x + linear_bias)) * weight + bias in one pass, and its gradient, on CUDA;
// formulas in ../cpu/layer_norm.cpp. A row up to 1024 wide is a warp's, its elements in registers;
// a wider one is a CTA's.
#include "device.h"

namespace bert_fast {
namespace cuda {
namespace {

constexpr int kWarpsPerCta = 8, kCta = 512;
// Elements of a row that a thread holds: a warp's rows are up to 1024 wide, a CTA's up to 8192.
template <int kLanes>
constexpr int kPerThread = kLanes == kWarp ? 32 : 16;

// kLanes threads share a row: 32, several rows a CTA, or kCta.
template <int kLanes>
constexpr int kThreads = kLanes == kWarp ? kWarpsPerCta * kWarp : kLanes;

template <int kLanes>
__device__ __forceinline__ float row_sum(float x) {
  x = warp_sum(x);
  if (kLanes == kWarp) return x;
  auto* parts = reinterpret_cast<float*>(shared_memory());
  barrier();  // the last sum has been read
  if (threadIdx.x % kWarp == 0) parts[threadIdx.x / kWarp] = x;
  barrier();
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kLanes / kWarp; ++i) sum += parts[i];
  return sum;
}

// The dropout factors of kCount columns from `column` on: the eight of a draw, half of them, or one.
template <int kCount>
__device__ __forceinline__ void factors(const Dropout& drop, int64_t row, int column,
                                        float (&keep)[kCount]) {
  static_assert(kCount == 8 || kCount == 4 || kCount == 1);
  const Words words = philox(*drop.seed, column / 8, static_cast<uint32_t>(row), 0, kLayerNormStream);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int at = kCount == 8 ? i : column % 8 + i;
    keep[i] = is_kept(word_of(words, at / 2), at & 1, drop) ? drop.scale : 0.0f;
  }
}

// Which of an op's parameters have x's type.
__device__ __forceinline__ Vector vector_of(const float* data, int low, int which) {
  return {data, (low & which) != 0};
}

template <class T, int kCount, int kLanes>
__global__ void __launch_bounds__(kThreads<kLanes>) forward(LayerNormForward a, Dropout drop,
                                                            int low) {
  using P = Pack<T, kCount>;
  constexpr int kPacks = kPerThread<kLanes> / kCount;
  const int lane = threadIdx.x % kLanes;
  const int64_t row =
      static_cast<int64_t>(blockIdx.x) * (kThreads<kLanes> / kLanes) + threadIdx.x / kLanes;
  if (row >= a.rows) return;  // a whole warp, or CTA, together
  const int width = static_cast<int>(a.hidden);
  const int64_t first = row * a.hidden;
  const T *x = static_cast<const T*>(a.x) + first, *residual = static_cast<const T*>(a.residual);
  const Vector linear_bias = vector_of(a.linear_bias, low, kLinearBias);
  // All reads under way before the first is used, but those of single elements: for want of registers.
  P packs[kPacks] = {}, rests[kPacks] = {};
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    const int column = (i * kLanes + lane) * kCount;
    if (column >= width) continue;
    packs[i] = load<P>(x + column);
    if (residual && kCount > 1) rests[i] = load<P>(residual + first + column);
  }
  float s[kPacks][kCount], sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    const int column = (i * kLanes + lane) * kCount;
    const bool inside = column < width;
    float keep[kCount], shift[kCount] = {};
    if (inside && drop.seed) factors(drop, row, column, keep);
    if (inside && linear_bias.data) load_vector<T>(linear_bias, column, shift);
    if (inside && residual && kCount == 1) rests[i] = load<P>(residual + first + column);
    P pack;
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      float value = to_float(packs[i].values[j]) + shift[j];
      if (inside && drop.seed) value *= keep[j];
      value += to_float(rests[i].values[j]);
      s[i][j] = value;
      sum += value;
      pack.values[j] = from_float<T>(value);
    }
    if (inside && a.sum) store(static_cast<T*>(a.sum) + first + column, pack);
  }
  const float mean = row_sum<kLanes>(sum) / width;
  sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    if ((i * kLanes + lane) * kCount >= width) continue;
#pragma unroll
    for (int j = 0; j < kCount; ++j) sum += (s[i][j] - mean) * (s[i][j] - mean);
  }
  const float rstd = 1.0f / sqrtf(row_sum<kLanes>(sum) / width + static_cast<float>(a.eps));
  if (lane == 0 && a.mean) a.mean[row] = mean, a.rstd[row] = rstd;
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    const int column = (i * kLanes + lane) * kCount;
    if (column >= width) continue;
    P pack;
    float weight[kCount], bias[kCount];
    load_vector<T>(vector_of(a.weight, low, kWeight), column, weight);
    load_vector<T>(vector_of(a.bias, low, kBias), column, bias);
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const float xhat = (s[i][j] - mean) * rstd;
      pack.values[j] = from_float<T>(xhat * weight[j] + bias[j]);
    }
    store(static_cast<T*>(a.out) + first + column, pack);
  }
}

// slots[i * kWarp] += mine[i], or = mine[i]: all are read before one is written, or each would wait for
// the one before.
template <int kMany>
__device__ __forceinline__ void add_to(float* slots, const float (&mine)[kMany], bool add) {
  float sum[kMany];
#pragma unroll
  for (int i = 0; i < kMany; ++i) sum[i] = add ? slots[i * kWarp] + mine[i] : mine[i];
#pragma unroll
  for (int i = 0; i < kMany; ++i) slots[i * kWarp] = sum[i];
}

// Grid: programs. Rows are read twice, the second time from the cache: the registers hold the sums.
template <class T, int kCount, int kLanes>
__global__ void __launch_bounds__(kThreads<kLanes>) backward(LayerNormBackward a, Dropout drop,
                                                             float* partials, int low) {
  using P = Pack<T, kCount>;
  constexpr int kPacks = kPerThread<kLanes> / kCount, kGroups = kThreads<kLanes> / kLanes;
  const int lane = threadIdx.x % kLanes, group = threadIdx.x / kLanes;
  const int width = static_cast<int>(a.hidden);
  const T *dout = static_cast<const T*>(a.dout), *total = static_cast<const T*>(a.sum);
  const Vector weights = vector_of(a.weight, low, kWeight);
  constexpr int kSums = kPerThread<kLanes>;
  float dweight[kSums] = {}, dbias[kSums] = {}, dlinear_bias[kSums] = {};
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kGroups + group; row < a.rows;
       row += static_cast<int64_t>(gridDim.x) * kGroups) {
    const int64_t first = row * a.hidden;
    const float mean = a.mean[row], rstd = a.rstd[row];
    float sum = 0.0f, product = 0.0f;
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const int column = (i * kLanes + lane) * kCount;
      if (column >= width) continue;
      const P dy = load<P>(dout + first + column), s = load<P>(total + first + column);
      float weight[kCount];
      load_vector<T>(weights, column, weight);
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        const float g = to_float(dy.values[j]) * weight[j];
        const float xhat = (to_float(s.values[j]) - mean) * rstd;
        sum += g;
        product += g * xhat;
        dweight[i * kCount + j] += to_float(dy.values[j]) * xhat;
        dbias[i * kCount + j] += to_float(dy.values[j]);
      }
    }
    sum = row_sum<kLanes>(sum) / width;
    product = row_sum<kLanes>(product) / width;
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const int column = (i * kLanes + lane) * kCount;
      if (column >= width) continue;
      const P dy = load<P>(dout + first + column), s = load<P>(total + first + column);
      float keep[kCount], weight[kCount];
      if (drop.seed) factors(drop, row, column, keep);
      load_vector<T>(weights, column, weight);
      P dsum, dx;
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        const float g = to_float(dy.values[j]) * weight[j];
        const float xhat = (to_float(s.values[j]) - mean) * rstd;
        float gradient = rstd * (g - sum - xhat * product);
        dsum.values[j] = from_float<T>(gradient);
        if (drop.seed) gradient *= keep[j];
        dx.values[j] = from_float<T>(gradient);
        dlinear_bias[i * kCount + j] += gradient;
      }
      store(static_cast<T*>(a.dsum) + first + column, dsum);
      if (a.dx) store(static_cast<T*>(a.dx) + first + column, dx);
    }
  }
  const auto program = [&](int k) {
    return partials + (static_cast<int64_t>(k) * gridDim.x + blockIdx.x) * width;
  };
  if constexpr (kGroups == 1) {
#pragma unroll
    for (int e = 0; e < kSums; ++e) {
      const int column = (e / kCount * kLanes + lane) * kCount + e % kCount;
      if (column >= width) continue;
      program(0)[column] = dweight[e];
      program(1)[column] = dbias[e];
      program(2)[column] = dlinear_bias[e];
    }
  } else {
    // The groups of a CTA one after another, so that the order of the sums is fixed; a lane's are a
    // word of each row, so that no two lanes want the same bank.
    auto* sums = reinterpret_cast<float*>(shared_memory()) + kCta / kWarp;
    for (int g = 0; g < kGroups; ++g) {
      if (group == g) {
        add_to(sums + lane, dweight, g > 0);
        add_to(sums + kSums * kLanes + lane, dbias, g > 0);
        add_to(sums + 2 * kSums * kLanes + lane, dlinear_bias, g > 0);
      }
      barrier();
    }
    for (int k = 0; k < 3; ++k) {
      for (int column = threadIdx.x; column < width; column += kThreads<kLanes>) {
        const int e = column / (kLanes * kCount) * kCount + column % kCount;
        program(k)[column] = sums[(k * kSums + e) * kLanes + column / kCount % kLanes];
      }
    }
  }
}

template <class T, int kCount, int kLanes>
void launch_kernel(const LayerNormForward& a, const Call& call) {
  constexpr int kGroups = kThreads<kLanes> / kLanes;
  launch(forward<T, kCount, kLanes>, dim3(static_cast<unsigned>((a.rows + kGroups - 1) / kGroups)),
         kThreads<kLanes>, kCta / kWarp * sizeof(float), call.stream, a, dropout_of(a.dropout_p, call),
         call.low);
}

template <class T, int kCount, int kLanes>
void launch_kernel(const LayerNormBackward& a, const Call& call) {
  const size_t sums = kLanes == kWarp ? 3 * kPerThread<kLanes> * kLanes : 0;
  launch(backward<T, kCount, kLanes>, dim3(call.programs), kThreads<kLanes>,
         (kCta / kWarp + sums) * sizeof(float), call.stream, a, dropout_of(a.dropout_p, call),
         call.scratch, call.low);
}

template <class Args>
void by_width(const Args& a, const Call& call, bool packs) {
  by_dtype(a.dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int kCount = 16 / sizeof(T);
    const bool wide = packs && a.hidden % kCount == 0;
    if (a.hidden <= kPerThread<kWarp> * kWarp) {
      wide ? launch_kernel<T, kCount, kWarp>(a, call) : launch_kernel<T, 1, kWarp>(a, call);
    } else {
      wide ? launch_kernel<T, kCount, kCta>(a, call) : launch_kernel<T, 1, kCta>(a, call);
    }
  });
}

}  // namespace

const char* layer_norm_forward(const LayerNormForward& a, const Call& call) {
  OnDevice on(call.device);
  if (on.error == cudaSuccess && a.rows) {
    by_width(a, call,
             aligned(a.x) && aligned(a.residual) && aligned(a.linear_bias) && aligned(a.weight) &&
                 aligned(a.bias) && aligned(a.out) && aligned(a.sum));
  }
  return on.message();
}

const char* layer_norm_backward(const LayerNormBackward& a, const Call& call) {
  OnDevice on(call.device);
  if (on.error == cudaSuccess) {
    by_width(a, call,
             aligned(a.dout) && aligned(a.sum) && aligned(a.weight) && aligned(a.dsum) &&
                 aligned(a.dx));
  }
  return on.message();
}

}  // namespace cuda
}  // namespace bert_fast
