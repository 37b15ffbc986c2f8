// libcudart.so.13: memory, streams, events, captures and graphs, kept track of as CUDA defines them. No kernel runs.
//
// Memory of the device is memory of the host that nothing backs until it is written, so copies copy: when the host
// waits for their stream, and not before, so that what is used too early shows. Every call that matters is journaled
// (journal.h); what CUDA forbids returns CUDA's error and is journaled as a "fault". State and rules are in device.h,
// the functions here.

#include <dlfcn.h>

#include "device.h"

cudaError_t stand_in::enqueue(cudaStream_t stream, const Product& product) {
    NEEDS_CONTEXT();
    const std::string shape = product.library + " " + std::to_string(product.m) + "x" + std::to_string(product.n) +
                              "x" + std::to_string(product.k);
    const auto operands = product.operands;
    const auto check = [operands, shape](cudaError_t error, const char* of) -> cudaError_t {
        for (const auto& one : operands)
            if (one.bytes && !on_device(one.pointer, one.bytes))
                return fault(
                    "product", error, of + shape + ": " + one.name + " is not within live memory of the device"
                );
        return cudaSuccess;
    };
    if (const cudaError_t error = check(cudaErrorInvalidValue, "")) return error;
    Line line("product");
    line.text("library", product.library)
        .number("m", product.m)
        .number("n", product.n)
        .number("k", product.k)
        .number("batch", product.batch)
        .text("transposes", product.transposes)
        .text("a", product.a)
        .text("b", product.b)
        .text("c", product.c)
        .text("compute", product.compute)
        .text("epilogue", product.epilogue);
    const Run run = [check] { return check(cudaErrorIllegalAddress, "as it ran, "); };
    return put("product", stream, {Kind::product, [run] { return run; }}, line);
}

extern "C" {

// ---------------------------------------------------------------------------------------------------------------------
// What the compiler's host code calls
// ---------------------------------------------------------------------------------------------------------------------

void** __cudaRegisterFatBinary(void*) {
    static void* handle = nullptr;
    return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(
    void**, const char* stub, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*, int*
) {
    Locked guard(state().lock);
    state().kernels[stub] = name;
}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
char __cudaInitModule(void**) { return 1; }

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
    call_configurations.push_back({grid, block, shared, stream});
    return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
    if (call_configurations.empty()) return failed(cudaErrorMissingConfiguration);
    const CallConfiguration last = call_configurations.back();
    call_configurations.pop_back();
    *grid = last.grid, *block = last.block, *shared = last.shared;
    *static_cast<cudaStream_t*>(stream) = last.stream;
    return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* stub) {
    *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(stub));
    return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void**, size_t shared, cudaStream_t stream) {
    return launch(__func__, kernel, grid, block, shared, stream);
}

// ---------------------------------------------------------------------------------------------------------------------
// Launches
// ---------------------------------------------------------------------------------------------------------------------

