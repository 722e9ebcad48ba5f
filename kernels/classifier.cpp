#include "classifier.h"

#include <cmath>
#include <type_traits>

#include "common.h"
#include "math.h"

namespace {

constexpr int kUnroll = 4; // independent maxima and sums, so that none waits for the one before it

// e^d for a logit's distance d <= 0 from the maximum. Below −87 it is no normal float any more and counts as 0; NaN
// stays NaN.
Vec weight(Vec d) { return d < -87.f ? Vec{} : exp_bounded(d); }
float weight(float d) { return weight(splat(d))[0]; }

struct Softmax {
    float max, sum; // sum of the weights exp(logit − max)
};

// Of one row of logits (V), in two sweeps: the first brings the row into L2, so the second costs no memory traffic.
// With kKeep the weights replace the logits.
template <bool kKeep> Softmax softmax(std::conditional_t<kKeep, real*, const real*> logits, int64_t V) {
    Vec m[kUnroll];
    for (Vec& lanes : m) lanes = splat(-INFINITY);
    int64_t v = 0;
    for (; v + kUnroll * kLanes <= V; v += kUnroll * kLanes)
        for (int u = 0; u < kUnroll; u++) m[u] = max(m[u], load(logits + v + u * kLanes));
    float largest = max(max(max(m[0], m[1]), max(m[2], m[3])));
    for (; v < V; v++) largest = std::max(largest, to_float(logits[v]));

    Vec s[kUnroll] = {};
    for (v = 0; v + kUnroll * kLanes <= V; v += kUnroll * kLanes)
        for (int u = 0; u < kUnroll; u++) {
            const Vec w = weight(load(logits + v + u * kLanes) - largest);
            s[u] += w;
            if constexpr (kKeep) store(logits + v + u * kLanes, w);
        }
    float total = sum((s[0] + s[1]) + (s[2] + s[3]));
    for (; v < V; v++) {
        const float w = weight(to_float(logits[v]) - largest);
        total += w;
        if constexpr (kKeep) assign(logits[v], w);
    }
    return {largest, total};
}

// The difference first: both terms may be large, and the logarithm is not.
float loss_of(Softmax s, float target_logit) { return (s.max - target_logit) + std::log(s.sum); }

} // namespace

void classifier_forward_backward(Stream, float* losses, real* logits, const int32_t* targets, float dloss, int64_t N,
                                 int64_t V, int64_t Vp) {
    // Exponentials are what costs here, not memory. Floats keep theirs from the sum to the gradient (1.6 times as
    // fast); bf16 would round them twice, so it computes them again.
    constexpr bool kKeep = std::is_same_v<real, float>;
    parallel_ranges(N, 1, [&](int64_t begin, int64_t end, int) {
        for (int64_t n = begin; n < end; n++) {
            real* row = logits + n * Vp; // (Vp)
            const int64_t target = targets[n];
            if (target < 0) {
                losses[n] = 0;
                memset(row, 0, Vp * sizeof(real));
                continue;
            }
            const float target_logit = to_float(row[target]);
            const Softmax s = softmax<kKeep>(row, V);
            losses[n] = loss_of(s, target_logit);

            const float factor = dloss / s.sum;
            auto gradient = [&](auto x) {
                if constexpr (kKeep)
                    return x * factor;
                else
                    return weight(x - s.max) * factor;
            };
            int64_t v = 0;
            for (; v + kLanes <= V; v += kLanes) store(row + v, gradient(load(row + v)));
            for (; v < V; v++) assign(row[v], gradient(to_float(row[v])));
            assign(row[target], weight(target_logit - s.max) * factor - dloss);
            memset(row + V, 0, (Vp - V) * sizeof(real));
        }
    });
}

void classifier_forward(Stream, float* losses, const real* logits, const int32_t* targets, int64_t N, int64_t V,
                        int64_t Vp) {
    parallel_ranges(N, 1, [&](int64_t begin, int64_t end, int) {
        for (int64_t n = begin; n < end; n++) {
            const real* row = logits + n * Vp; // (Vp)
            losses[n] = targets[n] < 0 ? 0 : loss_of(softmax<false>(row, V), to_float(row[targets[n]]));
        }
    });
}

void classifier_add_losses(Stream, double* total, const float* losses, double factor, int64_t N) {
    double sum = 0;
    for (int64_t n = 0; n < N; n++) sum += losses[n];
    *total += factor * sum;
}
