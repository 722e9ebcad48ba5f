// The optimizer's step over one tensor, in one pass: AdamW (Loshchilov & Hutter 2019, in PyTorch's order of operations)
// or Lion (Chen et al. 2023), states in fp32, bf16 or blockwise 8-bit codes (optimizer_codes.h).
//
//   g = scale · grad
//   AdamW   m = β1·m + (1−β1)·g        v = β2·v + (1−β2)·g²
//           p = p·(1 − lr·wd) − lr · (m / (1−β1ᵗ)) / (sqrt(v / (1−β2ᵗ)) + eps)
//   Lion    p = p·(1 − lr·wd) − lr · sign(β1·m + (1−β1)·g), sign(0) = 0
//           m = β2·m + (1−β2)·g
//
// p moves by the new m and v as they are before they are rounded into their states.
//
// A scale that is NaN (global_norm.h) leaves everything as it was. An element whose g is not finite, or so large that
// g² is not, keeps its p, m and v and is counted. It is the element and not its block that is passed over: one broken
// gradient need not cost 255 others their step, and the rule is the same for every type of state.
//
// Where p or a state is kept in bf16 alone, nearest rounding would swallow every change below half a step of bf16
// (1/512 of the value): small updates of p, and all of v's decay at β2 = 0.999, since 0.001·v is less than that. They
// are rounded stochastically instead, up or down at random, such that their mean is the value: 16 random bits are added
// below the bits that are kept. They are a function of (seed, tensor, t, first + i), the same in every build and for
// any alignment, so a resumed run draws what it would have drawn, and a tensor updated in parts, each call's pointers
// moved on by its `first`, ends with the bits of one call.
//
// 8-bit states: block b is the elements [256·b, 256·b + 256) of the tensor, the last may have fewer. Its new absmax is
// the largest |m| (or v) of the block, at least FLT_MIN, so that an all-zero block divides by no zero; a state's new
// code is the one nearest to value · (1 / absmax) in float, the one of smaller magnitude in a tie. Then
//   - m < 0 never becomes code 127, which is 0, but 126, the smallest negative one, as in bitsandbytes;
//   - v > 0 never becomes code 0, but 1, unless floor_v is off, which is bitsandbytes' way: a v of 0 beside an m that
//     is not makes the next update m / eps.
// Bytes that are all zero are states that are all zero, absmax being 0.
#pragma once
#include <bit>
#include <cmath>

#include "../runtime/base/random.h"
#include "common.h"
#include "types.h"

enum class Rule { adamw, lion };
enum class StateType { fp32, bf16, int8 };

struct Optimizer {
    float lr, beta1 = 0.9f, beta2 = 0.95f, eps = 1e-8f, weight_decay = 0.1f;
    int64_t t = 1; // updates applied, this one included; below 2^40
    uint64_t seed = 0;
    uint32_t tensor = 0; // below 2^24: a number of its own for each tensor, lest two draw the same noise
    Rule rule = Rule::adamw;
    bool floor_v = true; // 8-bit AdamW only
    int64_t first = 0;   // where in its tensor this call's part begins, a multiple of 256
};

// A tensor's states. Lion has no v: null.
struct States {
    StateType type;
    void *m, *v;                                    // (n) float, bf16 or codes (uint8_t)
    float *m_absmax = nullptr, *v_absmax = nullptr; // (ceil(n / 256)); 8-bit only
};

// A tensor's gradients; float or bf16, in any build.
struct Gradients {
    Gradients(const float* p) : data(p), is_bf16(false) {}
    Gradients(const bf16* p) : data(p), is_bf16(true) {}
    const void* data; // (n)
    bool is_bf16;
};

// What went other than planned, summed over elements and calls.
struct OptimizerCounts {
    uint64_t non_finite; // elements passed over
    // 8-bit only. v > 0 whose nearest code was 0: it became 1, or 0 with the floor off.
    uint64_t vanished;
    // Blocks whose one large value takes the resolution from the rest: of the elements with v > 0 (Lion: m ≠ 0) more
    // than half are nearest to the two smallest magnitudes, 0 and 3.25e-7 (Lion: 5.5e-7) of absmax.
    uint64_t saturated;
};

// params (n) `=`, states updated in place, grads (n) read, scale (1) read.
// master (n): the float weights, updated in place and rounded into params, nearest even; null when params hold the
// weights themselves, which are then updated in place and rounded stochastically if they are bf16.
// counts (1) `+=`; may be null. No two arrays overlap; each may begin at any address that its type allows, and the
// fastest way needs multiples of 16 bytes. Throws std::invalid_argument for t < 1, for states that are missing and
// for a first that is no multiple of 256. The same bits for any number of threads.
void optimizer_update(Stream stream, real* params, float* master, const States& states, Gradients grads,
                      const float* scale, OptimizerCounts* counts, int64_t n, const Optimizer& opt);

inline int64_t absmax_count(int64_t n) { return (n + 255) / 256; }

// Bytes of a tensor's states: for each element of m and v 8, 4 or 2.03; half of that for Lion's m.
inline double optimizer_state_bytes(int64_t n, Rule rule, StateType type) {
    const double each = type == StateType::fp32   ? 4.0 * n
                        : type == StateType::bf16 ? 2.0 * n
                                                  : 1.0 * n + sizeof(float) * double(absmax_count(n));
    return rule == Rule::adamw ? 2 * each : each;
}

// States are read and written, weights too, gradients read.
inline Cost optimizer_cost(int64_t n, Rule rule, StateType type, bool bf16_grads, bool with_master) {
    const double states = optimizer_state_bytes(n, rule, type), weights = with_master ? sizeof(float) : sizeof(real);
    const double flops = rule == Rule::adamw ? 14 : 9; // the rule itself; codes cost comparisons
    return {n * ((bf16_grads ? 2 : 4) + weights) + states, n * (weights + (with_master ? sizeof(real) : 0)) + states,
            flops * n};
}

