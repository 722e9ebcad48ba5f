// The optimizer's step on the GPU: one pass, bound by memory. Two kernels, one for states of one number each and one
// for 8-bit codes, whose blocks of 256 elements are a warp's work.
//
// In both a lane takes quads of neighbours, a warp's or block's width apart, so that each access of a warp is a run of
// whole sectors (eight neighbours a lane would write each sector in two halves).
#include "optimizer.h"

#include <cmath>
#include <type_traits>

#include "device.h"
#include "launch.h"
#include "optimizer_codes.h"

namespace {

constexpr int kQuads = 2; // of a lane at a time: its loads, up to 128 bytes, are all under way at once

struct Arrays {
    real* params;               // (n)
    float* master;              // (n) or null
    void *m, *v;                // (n) each
    float *m_absmax, *v_absmax; // (ceil(n / 256)); 8-bit only
    const void* grads;          // (n)
    bool bf16_grads;
    const float* scale;      // (1)
    OptimizerCounts* counts; // (1) or null
    int64_t n;
    bool aligned; // every array starts at a multiple of 16 bytes
};

template <bool kMaster> using Weight = std::conditional_t<kMaster, float, real>;
template <bool kMaster> __device__ __forceinline__ Weight<kMaster>* weights_of(const Arrays& a) {
    if constexpr (kMaster)
        return a.master;
    else
        return a.params;
}

__device__ __forceinline__ Pack<float, 4> load_grads(const Arrays& a, int64_t i, bool whole) {
    if (!a.bf16_grads) return load_quad(static_cast<const float*>(a.grads), i, a.n, whole);
    const Pack<bf16, 4> half = load_quad(static_cast<const bf16*>(a.grads), i, a.n, whole);
    return {{to_float(half[0]), to_float(half[1]), to_float(half[2]), to_float(half[3])}};
}

// The new weights of quad i / 4, rounded to where they belong.
template <bool kMaster> __device__ __forceinline__ void store_weights(const Arrays& a, const OptimizerFactors& f,
                                                                      const float (&p)[4], int64_t i, bool whole) {
    Pack<Weight<kMaster>, 4> weights;
    if constexpr (kMaster) {
        Pack<real, 4> rounded;
#pragma unroll
        for (int j = 0; j < 4; j++) weights[j] = p[j], assign(rounded[j], p[j]);
        store_quad(a.params, rounded, i, a.n, whole);
    } else {
        Philox noise = {};
        if constexpr (sizeof(real) == 2) noise = quad_noise(f.seed, f.stream, f.first / 8, i);
#pragma unroll
        for (int j = 0; j < 4; j++) assign_stochastically(weights[j], p[j], noise_half(noise, j));
    }
    store_quad(weights_of<kMaster>(a), weights, i, a.n, whole);
}

__device__ __forceinline__ void add_count(uint64_t* count, unsigned value) {
    if (value > 0) atomicAdd(reinterpret_cast<unsigned long long*>(count), static_cast<unsigned long long>(value));
}

// ---- States of one number each ----

constexpr int kThreads = 256;

template <Rule rule, class State, bool kMaster> __global__ void __launch_bounds__(kThreads, 3)
    update(Arrays a, OptimizerFactors f) {
    constexpr bool kAdamW = rule == Rule::adamw;
    const int64_t first = 4 * (int64_t(blockIdx.x) * kQuads * kThreads + threadIdx.x);
    State *m_at = static_cast<State*>(a.m), *v_at = static_cast<State*>(a.v);
    Pack<Weight<kMaster>, 4> w[kQuads];
    Pack<State, 4> m[kQuads], v[kQuads];
    Pack<float, 4> g[kQuads];
#pragma unroll
    for (int q = 0; q < kQuads; q++) {
        const int64_t i = first + 4 * q * kThreads;
        const bool whole = a.aligned && i + 4 <= a.n;
        g[q] = load_grads(a, i, whole), w[q] = load_quad(weights_of<kMaster>(a), i, a.n, whole);
        m[q] = load_quad(m_at, i, a.n, whole);
        if constexpr (kAdamW) v[q] = load_quad(v_at, i, a.n, whole);
    }
    const float scale = load_global(a.scale); // behind the other loads, so that none waits for the decision
    if (isnan(scale)) return;

    unsigned passed_over = 0;
#pragma unroll
    for (int q = 0; q < kQuads; q++) {
        const int64_t i = first + 4 * q * kThreads;
        if (i >= a.n) break;
        const bool whole = a.aligned && i + 4 <= a.n;
        Philox noise = {};
        if constexpr (sizeof(State) == 2) noise = philox(f.seed, f.stream, kStateNoise + (f.first + i) / 4);
        float p[4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            p[j] = to_float(w[q][j]);
            float m_new = to_float(m[q][j]), v_new = kAdamW ? to_float(v[q][j]) : 0;
            passed_over += !optimizer_step<rule>(p[j], m_new, v_new, scale * g[q][j], f);
            assign_stochastically(m[q][j], m_new, noise_half(noise, j));
            if constexpr (kAdamW) assign_stochastically(v[q][j], v_new, noise_half(noise, 4 + j));
        }
        store_quad(m_at, m[q], i, a.n, whole);
        if constexpr (kAdamW) store_quad(v_at, v[q], i, a.n, whole);
        store_weights<kMaster>(a, f, p, i, whole);
    }
    if (passed_over > 0 && a.counts) add_count(&a.counts->non_finite, passed_over); // rare: no need to gather
}

// ---- 8-bit states ----
//
// Which code a lane looks up is chance, so a table of 256 values in shared memory would cost a warp three or four turns
// at its banks a look. Each lane has a table of its own instead, in its own bank: magnitude k of lane l is word 32·k +
// l, 16 KB for the signed and 32 KB for the unsigned book. The search for a code takes a dozen multiply-adds and two
// looks (optimizer_codes.h); tried on paper and dropped: computing the magnitudes instead, about 20 instructions each
// to meet torch's rounding. Two blocks share an SM, on cards with 100 KB of shared memory too; with more than 384
// threads each they spill.

constexpr int kCodedThreads = 384;
constexpr int kBlocksOfWarp = 4; // one after another, neighbours, so that four absmax are one access
constexpr int kBlocksOfBlock = kBlocksOfWarp * kCodedThreads / kWarpSize;

constexpr int table_words(Book book) { return (largest_magnitude(book) + 1) * kWarpSize; }
constexpr size_t coded_shared_bytes(Rule rule) {
    return sizeof(float) *
           (table_words(Book::signed_values) + (rule == Rule::adamw ? table_words(Book::unsigned_values) : 0));
}

__device__ __forceinline__ void fill_table(float* table, Book book) {
    for (int k = threadIdx.x; k <= largest_magnitude(book); k += kCodedThreads) {
        const float magnitude = code_magnitude(book, k);
        for (int i = 0; i < kWarpSize; i++) // each lane at another bank
            store_shared(table + k * kWarpSize + (i + lane_index()) % kWarpSize, magnitude);
    }
}

// The magnitude nearest to a >= 0, the smaller in a tie. table: this lane's.
template <Book book> __device__ __forceinline__ int nearest_magnitude(float a, const float* table) {
    const float position = code_position<book>(a, static_cast<float>(largest_magnitude(book)),
                                               [](float x, float y) { return fminf(x, y); });
    const int r = __float_as_int(position + kRoundToInteger) & kIntegerBits;
    const float low = load_shared(table + (r - 1) * kWarpSize), high = load_shared(table + r * kWarpSize);
    // Is 2a > low + high? The sum is rounded; what it lost is exact, since low <= high, and so is 2a − sum where they
    // are near.
    const float sum = low + high, lost = low - (sum - high);
    return r - 1 + (2 * a - sum > lost);
}

// The value of a signed code, in units of absmax.
__device__ __forceinline__ float signed_value(int code, const float* table) {
    const float magnitude = load_shared(table + abs(code - kZeroCode) * kWarpSize);
    return code < kZeroCode ? -magnitude : magnitude;
}

// Two blocks an SM; for sm_120 ptxas spills 76 bytes in the 80 registers that these leave, and one block has more.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 1200
constexpr int kCodedResident = 1;
#else
constexpr int kCodedResident = 2;
#endif

template <Rule rule, bool kMaster> __global__ void __launch_bounds__(kCodedThreads, kCodedResident)
    update_coded(Arrays a, OptimizerFactors f, bool floor_v) {
    constexpr bool kAdamW = rule == Rule::adamw;
    const float scale = load_global(a.scale);
    if (isnan(scale)) return;
    float* tables = reinterpret_cast<float*>(dynamic_shared());
    const float *m_table = tables + lane_index(), *v_table = m_table + table_words(Book::signed_values);
    fill_table(tables, Book::signed_values);
    if constexpr (kAdamW) fill_table(tables + table_words(Book::signed_values), Book::unsigned_values);
    __syncthreads();

    // Lane b of the first kBlocksOfWarp keeps block b's absmax.
    const int64_t blocks = (a.n + kCodeBlock - 1) / kCodeBlock;
    const int64_t first_block = int64_t(blockIdx.x) * kBlocksOfBlock + warp_index() * kBlocksOfWarp;
    const bool keeper = lane_index() < kBlocksOfWarp && first_block + lane_index() < blocks;
    float m_absmax = 0, v_absmax = 0;
    if (keeper) {
        m_absmax = load_global(a.m_absmax + first_block + lane_index());
        if constexpr (kAdamW) v_absmax = load_global(a.v_absmax + first_block + lane_index());
    }
    uint8_t *m_at = static_cast<uint8_t*>(a.m), *v_at = static_cast<uint8_t*>(a.v);
    unsigned passed_over = 0, vanished = 0, saturated = 0; // the last is the warp's, the others the lane's

    for (int b = 0; b < kBlocksOfWarp && first_block + b < blocks; b++) {
        const int64_t first = (first_block + b) * kCodeBlock + 4 * lane_index();
        Pack<Weight<kMaster>, 4> w[kQuads];
        Pack<uint8_t, 4> m_codes[kQuads], v_codes[kQuads];
        Pack<float, 4> g[kQuads];
#pragma unroll
        for (int q = 0; q < kQuads; q++) {
            const int64_t i = first + 4 * q * kWarpSize;
            const bool whole = a.aligned && i + 4 <= a.n;
            g[q] = load_grads(a, i, whole), w[q] = load_quad(weights_of<kMaster>(a), i, a.n, whole);
            m_codes[q] = load_quad(m_at, i, a.n, whole);
            if constexpr (kAdamW) v_codes[q] = load_quad(v_at, i, a.n, whole);
        }
        const float m_unit = __shfl_sync(kFullWarp, m_absmax, b);
        const float v_unit = kAdamW ? __shfl_sync(kFullWarp, v_absmax, b) : 0;

        float m[kQuads][4], v[kQuads][4], m_largest = 0, v_largest = 0;
#pragma unroll
        for (int q = 0; q < kQuads; q++) {
            const int64_t i = first + 4 * q * kWarpSize;
            float p[4];
#pragma unroll
            for (int j = 0; j < 4; j++) {
                p[j] = to_float(w[q][j]);
                m[q][j] = signed_value(m_codes[q][j], m_table) * m_unit;
                v[q][j] = kAdamW ? load_shared(v_table + v_codes[q][j] * kWarpSize) * v_unit : 0;
                const bool exists = i + j < a.n;
                if (!exists) m[q][j] = v[q][j] = 0;
                passed_over += exists && !optimizer_step<rule>(p[j], m[q][j], v[q][j], scale * g[q][j], f);
                m_largest = fmaxf(m_largest, fabsf(m[q][j])), v_largest = fmaxf(v_largest, v[q][j]);
            }
            if (i < a.n) store_weights<kMaster>(a, f, p, i, a.aligned && i + 4 <= a.n);
        }

        // Floats that are not negative are ordered as their bits are.
        auto warp_largest = [](float x) {
            return fmaxf(__uint_as_float(__reduce_max_sync(kFullWarp, __float_as_uint(x))), kSmallestAbsmax);
        };
        m_largest = warp_largest(m_largest);
        if constexpr (kAdamW) v_largest = warp_largest(v_largest);
        if (lane_index() == b) m_absmax = m_largest, v_absmax = v_largest;
        const float m_inverse = 1 / m_largest, v_inverse = kAdamW ? 1 / v_largest : 0;

        unsigned positive_and_low = 0; // the latter in the upper half
#pragma unroll
        for (int q = 0; q < kQuads; q++) {
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const float m_new = m[q][j], v_new = v[q][j];
                const int k = nearest_magnitude<Book::signed_values>(fabsf(m_new) * m_inverse, m_table);
                m_codes[q][j] = static_cast<uint8_t>(m_new < 0 ? max(kZeroCode - max(k, 1), 0) : kZeroCode + k);
                if constexpr (kAdamW) {
                    int c = nearest_magnitude<Book::unsigned_values>(v_new * v_inverse, v_table);
                    positive_and_low += (v_new > 0) + ((v_new > 0 && c <= 1) << 16);
                    const bool gone = v_new > 0 && c == 0;
                    vanished += gone;
                    v_codes[q][j] = static_cast<uint8_t>(gone && floor_v ? 1 : c);
                } else {
                    positive_and_low += (m_new != 0) + ((m_new != 0 && k <= 1) << 16);
                }
            }
            const int64_t i = first + 4 * q * kWarpSize;
            const bool whole = a.aligned && i + 4 <= a.n;
            store_quad(m_at, m_codes[q], i, a.n, whole);
            if constexpr (kAdamW) store_quad(v_at, v_codes[q], i, a.n, whole);
        }
        positive_and_low = __reduce_add_sync(kFullWarp, positive_and_low);
        saturated += 2 * (positive_and_low >> 16) > (positive_and_low & 0xffff);
    }

