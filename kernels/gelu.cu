// GELU on the GPU: one pass, 16 bytes an access, bound by memory. Both forms are x times a sigmoid-like function of x
// that is computed whole, never as 1 + something near −1: so the left tail keeps its digits, and its gradient too.
#include "gelu.h"

#include "common.h"
#include "device.h"
#include "launch.h"
#include "ptx.h"

namespace {

constexpr int kThreads = 256;

// tanh form: x/2·(1 + tanh y) = x·σ(2y), and 2y = x·(kLinear + kCubic·x²).
constexpr float kLinear = 1.5957691216f;         // 2·sqrt(2/π)
constexpr float kCubic = 0.0713548163f;          // 0.044715·kLinear
constexpr float kDensityAtZero = 0.39894228040f; // 1/sqrt(2π)

// Left of these x the function is 0 in floats (but for a few in the last binades), right of them it is x. Clamping
// there keeps ∞·0 out of the formulas and e^(−2y) finite: 2y(−10) = −87.3.
constexpr float kTanhEdge = 10.f, kErfEdge = 13.f;

// x clamped to [−edge, edge]; comparisons let NaN through, which fminf would not.
__device__ __forceinline__ float clamp(float x, float edge) {
    x = x < -edge ? -edge : x;
    return x > edge ? edge : x;
}

template <Gelu Kind> __device__ __forceinline__ float value(float x) {
    if constexpr (Kind == Gelu::none) return x;
    if constexpr (Kind == Gelu::tanh) {
        float c = clamp(x, kTanhEdge);
        float result = x / (1.f + expf(-c * (kLinear + kCubic * c * c)));
        return x < -kTanhEdge ? 0.f : result;
    }
    float result = x * normcdff(x);
    return x < -kErfEdge ? 0.f : result;
}

template <Gelu Kind> __device__ __forceinline__ float slope(float x) {
    if constexpr (Kind == Gelu::none) return 1.f;
    if constexpr (Kind == Gelu::tanh) {
        // σ + x·σ'·(2y)', with σ' = σ²·e^(−2y): no 1 − σ, which would cancel on the right.
        float c = clamp(x, kTanhEdge), square = c * c;
        float e = expf(-c * (kLinear + kCubic * square)), s = 1.f / (1.f + e);
        float result = s + c * s * (s * e) * (kLinear + 3 * kCubic * square);
        return x < -kTanhEdge ? 0.f : result;
    }
    float c = clamp(x, kErfEdge);
    float result = normcdff(c) + c * kDensityAtZero * expf(-0.5f * c * c);
    return x < -kErfEdge ? 0.f : result;
}

// Each thread takes N neighbours, and the last ones of a ragged end one by one.
template <Gelu Kind, int N> __global__ void __launch_bounds__(kThreads) forward(real* out, const real* inp, int64_t n) {
    int64_t i = global_thread() * N;
    if (i + N <= n) {
        Pack<real, N> x = load_pack<N>(inp + i);
        float y[N];
#pragma unroll
        for (int j = 0; j < N; j++) y[j] = value<Kind>(to_float(x[j]));
        store_pack(out + i, round_pack<real>(y));
    } else {
        for (; i < n; i++) assign(out[i], value<Kind>(to_float(inp[i])));
    }
}

template <Gelu Kind, int N> __global__ void __launch_bounds__(kThreads)
    backward(real* dinp, const real* dout, const real* inp, int64_t n) {
    int64_t i = global_thread() * N;
    if (i + N <= n) {
        Pack<real, N> x = load_pack<N>(inp + i), d = load_pack<N>(dout + i);
        float y[N];
#pragma unroll
        for (int j = 0; j < N; j++) y[j] = to_float(d[j]) * slope<Kind>(to_float(x[j]));
        store_pack(dinp + i, round_pack<real>(y));
    } else {
        for (; i < n; i++) assign(dinp[i], to_float(dout[i]) * slope<Kind>(to_float(inp[i])));
    }
}

// run(form, width): constants for the form and for how many neighbours a thread takes.
template <class Run> void with_kernel(Gelu kind, bool wide, Run run) {
    auto with_width = [&](auto form) {
        if (wide)
            run(form, std::integral_constant<int, Pack128<real>::size>());
        else
            run(form, std::integral_constant<int, 1>());
    };
    if (kind == Gelu::tanh)
        with_width(std::integral_constant<Gelu, Gelu::tanh>());
    else if (kind == Gelu::erf)
        with_width(std::integral_constant<Gelu, Gelu::erf>());
    else
        with_width(std::integral_constant<Gelu, Gelu::none>());
}

} // namespace

void gelu_forward(Stream stream, real* out, const real* inp, int64_t n, Gelu kind) {
    if (n == 0) return;
    with_kernel(kind, aligned(out) && aligned(inp), [&](auto form, auto width) {
        launch(forward<form(), width()>, blocks_for(n, kThreads * width()), kThreads, 0, stream, out, inp, n);
    });
}

void gelu_backward(Stream stream, real* dinp, const real* dout, const real* inp, int64_t n, Gelu kind) {
    if (n == 0) return;
    with_kernel(kind, aligned(dinp) && aligned(dout) && aligned(inp), [&](auto form, auto width) {
        launch(backward<form(), width()>, blocks_for(n, kThreads * width()), kThreads, 0, stream, dinp, dout, inp, n);
    });
}
