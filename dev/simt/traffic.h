// Inside the simulator: how much memory a worker's warps move, see Traffic in simt.h.
//
// Lanes are fibers that run one after another, so a warp's instruction comes in pieces and is put together here: the
// n-th time that each lane comes to a place of the code since the warp's lanes last met is one instruction. They meet
// at every barrier and at collectives of the whole warp, so that lanes which took different ways, or a loop a different
// number of times, are not mixed up afterwards.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "simt.h"

namespace simt {

enum class Collective : uint8_t;

enum class Move : uint8_t {
    global_read,
    global_write,
    global_atomic,
    shared_load,
    shared_store,
    shared_async,
    shared_atomic
};

// Which sectors of 32 bytes were touched: 128 bits for each 4 KiB of memory.
class SectorSet {
public:
    void insert(uint64_t sector);
    void insert(const SectorSet& other);
    uint64_t count() const;

private:
    std::unordered_map<uint64_t, std::array<uint64_t, 2>> pages_;
};

// An instruction of a warp, as far as its lanes have come to it.
struct Instruction {
    uint32_t lanes = 0;
    std::array<uint64_t, 32> address;
};

// One worker's part in a launch.
class Counter {
public:
    Traffic total;
    SectorSet read, written, atomic;

    // A lane's access; `live`: the lanes of its warp that have not returned. Shared addresses count from the start of
    // shared memory.
    void access(uint32_t warp, uint32_t lane, uint32_t live, uint64_t address, uint32_t bytes, Move move,
                const void* at);
    void tile(const uint32_t (&rows)[8]); // one 8×8 tile of an ldmatrix
    void collective(Collective kind);
    void meet(uint32_t warp); // all live lanes of the warp are here
    void finish_block();

private:
    // One place of the code, for one warp.
    struct Site {
        std::array<uint32_t, 32> times{}; // that each lane came here since the warp met
        uint32_t weighed = 0;             // instructions that were complete, and are no longer in `open`
        size_t first = 0;                 // of those that are, in `open`
        std::vector<Instruction> open;
        bool touched = false;
    };
    struct Form {
        uint32_t bytes;
        Move move;
    };
    std::unordered_map<uint64_t, uint32_t> number_; // of a form of access: code, bytes and move in one word
    std::vector<Form> forms_;
    std::array<std::vector<Site>, 32> sites_;       // of each warp, by number
    std::array<std::vector<uint32_t>, 32> touched_; // numbers, since the warp met

    void weigh(const Form& form, const Instruction& one);
    void weigh_global(GlobalTraffic& sum, SectorSet& set, const Form& form, const Instruction& one);
    void weigh_shared(SharedTraffic& sum, const Form& form, const Instruction& one);
};

// All workers' parts in a launch.
struct LaunchCount {
    std::mutex mutex;
    Traffic total;
    SectorSet read, written, atomic;

    void add(const Counter& part);
};
void record_traffic(const void* kernel, const LaunchCount& launch);

} // namespace simt
