#include "memory.h"

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <string>
#include <utility>

#include <sys/mman.h>
#include <sys/resource.h>

#include "errors.h"

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

// The least limit of the process's control group and of those above it; "max" and files that are not there are none.
static size_t group_limit() {
    size_t least = SIZE_MAX;
    auto take = [&](const std::string& path) {
        size_t limit = 0;
        if (std::ifstream(path) >> limit) least = std::min(least, limit);
    };
    std::ifstream groups("/proc/self/cgroup");
    for (std::string line; std::getline(groups, line);) {
        if (line.rfind("0::", 0) != 0) continue;
        for (std::string group = line.substr(3); !group.empty(); group.resize(group.rfind('/')))
            take("/sys/fs/cgroup" + group + "/memory.max");
    }
    take("/sys/fs/cgroup/memory.max");                   // a container's own
    take("/sys/fs/cgroup/memory/memory.limit_in_bytes"); // version 1
    return least;
}

// What the process's own limits (ulimit -v and -d) leave beside what it has mapped already and what its threads will
// map: a stack, and glibc's heap of 64 MiB, most of which is never touched but counts all the same.
static size_t process_limit(int64_t threads) {
    constexpr size_t kPage = 4096, kHeap = size_t(64) << 20, kMostStack = size_t(8) << 20;
    rlimit stack{};
    getrlimit(RLIMIT_STACK, &stack);
    const size_t each = kHeap + std::min<size_t>(stack.rlim_cur, kMostStack);
    size_t size = 0, resident = 0, shared = 0, text = 0, library = 0, data = 0; // pages, as proc(5) has them
    std::ifstream("/proc/self/statm") >> size >> resident >> shared >> text >> library >> data;
    size_t least = SIZE_MAX;
    for (const auto& [kind, pages] : {std::pair(RLIMIT_AS, size), std::pair(RLIMIT_DATA, data)}) {
        rlimit limit{};
        if (getrlimit(kind, &limit) != 0 || limit.rlim_cur == RLIM_INFINITY) continue;
        const size_t taken = pages * kPage + static_cast<size_t>(threads) * each;
        least = std::min<size_t>(least, limit.rlim_cur > taken ? limit.rlim_cur - taken : 1);
    }
    return least;
}

size_t available_bytes(int64_t threads) {
    std::ifstream info("/proc/meminfo");
    size_t kilobytes = 0;
    for (std::string word; info >> word;)
        if (word == "MemAvailable:" && info >> kilobytes) break;
    const size_t least = std::min({kilobytes ? kilobytes * 1024 : SIZE_MAX, group_limit(), process_limit(threads)});
    return least == SIZE_MAX ? 0 : std::max<size_t>(least / 10 * 9, 1);
}

size_t peak_resident_bytes() {
    rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    return static_cast<size_t>(usage.ru_maxrss) * 1024;
}
