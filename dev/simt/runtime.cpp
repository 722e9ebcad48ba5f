// The CUDA runtime's calls for memory, copies and questions; streams and events are in streams.cpp, graphs in
// graph.cpp.
#include <algorithm>
#include <cstring>
#include <memory>
#include <utility>

#include <sys/mman.h>

#include "block.h"
#include "include/cuda_runtime.h"
#include "streams.h"

static cudaError_t& last_error() {
    static thread_local cudaError_t error = cudaSuccess;
    return error;
}
static cudaError_t done(cudaError_t error) {
    if (error != cudaSuccess) last_error() = error;
    return error;
}

const char* cudaGetErrorString(cudaError_t error) {
    switch (error) {
    case cudaSuccess:
        return "no error";
    case cudaErrorInvalidValue:
        return "invalid argument";
    case cudaErrorMemoryAllocation:
        return "out of memory";
    case cudaErrorInvalidConfiguration:
        return "invalid configuration argument";
    case cudaErrorInvalidDevicePointer:
        return "invalid device pointer";
    case cudaErrorNotReady:
        return "device not ready";
    case cudaErrorInvalidDevice:
        return "invalid device ordinal";
    case cudaErrorInvalidResourceHandle:
        return "invalid resource handle";
    case cudaErrorStreamCaptureUnsupported:
        return "operation not permitted while a stream is captured";
    case cudaErrorStreamCaptureUnjoined:
        return "capturing stream has unjoined work";
    case cudaErrorStreamCaptureIsolation:
        return "dependency created on uncaptured work in another stream";
    case cudaErrorCapturedEvent:
        return "operation not permitted on an event last recorded in a capturing stream";
    case cudaErrorLaunchFailure:
        return "unspecified launch failure";
    }
    return "unrecognized error code";
}
const char* cudaGetErrorName(cudaError_t error) { return cudaGetErrorString(error); }
cudaError_t cudaGetLastError() { return std::exchange(last_error(), cudaSuccess); }
cudaError_t cudaPeekAtLastError() { return last_error(); }

cudaError_t cudaGetDeviceCount(int* count) {
    *count = 1;
    return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) { return done(device == 0 ? cudaSuccess : cudaErrorInvalidDevice); }
cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}

