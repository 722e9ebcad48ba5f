// GELU (Hendrycks & Gimpel 2016) in the two forms that models use. GPT-2 has the tanh form, Pythia in HF the erf form.
//
//   tanh:  x/2 · (1 + tanh(sqrt(2/π)·(x + 0.044715·x³)))        erf:  x/2 · (1 + erf(x/sqrt(2)))
#pragma once
#include "types.h"

enum class Gelu { none, tanh, erf }; // none: the identity, for matmuls without an activation

// out (n) `=`. inp (n). out may alias inp.
void gelu_forward(Stream stream, real* out, const real* inp, int64_t n, Gelu kind);

// dinp (n) = dout · gelu'(inp). inp is the pre-activation. dinp may alias dout.
void gelu_backward(Stream stream, real* dinp, const real* dout, const real* inp, int64_t n, Gelu kind);

// FLOPs count an exp, tanh or erf as ten.
inline Cost gelu_forward_cost(int64_t n) { return {double(n) * sizeof(real), double(n) * sizeof(real), 18.0 * n}; }
inline Cost gelu_backward_cost(int64_t n) { return {2.0 * n * sizeof(real), double(n) * sizeof(real), 28.0 * n}; }
