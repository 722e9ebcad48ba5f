#include "../kernels/adamw.h"

#include "check.h"
#include "oracle.h"

namespace {

constexpr bool kMaster = sizeof(real) < sizeof(float); // the bf16 build keeps float weights beside the bf16 ones

// Float weights, wherever this build keeps them, and what goes with them.
struct State {
    Vector<float> weights, m, v; // (n)
    Vector<real> params;         // (n); NaN at first in the bf16 build, which must not read them

    explicit State(int64_t n, uint64_t seed = 1)
        : weights(random_normal<float>(n, seed)), m(n), v(n), params(poisoned<real>(n)) {}

    void update(const Vector<float>& grads, float scale, const AdamW& opt) {
        if constexpr (kMaster)
            adamw_update(nullptr, params.data(), weights.data(), m.data(), v.data(), grads.data(), &scale,
                         weights.size(), opt);
        else
            adamw_update(nullptr, reinterpret_cast<real*>(weights.data()), nullptr, m.data(), v.data(), grads.data(),
                         &scale, weights.size(), opt);
    }
};

constexpr double kFloat = 1.2e-7;

} // namespace

TEST_CASE("several steps against the oracle") {
    struct Case {
        float lr, beta1, beta2, eps, weight_decay, scale, grad;
        int64_t first_t;
    };
    const Case cases[] = {
        {1e-3f, 0.9f, 0.95f, 1e-8f, 0.1f, 1, 1, 1},
        {1e-1f, 0.9f, 0.999f, 1e-8f, 0, 0.37f, 1, 1},       // no decay, clipped
        {1e-2f, 0.9f, 0.999f, 1, 0.5f, 1, 1, 1},            // eps as large as the gradient
        {1e-2f, 0.9f, 0.95f, 1e-8f, 0.1f, 1, 1e-10f, 1},    // eps above the gradient: hardly a step
        {1e-2f, 0.9f, 0.95f, 1e-20f, 0.1f, 1, 1e-15f, 1},   // v about 1e-30, and still a whole step
        {1e-2f, 0, 0.5f, 1e-8f, 0.1f, 1, 1, 1},             // no momentum
        {1e-3f, 0.9f, 0.999f, 1e-8f, 0.1f, 1, 1, 20000000}, // long trained: the corrections are 1
    };
    for (const Case& c : cases)
        for (int64_t n : {1, 7, 64, 1003}) {
            CAPTURE(&c - cases);
            CAPTURE(n);
            State got(n);
            std::vector<double> p = to_double(got.weights), m(n), v(n);
            const std::vector<double> start = p;
            const int steps = 6;
            for (int step = 0; step < steps; step++) {
                const Vector<float> grads = random_normal<float>(n, 100 + step, c.grad);
                AdamW opt{c.lr, c.beta1, c.beta2, c.eps, c.weight_decay, c.first_t + step};
                got.update(grads, c.scale, opt);
                for (int64_t i = 0; i < n; i++)
                    oracle::adamw(p[i], m[i], v[i], double(c.scale) * grads[i], c.lr, c.beta1, c.beta2, c.eps,
                                  c.weight_decay, opt.t);
            }
            // m and v lose a few roundings a step; of a weight, each step rounds it twice and moves it by about lr.
            check_close("m", got.m, m, 3 * kFloat * steps);
            check_close("v", got.v, v, 3 * kFloat * steps);
            for (int64_t i = 0; i < n; i++) {
                const double bound = steps * (kFloat * (std::abs(p[i]) + std::abs(start[i])) + 10 * kFloat * c.lr);
                if (!(std::abs(got.weights[i] - p[i]) <= bound)) CHECK(got.weights[i] == doctest::Approx(p[i]));
            }
            if (kMaster)
                for (int64_t i = 0; i < n; i++) {
                    real rounded;
                    assign(rounded, got.weights[i]);
                    if (memcmp(&rounded, &got.params[i], sizeof rounded) != 0)
                        CHECK(to_float(got.params[i]) == to_float(rounded));
                }
        }
}

TEST_CASE("under a constant gradient every step is lr·sign(g): the corrections undo the β to the last digits") {
    State got(100);
    std::fill(got.weights.begin(), got.weights.end(), 0.f);
    Vector<float> grads = random_normal<float>(100, 5);
    for (float& g : grads) g += g > 0 ? 1 : -1;
    std::vector<double> want(100);
    for (int64_t t = 1; t <= 8; t++) {
        got.update(grads, 1, AdamW{0.25f, 0.9f, 0.999f, 1e-12f, 0.f, t});
        for (int i = 0; i < 100; i++) want[i] -= grads[i] > 0 ? 0.25 : -0.25;
        check_close("p", got.weights, want, 4 * kFloat); // with 0.999ᵗ in float, 1e-5
    }
}

TEST_CASE("a NaN scale changes nothing") {
    State got(100);
    const AdamW opt{1e-3f};
    got.update(random_normal<float>(100, 5), 1, opt);
    const State before = got;
    got.update(random_normal<float>(100, 6), NAN, opt);
    CHECK(check::same_bits(got.weights, before.weights));
    CHECK(check::same_bits(got.m, before.m));
    CHECK(check::same_bits(got.v, before.v));
    CHECK(check::same_bits(got.params, before.params));
}

TEST_CASE("updates are counted from 1") {
    State got(4);
    CHECK_THROWS_AS(got.update({1, 2, 3, 4}, 1, AdamW{.lr = 1e-3f, .t = 0}), std::invalid_argument);
}

TEST_CASE("the same bits on any number of threads") {
    State first(0);
    check::with_threads({1, 2, 3, 16}, [&](int threads) {
        CAPTURE(threads);
        State got(10007);
        for (int64_t t = 1; t <= 3; t++)
            got.update(random_normal<float>(10007, t), 0.7f, AdamW{1e-2f, 0.9f, 0.95f, 1e-8f, 0.1f, t});
        if (first.weights.empty()) first = got;
        CHECK(check::same_bits(got.weights, first.weights));
        CHECK(check::same_bits(got.m, first.m));
        CHECK(check::same_bits(got.v, first.v));
    });
}

TEST_SUITE("long") {
    TEST_CASE("more than 2^31 parameters: the last ones are right") {
        const int64_t n = (int64_t(1) << 31) + 100003, tail = 1000;
        State want(tail);
        const Vector<float> grads = random_normal<float>(tail, 3);
        // Zeros under zero gradients stay zeros, so the mirrored part may be updated in any order.
        check::Huge<float> weights(n, true), m(n, true), v(n, true), g(n);
        check::Huge<real> params(kMaster ? n : 1, true);
        memcpy(&weights[n - tail], want.weights.data(), tail * sizeof(float));
        memcpy(&g[n - tail], grads.data(), tail * sizeof(float));
        const AdamW opt{1e-2f};
        const float scale = 1;
        want.update(grads, scale, opt);
        adamw_update(nullptr, kMaster ? params.data() : reinterpret_cast<real*>(weights.data()),
                     kMaster ? weights.data() : nullptr, m.data(), v.data(), g.data(), &scale, n, opt);
        CHECK(memcmp(&weights[n - tail], want.weights.data(), tail * sizeof(float)) == 0);
        CHECK(memcmp(&v[n - tail], want.v.data(), tail * sizeof(float)) == 0);
        if (kMaster) CHECK(memcmp(&params[n - tail], want.params.data(), tail * sizeof(real)) == 0);
    }
}
