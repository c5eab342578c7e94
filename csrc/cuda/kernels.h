// The CUDA launchers' interface: raw device pointers, sizes, the caller's stream; no torch, no
// Python, and no CUDA header either, so that bindings.cpp compiles without one. A launcher
// allocates nothing and waits for nothing (CUDA graphs may capture it). It returns null, or what
// CUDA said.
#pragma once
#include "../cpu/kernels.h"

namespace bert_fast {
namespace cuda {

const char* gelu_forward(const GeluForward& args, int device, void* stream);

}  // namespace cuda
}  // namespace bert_fast
