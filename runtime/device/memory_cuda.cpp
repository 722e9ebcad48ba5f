#include "memory.h"

#include <algorithm>

#include "../../kernels/launch.h"

void* device_alloc(size_t bytes) {
    void* pointer = nullptr;
    cudaError_t status = cudaMalloc(&pointer, bytes);
    if (status != cudaSuccess) {
        cudaGetLastError();
        size_t available = 0, total = 0;
        cudaMemGetInfo(&available, &total);
        throw RunFailed("cannot allocate " + std::to_string(bytes) + " bytes of GPU memory (" +
                        std::to_string(available) + " of " + std::to_string(total) +
                        " are free): " + cudaGetErrorString(status));
    }
    // Nobody else waits for it: it is in the legacy default stream, and the run's streams do not block.
    check_cuda(cudaMemset(pointer, 0, bytes), "clearing GPU memory");
    check_cuda(cudaStreamSynchronize(nullptr), "clearing GPU memory");
    return pointer;
}

void device_free(void* pointer, size_t) { cudaFree(pointer); }

void release_mapped(const void*, size_t) {}

void* managed_alloc(size_t bytes) {
    void* pointer = nullptr;
    check_cuda(cudaMallocManaged(&pointer, std::max<size_t>(bytes, 1)), "allocating managed memory");
#ifndef LONGHAND_SIMT // whose memory starts out poisoned where it is small, and untouched, so zero, where it is large
    check_cuda(cudaMemset(pointer, 0, bytes), "clearing managed memory"); // which waits where the host may look
#endif
    return pointer;
}
void managed_free(void* pointer) { cudaFree(pointer); }

bool device_is_host() { return false; }

// Without a GPU the Device says so, better than could be said here. What is in use at the start of a run is its own
// context and what other processes hold; the call does not tell them apart, but a context alone is smaller than this.
size_t available_bytes(int64_t) {
    constexpr size_t kContext = size_t(1) << 30;
    size_t available = 0, total = 0;
    if (cudaMemGetInfo(&available, &total) == cudaSuccess) return total - available <= kContext ? total : available;
    cudaGetLastError();
    return 0;
}

size_t peak_resident_bytes() {
    size_t available = 0, total = 0;
    check_cuda(cudaMemGetInfo(&available, &total), "asking how much GPU memory is free");
    return total - available;
}
