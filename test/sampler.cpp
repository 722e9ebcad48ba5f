// runtime/loop/sampler.h: frequencies against a softmax computed here, exact cuts by top_k, ties, extremes, refusals.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../runtime/base/errors.h"
#include "../runtime/base/random.h"
#include "../runtime/loop/sampler.h"
#include "scratch.h"

namespace {

const float kInf = std::numeric_limits<float>::infinity();

std::vector<float> normal_logits(int64_t V, uint64_t seed) {
    std::vector<float> logits(static_cast<size_t>(V)); // (V)
    for (int64_t i = 0; i < V; i++) logits[size_t(i)] = float(2 * random_normal(seed, 0, uint64_t(i)));
    return logits;
}

int32_t sample(const std::vector<float>& logits, double temperature, int64_t top_k, double u) {
    return sample_token(logits.data(), int64_t(logits.size()), temperature, top_k, u);
}

// What the header promises, by sorting everything. Cumulative in token order.
std::vector<double> probabilities(const std::vector<float>& logits, double temperature, int64_t top_k) {
    std::vector<size_t> order(logits.size());
    for (size_t i = 0; i < order.size(); i++) order[i] = i;
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return logits[a] > logits[b]; });
    if (top_k > 0 && size_t(top_k) < order.size()) order.resize(size_t(top_k));
    std::vector<double> p(logits.size());
    double sum = 0;
    for (size_t i : order) sum += p[i] = std::exp((double(logits[i]) - double(logits[order[0]])) / temperature);
    for (double& x : p) x /= sum;
    return p;
}

} // namespace

TEST_CASE("every token holds its share of [0, 1)") {
    for (int64_t V : {1, 2, 17, 1000})
        for (int64_t top_k : {0, 1, 2, 5, 17, 5000})
            for (double temperature : {0.3, 1.0, 2.5}) {
                std::vector<float> logits = normal_logits(V, uint64_t(V));
                std::vector<double> p = probabilities(logits, temperature, top_k), got(logits.size());
                constexpr int kGrid = kSanitized ? 1000 : 10000;
                int32_t before = 0;
                bool ordered = true;
                for (int i = 0; i < kGrid; i++) {
                    int32_t token = sample(logits, temperature, top_k, (i + 0.5) / kGrid);
                    got[size_t(token)] += 1;
                    ordered &= token >= before;
                    before = token;
                }
                CHECK(ordered);
                // A cut between tokens moves by at most one grid point at either end.
                for (size_t i = 0; i < p.size(); i++) {
                    CHECK(std::abs(got[i] - p[i] * kGrid) <= 1.01);
                    if (p[i] == 0) CHECK(got[i] == 0);
                }
            }
}

TEST_CASE("temperature 0 and top_k 1 take the largest, the first of equals") {
    std::vector<float> logits = {1, 3, -2, 3, 3};
    for (double u : {0.0, 0.5, 0.999999}) {
        CHECK(sample(logits, 0, 0, u) == 1);
        CHECK(sample(logits, 0, 3, u) == 1);
        CHECK(sample(logits, 1, 1, u) == 1);
        CHECK(sample(logits, 1e-300, 0, 0) == 1);
    }
    // Two of three equals: the lower two, half each.
    CHECK(sample(logits, 1, 2, 0) == 1);
    CHECK(sample(logits, 1, 2, 0.499) == 1);
    CHECK(sample(logits, 1, 2, 0.501) == 3);
    CHECK(sample(logits, 1, 2, 0.999) == 3);
    // Many equals at the cut, where nth_element alone could choose any.
    std::vector<float> flat(1000, 0.25f);
    flat[700] = 1;
    for (double u : {0.0, 0.2, 0.4, 0.6, 0.8, 0.999}) {
        int32_t token = sample(flat, 1, 10, u);
        CHECK((token < 9 || token == 700));
    }
}

TEST_CASE("extreme logits") {
    std::vector<float> logits = {3e38f, -3e38f, -kInf, 3e38f};
    CHECK(sample(logits, 1, 0, 0.25) == 0);
    CHECK(sample(logits, 1, 0, 0.75) == 3);
    CHECK(sample({-kInf, -5, -kInf}, 1, 0, 0) == 1);
    CHECK(sample({-kInf, -5, -kInf}, 1, 2, std::nextafter(1.0, 0.0)) == 1);
    CHECK(sample({-kInf, -5, -kInf}, 0, 0, 0.5) == 1);
    CHECK(sample({-kInf, 0, 0, -kInf}, 1e300, 0, 0.75) == 2); // a temperature that flattens everything but -Inf
    CHECK(sample({0, -kInf}, 1, 0, std::nextafter(1.0, 0.0)) == 0);
}

TEST_CASE("a model that has diverged is refused") {
    auto said = [](std::vector<float> logits, double temperature) {
        return message_of<RunFailed>([&] { sample(logits, temperature, 2, 0.5); });
    };
    for (double temperature : {0.0, 1.0}) {
        CHECK(contains(said({1, NAN, 2}, temperature), "token 1 is nan"));
        CHECK(contains(said({1, 2, kInf}, temperature), "token 2 is inf"));
        CHECK(contains(said({-kInf, -kInf}, temperature), "no token has a finite logit"));
        CHECK(contains(said({}, temperature), "no token"));
    }
}