cudaError_t cudaLaunchKernel(const void* stub, dim3 grid, dim3 block, void**, size_t shared, cudaStream_t stream) {
    return launch(__func__, stub, grid, block, shared, stream);
}
cudaError_t cudaLaunchCooperativeKernel(
    const void* stub, dim3 grid, dim3 block, void**, size_t shared, cudaStream_t stream
) {
    return launch(__func__, stub, grid, block, shared, stream);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* how, const void* stub, void**) {
    return launch(__func__, stub, how->gridDim, how->blockDim, how->dynamicSmemBytes, how->stream);
}
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* data) {
    const Run run = [=] {
        function(data);
        return cudaSuccess;
    };
    return put(__func__, stream, {Kind::host_function, [run] { return run; }}, Line("host function"));
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* of, const void*) {
    *of = {};
    of->numRegs = 64;
    of->maxThreadsPerBlock = 1024;
    int major = 0, minor = 0;
    stand_in::capability(&major, &minor);
    of->binaryVersion = of->ptxVersion = major * 10 + minor;
    of->maxDynamicSharedSizeBytes = static_cast<int>(properties().sharedMemPerBlockOptin);
    return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t cudaFuncSetCacheConfig(const void*, cudaFuncCache) { return cudaSuccess; }
cudaError_t cudaFuncGetName(const char** name, const void* stub) {
    *name = kernel_name(stub).c_str();
    return cudaSuccess;
}
cudaError_t cudaKernelSetAttributeForDevice(cudaKernel_t, cudaFuncAttribute, int, int) { return cudaSuccess; }
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t) {
    *blocks = 2;
    return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int, size_t, unsigned) {
    *blocks = 2;
    return cudaSuccess;
}
cudaError_t cudaLibraryLoadData(
    cudaLibrary_t* library, const void*, cudaJitOption*, void**, unsigned, cudaLibraryOption*, void**, unsigned
) {
    *library = new_handle<cudaLibrary_t>();
    return cudaSuccess;
}
cudaError_t cudaLibraryUnload(cudaLibrary_t) { return cudaSuccess; }
cudaError_t cudaLibraryGetKernel(cudaKernel_t* kernel, cudaLibrary_t, const char* name) {
    Locked guard(state().lock);
    *kernel = new_handle<cudaKernel_t>();
    state().kernels[*kernel] = name;
    return cudaSuccess;
}

// ---------------------------------------------------------------------------------------------------------------------
// Memory
// ---------------------------------------------------------------------------------------------------------------------

cudaError_t cudaMalloc(void** pointer, size_t bytes) {
    NEEDS_CONTEXT();
    NEEDS_NO_CAPTURE();
    return allocate(pointer, bytes);
}
cudaError_t cudaFree(void* pointer) {
    NEEDS_CONTEXT();
    NEEDS_NO_CAPTURE();
    return release(__func__, pointer);
}
cudaError_t cudaMallocAsync(void** pointer, size_t bytes, cudaStream_t) {
    NEEDS_CONTEXT();
    return allocate(pointer, bytes);
}
cudaError_t cudaMallocFromPoolAsync(void** pointer, size_t bytes, cudaMemPool_t, cudaStream_t) {
    NEEDS_CONTEXT();
    return allocate(pointer, bytes);
}
cudaError_t cudaFreeAsync(void* pointer, cudaStream_t) {
    NEEDS_CONTEXT();
    return release(__func__, pointer);
}
cudaError_t cudaMemPoolCreate(cudaMemPool_t* pool, const cudaMemPoolProps*) {
    NEEDS_CONTEXT();
    *pool = new_handle<cudaMemPool_t>();
    return cudaSuccess;
}
cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t* pool, int) { return cudaMemPoolCreate(pool, nullptr); }
cudaError_t cudaMemPoolDestroy(cudaMemPool_t) { return cudaSuccess; }
cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t, cudaMemPoolAttr, void* value) {
    std::memset(value, 0, 8);
    return cudaSuccess;
}
cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t, cudaMemPoolAttr, void*) { return cudaSuccess; }
cudaError_t cudaMemPoolTrimTo(cudaMemPool_t, size_t) { return cudaSuccess; }

