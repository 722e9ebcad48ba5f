// States kept in bf16, rounded stochastically.
#include "../kernels/optimizer.h"

#include <bit>

#include "check.h"

namespace {

constexpr bool kMaster = sizeof(real) < sizeof(float);

// Weights (float, wherever this build keeps them) with states in bf16, beginning at `offset`, so that other alignments
// have their turn.
struct State {
    int64_t n, offset;
    Vector<float> weights;
    Vector<real> params;
    Vector<bf16> m, v;

    explicit State(int64_t count, int64_t shift = 0)
        : n(count), offset(shift), weights(random_normal<float>(count, 1)), params(count), m(count + shift),
          v(count + shift) {}
    void update(Gradients grads, float scale_value, const Optimizer& opt) {
        const Vector<float> scale = {scale_value};
        optimizer_update(nullptr, kMaster ? params.data() : reinterpret_cast<real*>(weights.data()),
                         kMaster ? weights.data() : nullptr,
                         {StateType::bf16, m.data() + offset, opt.rule == Rule::adamw ? v.data() + offset : nullptr},
                         grads, scale.data(), nullptr, n, opt);
    }
    float m_at(int64_t i) const { return to_float(m[offset + i]); }
    float v_at(int64_t i) const { return to_float(v[offset + i]); }
};

constexpr int64_t kFirst[] = {0, 256 * 3, int64_t(1) << 36}; // parts of a tensor that begin here

// What chance makes of x, from the words of Philox: the contract once more. half: 0 to 3 for m, 4 to 7 for v.
bf16 by_chance(float x, const Optimizer& opt, int64_t i, int half) {
    i += opt.first;
    const uint64_t stream = (uint64_t(0x6164616d) << 32) ^ (uint64_t(opt.tensor) << 40) ^ uint64_t(opt.t);
    const uint32_t word = philox(opt.seed, stream, (uint64_t(1) << 60) + uint64_t(i) / 4).word[half / 2];
    const uint32_t noise = half % 2 ? word >> 16 : word & 0xffff;
    return bf16{static_cast<uint16_t>((std::bit_cast<uint32_t>(x) + noise) >> 16)};
}

} // namespace

TEST_CASE("bf16 states: the bits of the formula, for any length and alignment, and weights by the unrounded states") {
    for (Rule rule : {Rule::adamw, Rule::lion})
        for (int64_t n : {1, 3, 4, 255, 1003, 2050})
            for (int64_t offset : {0, 1}) {
                CAPTURE(n);
                CAPTURE(offset);
                State s(n, offset);
                Vector<float> floats_m(n), floats_v(n), scale = {0.5f};
                for (int64_t t = 1; t <= 3; t++) {
                    const Optimizer opt{
                        .lr = 1e-2f, .t = t, .seed = 77, .tensor = 3, .rule = rule, .first = kFirst[t - 1]};
                    const Vector<float> grads = random_normal<float>(n, t);
                    // The same step with float states from the same values.
                    State before = s;
                    for (int64_t i = 0; i < n; i++) floats_m[i] = s.m_at(i), floats_v[i] = s.v_at(i);
                    optimizer_update(
                        nullptr, kMaster ? before.params.data() : reinterpret_cast<real*>(before.weights.data()),
                        kMaster ? before.weights.data() : nullptr, {StateType::fp32, floats_m.data(), floats_v.data()},
                        grads.data(), scale.data(), nullptr, n, opt);
                    s.update(grads.data(), 0.5f, opt);
                    CHECK(check::same_bits(s.weights, before.weights));
                    int64_t wrong = 0;
                    for (int64_t i = 0; i < n; i++) {
                        wrong += s.m[offset + i].bits != by_chance(floats_m[i], opt, i, i % 4).bits;
                        if (rule == Rule::adamw)
                            wrong += s.v[offset + i].bits != by_chance(floats_v[i], opt, i, 4 + i % 4).bits;
                        else
                            wrong += s.v[offset + i].bits != 0;
                    }
                    CHECK(wrong == 0);
                }
            }
}

