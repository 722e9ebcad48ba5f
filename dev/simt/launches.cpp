// Which kernels were launched with how many threads and how much shared memory: the facts that an occupancy needs and
// the assembler does not know. One line for each that is new to this process goes to the file that SIMT_LAUNCHES names.
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <set>
#include <string>
#include <tuple>

#include "block.h"

namespace simt {

void note_launch(const void* kernel, uint64_t threads, size_t shared_bytes) {
    const char* path = getenv("SIMT_LAUNCHES");
    if (!path) return;
    static std::mutex mutex;
    static std::set<std::tuple<const void*, uint64_t, size_t>> known;
    std::lock_guard lock(mutex);
    if (!known.insert({kernel, threads, shared_bytes}).second) return;
    std::string line = std::to_string(threads) + "\t" + std::to_string(shared_bytes) + "\t" +
                       find_place(static_cast<const char*>(kernel) + 1).file + "\t" + function_name(kernel) + "\n";
    // Several test programs may write at once: a line goes out in one piece.
    if (FILE* file = fopen(path, "a")) {
        setvbuf(file, nullptr, _IOFBF, line.size() + 1);
        fwrite(line.data(), 1, line.size(), file);
        fclose(file);
    }
}

} // namespace simt
