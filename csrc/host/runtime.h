// CUDA kernels run on the CPU: what nvcc and the GPU give, for g++, so that every kernel's own source
// is executed by tests where there is no GPU. Included by cuda/device.h under BERT_FAST_HOST.
//
// A block's threads are fibers on one OS thread. One warp, drawn at random, runs as far as it can
// while the others starve; that is the schedule which shows a missing barrier. Shared memory is
// filled with NaN, exactly as large as was asked for, and asynchronous copies land as early or as
// late as they may, by chance. Wrong use (a barrier that not all threads reach, misaligned access, an
// address outside of shared memory) becomes an exception that names block and thread.
#pragma once
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __shared__
#define threadIdx (::bert_fast::host::thread_index())
#define blockIdx (::bert_fast::host::block_index())
#define gridDim (::bert_fast::host::grid_size())

using std::max;
using std::min;

namespace bert_fast {
namespace host {

const uint3& thread_index();
const uint3& block_index();
const dim3& grid_size();

void run(dim3 grid, int threads, size_t shared_bytes, const std::function<void()>& body);
[[noreturn]] void fail(const char* what);  // from within a kernel

unsigned char* shared_memory();
void check_shared(const void* address, size_t bytes);
void check_aligned(const void* address, size_t bytes);
void barrier();
// Gives `bytes` of this lane's to its warp and returns all 32 lanes', `bytes` apart; every lane of
// the warp must come here, for the same `what`.
const unsigned char* exchange(const void* mine, size_t bytes, const char* what);
void copy_async(void* to, const void* from, size_t bytes, bool valid);
void copy_async_commit();
void copy_async_wait(int groups_left);

uint64_t launched();  // how many kernels so far
int capability();  // of the GPU that is played: 10 * major + minor, BERT_FAST_HOST_CAPABILITY
int multiprocessors();  // that it has, BERT_FAST_HOST_MULTIPROCESSORS

}  // namespace host
}  // namespace bert_fast
