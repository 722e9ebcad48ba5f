// What the 32 lanes of a warp do together. Each lane leaves a pointer to its operands, which lie on its own stack; the
// last to arrive works for all.
#include <cmath>
#include <cstring>

#include "../../kernels/types.h"
#include "block.h"
#include "language.h"
#undef memcpy
#undef memset

namespace simt {

template <class T> static T& operand(Warp& warp, int lane) { return *static_cast<T*>(warp.operand[lane]); }

void sync_warp(unsigned mask) { collective(Collective::sync, mask, nullptr, SIMT_CALLER, nullptr); }

struct ShuffleOperand {
    uint64_t bits, result;
    Shuffle mode;
    int argument, width;
    const void* at;
};

static void complete_shuffle(Worker& worker, Warp& warp, const Pending& pending) {
    for (int lane = 0; lane < kLanes; lane++) {
        if (!(pending.arrived >> lane & 1)) continue;
        ShuffleOperand& mine = operand<ShuffleOperand>(warp, lane);
        int first = lane / mine.width * mine.width, within = lane % mine.width, source = lane;
        switch (mine.mode) {
        case Shuffle::index:
            source = first + (mine.argument & (mine.width - 1));
            break;
        case Shuffle::up:
            source = within >= mine.argument ? lane - mine.argument : lane;
            break;
        case Shuffle::down:
            source = within + mine.argument < mine.width ? lane + mine.argument : lane;
            break;
        // Past the end of its segment a lane keeps its own value.
        case Shuffle::exclusive_or:
            source = (lane ^ mine.argument) < first + mine.width ? lane ^ mine.argument : lane;
        }
        if (!(pending.arrived >> source & 1))
            worker.raise(FaultKind::divergent_warp, mine.at,
                         text("lane %d reads from lane %d, which takes no part in this shuffle", lane, source));
        if (operand<ShuffleOperand>(warp, source).mode != mine.mode)
            worker.raise(FaultKind::divergent_warp, mine.at,
                         text("lanes %d and %d are in shuffles of different kinds", lane, source));
        mine.result = operand<ShuffleOperand>(warp, source).bits;
    }
}

uint64_t shuffle(unsigned mask, uint64_t bits, Shuffle mode, int argument, int width) {
    const void* at = SIMT_CALLER;
    Inside inside(*running_worker);
    if (width < 1 || width > 32 || (width & (width - 1)))
        running_worker->raise(FaultKind::invalid, at,
                              text("shuffle of width %d: must be a power of two up to 32", width));
    ShuffleOperand mine{bits, 0, mode, argument, width, at};
    collective(Collective::shuffle, mask, &mine, at, complete_shuffle);
    return mine.result;
}

struct BallotOperand {
    bool vote;
    unsigned result;
};

unsigned ballot(unsigned mask, bool vote) {
    BallotOperand mine{vote, 0};
    collective(Collective::ballot, mask, &mine, SIMT_CALLER, [](Worker&, Warp& warp, const Pending& pending) {
        unsigned all = 0;
        for (int lane = 0; lane < kLanes; lane++)
            if (pending.arrived >> lane & 1)
                all |= static_cast<unsigned>(operand<BallotOperand>(warp, lane).vote) << lane;
        for (int lane = 0; lane < kLanes; lane++)
            if (pending.arrived >> lane & 1) operand<BallotOperand>(warp, lane).result = all;
    });
    return mine.result;
}

struct ReduceOperand {
    uint32_t value;
    Reduction how;
    bool is_signed;
};

static uint32_t combine(uint32_t a, uint32_t b, Reduction how, bool is_signed) {
    bool less = is_signed ? static_cast<int32_t>(a) < static_cast<int32_t>(b) : a < b;
    switch (how) {
    case Reduction::add:
        return a + b;
    case Reduction::min:
        return less ? a : b;
    case Reduction::max:
        return less ? b : a;
    case Reduction::bit_and:
        return a & b;
    case Reduction::bit_or:
        return a | b;
    case Reduction::bit_xor:
        return a ^ b;
    }
    return 0;
}

uint32_t reduce(unsigned mask, uint32_t value, Reduction how, bool is_signed) {
    ReduceOperand mine{value, how, is_signed};
    collective(Collective::reduce, mask, &mine, SIMT_CALLER, [](Worker&, Warp& warp, const Pending& pending) {
        uint32_t all = 0;
        bool first = true;
        for (int lane = 0; lane < kLanes; lane++) {
            if (!(pending.arrived >> lane & 1)) continue;
            const ReduceOperand& one = operand<ReduceOperand>(warp, lane);
            all = first ? one.value : combine(all, one.value, one.how, one.is_signed);
            first = false;
        }
        for (int lane = 0; lane < kLanes; lane++)
            if (pending.arrived >> lane & 1) operand<ReduceOperand>(warp, lane).value = all;
    });
    return mine.value;
}

// ---- Matrices ----
static void need_whole_warp(Worker& worker, const Pending& pending) {
    if (pending.arrived != 0xffffffffu)
        worker.raise(
            FaultKind::divergent_warp, pending.at,
            text("%s needs all 32 lanes, but only %08x are there", collective_name(pending.kind), pending.arrived));
}

struct LdmatrixOperand {
    uint32_t* registers;
    int tiles;
    bool transposed;
    uint32_t address;
    const void* at;
};

static void complete_ldmatrix(Worker& worker, Warp& warp, const Pending& pending) {
    need_whole_warp(worker, pending);
    const LdmatrixOperand& any = operand<LdmatrixOperand>(warp, 0);
    for (int tile = 0; tile < any.tiles; tile++) {
        uint16_t values[8][8]; // [row][column]
        uint32_t addresses[8];
        for (int row = 0; row < 8; row++) {
            uint32_t address = operand<LdmatrixOperand>(warp, tile * 8 + row).address;
            memcpy(values[row], reinterpret_cast<const void*>(worker.shared + (address - kSharedWindow)), 16);
            addresses[row] = address;
        }
        if (worker.counter) worker.counter->tile(addresses);
        for (int lane = 0; lane < kLanes; lane++) {
            int group = lane / 4, pair = lane % 4;
            uint32_t low = any.transposed ? values[2 * pair][group] : values[group][2 * pair];
            uint32_t high = any.transposed ? values[2 * pair + 1][group] : values[group][2 * pair + 1];
            operand<LdmatrixOperand>(warp, lane).registers[tile] = low | high << 16;
        }
    }
}

void ldmatrix(uint32_t* registers, int tiles, bool transposed, uint32_t address) {
    const void* at = SIMT_CALLER;
    Worker& worker = *running_worker;
    Inside inside(worker);
    // Each row is read in the name of the lane that gives its address.
    if (static_cast<int>(worker.current->lane) < tiles * 8) {
        if (address % 16)
            worker.raise(
                FaultKind::misaligned, at,
                text("a row of ldmatrix at byte %d of shared memory", static_cast<int>(address - kSharedWindow)));
        check_access(worker, worker.shared + static_cast<int32_t>(address - kSharedWindow), 16, Access::read, true, at);
    }
    LdmatrixOperand mine{registers, tiles, transposed, address, at};
    collective(Collective::ldmatrix, 0xffffffffu, &mine, at, complete_ldmatrix);
}

struct MmaOperand {
    float* c;
    const uint32_t* a;
    uint32_t b[2];
};

static float bf16_low(uint32_t r) { return to_float(bf16{static_cast<uint16_t>(r)}); }
static float bf16_high(uint32_t r) { return to_float(bf16{static_cast<uint16_t>(r >> 16)}); }

static void complete_mma(Worker& worker, Warp& warp, const Pending& pending) {
    need_whole_warp(worker, pending);
    // A row of b or c as one vector: this is where attention spends its time here.
    typedef float Row __attribute__((vector_size(32)));
    float a[16][16];
    Row b[16], c[16];
    for (int lane = 0; lane < kLanes; lane++) {
        const MmaOperand& mine = operand<MmaOperand>(warp, lane);
        int group = lane / 4, pair = lane % 4;
        for (int i = 0; i < 4; i++) {
            int row = group + i % 2 * 8, column = 2 * pair + i / 2 * 8;
            a[row][column] = bf16_low(mine.a[i]), a[row][column + 1] = bf16_high(mine.a[i]);
        }
        for (int i = 0; i < 2; i++) {
            int row = 2 * pair + i * 8;
            b[row][group] = bf16_low(mine.b[i]), b[row + 1][group] = bf16_high(mine.b[i]);
        }
        for (int i = 0; i < 4; i++) c[group + i / 2 * 8][2 * pair + i % 2] = mine.c[i];
    }
    for (int row = 0; row < 16; row++) {
        Row sum = c[row];
        for (int k = 0; k < 16; k++) sum += a[row][k] * b[k];
        c[row] = sum;
    }
    for (int lane = 0; lane < kLanes; lane++) {
        int group = lane / 4, pair = lane % 4;
        for (int i = 0; i < 4; i++) operand<MmaOperand>(warp, lane).c[i] = c[group + i / 2 * 8][2 * pair + i % 2];
    }
}

void mma_m16n8k16(float* c, const uint32_t* a, uint32_t b0, uint32_t b1) {
    MmaOperand mine{c, a, {b0, b1}};
    collective(Collective::mma, 0xffffffffu, &mine, SIMT_CALLER, complete_mma);
}

// ---- Approximations ----
// As wrong as the instruction may be, in turns up and down, so that nobody leans on more.
static float perturbed(float x, float relative) {
    uint32_t bits = __builtin_bit_cast(uint32_t, x);
    return x * (1 + (__builtin_popcount(bits) & 1 ? relative : -relative));
}

static float flushed(float x) { return std::fabs(x) < 1.17549435e-38f ? std::copysign(0.0f, x) : x; }

static void count(uint64_t Traffic::*results) {
    if (Worker* worker = running_worker; worker && worker->counter) worker->counter->total.*results += 1;
}

float exp2_approx(float x) {
    count(&Traffic::exp2);
    return flushed(x) == 0 ? 1.0f : flushed(perturbed(std::exp2(x), 0x1p-22f));
}
float log2_approx(float x) {
    count(&Traffic::log2);
    return perturbed(std::log2(flushed(x)), 0x1p-22f);
}
float tanh_approx(float x) {
    count(&Traffic::tanh);
    float y = perturbed(std::tanh(x), 0x1p-11f);
    return y > 1 ? 1.0f : y < -1 ? -1.0f : y;
}

} // namespace simt
