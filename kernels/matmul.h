// Linear layers, through oneDNN (cpu) and cuBLASLt (cuda), with bias and GELU fused where the library can.
//
//   forward:          pre = inp · wᵀ + bias        out = gelu(pre)
//   backward_input:   dinp = (dout · w) ∘ gelu'(pre)      pre: what the layer *before* fed its GELU, or null
//   backward_weight:  dw += doutᵀ · inp            dbias += Σ_n dout[n,:]
//
// Weights are (OC,C) row-major, as llm.c stores them. Products of bf16 are summed in float. On a CPU without AVX-512,
// for which oneDNN has no bf16 products, the cpu build multiplies float copies, at the speed of the fp32 build.
#pragma once
#include <cstddef>

#include "gelu.h"
#include "types.h"

// Library handle, cache of prepared primitives, work space. One a device, opened once, used from one thread.
struct Matmul;
Matmul* matmul_open(Stream stream);
void matmul_close(Matmul* mm);

// Bytes that cuBLASLt is given at opening for the partial sums of products that are split along K, and 1 MiB of it for
// dbias. NVIDIA recommends 32 MiB from Hopper (compute capability 9) on and 4 before; twice and eight times that
// leave the heuristic every choice. Of an unknown GPU the larger. oneDNN is given what each product asks for.
inline size_t matmul_workspace(const Target& target, int capability_major = 9) {
    return !target.cuda ? 0 : size_t(capability_major >= 9 ? 64 : 32) << 20;
}

// out (N,OC) `=`. pre (N,OC) `=` or null: keep the pre-activation for the backward pass (kind != none only).
// inp (N,C), w (OC,C), bias (OC) or null. No aliasing. GELU is taken of the float sum where it is part of the product,
// else of the sum rounded to real.
void matmul_forward(Matmul* mm, real* out, real* pre, const real* inp, const real* w, const real* bias, int64_t N,
                    int64_t C, int64_t OC, Gelu kind = Gelu::none);

// out (N,OC) `+=` inp · wᵀ + bias, the branch of a parallel block beside the one that out holds. Else as above.
void matmul_forward_add(Matmul* mm, real* out, const real* inp, const real* w, const real* bias, int64_t N, int64_t C,
                        int64_t OC);

// dinp (N,C) `=`. dout (N,OC), w (OC,C), pre (N,C) or null when kind == none. No aliasing.
void matmul_backward_input(Matmul* mm, real* dinp, const real* dout, const real* w, const real* pre, int64_t N,
                           int64_t C, int64_t OC, Gelu kind = Gelu::none);

// dinp (N,C) `+=` dout · w, which is rounded together with what dinp holds: one share of a gradient that several
// products make, as those of attention's head groups do. Else as above.
void matmul_backward_input_add(Matmul* mm, real* dinp, const real* dout, const real* w, int64_t N, int64_t C,
                               int64_t OC);

// dw (OC,C) `+=` in float or null, dbias (OC) `+=` in float or null. dout (N,OC), inp (N,C; null where dw is).
// Deterministic for a thread count.
void matmul_backward_weight(Matmul* mm, float* dw, float* dbias, const real* dout, const real* inp, int64_t N,
                            int64_t C, int64_t OC);

inline Cost matmul_forward_cost(int64_t N, int64_t C, int64_t OC) {
    double n = double(N), c = double(C), oc = double(OC);
    return {(n * c + oc * c + oc) * sizeof(real), n * oc * sizeof(real), 2 * n * c * oc};
}
inline Cost matmul_backward_input_cost(int64_t N, int64_t C, int64_t OC) {
    double n = double(N), c = double(C), oc = double(OC);
    return {(n * oc + oc * c) * sizeof(real), n * c * sizeof(real), 2 * n * c * oc};
}
inline Cost matmul_backward_input_add_cost(int64_t N, int64_t C, int64_t OC) {
    return matmul_backward_input_cost(N, C, OC) + Cost{.read = double(N) * C * sizeof(real)};
}
inline Cost matmul_backward_weight_cost(int64_t N, int64_t C, int64_t OC) {
    double n = double(N), c = double(C), oc = double(OC);
    return {(n * oc + n * c) * sizeof(real) + oc * c * sizeof(float), oc * c * sizeof(float), 2 * n * c * oc};
}
