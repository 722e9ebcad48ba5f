// GELU on the CPU. Both forms are x times a sigmoid-like function of x that is computed whole, never as 1 + something
// near −1: so the left tail keeps its digits, and its gradient too.
#include "gelu.h"

#include "common.h"
#include "math.h"

namespace {

// tanh form: x/2·(1 + tanh y) = x·σ(2y), and 2y = x·(kLinear + kCubic·x²).
constexpr float kLinear = 1.5957691216f; // 2·sqrt(2/π)
constexpr float kCubic = 0.0713548163f;  // 0.044715·kLinear

// Left of these x the function is 0 in floats (but for a few in the last binades), right of them it is x. Clamping
// there keeps ∞·0 out of the formulas and e^(−2y) finite: 2y(−10) = −87.3.
constexpr float kTanhEdge = 10.f, kErfEdge = 13.f;

// x clamped to [−edge, edge]; the order of comparison lets NaN through.
Vec clamp(Vec x, float edge) { return min(splat(edge), max(splat(-edge), x)); }

struct TanhForm {
    static Vec value(Vec x) {
        Vec c = clamp(x, kTanhEdge);
        Vec result = x / (1.f + exp_bounded(-c * (kLinear + kCubic * c * c)));
        return x < -kTanhEdge ? Vec{} : result;
    }
    // σ + x·σ'·(2y)', with σ' = σ²·e^(−2y): no 1 − σ, which would cancel on the right.
    static Vec slope(Vec x) {
        Vec c = clamp(x, kTanhEdge), square = c * c;
        Vec e = exp_bounded(-c * (kLinear + kCubic * square)), s = 1.f / (1.f + e);
        Vec result = s + c * s * (s * e) * (kLinear + 3 * kCubic * square);
        return x < -kTanhEdge ? Vec{} : result;
    }
};

struct ErfForm {
    static Vec value(Vec x) {
        Vec result = x * normal_distribution(x).below;
        return x < -kErfEdge ? Vec{} : result;
    }
    static Vec slope(Vec x) {
        Normal n = normal_distribution(x);
        Vec result = n.below + clamp(x, kErfEdge) * n.density;
        return x < -kErfEdge ? Vec{} : result;
    }
};

// Fewer elements than this are not worth waking the other threads for.
constexpr int64_t kAlone = 8192;

// body(i, count) for every vector of [0, n): count is kLanes, but for the last one of a run, which may be partial.
template <class Body> void for_vectors(int64_t n, Body body) {
    auto run = [&](int64_t begin, int64_t end, int) {
        int64_t i = begin;
        for (; i + kLanes <= end; i += kLanes) body(i, int64_t(kLanes));
        if (i < end) body(i, end - i);
    };
    if (n < kAlone)
        run(0, n, 0);
    else
        parallel_ranges(n, 4 * kLanes, run);
}

Vec load_some(const real* p, int64_t count) {
    if (count == kLanes) return load(p);
    real padded[kLanes] = {};
    memcpy(padded, p, count * sizeof(real));
    return load(padded);
}
void store_some(real* p, Vec v, int64_t count) {
    if (count == kLanes) return store(p, v);
    real padded[kLanes];
    store(padded, v);
    memcpy(p, padded, count * sizeof(real));
}

template <class Form> void forward(real* out, const real* inp, int64_t n) {
    for_vectors(n,
                [=](int64_t i, int64_t count) { store_some(out + i, Form::value(load_some(inp + i, count)), count); });
}
template <class Form> void backward(real* dinp, const real* dout, const real* inp, int64_t n) {
    for_vectors(n, [=](int64_t i, int64_t count) {
        store_some(dinp + i, load_some(dout + i, count) * Form::slope(load_some(inp + i, count)), count);
    });
}

} // namespace

void gelu_forward(Stream, real* out, const real* inp, int64_t n, Gelu kind) {
    if (kind == Gelu::tanh) forward<TanhForm>(out, inp, n);
    if (kind == Gelu::erf) forward<ErfForm>(out, inp, n);
    if (kind == Gelu::none && out != inp)
        for_vectors(n, [=](int64_t i, int64_t count) { memcpy(out + i, inp + i, count * sizeof(real)); });
}

void gelu_backward(Stream, real* dinp, const real* dout, const real* inp, int64_t n, Gelu kind) {
    if (kind == Gelu::tanh) backward<TanhForm>(dinp, dout, inp, n);
    if (kind == Gelu::erf) backward<ErfForm>(dinp, dout, inp, n);
    if (kind == Gelu::none && dinp != dout)
        for_vectors(n, [=](int64_t i, int64_t count) { memcpy(dinp + i, dout + i, count * sizeof(real)); });
}
