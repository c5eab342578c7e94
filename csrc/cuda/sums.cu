// The second stage of sums over rows: what programs have summed is added in a fixed order, by one
// kernel for all the sums of a layer.
#include "device.h"

namespace bert_fast {
namespace cuda {
namespace {

// kSumColumns columns a block; its groups of threads take every kSumGroups-th program.
constexpr int kSumGroups = 16;

inline __host__ __device__ int64_t blocks_of(const Partials& kind) {
  return (kind.width + kSumColumns - 1) / kSumColumns;
}

// Grid: blocks of columns of all sums.
template <class T>
__global__ void __launch_bounds__(kSumColumns * kSumGroups) sum_kernel(Sums a) {
  int64_t block = blockIdx.x;
  T* out = static_cast<T*>(a.out) + block * kSumColumns;
  Partials kind = a.kinds[0];
#pragma unroll
  for (int k = 1; k < kSumKinds; ++k) {
    const int64_t before = kind.sums * blocks_of(kind);
    if (block < before) break;
    block -= before;
    kind = a.kinds[k];
  }
  const int64_t blocks = blocks_of(kind), number = block / blocks;
  const int group = threadIdx.x / kSumColumns, place = threadIdx.x % kSumColumns;
  const int64_t column = block % blocks * kSumColumns + place;
  auto* sums = reinterpret_cast<float(*)[kSumColumns]>(shared_memory());  // one a group
  float sum = 0.0f;
  if (column < kind.width) {
    const float* p = kind.data + number * kind.programs * kind.width + column;
#pragma unroll 4
    for (int i = group; i < kind.programs; i += kSumGroups) sum += p[i * kind.width];
  }
  sums[group][place] = sum;
  barrier();
  if (group || column >= kind.width) return;
  float all[kSumGroups];
#pragma unroll
  for (int g = 0; g < kSumGroups; ++g) all[g] = sums[g][place];
#pragma unroll
  for (int n = kSumGroups / 2; n; n /= 2) {  // by pairs: one after another they would err more
    for (int g = 0; g < n; ++g) all[g] += all[g + n];
  }
  out[place] = from_float<T>(all[0]);
}

}  // namespace

const char* sum_partials(const Sums& a, const Call& call) {
  OnDevice on(call.device);
  int64_t blocks = 0;
  for (const Partials& kind : a.kinds) blocks += kind.sums * blocks_of(kind);
  if (on.error == cudaSuccess && blocks) {
    by_dtype(a.dtype, [&](auto element) {
      launch(sum_kernel<decltype(element)>, dim3(static_cast<unsigned>(blocks)),
             kSumColumns * kSumGroups, kSumColumns * kSumGroups * sizeof(float), call.stream, a);
    });
  }
  return on.message();
}

}  // namespace cuda
}  // namespace bert_fast
