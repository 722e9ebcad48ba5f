// Holds together the four things that the trainers' own tests stand on: the weights that test/golden.h makes, the order
// and layout of the tensors, test/oracle.h, and what HuggingFace computed in float64. No kernel takes part.
#include <algorithm>
#include <complex>
#include <random>
#include <string>
#include <vector>

#include <doctest/doctest.h>

#include "golden_oracle.h"

namespace {

// Both sides are double. A sum of n terms in another order differs by about sqrt(n)·1.1e-16 of its size; a few dozen
// such sums stand one after the other, n stays below 1000: 1e-12 holds with room, and no wrong formula hides in it.
constexpr double kDouble = 1e-12;

const std::vector<std::string> kGpt2 = {"gpt2_d32", "gpt2_d64", "gpt2_d80"};
const std::vector<std::string> kPythia = {"pythia_d32",     "pythia_d64",   "pythia_d80",  "pythia_d128",
                                          "pythia_d256",    "pythia_whole", "pythia_long", "pythia_linear",
                                          "pythia_dynamic", "pythia_yarn"};

std::string path_of(const std::string& name) { return "test/golden/" + name + ".json"; }

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

static void check_values(const std::string& name) {
    CAPTURE(name);
    golden::Golden g = golden::load(path_of(name));
    const golden::Config& c = g.config;
    golden::Oracle<double> model(c);
    std::vector<double> logits = model.logits();
    check_double("logits", c, g.logits, logits);
    std::vector<double> losses;
    double mean = 0;
    for (int64_t n = 0; n < c.B * c.T; n++) {
        losses.push_back(oracle::cross_entropy(&logits[n * c.V], c.V, model.batch.targets[n]));
        mean += losses.back() / double(c.B * c.T);
    }
    check_double("losses", c, g.losses, losses);
    CHECK(std::abs(mean / g.loss.fp64 - 1) <= kDouble);
}

// Im loss(w + i·h·s) / h is the gradient times the sign vector s, which weighs every entry of the tensor at once: it
// has to be the stored product. One evaluation a tensor.
static void check_gradients(const std::string& name) {
    CAPTURE(name);
    golden::Golden g = golden::load(path_of(name));
    const golden::Config& c = g.config;
    golden::Oracle<oracle::Complex> model(c);
    auto tensors = model.tensors();
    const double h = 1e-30;
    for (size_t t = 0; t < tensors.size(); t++) {
        CAPTURE(golden::tensors(c)[t].name);
        const golden::Fingerprint& want = g.gradients[t];
        std::vector<oracle::Complex>&tensor = *tensors[t], saved = tensor;
        REQUIRE(want.n == int64_t(tensor.size()));
        for (size_t i = 0; i < tensor.size(); i++) tensor[i] += oracle::Complex(0, h * golden::sign(c, i, 0));
        double along = model.loss().imag() / h;
        tensor = saved;
        CHECK(std::abs(along - want.projections[0]) <= kDouble * want.norm);
    }
}

TEST_CASE("the oracle's loss and logits are HuggingFace's: GPT-2") {
    for (const std::string& name : kGpt2) check_values(name);
}

TEST_CASE("the oracle's loss and logits are HuggingFace's: Pythia") {
    for (const std::string& name : kPythia) check_values(name);
}

TEST_CASE("the oracle's gradients are HuggingFace's, along one direction in each tensor") {
    for (const char* name : {"gpt2_d32", "gpt2_d80", "pythia_d32", "pythia_d80", "pythia_whole", "pythia_yarn"})
        check_gradients(name);
}

// Later tests stand on compare(): it has to pass errors of PyTorch's size and refuse larger ones.
TEST_CASE(
    "the comparison passes PyTorch's error and refuses four times as much, one wrong entry, NaN and a short tensor") {
    golden::Golden g = golden::load(path_of("gpt2_d32"));
    const golden::Config& c = g.config;
    const golden::Fingerprint& want = g.logits;
    const std::vector<double> truth = golden::Oracle<double>(c).logits();
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
