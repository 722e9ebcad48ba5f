// The Euclidean norm of all gradients, and the factor by which the optimizer scales them.
//
//   norm  = sqrt(Σ_i g_i²)
//   scale = norm > clip > 0 ? clip / norm : 1;   NaN when norm or loss is not finite: the optimizer then does nothing
//
// Both stay on the device, so that a step needs no host in the middle.
#pragma once
#include <cstddef>

#include "types.h"

// norm (1) `=`. grads (n), float or bf16 in any build. Summed in double, or as exactly, in an order that depends on n,
// type and alignment alone. scratch: global_norm_scratch(n) bytes for either type, 64-byte aligned.
void global_norm(Stream stream, float* norm, const float* grads, void* scratch, int64_t n);
void global_norm(Stream stream, float* norm, const bf16* grads, void* scratch, int64_t n);
size_t global_norm_scratch(int64_t n, const Target& target = this_target());

// norm (1) `=` the norm of what has these `n` norms (n) in its parts.
void combine_norms(Stream stream, float* norm, const float* norms, int64_t n);

// scale (1) `=`. norm (1), loss (1).
void clip_scale(Stream stream, float* scale, const float* norm, const double* loss, float clip);

inline Cost global_norm_cost(int64_t n, bool bf16_grads = false) {
    return {n * (bf16_grads ? 2.0 : 4.0), sizeof(float), 2.0 * n};
}
