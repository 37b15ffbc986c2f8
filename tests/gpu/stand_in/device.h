// What the runtime keeps track of, and CUDA's rules for it: memory, streams, captures, graphs, work. Included once, by
// runtime.cpp, which has the functions of the runtime.
#pragma once

#include <cxxabi.h>
#include <sys/mman.h>

#include <chrono>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string_view>
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

using Run = std::function<cudaError_t()>;

// One piece of work. `start` is called when it is put on a stream, or when a graph that holds it is launched; what it
// returns runs when the host waits for the stream. Kernels have none.
struct Work {
    Kind kind;
    std::function<Run()> start;
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
    std::deque<Run> waiting;  // in order, to run when the host waits
    long done = 0;            // of what was put on it

    long end() const { return done + static_cast<long>(waiting.size()); }
};

struct Event {
    bool recorded = false;
    double milliseconds = 0;
    std::shared_ptr<Capture> capture;  // that it was recorded in
    cudaStream_t stream = nullptr;
    long position = 0;  // in its stream
};

struct State {
    std::recursive_mutex lock;
    long handles = 0;
    pid_t process = 0;                                          // that made the context
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

template <class Handle>
Handle new_handle() {
    return reinterpret_cast<Handle>((++state().handles + 0x1000) << 4);
}

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
    if (state().process != getpid())
        return fault(function, cudaErrorInitializationError, "a context does not survive a fork");
    return cudaSuccess;
}

#define NEEDS_CONTEXT() \
    if (const cudaError_t error = context_error(__func__)) return error

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
        case cudaDevAttrMaxThreadsPerBlock:
            return of.maxThreadsPerBlock;
        case cudaDevAttrMaxBlockDimX:
        case cudaDevAttrMaxBlockDimY:
            return of.maxThreadsDim[0];
        case cudaDevAttrMaxBlockDimZ:
            return of.maxThreadsDim[2];
        case cudaDevAttrMaxGridDimX:
            return of.maxGridSize[0];
        case cudaDevAttrMaxGridDimY:
        case cudaDevAttrMaxGridDimZ:
            return of.maxGridSize[1];
        case cudaDevAttrMaxSharedMemoryPerBlock:
            return static_cast<int>(of.sharedMemPerBlock);
        case cudaDevAttrMaxSharedMemoryPerBlockOptin:
            return static_cast<int>(of.sharedMemPerBlockOptin);
        case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
            return static_cast<int>(of.sharedMemPerMultiprocessor);
        case cudaDevAttrMaxRegistersPerBlock:
        case cudaDevAttrMaxRegistersPerMultiprocessor:
            return of.regsPerBlock;
        case cudaDevAttrWarpSize:
            return of.warpSize;
        case cudaDevAttrMultiProcessorCount:
            return of.multiProcessorCount;
        case cudaDevAttrMaxThreadsPerMultiProcessor:
            return of.maxThreadsPerMultiProcessor;
        case cudaDevAttrMaxBlocksPerMultiprocessor:
            return of.maxBlocksPerMultiProcessor;
        case cudaDevAttrComputeCapabilityMajor:
            return of.major;
        case cudaDevAttrComputeCapabilityMinor:
            return of.minor;
        case cudaDevAttrL2CacheSize:
            return of.l2CacheSize;
        case cudaDevAttrComputeMode:
            return stand_in::held_by_another() ? cudaComputeModeExclusiveProcess : cudaComputeModeDefault;
        case cudaDevAttrIntegrated:
            return 0;
        default:
            return 1;
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Memory
// ---------------------------------------------------------------------------------------------------------------------

template <class Ranges>
auto range_of(Ranges& ranges, const void* pointer) {
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
    return found != state().pinned_memory.end() &&
           reinterpret_cast<uintptr_t>(pointer) + bytes <= found->first + found->second;
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
    Line("allocate")
        .text("where", "device")
        .handle("address", *pointer)
        .number("bytes", bytes)
        .number("used", used)
        .number("peak", peak)
        .number("device", current_device)
        .write();
    return cudaSuccess;
}

// Run what waits in a stream, up to a position. Its first error, which CUDA returns from the call that waits.
cudaError_t finish(Stream& stream, long position) {
    cudaError_t first = cudaSuccess;
    while (!stream.waiting.empty() && stream.done < position) {
        const Run run = std::move(stream.waiting.front());
        stream.waiting.pop_front();
        ++stream.done;
        const cudaError_t error = run();
        if (first == cudaSuccess) first = error;
    }
    return first;
}