cudaError_t cudaHostAlloc(void** pointer, size_t bytes, unsigned) {
    NEEDS_CONTEXT();
    NEEDS_NO_CAPTURE();
    Locked guard(state().lock);
    const size_t size = std::max<size_t>((bytes + 4095) / 4096 * 4096, 4096);
    if (!(*pointer = pages(size))) return failed(cudaErrorMemoryAllocation);
    state().pinned_memory[reinterpret_cast<uintptr_t>(*pointer)] = size;
    Line("allocate")
        .text("where", "host")
        .handle("address", *pointer)
        .number("bytes", static_cast<long long>(bytes))
        .write();
    return cudaSuccess;
}
cudaError_t cudaMallocHost(void** pointer, size_t bytes) { return cudaHostAlloc(pointer, bytes, 0); }
cudaError_t cudaFreeHost(void* pointer) {
    NEEDS_CONTEXT();
    NEEDS_NO_CAPTURE();
    if (!pointer) return cudaSuccess;
    Locked guard(state().lock);
    if (const cudaError_t error = finish_all()) return failed(error);
    const auto found = state().pinned_memory.find(reinterpret_cast<uintptr_t>(pointer));
    if (found == state().pinned_memory.end())
        return fault(__func__, cudaErrorInvalidValue, "no pinned memory starts there");
    Line("free")
        .text("where", "host")
        .handle("address", pointer)
        .number("bytes", static_cast<long long>(found->second))
        .write();
    munmap(pointer, found->second);
    state().pinned_memory.erase(found);
    return cudaSuccess;
}
cudaError_t cudaHostRegister(void* pointer, size_t bytes, unsigned) {
    NEEDS_CONTEXT();
    NEEDS_NO_CAPTURE();
    Locked guard(state().lock);
    if (is_pinned(pointer, bytes)) return failed(cudaErrorHostMemoryAlreadyRegistered);
    state().pinned_memory[reinterpret_cast<uintptr_t>(pointer)] = bytes;
    Line("register").handle("address", pointer).number("bytes", static_cast<long long>(bytes)).write();
    return cudaSuccess;
}
cudaError_t cudaHostUnregister(void* pointer) {
    NEEDS_CONTEXT();
    NEEDS_NO_CAPTURE();
    Locked guard(state().lock);
    if (const cudaError_t error = finish_all()) return failed(error);
    if (!state().pinned_memory.erase(reinterpret_cast<uintptr_t>(pointer)))
        return failed(cudaErrorHostMemoryNotRegistered);
    Line("unregister").handle("address", pointer).write();
    return cudaSuccess;
}
cudaError_t cudaHostGetDevicePointer(void** device, void* host, unsigned) {
    *device = host;
    return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
    NEEDS_CONTEXT();
    Locked guard(state().lock);
    *total = stand_in::total_memory();
    *free = *total - state().used[current_device];
    return cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* of, const void* pointer) {
    Locked guard(state().lock);
    *of = {};
    of->hostPointer = of->devicePointer = const_cast<void*>(pointer);
    if (on_device(pointer, 1)) {
        of->type = cudaMemoryTypeDevice;
        of->device = range_of(state().device_memory, pointer)->second.second;
        of->hostPointer = nullptr;
    } else if (is_pinned(pointer, 1)) {
        of->type = cudaMemoryTypeHost;
    } else {
        of->type = cudaMemoryTypeUnregistered;
        of->device = -2;
        of->devicePointer = nullptr;
    }
    return cudaSuccess;
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
    return copy(__func__, to, from, flat(bytes), kind, nullptr, true);
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
    return copy(__func__, to, from, flat(bytes), kind, stream, false);
}
cudaError_t cudaMemcpy2D(
    void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width, size_t height, cudaMemcpyKind kind
) {
    return copy(__func__, to, from, {width, height, to_pitch, from_pitch}, kind, nullptr, true);
}
cudaError_t cudaMemcpy2DAsync(
    void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width, size_t height, cudaMemcpyKind kind,
    cudaStream_t stream
) {
    return copy(__func__, to, from, {width, height, to_pitch, from_pitch}, kind, stream, false);
}
// Variables of the device have no memory here: reads give zeros, writes are lost.
cudaError_t cudaMemcpyFromSymbol(void* to, const void*, size_t bytes, size_t, cudaMemcpyKind) {
    NEEDS_CONTEXT();
    NEEDS_NO_CAPTURE();
    std::memset(to, 0, bytes);
    return cudaSuccess;
}
cudaError_t cudaMemcpyToSymbol(const void*, const void*, size_t, size_t, cudaMemcpyKind) {
    NEEDS_CONTEXT();
    NEEDS_NO_CAPTURE();
    return cudaSuccess;
}
cudaError_t cudaMemcpyToSymbolAsync(const void*, const void*, size_t, size_t, cudaMemcpyKind, cudaStream_t) {
    return cudaSuccess;
}
cudaError_t cudaMemset(void* to, int value, size_t bytes) {
    NEEDS_NO_CAPTURE();
    return set(__func__, to, value, bytes, nullptr);
}
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
    return set(__func__, to, value, bytes, stream);
}