TEST_CASE("bf16 states: the mean of many roundings is the value, at each place of the four that share noise") {
    const int64_t n = 512;
    const int steps = 64;
    double error[8] = {}, variance[8] = {}; // m's four places and v's
    for (int step = 0; step < steps; step++) {
        State s(n);
        const Vector<float> grads = random_normal<float>(n, 9);
        s.update(grads.data(), 1, {.lr = 1e-2f, .beta1 = 0.9f, .beta2 = 0.95f, .t = 1 + step, .seed = 5});
        for (int64_t i = 0; i < n; i++)
            for (int which : {0, 1}) {
                const float exact = which ? (1 - 0.95f) * (grads[i] * grads[i]) : (1 - 0.9f) * grads[i];
                const uint32_t below = std::bit_cast<uint32_t>(exact) & 0xffff0000u;
                const double low = std::bit_cast<float>(below), high = std::bit_cast<float>(below + 0x10000u);
                const double part = (exact - low) / (high - low), got = which ? s.v_at(i) : s.m_at(i);
                error[4 * which + i % 4] += (got - low) / (high - low) - part;
                variance[4 * which + i % 4] += part * (1 - part);
            }
    }
    for (int place = 0; place < 8; place++) CHECK(std::abs(error[place]) < 4 * std::sqrt(variance[place]));
}

// Nearest rounding would leave v where it is: 0.001·v is less than half a step of bf16.
TEST_CASE("bf16 states: v decays at β2 = 0.999") {
    const int64_t n = 4096;
    State s(n);
    for (auto& v : s.v) v = to_bf16(1);
    const Vector<float> none(n);
    const int steps = 700;
    for (int t = 1; t <= steps; t++) s.update(none.data(), 1, {.lr = 1e-2f, .beta2 = 0.999f, .t = t});
    double mean = 0;
    for (int64_t i = 0; i < n; i++) mean += s.v_at(i) / n;
    // A step adds up to half a step of bf16 in quadrature: 2^-9 · sqrt(700) is 5%, of the mean of 4096 0.1%.
    CHECK(mean == doctest::Approx(std::pow(0.999, steps)).epsilon(0.01));
}

TEST_CASE("bf16 states: another step, seed or tensor is another noise; the same again repeats, on any threads") {
    const int64_t n = 3000;
    const Vector<float> grads = random_normal<float>(n, 9);
    auto moments = [&](const Optimizer& opt) {
        State s(n);
        s.update(grads.data(), 1, opt);
        return s.m;
    };
    const Optimizer base{.lr = 1e-2f, .t = 7, .seed = 0x123456789abcdef, .tensor = 5};
    Optimizer t = base, seed = base, tensor = base;
    t.t++, seed.seed++, tensor.tensor++;
    const Vector<bf16> first = moments(base);
    for (const Optimizer& other : {t, seed, tensor}) {
        const Vector<bf16> second = moments(other);
        int64_t differ = 0;
        for (int64_t i = 0; i < n; i++) differ += first[i].bits != second[i].bits;
        CHECK(differ > n / 5); // of two draws that go up with p in 0 .. 1 on average a third
    }
    check::with_threads({1, 2, 3, 16}, [&](int) { CHECK(check::same_bits(moments(base), first)); });
}

