// early_launches of device.h.
#include <cstdlib>
#include <string>

#include "device.h"

namespace jinaclip {

bool early_launches() {
  static const bool allowed = [] {
    const char* value = std::getenv("JINACLIP_CUDA_PDL");
    return value == nullptr || std::string(value) != "0";
  }();
  int device = 0, major = 0;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  return allowed && major >= 9;  // such a device runs code of this library that was compiled for 9.0 or later
}

}  // namespace jinaclip
