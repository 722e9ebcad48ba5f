// The plain kernels of the attention layer, as kernels/attention.cu and test/attention_backends.cpp see them:
// attention.h's passes in float, for every head dim, alignment and precision. They serve fp32 builds, what the flash
// kernels do not take, and as a second truth beside those.
#pragma once
#include "attention.h"

namespace plain {

// The functions of attention.h of the same names. The forward pass needs no scratch.
void forward(Stream stream, Heads<real> o, float* lse, Heads<const real> q, Heads<const real> k, Heads<const real> v,
             float scale, const AttentionShape& shape);
void forward_partial(Stream stream, Heads<float> o, float* lse, Heads<const real> q, Heads<const real> k,
                     Heads<const real> v, float scale, const AttentionShape& shape);

void backward(Stream stream, Heads<real> dq, Heads<real> dk, Heads<real> dv, Heads<const real> dout,
              Heads<const real> q, Heads<const real> k, Heads<const real> v, Heads<const real> o, const float* lse,
              float scale, void* scratch, const AttentionShape& shape);
void backward_partial(Stream stream, Heads<float> dq, Heads<float> dk, Heads<float> dv, Heads<const real> dout,
                      Heads<const real> q, Heads<const real> k, Heads<const real> v, Heads<const real> o,
                      const float* lse, float scale, void* scratch, const AttentionShape& shape);
// 4 bytes a query and head, for Δ.
inline size_t backward_scratch(const AttentionShape& s) { return sizeof(float) * s.B * s.H * s.Tq; }

} // namespace plain