// An A100's figures where kernels choose tiles by them, and as much memory as this machine has.
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int device) {
    if (device != 0) return done(cudaErrorInvalidDevice);
    *p = {};
    strcpy(p->name, "simulated GPU");
    p->totalGlobalMem = simt::settings().device_bytes;
    p->sharedMemPerBlock = 48 * 1024;
    p->sharedMemPerBlockOptin = simt::settings().shared_per_block;
    p->sharedMemPerMultiprocessor = simt::settings().shared_per_block + 1024;
    p->major = simt::settings().capability_major;
    p->multiProcessorCount = 4;
    p->warpSize = simt::kLanes;
    p->maxThreadsPerBlock = simt::kMaxThreads;
    p->maxThreadsPerMultiProcessor = 2048;
    p->regsPerBlock = 65536;
    p->l2CacheSize = 40 << 20;
    p->maxGridSize[0] = 0x7fffffff, p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024, p->maxThreadsDim[2] = 64;
    return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
    cudaDeviceProp p;
    if (cudaError_t error = cudaGetDeviceProperties(&p, device)) return error;
    switch (attribute) {
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
        *value = static_cast<int>(p.sharedMemPerBlockOptin);
        break;
    case cudaDevAttrMultiProcessorCount:
        *value = p.multiProcessorCount;
        break;
    case cudaDevAttrKernelExecTimeout:
        *value = simt::settings().kernel_timeout;
        break;
    case cudaDevAttrComputeCapabilityMajor:
        *value = p.major;
        break;
    case cudaDevAttrComputeCapabilityMinor:
        *value = p.minor;
        break;
    default:
        return done(cudaErrorInvalidValue);
    }
    return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() {
    return done(simt::capturing() ? cudaErrorStreamCaptureUnsupported : simt::wait_for_all());
}
cudaError_t cudaMemGetInfo(size_t* available, size_t* total) {
    *total = simt::settings().device_bytes;
    *available = *total - std::min(*total, simt::allocated(simt::Memory::device));
    return cudaSuccess;
}

static cudaError_t allocate(void** pointer, size_t bytes, simt::Memory memory, size_t limit) {
    *pointer = nullptr;
    if (simt::capturing()) return done(cudaErrorStreamCaptureUnsupported);
    if (bytes == 0) return cudaSuccess;
    *pointer = simt::allocate(bytes, memory, limit);
    return done(*pointer ? cudaSuccess : cudaErrorMemoryAllocation);
}
cudaError_t cudaMalloc(void** pointer, size_t bytes) {
    return allocate(pointer, bytes, simt::Memory::device, simt::settings().device_bytes);
}
static cudaError_t release(void* pointer) {
    return done(simt::release(pointer) ? cudaSuccess : cudaErrorInvalidDevicePointer);
}
// It waits for everything that might use the memory, as the programming guide says.
cudaError_t cudaFree(void* pointer) {
    if (!pointer) return cudaSuccess;
    if (cudaError_t status = simt::wait_for_all()) return done(status);
    return release(pointer);
}
// Kernels may read pinned and managed memory, so it lies in the same heap.
cudaError_t cudaMallocManaged(void** pointer, size_t bytes, unsigned) {
    return allocate(pointer, bytes, simt::Memory::managed, simt::settings().device_bytes);
}
cudaError_t cudaMallocHost(void** pointer, size_t bytes) {
    return allocate(pointer, bytes, simt::Memory::pinned, simt::settings().pinned_bytes);
}
cudaError_t cudaHostAlloc(void** pointer, size_t bytes, unsigned) { return cudaMallocHost(pointer, bytes); }
// Nothing promises that it waits.
cudaError_t cudaFreeHost(void* pointer, SimtPlace place) {
    if (!pointer) return cudaSuccess;
    simt::host_releases(pointer, "cudaFreeHost", place);
    return release(pointer);
}
cudaError_t cudaHostRegister(void* pointer, size_t bytes, unsigned) {
    if (!pointer || !bytes) return done(cudaErrorInvalidValue);
    return done(simt::register_host(pointer, bytes, simt::settings().pinned_bytes) ? cudaSuccess
                                                                                   : cudaErrorMemoryAllocation);
}
cudaError_t cudaHostUnregister(void* pointer, SimtPlace place) {
    simt::host_releases(pointer, "cudaHostUnregister", place);
    return done(simt::unregister_host(pointer) ? cudaSuccess : cudaErrorInvalidValue);
}

// Whether the device side of a copy is one allocation that holds all of it.
static bool on_device(const void* p, size_t bytes) {
    simt::HeapAnswer answer = simt::look_up(reinterpret_cast<uintptr_t>(p));
    return answer.state == simt::HeapState::inside && answer.end - reinterpret_cast<uintptr_t>(p) >= bytes;
}
// What the runtime does not know is the host's, and pageable.
static bool on_host(const void* p) {
    return simt::look_up(reinterpret_cast<uintptr_t>(p)).state == simt::HeapState::foreign;
}
static bool only_on_device(const void* p) {
    return simt::look_up(reinterpret_cast<uintptr_t>(p)).memory == simt::Memory::device && !on_host(p);
}

static bool can_copy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
    if (kind == cudaMemcpyDefault)
        return (on_host(to) || on_device(to, bytes)) && (on_host(from) || on_device(from, bytes));
    bool to_device = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
    bool from_device = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
    return (!to_device || on_device(to, bytes)) && (!from_device || on_device(from, bytes));
}