cudaError_t finish_all() {
    Locked guard(state().lock);
    cudaError_t first = cudaSuccess;
    for (auto& [handle, stream] : state().streams) {
        const cudaError_t error = finish(stream, stream.end());
        if (first == cudaSuccess) first = error;
    }
    return first;
}

cudaError_t finish(cudaStream_t handle) {
    Locked guard(state().lock);
    const auto found = state().streams.find(handle);
    return found == state().streams.end() ? finish_all() : finish(found->second, found->second.end());
}

cudaError_t finish(const Event& event) {
    const auto found = state().streams.find(event.stream);
    return found == state().streams.end() ? cudaSuccess : finish(found->second, event.position);
}

// Waits for all work, as cudaFree does.
cudaError_t release(const char* function, void* pointer) {
    if (!pointer) return cudaSuccess;
    Locked guard(state().lock);
    if (const cudaError_t error = finish_all()) return failed(error);
    const auto found = state().device_memory.find(reinterpret_cast<uintptr_t>(pointer));
    if (found == state().device_memory.end())
        return fault(function, cudaErrorInvalidValue, "no live allocation starts there");
    const auto [bytes, device] = found->second;
    state().device_memory.erase(found);
    state().used[device] -= bytes;
    munmap(pointer, bytes);
    Line("free")
        .text("where", "device")
        .handle("address", pointer)
        .number("bytes", bytes)
        .number("used", state().used[device])
        .number("device", device)
        .write();
    return cudaSuccess;
}

// ---------------------------------------------------------------------------------------------------------------------
// Captures
// ---------------------------------------------------------------------------------------------------------------------

void invalidate(Capture& capture, const char* function) {
    if (capture.invalid) return;
    capture.invalid = true;
    Line("capture invalid")
        .number("capture", capture.id)
        .handle("stream", capture.origin)
        .text("function", function)
        .write();
}

// A call that may wait for work, or for memory that work uses. Whether it is allowed while a stream captures depends on
// both modes, the capture's and the calling thread's (cudaThreadExchangeStreamCaptureMode).
cudaError_t unsafe_error(const char* function) {
    Locked guard(state().lock);
    cudaError_t error = cudaSuccess;
    for (const auto& capture : state().captures) {
        const bool own = capture->thread == thread_id() && capture->mode != cudaStreamCaptureModeRelaxed;
        const bool global = capture->mode == cudaStreamCaptureModeGlobal && thread_mode == cudaStreamCaptureModeGlobal;
        if (thread_mode == cudaStreamCaptureModeRelaxed || !(own || global)) continue;
        invalidate(*capture, function);
        error = fault(
            function, cudaErrorStreamCaptureUnsupported, own ? "this thread captures" : "another thread captures"
        );
    }
    return error;
}

// All captures are lost by a call that waits for the whole device.
cudaError_t broken_captures(const char* function) {
    Locked guard(state().lock);
    if (state().captures.empty()) return cudaSuccess;
    for (const auto& capture : state().captures) invalidate(*capture, function);
    return fault(function, cudaErrorStreamCaptureUnsupported, "a stream of the device captures");
}

#define NEEDS_NO_CAPTURE() \
    if (const cudaError_t error = unsafe_error(__func__)) return error

bool is_legacy(cudaStream_t stream) { return stream == nullptr || stream == cudaStreamLegacy; }
bool is_built_in(cudaStream_t stream) { return is_legacy(stream) || stream == cudaStreamPerThread; }

std::shared_ptr<Capture> capture_of(cudaStream_t stream) {
    const auto found = state().streams.find(stream);
    return found == state().streams.end() ? nullptr : found->second.capture;
}

// Start work, to run when the host waits for its stream. In the built-in streams it runs at once, behind the work of
// blocking streams.
cudaError_t start(cudaStream_t stream, const Work& work) {
    const Run run = work.start ? work.start() : nullptr;
    if (!run) return cudaSuccess;
    const auto found = state().streams.find(stream);
    if (found != state().streams.end()) {
        found->second.waiting.push_back(run);
        return cudaSuccess;
    }
    for (auto& [handle, other] : state().streams)
        if (other.blocking)
            if (const cudaError_t error = finish(other, other.end())) return failed(error);
    return run();
}

