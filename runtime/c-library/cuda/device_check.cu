// Tells whether the operators can run on a device, and which they are, for callers that have another way to go if not.
#include "device.h"

namespace {

__global__ void probe() {}

}  // namespace

// Null if this library has code for the device of this index, else what CUDA says. The text lives as long as the
// process. The calling thread's current device is left as it was.
extern "C" __attribute__((visibility("default"))) const char* jinaclip_cuda_device_error(int device) {
  int before = 0;
  cudaError_t error = cudaGetDevice(&before);
  if (error == cudaSuccess) {
    error = cudaSetDevice(device);
  }
  if (error == cudaSuccess) {
    cudaFuncAttributes attributes;
    error = cudaFuncGetAttributes(&attributes, probe);
    cudaSetDevice(before);
  }
  cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// Of the operators' inputs, outputs and attributes; VERSION in runtime/jinaclip/backends/onnxruntime/cuda_operators.py
// is the same.
extern "C" __attribute__((visibility("default"))) int jinaclip_cuda_operators_version() { return 3; }
