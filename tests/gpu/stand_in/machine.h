// The machine that the stand-in plays, from the environment. It is read at every call, so that a program can change it
// while it runs.
//
//   STAND_IN_DEVICES      how many GPUs there are (1); CUDA_VISIBLE_DEVICES is considered
//   STAND_IN_MEMORY_MIB   memory of each (81920)
//   STAND_IN_CAPABILITY   compute capability ("9.0"); below 7.5 no kernel starts
//   STAND_IN_DRIVER       CUDA version of the driver, as cuDriverGetVersion gives it (13000)
//   STAND_IN_CUINIT       error of cuInit (0): 100 no device, 803 driver and kernel module differ, 999 unknown
//   STAND_IN_FAIL         what fails, with error 719: "product", the name of a function of the runtime, or "captured "
//   and
//                         one of these, which then fails within captures alone
//   STAND_IN_EXCLUSIVE    1: another process holds the GPUs in exclusive mode, no context can be made (error 46)
#pragma once

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace stand_in {

constexpr const char* NAME = "CUDA stand-in (computes nothing)";
constexpr int MULTIPROCESSORS = 132;
constexpr int RUNTIME_VERSION = 13000;
constexpr int LEAST_CAPABILITY = 75;  // that CUDA 13 has kernels for
constexpr int NO_DEVICE = 100, DEVICE_UNAVAILABLE = 46;

inline long number_from(const char* name, long otherwise) {
    const char* value = std::getenv(name);
    return value && *value ? std::strtol(value, nullptr, 10) : otherwise;
}

inline int driver_version() { return static_cast<int>(number_from("STAND_IN_DRIVER", 13000)); }
inline size_t total_memory() { return static_cast<size_t>(number_from("STAND_IN_MEMORY_MIB", 81920)) << 20; }
inline bool held_by_another() { return number_from("STAND_IN_EXCLUSIVE", 0) != 0; }

// Devices this process sees: CUDA takes CUDA_VISIBLE_DEVICES up to its first entry that is no device.
inline int device_count() {
    const int all = static_cast<int>(number_from("STAND_IN_DEVICES", 1));
    const char* visible = std::getenv("CUDA_VISIBLE_DEVICES");
    if (!visible) return all;
    int count = 0;
    while (count < all) {
        char* end = nullptr;
        const long index = std::strtol(visible, &end, 10);
        if (end == visible || index < 0 || index >= all) break;
        ++count;
        if (*end != ',') break;
        visible = end + 1;
    }
    return count;
}

inline int cuinit_error() {
    const int error = static_cast<int>(number_from("STAND_IN_CUINIT", 0));
    return error ? error : device_count() == 0 ? NO_DEVICE : 0;
}

inline void capability(int* major, int* minor) {
    const char* value = std::getenv("STAND_IN_CAPABILITY");
    *major = 9, *minor = 0;
    if (value && *value) std::sscanf(value, "%d.%d", major, minor);
}

}  // namespace stand_in
