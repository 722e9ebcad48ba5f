// Inside the simulator: one block under way on one thread of the machine.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "fiber.h"
#include "include/vector_types.h"
#include "simt.h"
#include "touched.h"
#include "traffic.h"

namespace simt {

constexpr int kMaxThreads = 1024, kLanes = 32, kMaxWarps = kMaxThreads / kLanes, kBarriers = 16;

// Instrumented kernels with large fragments take a few KiB; printf in a kernel more. Untouched pages cost nothing. An
// odd number of pages: a power of two would put all stacks into the same few sets of the L2 cache and of the TLB.
constexpr size_t kStackBytes = 17 * 4096;
constexpr size_t kGuardBytes = 4096;
constexpr size_t kRedZoneBytes = 64 * 1024;
constexpr size_t kSharedBytes = 256 * 1024; // the largest block of shared memory that any card has, rounded up
constexpr uint32_t kSharedWindow = 1024;    // shared_address() of the first byte: null stays an invalid address

// An access is stamped with the thread that made it and its warp's time, which advances at every synchronisation.
using Stamp = uint32_t; // thread << 22 | time; 0: nobody
constexpr int kTimeBits = 22;
constexpr uint32_t kTimeMask = (1u << kTimeBits) - 1;

enum class State : uint8_t { ready, at_barrier, in_warp, done };

struct AsyncCopy {
    uint32_t offset, bytes, from; // from: bytes to copy, the rest is zeros
    const void* source;
    uint64_t group;
    const void* at;
};

struct Thread {
    Context context = nullptr;
    uint32_t linear = 0, warp = 0, lane = 0;
    uint3 index{};
    State state = State::done;
    int barrier = 0;
    const void* waits_at = nullptr; // code
    uint64_t groups = 0;            // of cp.async, committed
    std::vector<AsyncCopy> copies;
};

enum class Collective : uint8_t { sync, shuffle, ballot, reduce, ldmatrix, mma };
const char* collective_name(Collective kind);

// A collective operation under way: each lane's operands lie on its own stack until all have arrived.
struct Pending {
    uint32_t mask = 0, arrived = 0;
    Collective kind = Collective::sync;
    const void* at = nullptr; // where the first lane arrived
    void (*complete)(struct Worker&, struct Warp&, const Pending&) = nullptr;
};

struct Warp {
    uint32_t live = 0;                       // lanes that have not returned
    uint32_t time = 1;                       // of accesses made now
    uint32_t floor = 0;                      // every lane knows every lane's accesses up to here
    bool partial = false;                    // known_lanes says more than floor
    std::array<uint32_t, kMaxWarps> known{}; // up to which time of each other warp this one is behind a barrier
    std::array<std::array<uint32_t, kLanes>, kLanes> known_lanes{};
    std::vector<Pending> pending;
    std::array<void*, kLanes> operand{};
};

struct Barrier {
    uint32_t expected = 0, arrived = 0;      // threads
    std::array<uint32_t, kMaxWarps> lanes{}; // who arrived
    std::array<uint32_t, kMaxWarps> waits{}; // who of them waits
    std::array<uint32_t, kMaxWarps> time{};  // up to which the warp's accesses lie before its arrival
    std::array<const void*, kMaxWarps> at{}; // where the warp's first lane arrived
    const void* first_at = nullptr;
};

struct Report {
    bool raised = false;
    FaultKind kind = FaultKind::invalid;
    const void* at = nullptr;
    uint3 block{}, thread{};
    std::string text;
};

struct Grid {
    const void* kernel = nullptr;
    dim3 grid, block;
    size_t shared_bytes = 0;
    void (*entry)(const void*) = nullptr;
    const char* parameters = nullptr;
    size_t parameter_bytes = 0;
    uint64_t seed = 0;
};

struct Worker {
    // First what every access looks at.
    uintptr_t stacks = 0, stacks_bytes = 0;
    uintptr_t arena = 0, arena_bytes = 0; // red zone, shared memory, red zone
    uintptr_t shared = 0;
    uintptr_t allocation_begin = 0, allocation_end = 0; // the device allocation met last
    Thread* current = nullptr;
    uint32_t generation = 0;
    bool running = false;
    bool inside = false;                             // the simulator's own code is at work: hooks let its accesses pass
    std::unique_ptr<Counter> counter;                // null unless traffic is counted
    Touched* touched = nullptr;                      // of the kernel; null if nobody wants to know
    struct Cells *words = nullptr, *bytes = nullptr; // cells.h
    struct Places *word_places = nullptr, *byte_places = nullptr;

