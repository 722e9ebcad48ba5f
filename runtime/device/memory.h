// Memory that kernels work on.
#pragma once
#include <cstddef>
#include <cstdint>

// Zeroed device memory, 256-byte aligned; throws RunFailed naming the size if the system refuses it. On the CPU pages
// are taken when first touched.
void* device_alloc(size_t bytes);
void device_free(void* pointer, size_t bytes);

// Pages of a mapped file count as the process's no longer, until they are touched again. Nothing to do on a GPU, where
// no file stands for memory.
void release_mapped(const void* pointer, size_t bytes);

// Memory that host and device both see, for tests; what a kernel wrote is there once the stream has been waited for.
// Zeroed where it is large (beyond 64 MiB), and then pages that nobody touches cost nothing.
void* managed_alloc(size_t bytes);
void managed_free(void* pointer);

// Whether kernels are the host's own functions, which may touch all of its memory: in the cpu build.
bool device_is_host();

// What a run may take of the device's memory: all of a GPU's, or what other processes have left of it; on the CPU nine
// tenths of what the system has available or the process and its group are allowed, whichever is less, for a run on so
// many threads. 0 if that cannot be said.
size_t available_bytes(int64_t threads);

// Most memory this process has had: resident on the CPU, in use of the GPU's on a GPU, in bytes.
size_t peak_resident_bytes();
