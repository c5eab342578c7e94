// Runs a CUDA kernel without barriers on the CPU, thread after thread: enough for element-wise
// kernels. tests/test_cuda.py includes this, then the .cu file with its launches rewritten.
#include <cuda_runtime.h>

#include <cmath>

#undef __launch_bounds__
#define __launch_bounds__(...)
inline uint3 host_block, host_thread;
inline dim3 host_grid;
#define blockIdx host_block
#define threadIdx host_thread
#define gridDim host_grid

template <class Kernel, class... Arguments>
void host_launch(Kernel kernel, unsigned grid, unsigned block, Arguments... arguments) {
  host_grid = dim3(grid);
  for (host_block.x = 0; host_block.x < grid; ++host_block.x) {
    for (host_thread.x = 0; host_thread.x < block; ++host_thread.x) kernel(arguments...);
  }
}

extern "C" {
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return ""; }
}

// Device functions that the headers give no host version of.
inline float normcdff(float x) { return 0.5f * erfcf(x * -0.70710678f); }
inline float __expf(float x) { return expf(x); }