// ---- What the backends share ----

inline void check_optimizer(const States& states, const Optimizer& opt) {
    require(opt.t >= 1, "optimizer_update: t counts from 1");
    require(opt.first >= 0 && opt.first % 256 == 0, "optimizer_update: a part begins at a multiple of 256");
    require(states.m && (states.v || opt.rule == Rule::lion), "optimizer_update: a state is missing");
    require(states.type != StateType::int8 || (states.m_absmax && (states.v_absmax || opt.rule == Rule::lion)),
            "optimizer_update: 8-bit states without their absmax");
}

struct OptimizerFactors {
    float beta1, beta2, eps, step, unbias_v, keep;
    uint64_t seed, stream, first; // of the noise

    // In double: 1 − β2ᵗ in float loses half its digits for β2 = 0.999 and small t. "adam" in the stream's upper half
    // keeps it apart from the run's other draws.
    explicit OptimizerFactors(const Optimizer& opt)
        : beta1(opt.beta1), beta2(opt.beta2), eps(opt.eps), step(opt.lr), unbias_v(1),
          keep(float(1 - double(opt.lr) * opt.weight_decay)), seed(opt.seed),
          stream(uint64_t(0x6164616d) << 32 ^ uint64_t(opt.tensor) << 40 ^ uint64_t(opt.t)), first(opt.first) {
        if (opt.rule == Rule::lion) return;
        step = float(opt.lr / (1 - std::pow(double(beta1), double(opt.t))));
        unbias_v = float(1 / (1 - std::pow(double(beta2), double(opt.t))));
    }
};

struct SquareRoot {
    LONGHAND_HD static float of(float x) { return sqrtf(x); }
};

// One element's step; false if it was passed over. V is float, or a vector of floats whose comparisons are masks, with
// a Root of its own.
template <Rule rule, class Root = SquareRoot, class V>
LONGHAND_HD inline auto optimizer_step(V& p, V& m, V& v, V g, const OptimizerFactors& f) {
    const auto finite = g * g < INFINITY;
    if constexpr (rule == Rule::adamw) {
        const V m_new = f.beta1 * m + (1 - f.beta1) * g, v_new = f.beta2 * v + (1 - f.beta2) * (g * g);
        const V p_new = p * f.keep - f.step * m_new / (Root::of(v_new * f.unbias_v) + f.eps);
        p = finite ? p_new : p, m = finite ? m_new : m, v = finite ? v_new : v;
    } else {
        const V c = f.beta1 * m + (1 - f.beta1) * g, m_new = f.beta2 * m + (1 - f.beta2) * g;
        const V sign = c > 0.f ? V{} + 1.f : (c < 0.f ? V{} - 1.f : V{});
        const V p_new = p * f.keep - f.step * sign;
        p = finite ? p_new : p, m = finite ? m_new : m;
    }
    return finite;
}

// Noise comes from Philox's block `index` of one stream: for weights it is that of eight neighbours, from element
// 8·index on, element j's 16 bits in half j % 2 of word j / 2. For states, at 2^60 + index, it is that of four
// neighbours, m's in words 0 and 1, v's in 2 and 3.
constexpr uint64_t kStateNoise = uint64_t(1) << 60;

LONGHAND_HD inline uint32_t noise_half(const Philox& words, int j) {
    return words.word[j / 2] >> (16 * (j % 2)) & 0xffff;
}

// Of the noise that eight neighbours share, what belongs to the four from element i on, in words 0 and 1. i is a
// multiple of 4; element 0's block is `first`.
LONGHAND_HD inline Philox quad_noise(uint64_t seed, uint64_t stream, uint64_t first, int64_t i) {
    const Philox eight = philox(seed, stream, first + i / 8);
    const bool upper = i / 4 % 2 == 1;
    return {{upper ? eight.word[2] : eight.word[0], upper ? eight.word[3] : eight.word[1], 0, 0}};
}

// x rounded to one of its two neighbours in bf16: the outer one with a probability that is the part of the step between
// them that lies inside of x. Past the largest bf16 that may be infinity; NaN and the infinities stay.
LONGHAND_HD inline bf16 round_stochastically(float x, uint32_t noise) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    if ((bits & 0x7f800000u) == 0x7f800000u) return to_bf16(x);
    return bf16{static_cast<uint16_t>((bits + noise) >> 16)};
}
LONGHAND_HD inline void assign_stochastically(bf16& to, float x, uint32_t noise) {
    to = round_stochastically(x, noise);
}
LONGHAND_HD inline void assign_stochastically(float& to, float x, uint32_t) { to = x; }

// For the CPU, in vectors: words of `blocks` Philox blocks from `first` on, four after four, which is in memory the
// noise of neighbours in their order, 16 bits each; and `count` <= N floats rounded by it.
inline void fill_noise(uint32_t* words, int blocks, uint64_t seed, uint64_t stream, uint64_t first) {
    static_assert(std::endian::native == std::endian::little);
#pragma omp simd
    for (int i = 0; i < blocks; i++) {
        const Philox noise = philox(seed, stream, first + i);
        words[4 * i] = noise.word[0], words[4 * i + 1] = noise.word[1];
        words[4 * i + 2] = noise.word[2], words[4 * i + 3] = noise.word[3];
    }
}
template <int N> void round_by_noise(bf16* to, const float* from, const uint32_t* words, int count) {
    alignas(64) uint16_t noise[N];
    memcpy(noise, words, sizeof noise);
#pragma omp simd
    for (int i = 0; i < count; i++) to[i] = round_stochastically(from[i], noise[i]);
}
