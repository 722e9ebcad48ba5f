#include "../kernels/optimizer.h"

#include <bit>

#include "check.h"
#include "oracle.h"

namespace {

// Float states.
States states_of(float* m, float* v) { return {StateType::fp32, m, v}; }

constexpr bool kMaster = sizeof(real) < sizeof(float); // the bf16 build keeps float weights beside the bf16 ones

// Float weights, wherever this build keeps them, and what goes with them.
struct State {
    Vector<float> weights, m, v; // (n)
    Vector<real> params;         // (n); NaN at first in the bf16 build, which must not read them

    explicit State(int64_t n, uint64_t seed = 1)
        : weights(random_normal<float>(n, seed)), m(n), v(n), params(poisoned<real>(n)) {}

    void update(const Vector<float>& grads, float scale_value, const Optimizer& opt,
                OptimizerCounts* counts = nullptr) {
        update(grads.data(), scale_value, opt, counts);
    }
    void update(Gradients grads, float scale_value, const Optimizer& opt, OptimizerCounts* counts = nullptr) {
        const Vector<float> scale = {scale_value};
        const States states{StateType::fp32, m.data(), opt.rule == Rule::adamw ? v.data() : nullptr};
        optimizer_update(nullptr, kMaster ? params.data() : reinterpret_cast<real*>(weights.data()),
                         kMaster ? weights.data() : nullptr, states, grads, scale.data(), counts, weights.size(), opt);
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
        for (int64_t n : {1, 7, 64, 1003, 2051}) {
            CAPTURE(&c - cases);
            CAPTURE(n);
            State got(n);
            std::vector<double> p = to_double(got.weights), m(n), v(n);
            const std::vector<double> start = p;
            const int steps = 6;
            for (int step = 0; step < steps; step++) {
                const Vector<float> grads = random_normal<float>(n, 100 + step, c.grad);
                Optimizer opt{c.lr, c.beta1, c.beta2, c.eps, c.weight_decay, c.first_t + step};
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

TEST_CASE("Lion: several steps against the oracle") {
    for (float beta2 : {0.95f, 0.99f})
        for (int64_t n : {1, 7, 1003, 2051}) {
            CAPTURE(n);
            State got(n);
            std::vector<double> p = to_double(got.weights), m(n);
            const std::vector<double> start = p;
            const int steps = 6;
            for (int64_t step = 1; step <= steps; step++) {
                Vector<float> grads = random_normal<float>(n, 100 + step);
                if (step == 1) grads[0] = 0; // of zeros the sign is 0
                const Optimizer opt{.lr = 1e-2f, .beta2 = beta2, .t = step, .rule = Rule::lion};
                got.update(grads, 0.5f, opt);
                for (int64_t i = 0; i < n; i++)
                    oracle::lion(p[i], m[i], 0.5 * grads[i], opt.lr, opt.beta1, beta2, opt.weight_decay);
            }
            // Where β1·m + (1−β1)·g all but cancels, its sign is a matter of rounding; here it nowhere does.
            check_close("m", got.m, m, 3 * kFloat * steps, 0.1);
            for (int64_t i = 0; i < n; i++) {
                const double bound = steps * kFloat * (std::abs(p[i]) + std::abs(start[i]) + 1e-2);
                if (!(std::abs(got.weights[i] - p[i]) <= bound)) CHECK(got.weights[i] == doctest::Approx(p[i]));
            }
            for (float v : got.v) CHECK(v == 0);
        }
}

TEST_CASE("elements without a finite gradient keep weight, m and v and are counted") {
    const int64_t n = 1003;
    for (Rule rule : {Rule::adamw, Rule::lion}) {
        State got(n), want(n);
        const float bad[] = {NAN, INFINITY, -INFINITY, 2e19f}; // the last one's square is not finite
        Vector<float> grads = random_normal<float>(n, 5);
        Optimizer opt{.lr = 1e-2f, .rule = rule};
        got.update(grads, 1, opt), want.update(grads, 1, opt);
        const State before = got;
        for (int i = 0; i < 4; i++) grads[i * 200] = bad[i];
        opt.t = 2;
        Vector<OptimizerCounts> counts = {{10, 20, 30}};
        got.update(grads, 1, opt, counts.data());
        for (int i = 0; i < 4; i++) grads[i * 200] = 1;
        want.update(grads, 1, opt);
        CHECK(counts[0].non_finite == 14);
        CHECK(counts[0].vanished == 20);
        CHECK(counts[0].saturated == 30);
        for (int64_t i = 0; i < n; i++) {
            const State& expected = i % 200 == 0 && i < 800 ? before : want;
            if (got.weights[i] != expected.weights[i]) CHECK(got.weights[i] == expected.weights[i]);
            if (got.m[i] != expected.m[i]) CHECK(got.m[i] == expected.m[i]);
            if (got.v[i] != expected.v[i]) CHECK(got.v[i] == expected.v[i]);
        }
    }
}

TEST_CASE("bf16 gradients are their floats") {
    for (int64_t n : {5, 1003}) {
        const Vector<bf16> half = random_normal<bf16>(n, 5);
        Vector<float> grads(n);
        for (int64_t i = 0; i < n; i++) grads[i] = to_float(half[i]);
        State want(n), got(n);
        want.update(grads, 0.7f, {.lr = 1e-2f}), got.update(half.data(), 0.7f, {.lr = 1e-2f});
        CHECK(check::same_bits(got.weights, want.weights));
        CHECK(check::same_bits(got.m, want.m));
        CHECK(check::same_bits(got.v, want.v));
    }
}

TEST_CASE("under a constant gradient every step is lr·sign(g): the corrections undo the β to the last digits") {
    State got(100);
    std::fill(got.weights.begin(), got.weights.end(), 0.f);
    Vector<float> grads = random_normal<float>(100, 5);
    for (float& g : grads) g += g > 0 ? 1 : -1;
    std::vector<double> want(100);
    for (int64_t t = 1; t <= 8; t++) {
        got.update(grads, 1, Optimizer{0.25f, 0.9f, 0.999f, 1e-12f, 0.f, t});
        for (int i = 0; i < 100; i++) want[i] -= grads[i] > 0 ? 0.25 : -0.25;
        check_close("p", got.weights, want, 4 * kFloat); // with 0.999ᵗ in float, 1e-5
    }
}

TEST_CASE("a NaN scale changes nothing") {
    State got(100);
    const Optimizer opt{1e-3f};
    got.update(random_normal<float>(100, 5), 1, opt);
    const State before = got;
    got.update(random_normal<float>(100, 6), NAN, opt);
    CHECK(check::same_bits(got.weights, before.weights));
    CHECK(check::same_bits(got.m, before.m));
    CHECK(check::same_bits(got.v, before.v));
    CHECK(check::same_bits(got.params, before.params));
}

TEST_CASE("each array from any address") {
    const int64_t n = 20;
    const Vector<float> grads = random_normal<float>(n, 5), scale = {0.5f};
    const Optimizer opt{1e-2f};
    State want(n);
    want.update(grads, 0.5f, opt);
    for (int shifted = 0; shifted < 5; shifted++) {
        CAPTURE(shifted);
        State got(n);
        check::Unaligned<float> weights(got.weights), m(got.m), v(got.v), g(grads);
        check::Unaligned<real> params(got.params);
        float* at = shifted == 0 ? weights.data() : got.weights.data();
        real* rounded = shifted == 4 ? params.data() : got.params.data();
        const States states = states_of(shifted == 1 ? m.data() : got.m.data(), shifted == 2 ? v.data() : got.v.data());
        optimizer_update(nullptr, kMaster ? rounded : reinterpret_cast<real*>(at), kMaster ? at : nullptr, states,
                         shifted == 3 ? g.data() : grads.data(), scale.data(), nullptr, n, opt);
        check_close("weights", shifted == 0 ? weights.copy() : got.weights, to_double(want.weights), 2 * kFloat);
        check_close("m", shifted == 1 ? m.copy() : got.m, to_double(want.m), 2 * kFloat);
        check_close("v", shifted == 2 ? v.copy() : got.v, to_double(want.v), 2 * kFloat);
        if (kMaster)
            check_close("params", shifted == 4 ? params.copy() : got.params, to_double(want.weights), kRealEpsilon / 2);
    }
}

TEST_CASE("updates are counted from 1") {
    State got(4);
    CHECK_THROWS_AS(got.update(Vector<float>{1, 2, 3, 4}, 1, Optimizer{.lr = 1e-3f, .t = 0}), std::invalid_argument);
}

TEST_CASE("a part begins at a multiple of 256") {
    State got(4);
    for (int64_t first : {1, 255, 384, -256})
        CHECK_THROWS_AS(got.update(Vector<float>{1, 2, 3, 4}, 1, Optimizer{.lr = 1e-3f, .first = first}),
                        std::invalid_argument);
}

namespace {

// What two steps make of a tensor that each of them updates in parts, from one of `cuts` to the next.
struct InParts {
    Vector<real> params;
    Vector<float> weights, m_absmax, v_absmax;
    Vector<uint8_t> m, v; // states of any type
    Vector<OptimizerCounts> counts;

    InParts(const std::vector<int64_t>& cuts, Rule rule, StateType type, bool master)
        : params(random_normal<real>(cuts.back(), 2)), weights(random_normal<float>(cuts.back(), 2)),
          m_absmax(absmax_count(cuts.back())), v_absmax(m_absmax), m(4 * cuts.back()), v(m), counts(1) {
        const int64_t bytes = type == StateType::fp32 ? 4 : type == StateType::bf16 ? 2 : 1;
        const Vector<float> scale = {0.5f};
        for (int64_t t = 1; t <= 2; t++) {
            Vector<float> grads = random_normal<float>(cuts.back(), t);
            grads[3] = grads[1100] = NAN;
            for (size_t part = 0; part + 1 < cuts.size(); part++) {
                const int64_t i = cuts[part];
                const States states{type, m.data() + bytes * i, v.data() + bytes * i, m_absmax.data() + i / 256,
                                    v_absmax.data() + i / 256};
                optimizer_update(nullptr, params.data() + i, master ? weights.data() + i : nullptr, states,
                                 grads.data() + i, scale.data(), counts.data(), cuts[part + 1] - i,
                                 {.lr = 1e-2f, .t = t, .seed = 9, .tensor = 4, .rule = rule, .first = i});
            }
        }
    }
};

} // namespace

TEST_CASE("a tensor updated part by part ends with the bits and counts of one call") {
    const int64_t n = 256 * 9 + 77;
    for (Rule rule : {Rule::adamw, Rule::lion})
        for (StateType type : {StateType::fp32, StateType::bf16, StateType::int8})
            for (bool master : {true, false}) {
                CAPTURE(int(type));
                CAPTURE(master);
                const InParts whole({0, n}, rule, type, master);
                const InParts parts({0, 256, 1024, 1792, n}, rule, type, master);
                CHECK(check::same_bits(parts.params, whole.params));
                CHECK(check::same_bits(parts.weights, whole.weights));
                CHECK(check::same_bits(parts.m, whole.m));
                CHECK(check::same_bits(parts.v, whole.v));
                CHECK(check::same_bits(parts.m_absmax, whole.m_absmax));
                CHECK(check::same_bits(parts.v_absmax, whole.v_absmax));
                CHECK(check::same_bits(parts.counts, whole.counts));
                CHECK(whole.counts[0].non_finite == 4);
            }
}

TEST_CASE("the same bits on any number of threads") {
    State first(0);
    check::with_threads({1, 2, 3, 16}, [&](int threads) {
        CAPTURE(threads);
        State got(10007);
        for (int64_t t = 1; t <= 3; t++)
            got.update(random_normal<float>(10007, t), 0.7f, Optimizer{1e-2f, 0.9f, 0.95f, 1e-8f, 0.1f, t});
        if (first.weights.empty()) first = got;
        CHECK(check::same_bits(got.weights, first.weights));
        CHECK(check::same_bits(got.m, first.m));
        CHECK(check::same_bits(got.v, first.v));
    });
}

// A float's neighbours in bf16 and what chance makes of it, from the words of Philox: the contract once more.
uint16_t rounded_by_chance(float x, const Optimizer& opt, int64_t i) {
    const uint64_t stream = (uint64_t(0x6164616d) << 32) ^ (uint64_t(opt.tensor) << 40) ^ uint64_t(opt.t);
    const uint32_t word = philox(opt.seed, stream, uint64_t(opt.first + i) >> 3).word[(i & 7) >> 1];
    const uint32_t noise = i & 1 ? word >> 16 : word & 0xffff;
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    if (std::isnan(x) || std::isinf(x)) return bits >> 16;
    return (uint64_t(bits) + noise) >> 16;
}

// Weights in bf16 alone: `weights` after one update of nothing but decay, w·(1 − 2^-10), which is exact in float.
template <class Real> struct Rounded {
    Vector<Real> weights, start; // (n)

    Rounded(int64_t n, uint64_t seed = 3) : weights(random_normal<Real>(n, seed)), start(weights) {}
    static float decayed(Real w) { return to_float(w) * (1 - 0x1p-10f); }
    // From `offset` on, so that other alignments have their turn.
    void update(Optimizer opt, int64_t offset = 0) {
        const int64_t n = weights.size();
        opt.lr = 0x1p-5f, opt.weight_decay = 0x1p-5f;
        Vector<Real> there(n + offset);
        std::copy(weights.begin(), weights.end(), there.begin() + offset);
        Vector<float> m(n + offset), v(n + offset), grads(n + offset), scale = {1};
        optimizer_update(nullptr, there.data() + offset, nullptr, states_of(m.data() + offset, v.data() + offset),
                         grads.data() + offset, scale.data(), nullptr, n, opt);
        std::copy(there.begin() + offset, there.end(), weights.begin());
    }
};

// In a template, for only the build whose params are bf16 may call the layer with them.
template <class Real> void check_stochastic_rounding() {
    if constexpr (sizeof(Real) == 2) {
        const Optimizer base{.lr = 0, .t = 7, .seed = 0x123456789abcdef, .tensor = 5};
        SUBCASE("the bits of the formula, for any length and alignment") {
            for (int64_t n : {1, 7, 8, 9, 2047, 2056, 5003})
                for (int64_t offset : {0, 1}) {
                    CAPTURE(n);
                    CAPTURE(offset);
                    Rounded<Real> got(n);
                    Optimizer opt = base;
                    opt.first = offset * ((int64_t(1) << 36) + 256);
                    got.update(opt, offset);
                    int64_t wrong = 0, up = 0;
                    for (int64_t i = 0; i < n; i++) {
                        const float exact = Rounded<Real>::decayed(got.start[i]);
                        wrong += got.weights[i].bits != rounded_by_chance(exact, opt, i);
                        up += got.weights[i].bits == got.start[i].bits;
                    }
                    CHECK(wrong == 0);
                    if (n > 1000) CHECK(up > n / 2); // the step is a 4th to an 8th of a bf16's, which nearest drops
                    if (n > 1000) CHECK(up < n);
                }
        }
        SUBCASE("another step, seed or tensor is another noise; the same again repeats") {
            const int64_t n = 1000;
            auto bits = [&](const Optimizer& opt) {
                Rounded<Real> got(n);
                got.update(opt);
                return got.weights;
            };
            Optimizer t = base, seed = base, tensor = base;
            t.t++, seed.seed++, tensor.tensor++;
            const Vector<Real> first = bits(base);
            CHECK(check::same_bits(first, bits(base)));
            for (const Optimizer& other : {t, seed, tensor}) {
                const Vector<Real> second = bits(other);
                int64_t differ = 0;
                for (int64_t i = 0; i < n; i++) differ += first[i].bits != second[i].bits;
                CHECK(differ > n / 10); // of two draws that go up with p in 1/8 .. 1/4 on average 0.3·n
            }
        }
        SUBCASE("the mean of many steps is the exact value") {
            const int64_t n = 512;
            const int steps = 64;
            double error = 0, variance = 0;
            std::vector<double> at_place(8), place_variance(8); // of the eight that share a Philox block
            for (int step = 0; step < steps; step++) {
                Rounded<Real> got(n);
                Optimizer opt = base;
                opt.t = 1 + step;
                got.update(opt);
                for (int64_t i = 0; i < n; i++) {
                    const double exact = Rounded<Real>::decayed(got.start[i]);
                    uint32_t below = std::bit_cast<uint32_t>(float(exact)) & 0xffff0000u;
                    const double low = std::bit_cast<float>(below), high = std::bit_cast<float>(below + 0x10000u);
                    const double part = (exact - low) / (high - low);
                    const double e = (to_float(got.weights[i]) - low) / (high - low) - part;
                    error += e, at_place[i % 8] += e;
                    variance += part * (1 - part), place_variance[i % 8] += part * (1 - part);
                }
            }
            CHECK(std::abs(error) < 4 * std::sqrt(variance));
            for (int j = 0; j < 8; j++) CHECK(std::abs(at_place[j]) < 4 * std::sqrt(place_variance[j]));
        }
        SUBCASE("NaN and infinity stay, zero stays, the largest may become infinite") {
            Rounded<Real> got(64);
            for (int i = 0; i < 64; i++) assign(got.weights[i], i % 4 == 0 ? NAN : i % 4 == 1 ? INFINITY : -INFINITY);
            for (int i = 3; i < 64; i += 4) assign(got.weights[i], 0);
            got.update(base);
            for (int i = 0; i < 64; i++) {
                const float w = to_float(got.weights[i]);
                CHECK((i % 4 == 0 ? std::isnan(w) : w == (i % 4 == 1 ? INFINITY : i % 4 == 2 ? -INFINITY : 0)));
            }
            CHECK(std::isinf(to_float(round_stochastically(3.4e38f, 0xffff))));
            CHECK(std::isfinite(to_float(round_stochastically(3.39e38f, 0))));
        }
        SUBCASE("a NaN scale, and the moments as with master weights") {
            const int64_t n = 1003;
            Vector<Real> weights = random_normal<Real>(n, 3), before = weights, copy(n);
            Vector<float> master(n), m(n), v(n), m2(n), v2(n), grads = random_normal<float>(n, 4), scale = {NAN};
            optimizer_update(nullptr, weights.data(), nullptr, states_of(m.data(), v.data()), grads.data(),
                             scale.data(), nullptr, n, base);
            CHECK(check::same_bits(weights, before));
            CHECK(check::same_bits(m, Vector<float>(n)));
            scale[0] = 0.5f;
            Optimizer opt = base;
            opt.lr = 1e-2f;
            for (int64_t i = 0; i < n; i++) master[i] = to_float(weights[i]);
            optimizer_update(nullptr, weights.data(), nullptr, states_of(m.data(), v.data()), grads.data(),
                             scale.data(), nullptr, n, opt);
            optimizer_update(nullptr, copy.data(), master.data(), states_of(m2.data(), v2.data()), grads.data(),
                             scale.data(), nullptr, n, opt);
            CHECK(check::same_bits(m, m2));
            CHECK(check::same_bits(v, v2));
            for (int64_t i = 0; i < n; i++) // one of the two neighbours of what the float weights became
                CHECK(std::abs(to_float(weights[i]) - master[i]) < kRealEpsilon * std::abs(master[i]));
        }
    }
}

TEST_CASE("bf16 weights without master weights are rounded stochastically" *
          doctest::skip(!kMaster) /* floats need no rounding */) {
    check_stochastic_rounding<real>();
}

TEST_CASE("more than 2^31 parameters: the last ones are right" * doctest::test_suite(check::kSimulated ? "" : "long")) {
    const int64_t n = (int64_t(1) << 31) + 100003, tail = 1000;
    State want(tail);
    const Vector<float> grads = random_normal<float>(tail, 3);
    // Zeros under zero gradients stay zeros, so the mirrored part may be updated in any order.
    check::Huge<float> weights(n, true), m(n, true), v(n, true), g(n);
    check::Huge<real> params(kMaster ? n : 1, true);
    memcpy(&weights[n - tail], want.weights.data(), tail * sizeof(float));
    memcpy(&g[n - tail], grads.data(), tail * sizeof(float));
    const Optimizer opt{1e-2f};
    const Vector<float> scale = {1};
    want.update(grads, 1, opt);
    check::OnlyBlocks some(check::blocks_at(double(int64_t(1) << 31) / n));
    optimizer_update(nullptr, kMaster ? params.data() : reinterpret_cast<real*>(weights.data()),
                     kMaster ? weights.data() : nullptr, states_of(m.data(), v.data()), g.data(), scale.data(), nullptr,
                     n, opt);
    CHECK(memcmp(&weights[n - tail], want.weights.data(), tail * sizeof(float)) == 0);
    CHECK(memcmp(&v[n - tail], want.v.data(), tail * sizeof(float)) == 0);
    if (kMaster) CHECK(memcmp(&params[n - tail], want.params.data(), tail * sizeof(real)) == 0);
}
