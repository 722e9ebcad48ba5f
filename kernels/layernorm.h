// LayerNorm (Ba et al. 2016), alone or fused with the residual addition before it.
//
//   mean = Σ_c x_c / C     rstd = 1 / sqrt(Σ_c (x_c − mean)² / C + eps)     out = (x − mean)·rstd·w + b
//
// Variance is two-pass (or exact in another way): a one-pass variance loses everything at mean 1000.
#pragma once
#include <cstddef>

#include "types.h"

constexpr float kLayerNormEps = 1e-5f; // GPT-2's and Pythia's

// out (N,C) `=`, mean (N) `=`, rstd (N) `=`. inp (N,C), w (C), b (C). out may alias inp.
void layernorm_forward(Stream stream, real* out, float* mean, float* rstd, const real* inp, const real* w,
                       const real* b, int64_t N, int64_t C, float eps = kLayerNormEps);

// residual (N,C) = x + y, rounded to real; then out, mean, rstd as above of the rounded residual.
// residual may alias x or y.
void residual_layernorm_forward(Stream stream, real* residual, real* out, float* mean, float* rstd, const real* x,
                                const real* y, const real* w, const real* b, int64_t N, int64_t C,
                                float eps = kLayerNormEps);

// dinp (N,C) `+=` (the residual stream's gradient flows past the layer), dw (C) `+=`, db (C) `+=`.
// dout (N,C), inp (N,C), w (C), mean (N), rstd (N). dout may not alias dinp. Deterministic:
// the same bits for the same number of threads on a CPU, and on every GPU.
// scratch: layernorm_backward_scratch(N, C) bytes, 64-byte aligned.
void layernorm_backward(Stream stream, real* dinp, float* dw, float* db, const real* dout, const real* inp,
                        const real* w, const float* mean, const float* rstd, void* scratch, int64_t N, int64_t C);
size_t layernorm_backward_scratch(int64_t N, int64_t C, const Target& target = this_target());

inline Cost layernorm_forward_cost(int64_t N, int64_t C) {
    double n = double(N) * C;
    return {(n + 2.0 * C) * sizeof(real), n * sizeof(real) + 8.0 * N, 8 * n};
}
inline Cost residual_layernorm_forward_cost(int64_t N, int64_t C) {
    double n = double(N) * C;
    return {(2 * n + 2.0 * C) * sizeof(real), 2 * n * sizeof(real) + 8.0 * N, 9 * n};
}
inline Cost layernorm_backward_cost(int64_t N, int64_t C) {
    double n = double(N) * C;
    return {(3 * n + C) * sizeof(real) + 8.0 * N + 8.0 * C, n * sizeof(real) + 8.0 * C, 14 * n};
}
