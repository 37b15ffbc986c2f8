// What device.h asks of the current device.
#include <cstdlib>
#include <string>

#include "device.h"

namespace jinaclip {

namespace {

int attribute(cudaDeviceAttr which) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&value, which, device));
  return value;
}

}  // namespace

int multiprocessors() { return attribute(cudaDevAttrMultiProcessorCount); }

bool hopper_attention_runs() {
  return attribute(cudaDevAttrComputeCapabilityMajor) == 9 && attribute(cudaDevAttrComputeCapabilityMinor) == 0;
}

bool early_launches() {
  static const bool allowed = [] {
    const char* value = std::getenv("JINACLIP_CUDA_PDL");
    return value == nullptr || std::string(value) != "0";
  }();
  return allowed && attribute(cudaDevAttrComputeCapabilityMajor) >= 9;  // such a device runs code of this library that was compiled for 9.0 or later
}

}  // namespace jinaclip
