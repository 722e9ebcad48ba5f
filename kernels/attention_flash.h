// The flash kernels of the attention layer, as kernels/attention.cu sees them: attention.h's passes in bf16 on tensor
// cores, for the shapes that `supports` names. The plain kernels take all others.
#pragma once
#include <algorithm>

#include "attention.h"

namespace flash {

// Rows that move 16 bytes at a time: data and strides at multiples of 16 bytes.
template <class T> bool aligned(const Heads<T>& x) {
    constexpr int64_t n = 16 / sizeof(T);
    return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.batch % n == 0 && x.token % n == 0 && x.head % n == 0;
}

// Is there a kernel for bf16? True for every head dim and lengths of at most 2^30 − 128: places of a query and of a key
// in its last tile, 128 rows at the most, have a sum of 31 bits.
inline bool has_tiles(const AttentionShape& s) {
    constexpr int64_t kLongest = (int64_t(1) << 30) - 128;
    return attention_supports(s.D) && s.Tq <= kLongest && s.Tk <= kLongest;
}
// And for this call? Not in fp32 builds, nor where scale is not positive (the running maximum is taken before the
// scale). `heads` are all tensors of the call.
bool supports(const AttentionShape& shape, float scale);
template <class... T> bool supports(const AttentionShape& shape, float scale, const Heads<T>&... heads) {
    return supports(shape, scale) && (aligned(heads) && ...);
}

// Out = bf16 is attention_forward, Out = float is attention_forward_partial. No scratch.
template <class Out> void forward(Stream stream, Heads<Out> o, float* lse, Heads<const bf16> q, Heads<const bf16> k,
                                  Heads<const bf16> v, float scale, const AttentionShape& shape);

// Out = bf16 is attention_backward and sets the gradients, Out = float is attention_backward_partial and adds to them.
template <class Out> void backward(Stream stream, Heads<Out> dq, Heads<Out> dk, Heads<Out> dv, Heads<const bf16> dout,
                                   Heads<const bf16> q, Heads<const bf16> k, Heads<const bf16> v, Heads<const bf16> o,
                                   const float* lse, float scale, void* scratch, const AttentionShape& shape);

// ---- The scratch of the backward pass: statistics first, then dQ's sums; both multiples of 64 bytes ----

// Is dQ's order left open, and is there a kernel that makes use of it? attention_backward_partial has none.
inline bool adds_in_any_order(const AttentionShape& s) { return !s.deterministic && s.D == 64; }

// Heads that are worked on together: all, or those whose sums for dQ may be held at once.
inline int64_t heads_at_once(const AttentionShape& s) {
    int64_t sums = s.B * s.Tq * s.D * static_cast<int64_t>(sizeof(float)); // of a head
    if (!adds_in_any_order(s) || sums == 0 || s.H <= 1) return s.H;
    return std::clamp<int64_t>(s.most_sums / sums, 1, s.H);
}
// Heads first .. first + count of a call.
inline AttentionShape group_of(AttentionShape s, int64_t count) {
    s.lse_batch = s.lse_stride();
    s.H = count;
    return s;
}
inline int64_t rows_of(const AttentionShape& s) { return (s.B * s.H * s.Tq + 15) / 16 * 16; }

// 8 bytes a query and head for Δ and LSE; where the order may be any 4·D more for dQ's sums, of no more heads at a time
// than shape.most_sums holds.
inline size_t backward_scratch(const AttentionShape& s) {
    const int64_t floats = 2 + (adds_in_any_order(s) ? s.D : 0);
    return rows_of(group_of(s, heads_at_once(s))) * floats * sizeof(float);
}

} // namespace flash
