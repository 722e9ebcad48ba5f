// AdamW (Loshchilov & Hutter 2019) in one pass over a tensor, in PyTorch's order of operations.
//
//   g = scale · grad
//   m = β1·m + (1−β1)·g        v = β2·v + (1−β2)·g²
//   p = p·(1 − lr·wd)
//   p = p − lr · (m / (1−β1ᵗ)) / (sqrt(v / (1−β2ᵗ)) + eps)
//
// A scale that is NaN (global_norm.h) leaves everything as it was.
#pragma once
#include "types.h"

struct AdamW {
    float lr, beta1 = 0.9f, beta2 = 0.95f, eps = 1e-8f, weight_decay = 0.1f;
    int64_t t = 1; // updates applied, this one included
};

// params (n) `=`, m (n), v (n) updated in place, grads (n) read, scale (1) read.
// master (n): the float weights, updated in place and rounded into params; null when params are float themselves.
void adamw_update(Stream stream, real* params, float* master, float* m, float* v, const float* grads,
                  const float* scale, int64_t n, const AdamW& opt);

inline Cost adamw_cost(int64_t n, bool with_master) {
    double weights = with_master ? sizeof(float) : sizeof(real);
    return {double(n) * (12 + weights), double(n) * (8 + weights + (with_master ? sizeof(real) : 0)), 14.0 * n};
}