// ---------------------------------------------------------------------------------------------------------------------
// Devices
// ---------------------------------------------------------------------------------------------------------------------

cudaError_t cudaGetDeviceCount(int* count) {
    *count = 0;
    if (const cudaError_t error = runtime_error()) return failed(error);
    *count = stand_in::device_count();
    return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
    if (device < 0 || device >= stand_in::device_count())
        return failed(runtime_error() ? runtime_error() : cudaErrorInvalidDevice);
    NEEDS_CONTEXT();
    current_device = device;
    return cudaSuccess;
}
cudaError_t cudaInitDevice(int device, unsigned, unsigned) { return cudaSetDevice(device); }
cudaError_t cudaGetDevice(int* device) {
    if (const cudaError_t error = runtime_error()) return failed(error);
    *device = current_device;
    return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* of, int) {
    if (const cudaError_t error = runtime_error()) return failed(error);
    *of = properties();
    return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
    if (const cudaError_t error = runtime_error()) return failed(error);
    *value = attribute(which);
    return cudaSuccess;
}
cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) {
    *can = 0;
    return cudaSuccess;
}
cudaError_t cudaDeviceSetLimit(cudaLimit, size_t) { return cudaSuccess; }
cudaError_t cudaDeviceGetLimit(size_t* value, cudaLimit) {
    *value = 0;
    return cudaSuccess;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
    *least = 0, *greatest = -5;
    return cudaSuccess;
}
// A capture has nothing that could be waited for: a wait that encompasses its stream is invalid in every mode.
cudaError_t cudaDeviceSynchronize() {
    if (const cudaError_t error = broken_captures(__func__)) return error;
    if (const cudaError_t error = synchronise(__func__, "device", nullptr)) return error;
    return finish_all();
}
cudaError_t cudaDriverGetVersion(int* version) {
    *version = stand_in::driver_version();
    return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) {
    *version = stand_in::RUNTIME_VERSION;
    return cudaSuccess;
}
cudaError_t cudaGetDriverEntryPointByVersion(
    const char* symbol, void** function, unsigned, unsigned long long, cudaDriverEntryPointQueryResult* result
) {
    static void* const driver = dlopen("libcuda.so.1", RTLD_LAZY);
    *function = driver ? dlsym(driver, symbol) : nullptr;
    if (result) *result = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    return cudaSuccess;
}
cudaError_t cudaGetDriverEntryPoint(
    const char* symbol, void** function, unsigned long long flags, cudaDriverEntryPointQueryResult* result
) {
    return cudaGetDriverEntryPointByVersion(symbol, function, 0, flags, result);
}
cudaError_t cudaProfilerStart() { return cudaSuccess; }
cudaError_t cudaProfilerStop() { return cudaSuccess; }

// ---------------------------------------------------------------------------------------------------------------------
// Errors
// ---------------------------------------------------------------------------------------------------------------------

cudaError_t cudaGetLastError() {
    const cudaError_t error = last_error;
    last_error = cudaSuccess;
    return error;
}
cudaError_t cudaPeekAtLastError() { return last_error; }

