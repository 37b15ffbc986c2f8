// What the kernels are compiled against: CUDA, or with JINACLIP_HOST the host shim.
#pragma once

#include <cstdint>
#include <cstdlib>
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

// As if with `bytes` of shared memory a block, which the host always has.
template <typename... Parameters, typename... Arguments>
void launch_with_memory(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t, Stream stream,
                        Arguments... arguments) {
  launch(kernel, grid, block, stream, arguments...);
}

inline int multiprocessors() { return 3; }  // a few, so that blocks take several tiles each
inline bool hopper_attention_runs() {
  const char* value = std::getenv("JINACLIP_CUDA_WARPGROUPS");
  return value == nullptr || std::string(value) != "0";
}

inline void begin_kernel() {}
inline float fast_exp2(float x) { return std::exp2(x); }
inline float fast_reciprocal(float x) { return 1.0f / x; }
inline float fast_divide(float x, float y) { return x / y; }
inline float reciprocal_root(float x) { return 1.0f / std::sqrt(x); }
inline float multiply_rounded(float x, float y) {
  volatile float product = x * y;
  return product;
}

#else

inline void check(cudaError_t error) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
  }
}

// Whether kernels of the current device may be launched before the kernel in front of them ends (programmatic dependent
// launch): from compute capability 9.0 on, unless the environment variable JINACLIP_CUDA_PDL is 0 at the first call.
bool early_launches();

// Multiprocessors of the current device.
int multiprocessors();

// Whether the current device has warpgroup products: compute capability 9.0, unless the environment variable
// JINACLIP_CUDA_WARPGROUPS is 0 at the first call (in the host build: at this call).
bool hopper_attention_runs();

#ifdef __CUDACC__
// Threads of a kernel that is launched early: what one wave of a large GPU holds. Longer kernels gain nothing.
constexpr int64_t kEarlyThreads = int64_t{1} << 19;
// Shared memory that a kernel may have without asking for more.
constexpr size_t kPlainSharedBytes = 48 * 1024;

// With `bytes` of shared memory a block. Every kernel calls begin_kernel first: an early launch is ordered by that
// alone.
template <typename... Parameters, typename... Arguments>
void launch_with_memory(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t bytes, Stream stream,
                        Arguments... arguments) {
  if (bytes > kPlainSharedBytes) {
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(bytes)));
  }
  cudaLaunchAttribute early = {};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  const int64_t threads = int64_t{1} * grid.x * grid.y * grid.z * block.x * block.y * block.z;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &early;
  config.numAttrs = threads <= kEarlyThreads && early_launches() ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...));
}

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, Stream stream, Arguments... arguments) {
  launch_with_memory(kernel, grid, block, 0, stream, arguments...);
}

// Waits until the kernel in front has ended and its writes are visible, then lets the kernel behind be launched. In
// this order at most two kernels of a stream are on the device: none is launched while the one before the last still
// runs. What a kernel in front may have written must not be read through `const __restrict__` pointers: such loads may
// take a path that takes memory as constant while the kernel runs, from its launch on.
__device__ inline void begin_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Relative errors of a few units in the last place. fast_exp2 and fast_reciprocal are one instruction each; denormal
// inputs and results become 0.
__device__ inline float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ inline float fast_reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ inline float fast_divide(float x, float y) { return __fdividef(x, y); }
__device__ inline float reciprocal_root(float x) { return rsqrtf(x); }
// Rounded before it is added to anything.
__device__ inline float multiply_rounded(float x, float y) { return __fmul_rn(x, y); }
#endif

#endif

}  // namespace jinaclip
