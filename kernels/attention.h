// Causal attention that keeps only O and the log-sum-exp of each row: FlashAttention (Dao et al. 2022; Dao 2023).
// Nothing here is T×T: memory grows with T.
//
//   S[i,j] = scale · q_i·k_j  where query i sees key j, else −∞
//   O_i    = Σ_j softmax_j(S[i,:]) · v_j             LSE_i = ln Σ_j exp S[i,j]
//
// Query i stands at position q_offset + i, key j at k_offset + j, and i sees j iff
//   doc_start[b,i] <= k_offset + j <= q_offset + i
// so one contract serves training (both offsets 0), decoding with a KV cache (Tq = 1, q_offset = Tk − 1), one step of
// a ring (any two offsets) and packed documents. A query that sees no key gets O = 0 and LSE = −∞.
//
// Backward, with P = exp(S − LSE):   Δ_i = Σ_d dO_i·O_i     dV = Pᵀ·dO     dS = P ∘ (dO·Vᵀ − Δ)
//                                    dQ = scale · dS·K      dK = scale · dSᵀ·Q
// O and LSE are those of the whole row, so the backward passes of several key blocks simply add up.
#pragma once
#include <cstddef>

#include "types.h"

// Heads within a tensor: row (b,t,h) holds D consecutive elements at data + b·batch + t·token + h·head (in elements).
// GPT-2's packed qkv (B,T,3C) gives q = {qkv, T·3C, 3C, D}, k = {qkv + C, …}, v = {qkv + 2C, …}.
// A head group is the same call with `data` moved on and a smaller H.
template <class T> struct Heads {
    T* data;
    int64_t batch, token, head;

    LONGHAND_HD T* row(int64_t b, int64_t t, int64_t h) const { return data + b * batch + t * token + h * head; }
};

struct AttentionShape {
    int64_t B, Tq, Tk, H, D;
    int64_t q_offset = 0, k_offset = 0;
    const int64_t* doc_start = nullptr; // (B,Tq) first position of each query's document, never decreasing along a row
    int64_t lse_batch = 0;              // elements from one sequence's LSE to the next; 0 means H·Tq
    bool deterministic = true;          // false allows a backend to add dQ in any order, in float sums in scratch:
    int64_t most_sums = 64 << 20;       // bytes of them at a time, one head's at least, so that they do not grow with H

    int64_t lse_stride() const { return lse_batch ? lse_batch : H * Tq; }
};

// Head dims with kernels: 32, 64, 80, 128, 256.
constexpr bool attention_supports(int64_t D) { return D == 32 || D == 64 || D == 80 || D == 128 || D == 256; }

// o (B,Tq,H,D) `=`, lse (B,H,Tq) `=`. q (B,Tq,H,D), k and v (B,Tk,H,D). scale is usually 1/sqrt(D). No aliasing.
// scratch: attention_forward_scratch(shape) bytes, 64-byte aligned.
void attention_forward(Stream stream, Heads<real> o, float* lse, Heads<const real> q, Heads<const real> k,
                       Heads<const real> v, float scale, void* scratch, const AttentionShape& shape);

// The same with O in float: the part of a row that these keys make, normalised over these keys alone.
void attention_forward_partial(Stream stream, Heads<float> o, float* lse, Heads<const real> q, Heads<const real> k,
                               Heads<const real> v, float scale, void* scratch, const AttentionShape& shape);
size_t attention_forward_scratch(const AttentionShape& shape, const Target& target = this_target());

// (o, lse) := the row that both parts make together. o (B,Tq,H,D) and lse (B,H,Tq) in place; part, part_lse the same
// shapes. With s = sigmoid(part_lse − lse):  o −= s·(o − part),  lse −= ln sigmoid(lse − part_lse); no exp of a large
// number. Either side may be −∞ (saw nothing).
void attention_merge(Stream stream, Heads<float> o, float* lse, Heads<const float> part, const float* part_lse,
                     const AttentionShape& shape);

// dq (B,Tq,H,D) `=`, dk and dv (B,Tk,H,D) `=`. dout, o (B,Tq,H,D), lse (B,H,Tq) of the whole rows. No aliasing, except
// that dout may alias nothing and dq, dk, dv may interleave in one packed tensor.
// scratch: attention_backward_scratch(shape) bytes, 64-byte aligned; as much serves fewer sequences and heads, too.
void attention_backward(Stream stream, Heads<real> dq, Heads<real> dk, Heads<real> dv, Heads<const real> dout,
                        Heads<const real> q, Heads<const real> k, Heads<const real> v, Heads<const real> o,
                        const float* lse, float scale, void* scratch, const AttentionShape& shape);

// The same with float gradients `+=`: what a ring adds up while K and V travel.
void attention_backward_partial(Stream stream, Heads<float> dq, Heads<float> dk, Heads<float> dv,
                                Heads<const real> dout, Heads<const real> q, Heads<const real> k, Heads<const real> v,
                                Heads<const real> o, const float* lse, float scale, void* scratch,
                                const AttentionShape& shape);
size_t attention_backward_scratch(const AttentionShape& shape, const Target& target = this_target());

// Pairs (i,j) that the offsets leave visible in one row and head; documents, which only take pairs away, are not
// counted off.
inline double attention_pairs(const AttentionShape& s) {
    double pairs = 0;
    // Query i sees n(i) = clamp(q_offset + i − k_offset + 1, 0, Tk) keys: a run of zeros, a ramp, a run of Tk.
    int64_t first = s.q_offset - s.k_offset + 1; // n(0) before clamping
    int64_t ramp_begin = first < 0 ? -first : 0; // first i with n(i) >= 0
    int64_t ramp_end = s.Tk - first;             // first i with n(i) >= Tk
    if (ramp_begin > s.Tq) ramp_begin = s.Tq;
    if (ramp_end < ramp_begin) ramp_end = ramp_begin;
    if (ramp_end > s.Tq) ramp_end = s.Tq;
    double n = double(ramp_end - ramp_begin);
    pairs += n * (double(first) + ramp_begin) + n * (n - 1) / 2;
    pairs += double(s.Tq - ramp_end) * s.Tk;
    return pairs;
}
inline Cost attention_forward_cost(const AttentionShape& s) {
    double rows = double(s.B) * s.H, row = double(s.D) * sizeof(real);
    return {rows * (s.Tq + 2.0 * s.Tk) * row, rows * s.Tq * (row + sizeof(float)), rows * attention_pairs(s) * 4 * s.D};
}
// Five products instead of two, so 2.5 times the FLOPs.
inline Cost attention_backward_cost(const AttentionShape& s) {
    double rows = double(s.B) * s.H, row = double(s.D) * sizeof(real);
    return {rows * ((3.0 * s.Tq + 2.0 * s.Tk) * row + s.Tq * sizeof(float)), rows * (s.Tq + 2.0 * s.Tk) * row,
            rows * attention_pairs(s) * 10 * s.D};
}