    const Grid* grid = nullptr;
    uint3 block{};
    uint32_t thread_count = 0, warp_count = 0, done_count = 0;
    uint64_t random = 0;
    Context scheduler = nullptr;
    std::vector<uint16_t> ready;
    std::vector<Thread> threads;
    std::vector<Warp> warps;
    std::array<Barrier, kBarriers> barriers{};
    Report report;

    Worker();
    ~Worker();
    Worker(const Worker&) = delete;
    Worker& operator=(const Worker&) = delete;

    void run_block(const Grid& grid, uint64_t block);
    void make_ready(Thread& thread);
    void pick_next(); // leaves the current fiber for a ready one
    void finish_thread();
    // Ends the block with a fault; the fibers are left as they stand.
    [[noreturn]] void raise(FaultKind kind, const void* at, std::string text);
    void note(FaultKind kind, const Thread& thread, const void* at, std::string text);
    // What the lanes of mask did until now is known to each of them.
    void order_lanes(Warp& warp, uint32_t mask);
    void advance(Warp& warp);
    void finish_collective(Warp& warp, Pending pending);
    void release(Barrier& barrier);
    void explain_stuck();
};

// The worker of this thread of the machine while it runs a block, else null.
extern constinit thread_local Worker* running_worker;

// Held by whatever a kernel calls. The simulator is not instrumented, but the linker may give it a kernel's
// instrumented copy of a standard template. Fibers change only inside, so the saved value stays right across a change.
class Inside {
public:
    explicit Inside(Worker& worker) : worker_(worker), before_(worker.inside) { worker.inside = true; }
    ~Inside() { worker_.inside = before_; }
    Inside(const Inside&) = delete;
    Inside& operator=(const Inside&) = delete;

private:
    Worker& worker_;
    bool before_;
};

enum class Access { read, write, atomic };
// Reports what is wrong with an access of the current fiber.
void check_access(Worker& worker, uintptr_t address, size_t bytes, Access access, bool aligned, const void* at);

// Notes an access of the current fiber, if its worker counts.
void count_access(Worker& worker, uintptr_t address, size_t bytes, Move move, const void* at);
void count_plain(Worker& worker, uintptr_t address);
bool is_kernel_data(const Worker& worker, uintptr_t address, uintptr_t last); // parameters and the program's constants

// The current fiber's part in a collective of its warp; returns when all lanes of mask have taken theirs. `complete`
// runs once, when the last has arrived, and may read and write every lane's operand.
void collective(Collective kind, unsigned mask, void* operand, const void* at,
                void (*complete)(Worker&, Warp&, const Pending&));

struct Place {
    std::string function, file;
    int line = 0;
};
// The source line of a return address; in inlined code the outermost-but-known kernel line (device headers are
// skipped).
Place find_place(const void* return_address);
std::string function_name(const void* function);
std::string place_text(const void* return_address); // "layernorm.cu:42"
uint32_t code_offset(const void* code);
const void* code_at(uint32_t offset);

// Where this call will return to, in the kernel's code.
#define SIMT_CALLER __builtin_extract_return_addr(__builtin_return_address(0))

std::string text(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Device memory, managed memory, and the pinned memory of the host, which kernels may touch too (heap.cpp). `limit` is
// for all of a kind; managed memory is of the device's.
enum class Memory { device, managed, pinned };
void* allocate(size_t bytes, Memory memory, size_t limit); // null beyond it
bool release(void* pointer);
bool register_host(void* pointer, size_t bytes, size_t limit); // the host's own memory, now pinned; false beyond it
bool unregister_host(void* pointer);
size_t allocated(Memory memory);

void note_launch(const void* kernel, uint64_t threads, size_t shared_bytes);
enum class HeapState { foreign, inside, outside, freed };
struct HeapAnswer {
    HeapState state;
    uintptr_t begin, end; // of the allocation in whose slot the address lies
    Memory memory;
};
HeapAnswer look_up(uintptr_t address);

} // namespace simt
