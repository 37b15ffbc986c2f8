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

bool allowed_by(const char* variable) {
  const char* value = std::getenv(variable);
  return value == nullptr || std::string(value) != "0";
}

}  // namespace

int multiprocessors() { return attribute(cudaDevAttrMultiProcessorCount); }

bool hopper_attention_runs() {
  static const bool allowed = allowed_by("JINACLIP_CUDA_WARPGROUPS");
  return allowed && attribute(cudaDevAttrComputeCapabilityMajor) == 9 &&
         attribute(cudaDevAttrComputeCapabilityMinor) == 0;
}

bool early_launches() {
  static const bool allowed = allowed_by("JINACLIP_CUDA_PDL");
  // Such a device runs code of this library that was compiled for 9.0 or later.
  return allowed && attribute(cudaDevAttrComputeCapabilityMajor) >= 9;
}

}  // namespace jinaclip
