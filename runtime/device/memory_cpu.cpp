#include "memory.h"

#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>

#include <sys/mman.h>
#include <sys/resource.h>

#include "../base/errors.h"
#include "host_memory.h"

void* device_alloc(size_t bytes) {
    void* pointer = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pointer == MAP_FAILED)
        throw RunFailed("cannot allocate " + std::to_string(bytes) + " bytes of memory: " + strerror(errno) +
                        "; a limit of this process (ulimit -v, -d) or of the system refuses it");
    // Without huge pages a step spends several percent of its time in TLB misses.
    madvise(pointer, bytes, MADV_HUGEPAGE);
    return pointer;
}

void device_free(void* pointer, size_t bytes) { munmap(pointer, bytes); }

void release_mapped(const void* pointer, size_t bytes) {
    constexpr uintptr_t kPage = 4096;
    const uintptr_t begin = reinterpret_cast<uintptr_t>(pointer) / kPage * kPage;
    madvise(reinterpret_cast<void*>(begin), reinterpret_cast<uintptr_t>(pointer) + bytes - begin, MADV_DONTNEED);
}

void* managed_alloc(size_t bytes) {
    void* pointer = calloc(bytes, 1);
    if (!pointer) throw RunFailed("cannot allocate " + std::to_string(bytes) + " bytes of memory");
    return pointer;
}
void managed_free(void* pointer) { free(pointer); }

bool device_is_host() { return true; }

size_t available_bytes(int64_t threads) { return host_available_bytes(threads); }

size_t peak_resident_bytes() {
    rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    return static_cast<size_t>(usage.ru_maxrss) * 1024;
}