    if (keeper) {
        store_global(a.m_absmax + first_block + lane_index(), m_absmax);
        if constexpr (kAdamW) store_global(a.v_absmax + first_block + lane_index(), v_absmax);
    }
    if (!a.counts) return;
    const unsigned lost = __reduce_add_sync(kFullWarp, passed_over | vanished << 16); // of 1024 elements
    if (lane_index() != 0) return;
    add_count(&a.counts->non_finite, lost & 0xffff), add_count(&a.counts->vanished, lost >> 16);
    add_count(&a.counts->saturated, saturated);
}

} // namespace

void optimizer_update(Stream stream, real* params, float* master, const States& states, Gradients grads,
                      const float* scale, OptimizerCounts* counts, int64_t n, const Optimizer& opt) {
    check_optimizer(states, opt);
    if (n == 0) return;
    const bool wide =
        aligned(params) && aligned(master) && aligned(states.m) && aligned(states.v) && aligned(grads.data);
    const Arrays arrays{params, master, states.m, states.v, states.m_absmax, states.v_absmax, grads.data, grads.is_bf16,
                        scale,  counts, n,        wide};
    const OptimizerFactors factors(opt);
    auto for_rule = [&](auto rule) {
        constexpr Rule kRule = decltype(rule)::value;
        if (states.type == StateType::int8) {
            launch(master ? update_coded<kRule, true> : update_coded<kRule, false>,
                   blocks_for(n, int64_t(kBlocksOfBlock) * kCodeBlock), kCodedThreads, coded_shared_bytes(kRule),
                   stream, arrays, factors, opt.floor_v);
            return;
        }
        const auto kernel = states.type == StateType::fp32
                                ? (master ? update<kRule, float, true> : update<kRule, float, false>)
                                : (master ? update<kRule, bf16, true> : update<kRule, bf16, false>);
        launch(kernel, blocks_for(n, 4 * kQuads * kThreads), kThreads, 0, stream, arrays, factors);
    };
    if (opt.rule == Rule::adamw)
        for_rule(std::integral_constant<Rule, Rule::adamw>());
    else
        for_rule(std::integral_constant<Rule, Rule::lion>());
}