// Put work on a stream, or into the graph that captures it. `line` is journaled with the stream.
cudaError_t put(const char* function, cudaStream_t stream, Work work, Line line) {
    NEEDS_CONTEXT();
    if (const cudaError_t error = injected_error(function)) return error;
    Locked guard(state().lock);
    if (!is_built_in(stream) && !state().streams.count(stream))
        return fault(function, cudaErrorInvalidResourceHandle, "no such stream");
    if (is_legacy(stream)) {
        for (const auto& capture : state().captures) {
            const auto origin = state().streams.find(capture->origin);
            if (origin == state().streams.end() || !origin->second.blocking) continue;
            invalidate(*capture, function);
            return fault(
                function, cudaErrorStreamCaptureImplicit, "the legacy stream waits for a stream that captures"
            );
        }
    }
    const auto capture = capture_of(stream);
    if (capture)
        if (const cudaError_t error = injected_error((std::string("captured ") + function).c_str())) return error;
    line.handle("stream", stream).number("capture", capture ? capture->id : 0).write();
    if (!capture) return start(stream, work);
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
    line.text("kernel", kernel_name(stub))
        .three("grid", grid.x, grid.y, grid.z)
        .three("block", block.x, block.y, block.z)
        .number("shared", static_cast<long long>(shared));
    return put(function, stream, {Kind::kernel, nullptr}, line);
}

struct Extent {
    size_t width, height, to_pitch, from_pitch;
    size_t span(size_t pitch) const { return height ? (height - 1) * pitch + width : 0; }
};

size_t hash_of(const void* memory, size_t bytes) {
    return std::hash<std::string_view>()({static_cast<const char*>(memory), bytes});
}

void poison(void* to, const Extent& extent) {
    for (size_t row = 0; row < extent.height; ++row)
        std::memset(static_cast<char*>(to) + row * extent.to_pitch, 0xFB, extent.width);
}

cudaError_t copy(
    const char* function, void* to, const void* from, Extent extent, cudaMemcpyKind kind, cudaStream_t stream,
    bool waits
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
        return fault(
            function, cudaErrorInvalidValue,
            wants_to ? "to memory that is not live on the device" : "to the device, as if it were the host"
        );
    if (kind != cudaMemcpyDefault && wants_from != from_device)
        return fault(
            function, cudaErrorInvalidValue,
            wants_from ? "from memory that is not live on the device" : "from the device, as if it were the host"
        );
    const bool crosses = to_device != from_device;
    const bool pinned = crosses && is_pinned(to_device ? from : to, to_device ? from_bytes : to_bytes);
    Line line("copy");
    line.text("direction", to_device ? (from_device ? "device" : "in") : (from_device ? "out" : "host"))
        .number("bytes", static_cast<long long>(extent.width * extent.height))
        .number("waits", waits);
    if (crosses) line.text("host", pinned ? "pinned" : "pageable");
    // Until a copy has run, the host must leave pinned memory alone: what it copies from must not change, and what it
    // copies to is not there yet.
    const auto begin = [=]() -> Run {
        const size_t before = pinned && to_device ? hash_of(from, from_bytes) : 0;
        if (pinned && from_device) poison(to, extent);
        return [=]() -> cudaError_t {
            if (on_device(to, to_bytes) != to_device || on_device(from, from_bytes) != from_device)
                return fault(function, cudaErrorIllegalAddress, "a copy of memory that was freed");
            if (pinned && to_device && hash_of(from, from_bytes) != before)
                fault(function, cudaSuccess, "the host changed pinned memory before the copy from it had run");
            for (size_t row = 0; row < extent.height; ++row)
                std::memmove(
                    static_cast<char*>(to) + row * extent.to_pitch,
                    static_cast<const char*>(from) + row * extent.from_pitch, extent.width
                );
            return cudaSuccess;
        };
    };
    const cudaError_t error = put(function, stream, {Kind::copy, begin}, line);
    return error == cudaSuccess && crosses && !pinned && !capture_of(stream) ? finish(stream) : error;
}

Extent flat(size_t bytes) { return {bytes, 1, bytes, bytes}; }

cudaError_t set(const char* function, void* to, int value, size_t bytes, cudaStream_t stream) {
    NEEDS_CONTEXT();
    if (!bytes) return cudaSuccess;
    if (!on_device(to, bytes)) return fault(function, cudaErrorInvalidValue, "memory that is not live on the device");
    Line line("set");
    line.number("bytes", static_cast<long long>(bytes));
    const Run run = [=]() -> cudaError_t {
        if (!on_device(to, bytes)) return fault(function, cudaErrorIllegalAddress, "memory that was freed is set");
        std::memset(to, value, bytes);
        return cudaSuccess;
    };
    return put(function, stream, {Kind::set, [run] { return run; }}, line);
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
