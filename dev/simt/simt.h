// What tests say to the simulator and hear from it. Kernels never include this.
#pragma once
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "../../runtime/errors.h"
#include "include/vector_types.h"

namespace simt {

enum class FaultKind {
    deadlock,          // everybody waits
    divergent_barrier, // threads of a block at different barriers, or gone
    divergent_warp,    // lanes of a warp in different collective operations, or one that takes no part
    race,              // two threads at the same shared memory, one of them writing, with nothing that orders them
    unwritten_read,    // shared memory that nobody wrote, or whose cp.async has not been waited for
    out_of_bounds,     // outside of shared memory, of every device allocation, or in one that was freed
    misaligned,        // an access that is not at a multiple of its size
    invalid            // an operand that the instruction does not take
};
const char* fault_name(FaultKind kind);

// Thrown by launch(). what() is one line with all of it.
struct Fault : RunFailed {
    FaultKind kind;
    std::string kernel, file, text;
    int line;
    uint3 block, thread;

    Fault(FaultKind kind, std::string kernel, std::string file, int line, uint3 block, uint3 thread, std::string text);
};

// Of the process; read at every launch.
struct Settings {
    uint64_t seed;                        // of the order in which fibers and blocks run; SIMT_SEED at the start
    int threads;                          // of the machine that run blocks side by side; SIMT_THREADS, else all
    size_t shared_per_block = 227 * 1024; // the most that a launch may ask for
    int capability_major = 8;             // of the compute capability that the device claims
    size_t device_bytes;                  // what cudaMalloc gives out in all; at the start the machine's memory

    // Which blocks of a launch run, by linear index, given how many the grid has; null: all. For grids too large to
    // run.
    std::function<std::vector<uint64_t>(uint64_t)> blocks;
};
Settings& settings();

// For Settings::blocks: the first and last `each` blocks and those around each of `around` (blocks that straddle 2^31
// elements, for example).
std::function<std::vector<uint64_t>(uint64_t)> some_blocks(uint64_t each, std::vector<uint64_t> around = {});

// Puts the settings back when it goes.
class SettingsGuard {
public:
    SettingsGuard() : saved_(settings()) {}
    ~SettingsGuard() { settings() = saved_; }
    SettingsGuard(const SettingsGuard&) = delete;
    SettingsGuard& operator=(const SettingsGuard&) = delete;

private:
    Settings saved_;
};

} // namespace simt
