// Races on shared memory, found by dev/simt in random programs exactly where two accesses meet that nothing orders.
#include <doctest/doctest.h>

#include <string>
#include <vector>

#include "../dev/simt/simt.h"
#include "../kernels/device.h"
#include "../kernels/launch.h"
#include "../runtime/base/random.h"
#include "simt_buffer.h"

namespace {

// Three lanes of each warp do all: the same ones meet often.
constexpr int kThreads = 96, kWarp = 32, kLanesUsed = 3, kUnits = 6, kBytes = kUnits * 16, kPhases = 5, kOps = 3;

struct Op {
    bool write;
    uint8_t offset, bytes; // bytes: 0, 1, 2, 4, 8, 12 or 16
};

// kOps accesses of each thread with turns between, then a barrier of the block or of each warp; that kPhases times.
struct Program {
    Op ops[kPhases][kThreads][kOps];
    bool whole[kPhases];
};

} // namespace

// volatile: else the compiler reads no more than is used.
template <class T> __device__ static void touch(char* p, bool write, uint32_t* seen) {
    volatile T* at = reinterpret_cast<T*>(p);
    if (write)
        *at = 0;
    else
        *seen += static_cast<uint32_t>(*at);
}

__device__ static void touch_vector(char* p, bool write, uint32_t* seen) {
    float* at = reinterpret_cast<float*>(p);
    if (write)
        store128_shared(at, Pack128<float>{});
    else
        *seen += static_cast<uint32_t>(load128_shared(at)[0]);
}

// At any multiple of 4 bytes.
__device__ static void touch_three(char* p, bool write, uint32_t* seen) {
    uint32_t words[3] = {};
    memcpy(write ? p : reinterpret_cast<char*>(words), write ? reinterpret_cast<char*>(words) : p, sizeof words);
    *seen += words[2];
}

__global__ void run_program(const Program* program, uint32_t* out) {
    char* shared = reinterpret_cast<char*>(dynamic_shared());
    uint32_t seen = 0;
    if (threadIdx.x < kBytes / 4) reinterpret_cast<uint32_t*>(shared)[threadIdx.x] = 0;
    __syncthreads();
    for (int phase = 0; phase < kPhases; phase++) {
        for (int i = 0; i < kOps; i++) {
            Op op = program->ops[phase][threadIdx.x][i];
            char* p = shared + op.offset;
            if (op.bytes == 1) touch<uint8_t>(p, op.write, &seen);
            if (op.bytes == 2) touch<uint16_t>(p, op.write, &seen);
            if (op.bytes == 4) touch<uint32_t>(p, op.write, &seen);
            if (op.bytes == 8) touch<uint64_t>(p, op.write, &seen);
            if (op.bytes == 12) touch_three(p, op.write, &seen);
            if (op.bytes == 16) touch_vector(p, op.write, &seen);
            seen += __ballot_sync(kFullWarp, op.write); // others' turn, and nothing ordered
        }
        if (program->whole[phase])
            __syncthreads();
        else
            __syncwarp();
    }
    out[threadIdx.x] = seen;
}

namespace {

struct Random {
    uint64_t seed, count = 0;
    int below(int n) { return static_cast<int>(random_uniform(seed, 0, count++) * n); }
};

Op random_op(Random& random, int unit, bool write) {
    int bytes = 1 << random.below(5);
    return {write, static_cast<uint8_t>(unit * 16 + random.below(16 / bytes) * bytes), static_cast<uint8_t>(bytes)};
}

int any_thread(Random& random) { return random.below(kThreads / kWarp) * kWarp + random.below(kLanesUsed); }

// Between two barriers of the block each 16 bytes are read by all, or belong to one warp, of which in each phase one
// lane may write or all may read. Then perhaps one access that keeps to nothing.
void draw(Program& program, Random& random) {
    program = {};
    int owner[kUnits];
    for (int phase = 0; phase < kPhases; phase++) {
        program.whole[phase] = random.below(2);
        bool begins = phase == 0 || program.whole[phase - 1];
        for (int unit = 0; unit < kUnits; unit++) {
            if (begins) owner[unit] = random.below(kThreads / kWarp + 2); // a warp, or nobody
            bool owned = owner[unit] < kThreads / kWarp, writes = owned && random.below(2);
            int first = owned ? owner[unit] * kWarp : 0, writer = first + random.below(kLanesUsed);
            for (int tries = 0; tries < 6; tries++) {
                int thread = writes ? writer : owned ? first + random.below(kLanesUsed) : any_thread(random);
                Op& op = program.ops[phase][thread][random.below(kOps)];
                if (op.bytes == 0) op = random_op(random, unit, writes && random.below(2));
            }
        }
    }
    if (random.below(2)) {
        Op& op = program.ops[random.below(kPhases)][any_thread(random)][random.below(kOps)];
        op = random_op(random, random.below(kUnits), random.below(2));
        if (random.below(4) == 0) op = {op.write, static_cast<uint8_t>(random.below(kBytes / 4 - 2) * 4), 12};
    }
}

bool overlap(const Op& a, const Op& b) { return a.offset < b.offset + b.bytes && b.offset < a.offset + a.bytes; }

bool has_race(const Program& program) {
    struct Access {
        Op op;
        int phase, thread;
    };
    std::vector<Access> all;
    for (int phase = 0; phase < kPhases; phase++)
        for (int thread = 0; thread < kThreads; thread++)
            for (const Op& op : program.ops[phase][thread])
                if (op.bytes) all.push_back({op, phase, thread});
    for (const Access& a : all)
        for (const Access& b : all) {
            if (a.thread == b.thread || a.phase > b.phase || !(a.op.write || b.op.write) || !overlap(a.op, b.op))
                continue;
            bool ordered = a.phase < b.phase && a.thread / kWarp == b.thread / kWarp;
            for (int phase = a.phase; phase < b.phase; phase++) ordered |= program.whole[phase];
            if (!ordered) return true;
        }
    return false;
}

} // namespace

TEST_CASE("a race is told in random programs if there is one, and only then") {
    simt::SettingsGuard guard;
    std::vector<Program> program(1);
    Buffer<Program> given(program);
    Buffer<uint32_t> out(kThreads);
    int programs = 6000, races = 0;
    for (int i = 0; i < programs; i++) {
        CAPTURE(i);
        Random random{static_cast<uint64_t>(i)};
        draw(program[0], random);
        check_cuda(cudaMemcpy(given.data, program.data(), sizeof(Program), cudaMemcpyHostToDevice), "filling");
        simt::settings().seed = static_cast<uint64_t>(i);
        std::string told;
        try {
            launch(run_program, 1, kThreads, kBytes, nullptr, given.data, out.data);
        } catch (const simt::Fault& fault) {
            told = fault.what();
            CHECK(fault.kind == simt::FaultKind::race);
        }
        CAPTURE(told);
        bool race = has_race(program[0]);
        races += race;
        CHECK(race == !told.empty());
    }
    CHECK(races > programs / 5);
    CHECK(races < programs * 4 / 5);
}