TEST_CASE("more than 2^31 bf16 states: the last ones are right" *
          doctest::test_suite(check::kSimulated ? "" : "long")) {
    const int64_t n = (int64_t(1) << 31) + 100003, tail = 1000;
    const Vector<bf16> grads = [] {
        Vector<bf16> g;
        for (float x : random_normal<float>(tail, 3)) g.push_back(to_bf16(x));
        return g;
    }();
    // Zeros under zero gradients stay zeros, so the mirrored part may be updated in any order.
    check::Huge<float> weights(n, true);
    check::Huge<bf16> m(n, true), v(n, true), g(n);
    check::Huge<real> params(kMaster ? n : 1, true);
    memcpy(&g[n - tail], grads.data(), tail * sizeof(bf16));
    const Vector<float> scale = {1}, start = random_normal<float>(tail, 1);
    for (Rule rule : {Rule::adamw, Rule::lion}) {
        if (rule == Rule::lion && !check::kSimulated) continue; // no other code on the CPU
        const Optimizer opt{.lr = 1e-2f, .t = 1, .seed = 77, .tensor = 3, .rule = rule};
        memcpy(&weights[n - tail], start.data(), tail * sizeof(float));
        std::fill(&m[n - tail], &m[n - 1] + 1, bf16{}), std::fill(&v[n - tail], &v[n - 1] + 1, bf16{});
        // The same step of the last ones with float states.
        Vector<float> want = start, floats_m(tail), floats_v(tail);
        Vector<real> unused(tail);
        optimizer_update(nullptr, kMaster ? unused.data() : reinterpret_cast<real*>(want.data()),
                         kMaster ? want.data() : nullptr, {StateType::fp32, floats_m.data(), floats_v.data()},
                         grads.data(), scale.data(), nullptr, tail, opt);
        check::OnlyBlocks some(check::blocks_at(double(int64_t(1) << 31) / n));
        optimizer_update(nullptr, kMaster ? params.data() : reinterpret_cast<real*>(weights.data()),
                         kMaster ? weights.data() : nullptr, {StateType::bf16, m.data(), v.data()}, g.data(),
                         scale.data(), nullptr, n, opt);
        CHECK(memcmp(&weights[n - tail], want.data(), tail * sizeof(float)) == 0);
        int64_t wrong = 0;
        for (int64_t k = 0, i = n - tail; k < tail; k++, i++) {
            wrong += m[i].bits != by_chance(floats_m[k], opt, i, i % 4).bits;
            if (rule == Rule::adamw) wrong += v[i].bits != by_chance(floats_v[k], opt, i, 4 + i % 4).bits;
        }
        CHECK(wrong == 0);
    }
}

// bf16 weights that are rounded by chance have no float beside them.
TEST_CASE("more than 2^31 bf16 weights without masters: the last ones are right" *
          doctest::test_suite(check::kSimulated ? "" : "long") * doctest::skip(!kMaster)) {
    const int64_t n = (int64_t(1) << 31) + 100003, tail = 1000;
    check::Huge<real> weights(n, true);
    check::Huge<bf16> m(n, true), v(n, true), g(n);
    const Vector<float> scale = {1}, grads = random_normal<float>(tail, 3);
    Vector<float> want = random_normal<float>(tail, 1), floats_m(tail), floats_v(tail);
    Vector<real> unused(tail);
    for (int64_t k = 0; k < tail; k++) {
        assign(weights[n - tail + k], want[k]), want[k] = to_float(weights[n - tail + k]);
        g[n - tail + k] = to_bf16(grads[k]);
    }
    const Optimizer opt{.lr = 1e-2f, .t = 1, .seed = 77, .tensor = 3};
    optimizer_update(nullptr, unused.data(), want.data(), {StateType::fp32, floats_m.data(), floats_v.data()},
                     &g[n - tail], scale.data(), nullptr, tail, opt);
    check::OnlyBlocks some(check::blocks_at(double(int64_t(1) << 31) / n));
    optimizer_update(nullptr, weights.data(), nullptr, {StateType::bf16, m.data(), v.data()}, g.data(), scale.data(),
                     nullptr, n, opt);
    int64_t wrong = 0;
    for (int64_t k = 0, i = n - tail; k < tail; k++, i++) {
        const uint64_t stream = (uint64_t(0x6164616d) << 32) ^ (uint64_t(opt.tensor) << 40) ^ uint64_t(opt.t);
        const uint32_t word = philox(opt.seed, stream, uint64_t(i) / 8).word[i % 8 / 2];
        const uint32_t noise = i % 2 ? word >> 16 : word & 0xffff;
        const bf16 rounded{static_cast<uint16_t>((std::bit_cast<uint32_t>(want[k]) + noise) >> 16)};
        wrong += to_float(weights[i]) != to_float(rounded);
    }
    CHECK(wrong == 0);
}
