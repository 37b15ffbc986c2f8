// libcuda.so.1: what is asked of a driver before a runtime is there. It owns no memory; the runtime does.

#include "cuda.h"
#include "machine.h"

namespace {

CUresult context_error() {
    if (const int error = stand_in::cuinit_error()) return static_cast<CUresult>(error);
    return stand_in::held_by_another() ? CUDA_ERROR_DEVICE_UNAVAILABLE : CUDA_SUCCESS;
}

bool there(CUdevice device) { return device >= 0 && device < stand_in::device_count(); }

int context;  // its address stands for every context

}  // namespace

extern "C" {

CUresult cuInit(unsigned) { return static_cast<CUresult>(stand_in::cuinit_error()); }

CUresult cuDriverGetVersion(int* version) {
    *version = stand_in::driver_version();
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetCount(int* count) {
    *count = stand_in::device_count();
    return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice* device, int ordinal) {
    if (!there(ordinal)) return CUDA_ERROR_INVALID_DEVICE;
    *device = ordinal;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetName(char* name, int length, CUdevice device) {
    if (!there(device)) return CUDA_ERROR_INVALID_DEVICE;
    std::snprintf(name, static_cast<size_t>(length), "%s", stand_in::NAME);
    return CUDA_SUCCESS;
}

CUresult cuDeviceTotalMem_v2(size_t* bytes, CUdevice device) {
    if (!there(device)) return CUDA_ERROR_INVALID_DEVICE;
    *bytes = stand_in::total_memory();
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
    if (!there(device)) return CUDA_ERROR_INVALID_DEVICE;
    int major = 0, minor = 0;
    stand_in::capability(&major, &minor);
    switch (attribute) {
        case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT:
            *value = stand_in::MULTIPROCESSORS;
            break;
        case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR:
            *value = major;
            break;
        case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR:
            *value = minor;
            break;
        case CU_DEVICE_ATTRIBUTE_COMPUTE_MODE:
            *value = stand_in::held_by_another() ? CU_COMPUTEMODE_EXCLUSIVE_PROCESS : CU_COMPUTEMODE_DEFAULT;
            break;
        default:
            *value = 1;
    }
    return CUDA_SUCCESS;
}

CUresult cuCtxCreate_v2(CUcontext* made, unsigned, CUdevice) {
    *made = reinterpret_cast<CUcontext>(&context);
    return context_error();
}

CUresult cuCtxCreate_v4(CUcontext* made, CUctxCreateParams*, unsigned flags, CUdevice device) {
    return cuCtxCreate_v2(made, flags, device);
}

CUresult cuCtxDestroy_v2(CUcontext) { return CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext) { return context_error(); }
CUresult cuDevicePrimaryCtxRetain(CUcontext* made, CUdevice device) { return cuCtxCreate_v2(made, 0, device); }
CUresult cuDevicePrimaryCtxRelease_v2(CUdevice) { return CUDA_SUCCESS; }

CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned* flags, int* active) {
    *flags = 0, *active = 0;
    return CUDA_SUCCESS;
}

CUresult cuGetErrorName(CUresult error, const char** name) {
    switch (error) {
        case CUDA_SUCCESS:
            *name = "CUDA_SUCCESS";
            break;
        case CUDA_ERROR_DEVICE_UNAVAILABLE:
            *name = "CUDA_ERROR_DEVICE_UNAVAILABLE";
            break;
        case CUDA_ERROR_NO_DEVICE:
            *name = "CUDA_ERROR_NO_DEVICE";
            break;
        case CUDA_ERROR_SYSTEM_DRIVER_MISMATCH:
            *name = "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH";
            break;
        default:
            *name = "CUDA_ERROR_UNKNOWN";
    }
    return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char** text) {
    switch (error) {
        case CUDA_SUCCESS:
            *text = "no error";
            break;
        case CUDA_ERROR_DEVICE_UNAVAILABLE:
            *text = "CUDA-capable device(s) is/are busy or unavailable";
            break;
        case CUDA_ERROR_NO_DEVICE:
            *text = "no CUDA-capable device is detected";
            break;
        case CUDA_ERROR_SYSTEM_DRIVER_MISMATCH:
            *text = "system has unsupported display driver / cuda driver combination";
            break;
        default:
            *text = "unknown error";
    }
    return CUDA_SUCCESS;
}

// A kernel's description of a tensor: 128 bytes that only kernels read.
CUresult cuTensorMapEncodeTiled(
    CUtensorMap* map, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*, const cuuint32_t*,
    const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill
) {
    std::memset(map, 0, sizeof *map);
    return CUDA_SUCCESS;
}

}  // extern "C"