#define ERRORS(X)                                                                                                     \
    X(cudaSuccess, "no error")                                                                                        \
    X(cudaErrorInvalidValue, "invalid argument")                                                                      \
    X(cudaErrorMemoryAllocation, "out of memory")                                                                     \
    X(cudaErrorInitializationError, "initialization error")                                                           \
    X(cudaErrorInvalidConfiguration, "invalid configuration argument")                                                \
    X(cudaErrorInsufficientDriver, "CUDA driver version is insufficient for CUDA runtime version")                    \
    X(cudaErrorDevicesUnavailable, "CUDA-capable device(s) is/are busy or unavailable")                               \
    X(cudaErrorMissingConfiguration, "__global__ function call is not configured")                                    \
    X(cudaErrorNoDevice, "no CUDA-capable device is detected")                                                        \
    X(cudaErrorInvalidDevice, "invalid device ordinal")                                                               \
    X(cudaErrorInvalidResourceHandle, "invalid resource handle")                                                      \
    X(cudaErrorNotReady, "device not ready")                                                                          \
    X(cudaErrorNoKernelImageForDevice, "no kernel image is available for execution on the device")                    \
    X(cudaErrorIllegalAddress, "an illegal memory access was encountered")                                            \
    X(cudaErrorHostMemoryAlreadyRegistered, "part or all of the requested memory range is already mapped")            \
    X(cudaErrorHostMemoryNotRegistered, "pointer does not correspond to a registered memory region")                  \
    X(cudaErrorLaunchFailure, "unspecified launch failure")                                                           \
    X(cudaErrorSystemDriverMismatch, "system has unsupported display driver / cuda driver combination")               \
    X(cudaErrorStreamCaptureUnsupported, "operation not permitted when stream is capturing")                          \
    X(cudaErrorStreamCaptureInvalidated, "operation failed due to a previous error during capture")                   \
    X(cudaErrorStreamCaptureUnmatched, "capture was not initiated in this stream")                                    \
    X(cudaErrorStreamCaptureImplicit, "operation would make the legacy stream depend on a capturing blocking stream") \
    X(cudaErrorCapturedEvent, "operation not permitted on an event last recorded in a capturing stream")              \
    X(cudaErrorStreamCaptureWrongThread, "attempt to terminate a thread-local capture sequence from another thread")

