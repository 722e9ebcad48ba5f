// Softmax, cross-entropy and its gradient in one pass over a chunk of tokens, so that no more than a chunk of logits
// ever exists.
//
//   loss_n = ln Σ_{v<V} exp(logits[n,v]) − logits[n,target_n]
//   dlogits[n,v] = dloss · (softmax(logits[n,:])_v − [v = target_n])          v >= V: 0
//
// Columns V..Vp are padding: never read into a sum, and given gradient 0. A negative target is ignored: loss 0,
// gradient 0.
#pragma once
#include "types.h"

// losses (N) `=`. logits (N,Vp) are replaced by dlogits. targets (N), each < V.
void classifier_forward_backward(Stream stream, float* losses, real* logits, const int32_t* targets, float dloss,
                                 int64_t N, int64_t V, int64_t Vp);

// losses (N) `=` alone; logits (N,Vp) are left as they are.
void classifier_forward(Stream stream, float* losses, const real* logits, const int32_t* targets, int64_t N, int64_t V,
                        int64_t Vp);

// total (1) += factor · Σ_n losses[n], summed in double in a fixed order.
void classifier_add_losses(Stream stream, double* total, const float* losses, double factor, int64_t N);

inline Cost classifier_forward_backward_cost(int64_t N, int64_t V, int64_t Vp) {
    return {double(N) * (V * sizeof(real) + 4), double(N) * (Vp * sizeof(real) + 4), 14.0 * N * V};
}
inline Cost classifier_forward_cost(int64_t N, int64_t V) {
    return {double(N) * (V * sizeof(real) + 4), double(N) * 4, 12.0 * N * V};
}