// In the order of the stream, and never from memory that the caller may change: what comes from pageable memory is
// taken now.
static cudaError_t give_copy(const char* what, void* to, const void* from, size_t bytes, cudaStream_t stream,
                             SimtPlace place) {
    auto touches = std::make_shared<simt::Touched>();
    touches->add_range(from, bytes, false);
    touches->add_range(to, bytes, true);
    std::shared_ptr<char[]> taken;
    if (on_host(from)) {
        taken = std::make_shared_for_overwrite<char[]>(bytes);
        memcpy(taken.get(), from, bytes);
    }
    auto copy = [=](simt::Touched*) {
        memmove(to, taken ? taken.get() : from, bytes);
        return cudaSuccess;
    };
    return simt::give(stream, {what, place, nullptr, false, touches, copy});
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, SimtPlace place) {
    if (bytes == 0) return cudaSuccess;
    if (simt::capturing()) return done(cudaErrorStreamCaptureUnsupported);
    if (!can_copy(to, from, bytes, kind)) return done(cudaErrorInvalidValue);
    // From pageable memory it waits before it takes what is there, and not for the copy's end; among the device's own
    // memory it does not wait at all.
    const bool stages = on_host(from) && !on_host(to), inside = only_on_device(from) && only_on_device(to);
    if (stages)
        if (cudaError_t status = simt::wait_for(nullptr)) return done(status);
    if (cudaError_t status = give_copy("cudaMemcpy", to, from, bytes, nullptr, place)) return done(status);
    return done(stages || inside ? cudaSuccess : simt::wait_for(nullptr));
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream,
                            SimtPlace place) {
    if (bytes == 0) return cudaSuccess;
    // Host memory may be gone when the graph runs.
    if (simt::takes_part(stream) && (on_host(to) || on_host(from))) return done(cudaErrorStreamCaptureUnsupported);
    if (!can_copy(to, from, bytes, kind)) return done(cudaErrorInvalidValue);
    if (cudaError_t status = give_copy("cudaMemcpyAsync", to, from, bytes, stream, place)) return done(status);
    return done(on_host(to) ? simt::wait_for(stream) : cudaSuccess);
}

static cudaError_t fill(void* to, int value, size_t bytes) {
    // Huge and zero: whole pages are given back instead, and come again as zeros when touched.
    constexpr size_t kHuge = size_t{64} << 20, kPage = 4096;
    if (value == 0 && bytes > kHuge) {
        uintptr_t begin = reinterpret_cast<uintptr_t>(to), end = begin + bytes;
        uintptr_t first = (begin + kPage - 1) / kPage * kPage, last = end / kPage * kPage;
        memset(to, 0, first - begin);
        madvise(reinterpret_cast<void*>(first), last - first, MADV_DONTNEED);
        memset(reinterpret_cast<void*>(last), 0, end - last);
    } else
        memset(to, value, bytes);
    return cudaSuccess;
}
static cudaError_t give_fill(const char* what, void* to, int value, size_t bytes, cudaStream_t stream,
                             SimtPlace place) {
    if (bytes == 0) return cudaSuccess;
    if (!on_device(to, bytes)) return done(cudaErrorInvalidValue);
    auto touches = std::make_shared<simt::Touched>();
    touches->add_range(to, bytes, true);
    return done(simt::give(
        stream, {what, place, nullptr, false, touches, [=](simt::Touched*) { return fill(to, value, bytes); }}));
}
// Waits for its end only where the host may look.
cudaError_t cudaMemset(void* to, int value, size_t bytes, SimtPlace place) {
    if (simt::capturing()) return done(cudaErrorStreamCaptureUnsupported);
    if (cudaError_t status = give_fill("cudaMemset", to, value, bytes, nullptr, place)) return status;
    return done(only_on_device(to) ? cudaSuccess : simt::wait_for(nullptr));
}
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream, SimtPlace place) {
    return give_fill("cudaMemsetAsync", to, value, bytes, stream, place);
}

cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute attribute, int value) {
    if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize &&
        (value < 0 || static_cast<size_t>(value) > simt::settings().shared_per_block))
        return done(cudaErrorInvalidValue);
    return cudaSuccess;
}
cudaError_t cudaFuncGetName(const char** name, const void* kernel) {
    static thread_local std::string kept;
    kept = simt::function_name(kernel);
    *name = kept.c_str();
    return cudaSuccess;
}
// Without registers to count, what threads and shared memory alone allow.
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int threads, size_t shared_bytes) {
    if (threads <= 0) return done(cudaErrorInvalidValue);
    size_t by_shared = (simt::settings().shared_per_block + 1024) / (shared_bytes + 1024);
    *blocks = static_cast<int>(std::min<size_t>(2048 / threads, std::min<size_t>(by_shared, 32)));
    return cudaSuccess;
}