const char* cudaGetErrorName(cudaError_t error) {
    switch (error) {
#define NAME_OF(code, text) \
    case code:              \
        return #code;
        ERRORS(NAME_OF)
#undef NAME_OF
        default:
            return "cudaErrorUnknown";
    }
}
const char* cudaGetErrorString(cudaError_t error) {
    switch (error) {
#define TEXT_OF(code, text) \
    case code:              \
        return text;
        ERRORS(TEXT_OF)
#undef TEXT_OF
        default:
            return "unknown error";
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Streams and events
// ---------------------------------------------------------------------------------------------------------------------

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int) {
    NEEDS_CONTEXT();
    Locked guard(state().lock);
    *stream = new_handle<cudaStream_t>();
    state().streams[*stream].blocking = (flags & cudaStreamNonBlocking) == 0;
    Line("create").text("what", "stream").handle("handle", *stream).write();
    return cudaSuccess;
}
cudaError_t cudaStreamCreate(cudaStream_t* stream) { return cudaStreamCreateWithPriority(stream, 0, 0); }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
    return cudaStreamCreateWithPriority(stream, flags, 0);
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    NEEDS_CONTEXT();
    Locked guard(state().lock);
    if (const auto capture = capture_of(stream)) invalidate(*capture, __func__);
    finish(stream);
    if (!state().streams.erase(stream)) return fault(__func__, cudaErrorInvalidResourceHandle, "no such stream");
    Line("destroy").text("what", "stream").handle("handle", stream).write();
    return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    Locked guard(state().lock);
    if (!is_built_in(stream) && !state().streams.count(stream))
        return fault(__func__, cudaErrorInvalidResourceHandle, "no such stream");
    if (const auto capture = capture_of(stream)) {
        invalidate(*capture, __func__);
        return fault(__func__, cudaErrorStreamCaptureUnsupported, "the stream captures");
    }
    if (const cudaError_t error = synchronise(__func__, "stream", stream)) return error;
    return finish(stream);
}
cudaError_t cudaStreamQuery(cudaStream_t stream) {
    Locked guard(state().lock);
    if (const auto capture = capture_of(stream)) {
        invalidate(*capture, __func__);
        return fault(__func__, cudaErrorStreamCaptureUnsupported, "the stream captures");
    }
    if (const cudaError_t error = unsafe_error(__func__)) return error;
    return finish(stream);
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
    NEEDS_CONTEXT();
    Locked guard(state().lock);
    *event = new_handle<cudaEvent_t>();
    state().events[*event] = {};
    Line("create").text("what", "event").handle("handle", *event).write();
    return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t event) {
    Locked guard(state().lock);
    if (!state().events.erase(event)) return fault(__func__, cudaErrorInvalidResourceHandle, "no such event");
    Line("destroy").text("what", "event").handle("handle", event).write();
    return cudaSuccess;
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) {
    NEEDS_CONTEXT();
    Locked guard(state().lock);
    const auto found = state().events.find(event);
    if (found == state().events.end()) return fault(__func__, cudaErrorInvalidResourceHandle, "no such event");
    const auto capture = capture_of(stream);
    if (capture && (flags & cudaEventRecordExternal)) {
        const Run run = [event] {
            const auto recorded = state().events.find(event);
            if (recorded != state().events.end()) recorded->second = {true, now_in_milliseconds(), nullptr};
            return cudaSuccess;
        };
        capture->work.push_back({Kind::host_function, [run] { return run; }});
        return cudaSuccess;
    }
    const auto in = state().streams.find(stream);
    const long position = in == state().streams.end() ? 0 : in->second.end();
    found->second = {true, now_in_milliseconds(), capture, stream, position};
    return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    return cudaEventRecordWithFlags(event, stream, 0);
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    Locked guard(state().lock);
    const auto found = state().events.find(event);
    if (found == state().events.end()) return fault(__func__, cudaErrorInvalidResourceHandle, "no such event");
    if (found->second.capture) {
        invalidate(*found->second.capture, __func__);
        return fault(__func__, cudaErrorCapturedEvent, "recorded in a capture");
    }
    if (const cudaError_t error = synchronise(__func__, "event", event)) return error;
    return finish(found->second);
}
cudaError_t cudaEventQuery(cudaEvent_t event) {
    Locked guard(state().lock);
    const auto found = state().events.find(event);
    if (found == state().events.end()) return fault(__func__, cudaErrorInvalidResourceHandle, "no such event");
    if (found->second.capture) {
        invalidate(*found->second.capture, __func__);
        return fault(__func__, cudaErrorCapturedEvent, "recorded in a capture");
    }
    if (const cudaError_t error = unsafe_error(__func__)) return error;
    return finish(found->second);
}
// The time between the calls that recorded them: work takes none.
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t from, cudaEvent_t to) {
    Locked guard(state().lock);
    const auto first = state().events.find(from), second = state().events.find(to);
    if (first == state().events.end() || second == state().events.end() || !first->second.recorded ||
        !second->second.recorded)
        return fault(__func__, cudaErrorInvalidResourceHandle, "an event that was not recorded");
    if (first->second.capture || second->second.capture)
        return fault(__func__, cudaErrorCapturedEvent, "recorded in a capture");
    *milliseconds = static_cast<float>(second->second.milliseconds - first->second.milliseconds);
    return cudaSuccess;
}
// A stream that waits for an event of a capture joins that capture.
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
    NEEDS_CONTEXT();
    Locked guard(state().lock);
    const auto found = state().events.find(event);
    if (found == state().events.end()) return fault(__func__, cudaErrorInvalidResourceHandle, "no such event");
    if (found->second.capture && state().captures.count(found->second.capture) && state().streams.count(stream))
        state().streams[stream].capture = found->second.capture;
    else if (const cudaError_t error = finish(found->second))
        return failed(error);
    return cudaSuccess;
}

