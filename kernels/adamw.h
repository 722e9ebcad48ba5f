// AdamW (Loshchilov & Hutter 2019) in one pass over a tensor, in PyTorch's order of operations.
//
//   g = scale · grad
//   m = β1·m + (1−β1)·g        v = β2·v + (1−β2)·g²
//   p = p·(1 − lr·wd)
//   p = p − lr · (m / (1−β1ᵗ)) / (sqrt(v / (1−β2ᵗ)) + eps)
//
// A scale that is NaN (global_norm.h) leaves everything as it was.
//
// Where p is kept in bf16 alone, nearest rounding would swallow every update below half a step of bf16 (1/512 of the
// weight). It is rounded stochastically instead, up or down by chance, such that its mean is p: 16 random bits are
// added below the bits that are kept. They are a function of (seed, tensor, t, i), the same in every build and for any
// alignment, so a resumed run draws what it would have drawn.
#pragma once
#include "../runtime/random.h"
#include "types.h"

struct AdamW {
    float lr, beta1 = 0.9f, beta2 = 0.95f, eps = 1e-8f, weight_decay = 0.1f;
    int64_t t = 1; // updates applied, this one included; below 2^40
    uint64_t seed = 0;
    uint32_t tensor = 0; // below 2^24: a number of its own for each tensor, lest two draw the same noise
};

// params (n) `=`, m (n), v (n) updated in place, grads (n) read, scale (1) read.
// master (n): the float weights, updated in place and rounded into params, nearest even; null when params hold the
// weights themselves, which are then updated in place and rounded stochastically if they are bf16.
void adamw_update(Stream stream, real* params, float* master, float* m, float* v, const float* grads,
                  const float* scale, int64_t n, const AdamW& opt);

inline Cost adamw_cost(int64_t n, bool with_master) {
    double weights = with_master ? sizeof(float) : sizeof(real);
    return {double(n) * (12 + weights), double(n) * (8 + weights + (with_master ? sizeof(real) : 0)), 14.0 * n};
}

// ---- What the backends share ----

// The noise of eight neighbours, from element 8·group on: 16 bits each, element j's in half j % 2 of word j / 2.
// "adam" in the stream's upper half keeps it apart from the run's other draws.
inline uint64_t adamw_stream(const AdamW& opt) {
    return uint64_t(0x6164616d) << 32 ^ uint64_t(opt.tensor) << 40 ^ uint64_t(opt.t);
}
LONGHAND_HD inline uint32_t adamw_noise(const Philox& words, int j) {
    return words.word[j / 2] >> (16 * (j % 2)) & 0xffff;
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
