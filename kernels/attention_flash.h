// The flash kernels of the attention layer, as kernels/attention.cu sees them: attention.h's passes in bf16 on tensor
// cores, for the shapes that `supports` names. The plain kernels take all others.
#pragma once
#include "attention.h"

namespace flash {

// Rows that move 16 bytes at a time: data and strides at multiples of 16 bytes.
template <class T> bool aligned(const Heads<T>& x) {
    constexpr int64_t n = 16 / sizeof(T);
    return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.batch % n == 0 && x.token % n == 0 && x.head % n == 0;
}

// Is there a kernel? True for D 32, 64, 80, 128 and 256 in bf16 builds, if scale is positive (the running maximum is
// taken before the scale) and lengths are at most 2^30 − 128. `heads` are all tensors of the call.
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
// 8 bytes a query and head for Δ and LSE; where the order may be any 4·D more for dQ's sums, of no more heads at a time
// than shape.most_sums holds.
size_t backward_scratch(const AttentionShape& shape);

} // namespace flash
