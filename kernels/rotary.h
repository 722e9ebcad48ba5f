// Rotary position embedding (Su et al. 2021) in GPT-NeoX's form, on the first `dims` dimensions of each head of q and
// k, fused with the bias of the QKV product before it and the split into heads; backward, with their gathering.
//
//   (x1, x2) = the two halves of the first dims of (qkv + bias)'s row of one token and head        θ = p · ω_i
//   y1_i = f·(x1_i·cos θ − x2_i·sin θ)        y2_i = f·(x2_i·cos θ + x1_i·sin θ)        i < dims/2
//   p(b,t) = positions ? positions[b,t] : position0 + t
//
// All other dimensions, and all of v, are qkv + bias. f is 1 but for YaRN (runtime/model/rope.h), which also chooses ω.
//
// Angles are kept in turns, as 64-bit fractions: p·turns wraps around where the turns are whole, so the product is its
// own exact range reduction. The error is |p|·2^-65 turns, 2e-10 radians at p = 2^30; a float angle is 8 radians off
// there.
#pragma once
#include "attention.h"
#include "types.h"

constexpr int64_t kMostRotaryPairs = 128; // all of D = 256

struct Rotary {
    int64_t dims = 0;                      // even, at most D; 0: nothing is rotated
    float factor = 1;                      // f
    uint64_t turns[kMostRotaryPairs] = {}; // (dims/2) round(ω_i / 2π · 2^64)
};

struct RotaryShape {
    int64_t B, T, H, D;                 // D at most 256
    int64_t position0 = 0;              // position of t = 0, for decoding with a KV cache and for parts of a ring
    const int32_t* positions = nullptr; // (B,T) or null; restarts at document boundaries need it
};

// The queries (s = 0), keys (1) or values (2) within qkv (B,T,H,3,D).
template <class T> Heads<T> rotary_part(T* qkv, int s, const RotaryShape& shape) {
    const int64_t head = 3 * shape.D, token = shape.H * head;
    return {qkv + s * shape.D, shape.T * token, token, head};
}

// q, k, v (B,T,H,D) `=`. qkv (B,T,H,3,D): of each head its query, key and value. bias (H,3,D) or null.
// q, k and v may be qkv itself, each row in its own place; no other aliasing.
void rotary_forward(Stream stream, Heads<real> q, Heads<real> k, Heads<real> v, const real* qkv, const real* bias,
                    const Rotary& rotary, const RotaryShape& shape);

// dqkv (B,T,H,3,D) `=`, the gradient of qkv and, summed over tokens, of bias (matmul_backward_weight does that).
// dq, dk, dv (B,T,H,D); they may be dqkv itself, each row in its own place; no other aliasing.
void rotary_backward(Stream stream, real* dqkv, Heads<const real> dq, Heads<const real> dk, Heads<const real> dv,
                     const Rotary& rotary, const RotaryShape& shape);

// FLOPs count a sine with its cosine as twenty; they are computed once a token, not once a head.
inline Cost rotary_forward_cost(const RotaryShape& s, int64_t dims) {
    double n = double(s.B) * s.T, values = n * 3 * s.H * s.D;
    return {values * sizeof(real), values * sizeof(real), values + n * (2.0 * s.H * dims * 3 + 10.0 * dims)};
}
// In place only what is rotated moves.
inline Cost rotary_backward_cost(const RotaryShape& s, int64_t dims, bool in_place = false) {
    double n = double(s.B) * s.T, values = n * s.H * (in_place ? 2.0 * dims : 3.0 * s.D);
    return {values * sizeof(real), values * sizeof(real), n * (2.0 * s.H * dims * 3 + 10.0 * dims)};
}

// ---- What the backends share ----

struct CosSin {
    float cos, sin;
};

// cos and sin of an angle in 64-bit turns, each within 1.3e-7: the nearest quarter of a turn is taken off in integers,
// and the rest, at most π/4 either way, goes through Cephes' polynomials (sinf, cosf).
LONGHAND_HD inline CosSin cos_sin_of_turns(uint64_t angle) {
    const uint64_t quarter = (angle + (uint64_t(1) << 61)) >> 62;              // mod 4
    const float x = float(int64_t(angle - (quarter << 62))) * 3.40612158e-19f; // 2π / 2^64
    const float z = x * x;
    const float sin = x + x * z * (-1.6666654611e-1f + z * (8.3321608736e-3f + z * -1.9515295891e-4f));
    const float cos = 1 - 0.5f * z + z * z * (4.1666645683e-2f + z * (-1.3887316255e-3f + z * 2.4433157118e-5f));
    const bool swapped = quarter & 1;
    const float c = swapped ? sin : cos, s = swapped ? cos : sin;
    return {(quarter + 1) & 2 ? -c : c, quarter & 2 ? -s : s};
}

// The angle of pair i at position p; wraps.
LONGHAND_HD inline uint64_t rotary_angle(const Rotary& rotary, int64_t p, int64_t i) {
    return uint64_t(p) * rotary.turns[i];
}
