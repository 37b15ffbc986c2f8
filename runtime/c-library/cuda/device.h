// What the kernels are compiled against: CUDA, or with JINACLIP_HOST the host shim.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#ifdef JINACLIP_HOST
#include "host_shim.h"
#else
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

namespace jinaclip {

using Stream = void*;

#ifdef JINACLIP_HOST

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, Stream, Arguments... arguments) {
  host_shim::run(grid, block, [=] { kernel(arguments...); });
}

inline float fast_exp(float x) { return std::exp(x); }
inline float fast_divide(float x, float y) { return x / y; }
inline float reciprocal_root(float x) { return 1.0f / std::sqrt(x); }

#else

inline void check(cudaError_t error) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
  }
}

#ifdef __CUDACC__
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, Stream stream, Arguments... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.stream = static_cast<cudaStream_t>(stream);
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...));
}

// Errors of a few units in the last place of float32.
__device__ inline float fast_exp(float x) { return __expf(x); }
__device__ inline float fast_divide(float x, float y) { return __fdividef(x, y); }
__device__ inline float reciprocal_root(float x) { return rsqrtf(x); }
#endif

#endif

}  // namespace jinaclip