// ---------------------------------------------------------------------------------------------------------------------
// Captures and graphs
// ---------------------------------------------------------------------------------------------------------------------

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode) {
    NEEDS_CONTEXT();
    Locked guard(state().lock);
    if (is_legacy(stream) || !state().streams.count(stream))
        return fault(__func__, cudaErrorStreamCaptureUnsupported, "a stream that cannot be captured");
    if (capture_of(stream)) return fault(__func__, cudaErrorIllegalState, "the stream captures already");
    auto capture = std::make_shared<Capture>();
    capture->id = ++state().handles;
    capture->origin = stream, capture->thread = thread_id(), capture->mode = mode;
    state().streams[stream].capture = capture;
    state().captures.insert(capture);
    Line("capture begin")
        .number("capture", capture->id)
        .handle("stream", stream)
        .text(
            "mode", mode == cudaStreamCaptureModeGlobal        ? "global"
                    : mode == cudaStreamCaptureModeThreadLocal ? "thread"
                                                               : "relaxed"
        )
        .write();
    return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
    Locked guard(state().lock);
    *graph = nullptr;
    const auto capture = capture_of(stream);
    if (!capture) return fault(__func__, cudaErrorIllegalState, "the stream does not capture");
    if (capture->origin != stream)
        return fault(__func__, cudaErrorStreamCaptureUnmatched, "the capture began in another stream");
    if (capture->thread != thread_id() && capture->mode != cudaStreamCaptureModeRelaxed)
        return fault(__func__, cudaErrorStreamCaptureWrongThread, "the capture began in another thread");
    for (auto& [handle, other] : state().streams)
        if (other.capture == capture) other.capture = nullptr;
    state().captures.erase(capture);
    Line("capture end")
        .number("capture", capture->id)
        .handle("stream", stream)
        .number("invalid", capture->invalid)
        .write();
    if (capture->invalid) return failed(cudaErrorStreamCaptureInvalidated);
    *graph = new_handle<cudaGraph_t>();
    state().graphs[*graph] = {capture->id, std::move(capture->work)};
    return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
    Locked guard(state().lock);
    const auto capture = capture_of(stream);
    *status = !capture           ? cudaStreamCaptureStatusNone
              : capture->invalid ? cudaStreamCaptureStatusInvalidated
                                 : cudaStreamCaptureStatusActive;
    return cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
    std::swap(*mode, thread_mode);
    return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long) {
    NEEDS_CONTEXT();
    if (const cudaError_t error = injected_error(__func__)) return error;
    Locked guard(state().lock);
    const auto found = state().graphs.find(graph);
    if (found == state().graphs.end()) return fault(__func__, cudaErrorInvalidValue, "no such graph");
    *executable = new_handle<cudaGraphExec_t>();
    const Graph& made = state().executables[*executable] = found->second;
    Line("create")
        .text("what", "graph")
        .handle("handle", *executable)
        .number("capture", made.id)
        .number("kernels", made.count(Kind::kernel))
        .number("products", made.count(Kind::product))
        .number("copies", made.count(Kind::copy))
        .number("sets", made.count(Kind::set))
        .write();
    return cudaSuccess;
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long flags) {
    return cudaGraphInstantiate(executable, graph, flags);
}
cudaError_t cudaGraphUpload(cudaGraphExec_t, cudaStream_t) { return cudaSuccess; }
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
    NEEDS_CONTEXT();
    if (const cudaError_t error = injected_error(__func__)) return error;
    Locked guard(state().lock);
    const auto found = state().executables.find(executable);
    if (found == state().executables.end()) return fault(__func__, cudaErrorInvalidValue, "no such graph");
    if (const auto capture = capture_of(stream)) {
        invalidate(*capture, __func__);
        return fault(__func__, cudaErrorStreamCaptureUnsupported, "graphs within captures are not played here");
    }
    Line("graph launch").number("capture", found->second.id).handle("stream", stream).write();
    for (const Work& one : found->second.work)
        if (const cudaError_t error = start(stream, one)) return failed(error);
    return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    Locked guard(state().lock);
    return state().graphs.erase(graph) ? cudaSuccess : fault(__func__, cudaErrorInvalidValue, "no such graph");
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
    Locked guard(state().lock);
    const auto found = state().executables.find(executable);
    if (found == state().executables.end()) return fault(__func__, cudaErrorInvalidValue, "no such graph");
    Line("destroy").text("what", "graph").handle("handle", executable).write();
    state().executables.erase(found);
    return cudaSuccess;
}

}  // extern "C"
