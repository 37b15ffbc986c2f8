// libcudart.so.13: memory, streams, events, captures and graphs, kept track of as CUDA defines them. No kernel runs.
//
// Memory of the device is memory of the host that nothing backs until it is written, so copies copy. Work is over as
// soon as it is on its stream. Every call that matters is journaled (journal.h); what CUDA forbids returns CUDA's error
// and is journaled as a "fault".

#include <cxxabi.h>
#include <dlfcn.h>
#include <sys/mman.h>

#include <chrono>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <unordered_map>

#include "cuda_runtime_api.h"
#include "journal.h"
#include "machine.h"
#include "work.h"

using stand_in::Line;

// ---------------------------------------------------------------------------------------------------------------------
// State
// ---------------------------------------------------------------------------------------------------------------------

namespace {

enum class Kind { kernel, product, copy, set, host_function };

// One piece of work. `run` is what a graph's launch repeats of it: copies are made, products look at their memory again.
struct Work {
    Kind kind;
    std::function<cudaError_t()> run;
};

struct Graph {
    long id;
    std::vector<Work> work;

    long count(Kind kind) const {
        return std::count_if(work.begin(), work.end(), [kind](const Work& one) { return one.kind == kind; });
    }
};

struct Capture {
    long id;
    cudaStream_t origin;
    long thread;
    cudaStreamCaptureMode mode;
    bool invalid = false;
    std::vector<Work> work;
};

struct Stream {
    bool blocking;  // waits for the legacy stream, and that one for it
    std::shared_ptr<Capture> capture;
};

struct Event {
    bool recorded = false;
    double milliseconds = 0;
    std::shared_ptr<Capture> capture;  // that it was recorded in
};

struct State {
    std::recursive_mutex lock;
    long handles = 0;
    pid_t process = 0;  // that made the context
    std::map<uintptr_t, std::pair<size_t, int>> device_memory;  // address: bytes, device
    std::map<uintptr_t, size_t> pinned_memory;
    std::map<int, size_t> used, peak;  // by device
    std::unordered_map<cudaStream_t, Stream> streams;
    std::unordered_map<cudaEvent_t, Event> events;
    std::unordered_map<cudaGraph_t, Graph> graphs;
    std::unordered_map<cudaGraphExec_t, Graph> executables;
    std::set<std::shared_ptr<Capture>> captures;
    std::unordered_map<const void*, std::string> kernels;  // by the address of the host's stub, demangled at first use
    std::unordered_map<const void*, std::string> demangled;
};

// Never destroyed: libraries free their memory while the process ends.
State& state() {
    static State* const all = new State;
    return *all;
}

using Locked = std::lock_guard<std::recursive_mutex>;

thread_local int current_device = 0;
thread_local cudaError_t last_error = cudaSuccess;
thread_local cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;

long thread_id() { return syscall(SYS_gettid); }

template <class Handle> Handle new_handle() { return reinterpret_cast<Handle>((++state().handles + 0x1000) << 4); }

cudaError_t failed(cudaError_t error) { return last_error = error; }

// What a correct program never does.
cudaError_t fault(const char* function, cudaError_t error, const std::string& why) {
    Line("fault").text("function", function).number("error", error).text("why", why).write();
    return failed(error);
}

// ---------------------------------------------------------------------------------------------------------------------
// The device
// ---------------------------------------------------------------------------------------------------------------------

// Whether the runtime works at all on this machine.
cudaError_t runtime_error() {
    if (stand_in::driver_version() / 1000 * 1000 < stand_in::RUNTIME_VERSION) return cudaErrorInsufficientDriver;
    return static_cast<cudaError_t>(stand_in::cuinit_error());
}

// Whether this process has, or can make, a context.
cudaError_t context_error(const char* function) {
    if (const cudaError_t error = runtime_error()) return failed(error);
    if (stand_in::held_by_another()) return failed(cudaErrorDevicesUnavailable);
    Locked guard(state().lock);
    if (!state().process) state().process = getpid();
    if (state().process != getpid()) return fault(function, cudaErrorInitializationError, "a context does not survive a fork");
    return cudaSuccess;
}

#define NEEDS_CONTEXT() \
    if (const cudaError_t error = context_error(__func__)) return error

// STAND_IN_FAIL names what fails: "product", or a function of the runtime.
cudaError_t injected_error(const char* function) {
    const char* named = std::getenv("STAND_IN_FAIL");
    if (!named || std::strcmp(named, function) != 0) return cudaSuccess;
    Line("injected failure").text("function", function).write();
    return failed(cudaErrorLaunchFailure);
}

cudaDeviceProp properties() {
    cudaDeviceProp of{};
    std::snprintf(of.name, sizeof of.name, "%s", stand_in::NAME);
    stand_in::capability(&of.major, &of.minor);
    of.totalGlobalMem = stand_in::total_memory();
    of.multiProcessorCount = stand_in::MULTIPROCESSORS;
    of.sharedMemPerBlock = 48 << 10;
    of.sharedMemPerBlockOptin = 227 << 10;
    of.sharedMemPerMultiprocessor = 228 << 10;
    of.regsPerBlock = of.regsPerMultiprocessor = 64 << 10;
    of.warpSize = 32;
    of.maxThreadsPerBlock = of.maxThreadsDim[0] = of.maxThreadsDim[1] = 1024;
    of.maxThreadsDim[2] = 64;
    of.maxGridSize[0] = 2147483647;
    of.maxGridSize[1] = of.maxGridSize[2] = 65535;
    of.maxThreadsPerMultiProcessor = 2048;
    of.maxBlocksPerMultiProcessor = 32;
    of.totalConstMem = 64 << 10;
    of.l2CacheSize = 50 << 20;
    of.memoryBusWidth = 5120;
    of.asyncEngineCount = 3;
    of.concurrentKernels = of.unifiedAddressing = of.managedMemory = of.canMapHostMemory = of.memoryPoolsSupported = 1;
    return of;
}

int attribute(cudaDeviceAttr which) {
    const cudaDeviceProp of = properties();
    switch (which) {
        case cudaDevAttrMaxThreadsPerBlock: return of.maxThreadsPerBlock;
        case cudaDevAttrMaxBlockDimX: case cudaDevAttrMaxBlockDimY: return of.maxThreadsDim[0];
        case cudaDevAttrMaxBlockDimZ: return of.maxThreadsDim[2];
        case cudaDevAttrMaxGridDimX: return of.maxGridSize[0];
        case cudaDevAttrMaxGridDimY: case cudaDevAttrMaxGridDimZ: return of.maxGridSize[1];
        case cudaDevAttrMaxSharedMemoryPerBlock: return static_cast<int>(of.sharedMemPerBlock);
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: return static_cast<int>(of.sharedMemPerBlockOptin);
        case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return static_cast<int>(of.sharedMemPerMultiprocessor);
        case cudaDevAttrMaxRegistersPerBlock: case cudaDevAttrMaxRegistersPerMultiprocessor: return of.regsPerBlock;
        case cudaDevAttrWarpSize: return of.warpSize;
        case cudaDevAttrMultiProcessorCount: return of.multiProcessorCount;
        case cudaDevAttrMaxThreadsPerMultiProcessor: return of.maxThreadsPerMultiProcessor;
        case cudaDevAttrMaxBlocksPerMultiprocessor: return of.maxBlocksPerMultiProcessor;
        case cudaDevAttrComputeCapabilityMajor: return of.major;
        case cudaDevAttrComputeCapabilityMinor: return of.minor;
        case cudaDevAttrL2CacheSize: return of.l2CacheSize;
        case cudaDevAttrComputeMode: return stand_in::held_by_another() ? cudaComputeModeExclusiveProcess : cudaComputeModeDefault;
        case cudaDevAttrIntegrated: return 0;
        default: return 1;
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Memory
// ---------------------------------------------------------------------------------------------------------------------

template <class Ranges> auto range_of(Ranges& ranges, const void* pointer) {
    const auto address = reinterpret_cast<uintptr_t>(pointer);
    auto found = ranges.upper_bound(address);
    return found == ranges.begin() ? ranges.end() : std::prev(found);
}

bool on_device(const void* pointer, size_t bytes) {
    Locked guard(state().lock);
    const auto found = range_of(state().device_memory, pointer);
    return found != state().device_memory.end() &&
           reinterpret_cast<uintptr_t>(pointer) + bytes <= found->first + found->second.first &&
           reinterpret_cast<uintptr_t>(pointer) < found->first + std::max<size_t>(found->second.first, 1);
}

bool is_pinned(const void* pointer, size_t bytes) {
    Locked guard(state().lock);
    const auto found = range_of(state().pinned_memory, pointer);
    return found != state().pinned_memory.end() && reinterpret_cast<uintptr_t>(pointer) + bytes <= found->first + found->second;
}

void* pages(size_t bytes) {
    void* found = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return found == MAP_FAILED ? nullptr : found;
}

cudaError_t allocate(void** pointer, size_t bytes) {
    *pointer = nullptr;
    if (bytes == 0) return cudaSuccess;
    Locked guard(state().lock);
    const size_t size = (bytes + 511) / 512 * 512;
    size_t& used = state().used[current_device];
    size_t& peak = state().peak[current_device];
    if (used + size > stand_in::total_memory() || !(*pointer = pages(size))) {
        Line("out of memory").number("bytes", bytes).number("used", used).number("device", current_device).write();
        return failed(cudaErrorMemoryAllocation);
    }
    state().device_memory[reinterpret_cast<uintptr_t>(*pointer)] = {size, current_device};
    used += size, peak = std::max(peak, used);
    Line("allocate").text("where", "device").handle("address", *pointer).number("bytes", bytes).number("used", used)
        .number("peak", peak).number("device", current_device).write();
    return cudaSuccess;
}

cudaError_t release(const char* function, void* pointer) {
    if (!pointer) return cudaSuccess;
    Locked guard(state().lock);
    const auto found = state().device_memory.find(reinterpret_cast<uintptr_t>(pointer));
    if (found == state().device_memory.end()) return fault(function, cudaErrorInvalidValue, "no live allocation starts there");
    const auto [bytes, device] = found->second;
    state().device_memory.erase(found);
    state().used[device] -= bytes;
    munmap(pointer, bytes);
    Line("free").text("where", "device").handle("address", pointer).number("bytes", bytes)
        .number("used", state().used[device]).number("device", device).write();
    return cudaSuccess;
}

// ---------------------------------------------------------------------------------------------------------------------
// Captures
// ---------------------------------------------------------------------------------------------------------------------

void invalidate(Capture& capture, const char* function) {
    if (capture.invalid) return;
    capture.invalid = true;
    Line("capture invalid").number("capture", capture.id).handle("stream", capture.origin).text("function", function).write();
}

// A call that may wait for work, or for memory that work uses. Where it stands while a stream captures is told by both
// modes, the capture's and the calling thread's (cudaThreadExchangeStreamCaptureMode).
cudaError_t unsafe_error(const char* function) {
    Locked guard(state().lock);
    cudaError_t error = cudaSuccess;
    for (const auto& capture : state().captures) {
        const bool own = capture->thread == thread_id() && capture->mode != cudaStreamCaptureModeRelaxed;
        const bool global = capture->mode == cudaStreamCaptureModeGlobal && thread_mode == cudaStreamCaptureModeGlobal;
        if (thread_mode == cudaStreamCaptureModeRelaxed || !(own || global)) continue;
        invalidate(*capture, function);
        error = fault(function, cudaErrorStreamCaptureUnsupported, own ? "this thread captures" : "another thread captures");
    }
    return error;
}

#define NEEDS_NO_CAPTURE() \
    if (const cudaError_t error = unsafe_error(__func__)) return error

bool is_legacy(cudaStream_t stream) { return stream == nullptr || stream == cudaStreamLegacy; }
bool is_built_in(cudaStream_t stream) { return is_legacy(stream) || stream == cudaStreamPerThread; }

std::shared_ptr<Capture> capture_of(cudaStream_t stream) {
    const auto found = state().streams.find(stream);
    return found == state().streams.end() ? nullptr : found->second.capture;
}

// Put work on a stream: it is done now, or by the graph that captures it. `line` is journaled with the stream.
cudaError_t put(const char* function, cudaStream_t stream, Work work, Line line) {
    NEEDS_CONTEXT();
    if (const cudaError_t error = injected_error(function)) return error;
    Locked guard(state().lock);
    if (!is_built_in(stream) && !state().streams.count(stream)) return fault(function, cudaErrorInvalidResourceHandle, "no such stream");
    if (is_legacy(stream)) {
        for (const auto& capture : state().captures) {
            const auto origin = state().streams.find(capture->origin);
            if (origin == state().streams.end() || !origin->second.blocking) continue;
            invalidate(*capture, function);
            return fault(function, cudaErrorStreamCaptureImplicit, "the legacy stream waits for a stream that captures");
        }
    }
    const auto capture = capture_of(stream);
    line.handle("stream", stream).number("capture", capture ? capture->id : 0).write();
    if (!capture) return work.run ? work.run() : cudaSuccess;
    if (capture->invalid) return failed(cudaErrorStreamCaptureInvalidated);
    capture->work.push_back(std::move(work));
    return cudaSuccess;
}

// ---------------------------------------------------------------------------------------------------------------------
// Work
// ---------------------------------------------------------------------------------------------------------------------

const std::string& kernel_name(const void* stub) {
    Locked guard(state().lock);
    const auto known = state().demangled.find(stub);
    if (known != state().demangled.end()) return known->second;
    const auto found = state().kernels.find(stub);
    std::string name = found == state().kernels.end() ? "unknown" : found->second;
    int status = 0;
    if (char* plain = abi::__cxa_demangle(name.c_str(), nullptr, nullptr, &status)) {
        name = plain;
        std::free(plain);
    }
    return state().demangled[stub] = name;
}

cudaError_t launch(const char* function, const void* stub, dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
    const dim3 most(2147483647, 65535, 65535);
    if (!grid.x || !grid.y || !grid.z || !block.x || !block.y || !block.z || block.x * block.y * block.z > 1024 ||
        grid.x > most.x || grid.y > most.y || grid.z > most.z)
        return fault(function, cudaErrorInvalidConfiguration, kernel_name(stub));
    int major = 0, minor = 0;
    stand_in::capability(&major, &minor);
    if (major * 10 + minor < stand_in::LEAST_CAPABILITY) return failed(cudaErrorNoKernelImageForDevice);
    Line line("kernel");
    line.text("kernel", kernel_name(stub)).three("grid", grid.x, grid.y, grid.z).three("block", block.x, block.y, block.z)
        .number("shared", static_cast<long long>(shared));
    return put(function, stream, {Kind::kernel, nullptr}, line);
}

struct Extent {
    size_t width, height, to_pitch, from_pitch;
    size_t span(size_t pitch) const { return height ? (height - 1) * pitch + width : 0; }
};

cudaError_t copy(
    const char* function, void* to, const void* from, Extent extent, cudaMemcpyKind kind, cudaStream_t stream, bool waits
) {
    NEEDS_CONTEXT();
    if (extent.width * extent.height == 0) return cudaSuccess;
    if (waits)
        if (const cudaError_t error = unsafe_error(function)) return error;
    const size_t to_bytes = extent.span(extent.to_pitch), from_bytes = extent.span(extent.from_pitch);
    const bool to_device = on_device(to, to_bytes), from_device = on_device(from, from_bytes);
    const bool wants_to = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
    const bool wants_from = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
    if (kind != cudaMemcpyDefault && wants_to != to_device)
        return fault(function, cudaErrorInvalidValue, wants_to ? "to memory that is not live on the device" : "to the device, as if it were the host");
    if (kind != cudaMemcpyDefault && wants_from != from_device)
        return fault(function, cudaErrorInvalidValue, wants_from ? "from memory that is not live on the device" : "from the device, as if it were the host");
    Line line("copy");
    line.text("direction", to_device ? (from_device ? "device" : "in") : (from_device ? "out" : "host"))
        .number("bytes", static_cast<long long>(extent.width * extent.height)).number("waits", waits);
    if (to_device != from_device)
        line.text("host", is_pinned(to_device ? from : to, to_device ? from_bytes : to_bytes) ? "pinned" : "pageable");
    auto run = [=]() -> cudaError_t {
        if (on_device(to, to_bytes) != to_device || on_device(from, from_bytes) != from_device)
            return fault(function, cudaErrorIllegalAddress, "a graph copies memory that was freed");
        for (size_t row = 0; row < extent.height; ++row)
            std::memmove(static_cast<char*>(to) + row * extent.to_pitch, static_cast<const char*>(from) + row * extent.from_pitch, extent.width);
        return cudaSuccess;
    };
    return put(function, stream, {Kind::copy, run}, line);
}

Extent flat(size_t bytes) { return {bytes, 1, bytes, bytes}; }

cudaError_t set(const char* function, void* to, int value, size_t bytes, cudaStream_t stream) {
    NEEDS_CONTEXT();
    if (!bytes) return cudaSuccess;
    if (!on_device(to, bytes)) return fault(function, cudaErrorInvalidValue, "memory that is not live on the device");
    Line line("set");
    line.number("bytes", static_cast<long long>(bytes));
    auto run = [=]() -> cudaError_t {
        if (!on_device(to, bytes)) return fault(function, cudaErrorIllegalAddress, "a graph sets memory that was freed");
        std::memset(to, value, bytes);
        return cudaSuccess;
    };
    return put(function, stream, {Kind::set, run}, line);
}

cudaError_t synchronise(const char* function, const char* what, const void* handle) {
    NEEDS_CONTEXT();
    if (const cudaError_t error = unsafe_error(function)) return error;
    if (const cudaError_t error = injected_error(function)) return error;
    Line("synchronise").text("what", what).handle("handle", handle).write();
    return cudaSuccess;
}

double now_in_milliseconds() {
    return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

struct CallConfiguration {
    dim3 grid, block;
    size_t shared;
    cudaStream_t stream;
};
thread_local std::vector<CallConfiguration> call_configurations;

}  // namespace

cudaError_t stand_in::enqueue(cudaStream_t stream, const Product& product) {
    NEEDS_CONTEXT();
    const std::string shape = product.library + " " + std::to_string(product.m) + "x" + std::to_string(product.n) + "x" + std::to_string(product.k);
    auto operands = product.operands;
    auto check = [operands, shape](cudaError_t error, const char* of) -> cudaError_t {
        for (const auto& one : operands)
            if (one.bytes && !on_device(one.pointer, one.bytes))
                return fault("product", error, of + shape + ": " + one.name + " is not within live memory of the device");
        return cudaSuccess;
    };
    if (const cudaError_t error = check(cudaErrorInvalidValue, "")) return error;
    Line line("product");
    line.text("library", product.library).number("m", product.m).number("n", product.n).number("k", product.k)
        .number("batch", product.batch).text("transposes", product.transposes).text("a", product.a).text("b", product.b)
        .text("c", product.c).text("compute", product.compute).text("epilogue", product.epilogue);
    return put("product", stream, {Kind::product, [check] { return check(cudaErrorIllegalAddress, "in a graph, "); }}, line);
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
void __cudaRegisterFunction(void**, const char* stub, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*, int*) {
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
cudaError_t cudaLaunchCooperativeKernel(const void* stub, dim3 grid, dim3 block, void**, size_t shared, cudaStream_t stream) {
    return launch(__func__, stub, grid, block, shared, stream);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* how, const void* stub, void**) {
    return launch(__func__, stub, how->gridDim, how->blockDim, how->dynamicSmemBytes, how->stream);
}
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* data) {
    auto run = [=] {
        function(data);
        return cudaSuccess;
    };
    return put(__func__, stream, {Kind::host_function, run}, Line("host function"));
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
cudaError_t cudaLibraryLoadData(cudaLibrary_t* library, const void*, cudaJitOption*, void**, unsigned, cudaLibraryOption*, void**, unsigned) {
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
    Line("allocate").text("where", "host").handle("address", *pointer).number("bytes", static_cast<long long>(bytes)).write();
    return cudaSuccess;
}
cudaError_t cudaMallocHost(void** pointer, size_t bytes) { return cudaHostAlloc(pointer, bytes, 0); }
cudaError_t cudaFreeHost(void* pointer) {
    NEEDS_CONTEXT();
    NEEDS_NO_CAPTURE();
    if (!pointer) return cudaSuccess;
    Locked guard(state().lock);
    const auto found = state().pinned_memory.find(reinterpret_cast<uintptr_t>(pointer));
    if (found == state().pinned_memory.end()) return fault(__func__, cudaErrorInvalidValue, "no pinned memory starts there");
    Line("free").text("where", "host").handle("address", pointer).number("bytes", static_cast<long long>(found->second)).write();
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
    if (!state().pinned_memory.erase(reinterpret_cast<uintptr_t>(pointer))) return failed(cudaErrorHostMemoryNotRegistered);
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
cudaError_t cudaMemcpy2D(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width, size_t height, cudaMemcpyKind kind) {
    return copy(__func__, to, from, {width, height, to_pitch, from_pitch}, kind, nullptr, true);
}
cudaError_t cudaMemcpy2DAsync(
    void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width, size_t height, cudaMemcpyKind kind, cudaStream_t stream
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
cudaError_t cudaMemcpyToSymbolAsync(const void*, const void*, size_t, size_t, cudaMemcpyKind, cudaStream_t) { return cudaSuccess; }
cudaError_t cudaMemset(void* to, int value, size_t bytes) {
    NEEDS_NO_CAPTURE();
    return set(__func__, to, value, bytes, nullptr);
}
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) { return set(__func__, to, value, bytes, stream); }

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
    if (device < 0 || device >= stand_in::device_count()) return failed(runtime_error() ? runtime_error() : cudaErrorInvalidDevice);
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
cudaError_t cudaDeviceSynchronize() { return synchronise(__func__, "device", nullptr); }
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
cudaError_t cudaGetDriverEntryPoint(const char* symbol, void** function, unsigned long long flags, cudaDriverEntryPointQueryResult* result) {
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

#define ERRORS(X) \
    X(cudaSuccess, "no error") \
    X(cudaErrorInvalidValue, "invalid argument") \
    X(cudaErrorMemoryAllocation, "out of memory") \
    X(cudaErrorInitializationError, "initialization error") \
    X(cudaErrorInvalidConfiguration, "invalid configuration argument") \
    X(cudaErrorInsufficientDriver, "CUDA driver version is insufficient for CUDA runtime version") \
    X(cudaErrorDevicesUnavailable, "CUDA-capable device(s) is/are busy or unavailable") \
    X(cudaErrorMissingConfiguration, "__global__ function call is not configured") \
    X(cudaErrorNoDevice, "no CUDA-capable device is detected") \
    X(cudaErrorInvalidDevice, "invalid device ordinal") \
    X(cudaErrorInvalidResourceHandle, "invalid resource handle") \
    X(cudaErrorNotReady, "device not ready") \
    X(cudaErrorNoKernelImageForDevice, "no kernel image is available for execution on the device") \
    X(cudaErrorIllegalAddress, "an illegal memory access was encountered") \
    X(cudaErrorHostMemoryAlreadyRegistered, "part or all of the requested memory range is already mapped") \
    X(cudaErrorHostMemoryNotRegistered, "pointer does not correspond to a registered memory region") \
    X(cudaErrorLaunchFailure, "unspecified launch failure") \
    X(cudaErrorSystemDriverMismatch, "system has unsupported display driver / cuda driver combination") \
    X(cudaErrorStreamCaptureUnsupported, "operation not permitted when stream is capturing") \
    X(cudaErrorStreamCaptureInvalidated, "operation failed due to a previous error during capture") \
    X(cudaErrorStreamCaptureUnmatched, "capture was not initiated in this stream") \
    X(cudaErrorStreamCaptureImplicit, "operation would make the legacy stream depend on a capturing blocking stream") \
    X(cudaErrorCapturedEvent, "operation not permitted on an event last recorded in a capturing stream") \
    X(cudaErrorStreamCaptureWrongThread, "attempt to terminate a thread-local capture sequence from another thread")

const char* cudaGetErrorName(cudaError_t error) {
    switch (error) {
#define NAME_OF(code, text) \
    case code: return #code;
        ERRORS(NAME_OF)
#undef NAME_OF
        default: return "cudaErrorUnknown";
    }
}
const char* cudaGetErrorString(cudaError_t error) {
    switch (error) {
#define TEXT_OF(code, text) \
    case code: return text;
        ERRORS(TEXT_OF)
#undef TEXT_OF
        default: return "unknown error";
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Streams and events
// ---------------------------------------------------------------------------------------------------------------------

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int) {
    NEEDS_CONTEXT();
    Locked guard(state().lock);
    *stream = new_handle<cudaStream_t>();
    state().streams[*stream] = {(flags & cudaStreamNonBlocking) == 0, nullptr};
    Line("create").text("what", "stream").handle("handle", *stream).write();
    return cudaSuccess;
}
cudaError_t cudaStreamCreate(cudaStream_t* stream) { return cudaStreamCreateWithPriority(stream, 0, 0); }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) { return cudaStreamCreateWithPriority(stream, flags, 0); }
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    NEEDS_CONTEXT();
    Locked guard(state().lock);
    if (const auto capture = capture_of(stream)) invalidate(*capture, __func__);
    if (!state().streams.erase(stream)) return fault(__func__, cudaErrorInvalidResourceHandle, "no such stream");
    Line("destroy").text("what", "stream").handle("handle", stream).write();
    return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    Locked guard(state().lock);
    if (!is_built_in(stream) && !state().streams.count(stream)) return fault(__func__, cudaErrorInvalidResourceHandle, "no such stream");
    if (const auto capture = capture_of(stream)) {
        invalidate(*capture, __func__);
        return fault(__func__, cudaErrorStreamCaptureUnsupported, "the stream captures");
    }
    return synchronise(__func__, "stream", stream);
}
cudaError_t cudaStreamQuery(cudaStream_t stream) {
    Locked guard(state().lock);
    if (const auto capture = capture_of(stream)) {
        invalidate(*capture, __func__);
        return fault(__func__, cudaErrorStreamCaptureUnsupported, "the stream captures");
    }
    return unsafe_error(__func__);
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
        auto run = [event] {
            Locked again(state().lock);
            const auto recorded = state().events.find(event);
            if (recorded != state().events.end()) recorded->second = {true, now_in_milliseconds(), nullptr};
            return cudaSuccess;
        };
        capture->work.push_back({Kind::host_function, run});
        return cudaSuccess;
    }
    found->second = {true, now_in_milliseconds(), capture};
    return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) { return cudaEventRecordWithFlags(event, stream, 0); }
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    Locked guard(state().lock);
    const auto found = state().events.find(event);
    if (found == state().events.end()) return fault(__func__, cudaErrorInvalidResourceHandle, "no such event");
    if (found->second.capture) {
        invalidate(*found->second.capture, __func__);
        return fault(__func__, cudaErrorCapturedEvent, "recorded in a capture");
    }
    return synchronise(__func__, "event", event);
}
cudaError_t cudaEventQuery(cudaEvent_t event) {
    Locked guard(state().lock);
    const auto found = state().events.find(event);
    if (found == state().events.end()) return fault(__func__, cudaErrorInvalidResourceHandle, "no such event");
    if (found->second.capture) {
        invalidate(*found->second.capture, __func__);
        return fault(__func__, cudaErrorCapturedEvent, "recorded in a capture");
    }
    return unsafe_error(__func__);
}
// The time between the calls that recorded them: work takes none.
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t from, cudaEvent_t to) {
    Locked guard(state().lock);
    const auto first = state().events.find(from), second = state().events.find(to);
    if (first == state().events.end() || second == state().events.end() || !first->second.recorded || !second->second.recorded)
        return fault(__func__, cudaErrorInvalidResourceHandle, "an event that was not recorded");
    if (first->second.capture || second->second.capture) return fault(__func__, cudaErrorCapturedEvent, "recorded in a capture");
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
    return cudaSuccess;
}

// ---------------------------------------------------------------------------------------------------------------------
// Captures and graphs
// ---------------------------------------------------------------------------------------------------------------------

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode) {
    NEEDS_CONTEXT();
    Locked guard(state().lock);
    if (is_legacy(stream) || !state().streams.count(stream)) return fault(__func__, cudaErrorStreamCaptureUnsupported, "a stream that cannot be captured");
    if (capture_of(stream)) return fault(__func__, cudaErrorIllegalState, "the stream captures already");
    auto capture = std::make_shared<Capture>();
    capture->id = ++state().handles;
    capture->origin = stream, capture->thread = thread_id(), capture->mode = mode;
    state().streams[stream].capture = capture;
    state().captures.insert(capture);
    Line("capture begin").number("capture", capture->id).handle("stream", stream)
        .text("mode", mode == cudaStreamCaptureModeGlobal ? "global" : mode == cudaStreamCaptureModeThreadLocal ? "thread" : "relaxed").write();
    return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
    Locked guard(state().lock);
    *graph = nullptr;
    const auto capture = capture_of(stream);
    if (!capture) return fault(__func__, cudaErrorIllegalState, "the stream does not capture");
    if (capture->origin != stream) return fault(__func__, cudaErrorStreamCaptureUnmatched, "the capture began in another stream");
    if (capture->thread != thread_id() && capture->mode != cudaStreamCaptureModeRelaxed)
        return fault(__func__, cudaErrorStreamCaptureWrongThread, "the capture began in another thread");
    for (auto& [handle, other] : state().streams)
        if (other.capture == capture) other.capture = nullptr;
    state().captures.erase(capture);
    Line("capture end").number("capture", capture->id).handle("stream", stream).number("invalid", capture->invalid).write();
    if (capture->invalid) return failed(cudaErrorStreamCaptureInvalidated);
    *graph = new_handle<cudaGraph_t>();
    state().graphs[*graph] = {capture->id, std::move(capture->work)};
    return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
    Locked guard(state().lock);
    const auto capture = capture_of(stream);
    *status = !capture ? cudaStreamCaptureStatusNone : capture->invalid ? cudaStreamCaptureStatusInvalidated : cudaStreamCaptureStatusActive;
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
    Line("create").text("what", "graph").handle("handle", *executable).number("capture", made.id).number("kernels", made.count(Kind::kernel)).number("products", made.count(Kind::product))
        .number("copies", made.count(Kind::copy)).number("sets", made.count(Kind::set)).write();
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
        if (one.run)
            if (const cudaError_t error = one.run()) return failed(error);
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
