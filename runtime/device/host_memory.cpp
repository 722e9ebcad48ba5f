#include "host_memory.h"

#include <algorithm>
#include <fstream>
#include <string>
#include <utility>

#include <sys/resource.h>

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

size_t host_available_bytes(int64_t threads) {
    std::ifstream info("/proc/meminfo");
    size_t kilobytes = 0;
    for (std::string word; info >> word;)
        if (word == "MemAvailable:" && info >> kilobytes) break;
    const size_t least = std::min({kilobytes ? kilobytes * 1024 : SIZE_MAX, group_limit(), process_limit(threads)});
    return least == SIZE_MAX ? 0 : std::max<size_t>(least / 10 * 9, 1);
}
