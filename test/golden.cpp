// Holds together the four things that the trainer's own tests stand on: the weights that test/golden.h makes, the order
// and layout of the tensors, test/oracle.h, and what HuggingFace computed in float64. No kernel takes part.
#include <algorithm>
#include <complex>
#include <random>
#include <string>
#include <vector>

#include <doctest/doctest.h>

#include "golden.h"
#include "oracle.h"

namespace {

// Both sides are double. A sum of n terms in another order differs by about sqrt(n)·1.1e-16 of its size; a few dozen
// such sums stand one after the other, n stays below 1000: 1e-12 holds with room, and no wrong formula hides in it.
constexpr double kDouble = 1e-12;

// The oracle's GPT-2, filled with the golden weights.
template <class N> struct Model {
    oracle::Gpt2Config config;
    oracle::Gpt2Weights<N> weights;
    golden::Batch batch;

    explicit Model(const golden::Config& c)
        : config{c.maxT, c.V, c.Vp, c.L, c.H, c.C}, weights(config), batch(golden::batch(c)) {
        auto made = golden::weights<double>(c);
        auto tensors = weights.tensors();
        REQUIRE(made.size() == tensors.size());
        for (size_t t = 0; t < tensors.size(); t++) {
            REQUIRE(made[t].size() == tensors[t]->size());
            for (size_t i = 0; i < made[t].size(); i++) (*tensors[t])[i] = made[t][i];
        }
        CHECK(std::all_of(made[0].begin() + c.V * c.C, made[0].end(), [](double x) { return x == 0; }));
    }
};

void check_double(const std::string& name, const golden::Config& c, const golden::Fingerprint& want,
                  const std::vector<double>& got) {
    golden::Comparison compared = golden::compare(name, c, want, got.data(), got.size());
    CHECK_MESSAGE(compared.error.whole <= kDouble, compared.said);
    CHECK_MESSAGE(compared.error.worst_element <= kDouble, compared.said);
    double squares = 0;
    for (double x : got) squares += x * x;
    CHECK(std::abs(std::sqrt(squares) / want.norm - 1) <= kDouble);
}

} // namespace

TEST_CASE("the oracle's loss and logits are HuggingFace's") {
    for (const char* path : {"test/golden/gpt2_d32.json", "test/golden/gpt2_d64.json", "test/golden/gpt2_d80.json"}) {
        CAPTURE(path);
        golden::Golden g = golden::load(path);
        const golden::Config& c = g.config;
        Model<double> m(c);
        std::vector<double> logits = oracle::gpt2_logits(m.weights, m.config, m.batch.tokens, c.B, c.T);
        check_double("logits", c, g.logits, logits);
        std::vector<double> losses;
        double mean = 0;
        for (int64_t n = 0; n < c.B * c.T; n++) {
            losses.push_back(oracle::cross_entropy(&logits[n * c.V], c.V, m.batch.targets[n]));
            mean += losses.back() / double(c.B * c.T);
        }
        check_double("losses", c, g.losses, losses);
        CHECK(std::abs(mean / g.loss.fp64 - 1) <= kDouble);
    }
}

// Im loss(w + i·h·s) / h is the gradient times the sign vector s, which weighs every entry of the tensor at once: it
// has to be the stored product. One evaluation a tensor.
TEST_CASE("the oracle's gradients are HuggingFace's, along one direction in each tensor") {
    for (const char* path : {"test/golden/gpt2_d32.json", "test/golden/gpt2_d80.json"}) {
        CAPTURE(path);
        golden::Golden g = golden::load(path);
        const golden::Config& c = g.config;
        Model<oracle::Complex> m(c);
        auto tensors = m.weights.tensors();
        const double h = 1e-30;
        for (int t = 0; t < golden::kTensors; t++) {
            CAPTURE(golden::kTensorNames[t]);
            const golden::Fingerprint& want = g.gradients[t];
            std::vector<oracle::Complex>&tensor = *tensors[t], saved = tensor;
            REQUIRE(want.n == int64_t(tensor.size()));
            for (size_t i = 0; i < tensor.size(); i++) tensor[i] += oracle::Complex(0, h * golden::sign(c, i, 0));
            double along = oracle::gpt2_loss(m.weights, m.config, m.batch.tokens, m.batch.targets, c.B, c.T).imag() / h;
            tensor = saved;
            CHECK(std::abs(along - want.projections[0]) <= kDouble * want.norm);
        }
    }
}

// Later tests stand on compare(): it has to pass errors of PyTorch's size and refuse larger ones.
TEST_CASE(
    "the comparison passes PyTorch's error and refuses four times as much, one wrong entry, NaN and a short tensor") {
    golden::Golden g = golden::load("test/golden/gpt2_d32.json");
    const golden::Config& c = g.config;
    const golden::Fingerprint& want = g.logits;
    Model<double> m(c);
    const std::vector<double> truth = oracle::gpt2_logits(m.weights, m.config, m.batch.tokens, c.B, c.T);
    auto ok = [&](const std::vector<double>& got) {
        return golden::compare("logits", c, want, got.data(), got.size()).ok();
    };
    double torch = want.torch_error().whole;
    for (uint64_t seed = 1; seed <= 5; seed++) {
        CAPTURE(seed);
        std::mt19937_64 rng(seed);
        std::normal_distribution<double> normal(0, torch * want.norm / std::sqrt(double(want.n)));
        std::vector<double> same = truth, four_times = truth;
        for (size_t i = 0; i < truth.size(); i++) {
            double noise = normal(rng);
            same[i] += noise, four_times[i] += 4 * noise;
        }
        CHECK(ok(same));
        CHECK_FALSE(ok(four_times));
    }
    std::vector<double> got = truth;
    size_t unsampled = want.samples[0].first + 1;
    got[unsampled] += 8 * torch * want.norm;
    CHECK_FALSE(ok(got));
    got[unsampled] = NAN;
    CHECK_FALSE(ok(got));
    got = truth;
    got[want.samples.back().first] = NAN;
    CHECK_FALSE(ok(got));
    got = truth;
    got.pop_back();
    CHECK_FALSE(ok(got));
    CHECK(ok(truth));
}
