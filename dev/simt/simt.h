// What tests say to the simulator and hear from it. Kernels never include this. Builds without the simulator have
// what they call of it from without_simulator.cpp, so that a test is compiled once for all builds of
// a precision.
#pragma once
#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "../../runtime/base/errors.h"
#include "include/vector_types.h"

namespace simt {

extern const bool kPresent; // set before anything is initialised

enum class FaultKind {
    deadlock,          // everybody waits
    divergent_barrier, // threads of a block at different barriers, or gone
    divergent_warp,    // lanes of a warp in different collective operations, or one that takes no part
    race,              // two threads at the same shared memory, one of them writing, with nothing that orders them
    unwritten_read,    // shared memory that nobody wrote, or whose cp.async has not been waited for
    out_of_bounds,     // outside of shared memory, of every device allocation, or in one that was freed
    misaligned,        // an access that is not at a multiple of its size
    invalid,           // an operand that the instruction does not take
    unordered,         // two operations in streams, or of the host, at the same memory, with nothing that orders them
    mismatch           // ranks that call different things of NCCL
};
const char* fault_name(FaultKind kind);

// Thrown by launch() and by whatever else lets work run. what() is one line with all of it.
struct Fault : RunFailed {
    FaultKind kind;
    std::string kernel, file, text;
    int line = 0;
    uint3 block{}, thread{}; // not of unordered operations

    Fault(FaultKind kind, std::string kernel, std::string file, int line, uint3 block, uint3 thread, std::string text);
    Fault(FaultKind kind, std::string text);
};

// Of the process; read at every launch.
struct Settings {
    uint64_t seed;                        // of the order in which fibers and blocks run; SIMT_SEED at the start
    int threads;                          // of the machine that run blocks side by side; SIMT_THREADS, else all
    size_t shared_per_block = 227 * 1024; // the most that a launch may ask for
    int capability_major = 8;             // of the compute capability that the device claims
    bool kernel_timeout = false;          // the device claims to end kernels that take long, as with a display
    size_t device_bytes;                  // what cudaMalloc gives out in all; at the start the machine's memory
    size_t pinned_bytes;                  // cudaMallocHost and cudaHostRegister, likewise

    // Which blocks of a launch run, by linear index, given how many the grid has; null: all. For grids too large to
    // run.
    std::function<std::vector<uint64_t>(uint64_t)> blocks;

    // Of cuBLASLt: products with an epilogue are refused when they are to run, though a kernel was found for them.
    bool refuse_epilogues = false;

    bool count; // traffic, below; at the start whether SIMT_PROFILE names a file
};
Settings& settings();

// For Settings::blocks: the first and last `each` blocks and those around each of `around` (blocks that straddle 2^31
// elements, for example).
std::function<std::vector<uint64_t>(uint64_t)> some_blocks(uint64_t each, std::vector<uint64_t> around = {});

// ---- Traffic ----
//
// What kernels asked of memory and of the special units while Settings::count was on. "Instruction" is one instruction
// of one warp: the accesses of its lanes at one place of the code, taken together as the hardware takes them. Counted
// are the functions of kernels/device.h and kernels/ptx.h; plain C++ accesses are only numbered.

// Global memory, which moves in sectors of 32 bytes.
struct GlobalTraffic {
    uint64_t instructions = 0;
    uint64_t bytes = 0;   // as the lanes asked
    uint64_t sectors = 0; // distinct in each instruction
    uint64_t unique = 0;  // distinct in each launch: what a perfect cache would leave
};

// Shared memory: 32 banks of 4 bytes, each of which serves one word in a wavefront. An access of 4 bytes or less should
// take one wavefront, of 8 bytes one for each half of the warp, of 16 bytes one for each quarter, ldmatrix one for each
// 8×8 tile. Lanes that read the same word share it.
struct SharedTraffic {
    uint64_t instructions = 0, bytes = 0, wavefronts = 0;
    uint64_t conflicts = 0; // wavefronts beyond those
};

struct Traffic {
    uint64_t launches = 0, blocks = 0;
    GlobalTraffic read, written;
    GlobalTraffic atomic; // reductions too; each reads and writes
    SharedTraffic load, store;
    SharedTraffic async;    // cp.async: what it writes; what it reads is in `read`
    SharedTraffic matrix;   // ldmatrix
    SharedTraffic exchange; // atomics, where lanes at the same word take turns
    uint64_t mma = 0;       // instructions m16n8k16
    uint64_t shuffles = 0, votes = 0, reductions = 0, warp_syncs = 0; // instructions
    uint64_t barriers = 0;                                            // arrivals of warps, __syncthreads and named ones
    uint64_t exp2 = 0, log2 = 0, tanh = 0;       // of ptx.h, results: 32 in a full warp's instruction
    uint64_t plain_global = 0, plain_shared = 0; // accesses of single lanes in plain C++, in no other figure

    double flops() const { return 4096.0 * mma; }
    SharedTraffic shared() const; // the five together
};
Traffic operator+(Traffic a, const Traffic& b);

// By kernel, "gelu.cu forward<(Gelu)1, 8>", since the last reset. Launches that ended in a fault are left out; of
// launches that ran some blocks (Settings::blocks) those count.
std::map<std::string, Traffic> traffic();
Traffic traffic_of(const std::string& part); // the sum over kernels whose name contains `part`
void reset_traffic();
std::string traffic_table(); // of traffic(); SIMT_PROFILE names a file for that of the whole process, at its end

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
