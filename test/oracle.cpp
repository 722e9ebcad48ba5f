// The oracle proves itself: closed forms where there are some, and derivatives by complex step against central
// differences, two methods that share nothing but the function.
#include "oracle.h"

#include <numeric>

#include "check.h"

using oracle::Complex;

static std::vector<double> normal(size_t n, uint64_t seed, float scale = 1) {
    return to_double(random_normal<float>(n, seed, scale));
}

TEST_CASE("GELU: published values, and the complex step's slope") {
    CHECK(oracle::gelu_erf(1.0) == doctest::Approx(0.8413447460685429).epsilon(1e-14)); // Φ(1)
    CHECK(oracle::gelu_erf(-2.0) == doctest::Approx(-2 * 0.02275013194817921).epsilon(1e-13));
    CHECK(oracle::gelu_tanh(1.0) ==
          doctest::Approx(0.5 * (1 + std::tanh(0.7978845608028654 * 1.044715))).epsilon(1e-14));
    for (double x : {-6.0, -1.5, -0.1, 0.0, 0.3, 2.0, 7.0}) {
        const double density = std::exp(-x * x / 2) / std::sqrt(2 * M_PI);
        const double slope_erf = 0.5 * (1 + std::erf(x / std::sqrt(2.0))) + x * density;
        const double k = std::sqrt(2 / M_PI), t = std::tanh(k * (x + 0.044715 * x * x * x));
        const double slope_tanh = 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * k * (1 + 3 * 0.044715 * x * x);
        Complex z = x;
        CHECK(oracle::derivative(z, [&] { return oracle::gelu_erf(z); }) == doctest::Approx(slope_erf).epsilon(1e-13));
        CHECK(oracle::derivative(z, [&] { return oracle::gelu_tanh(z); }) ==
              doctest::Approx(slope_tanh).epsilon(1e-13));
        CHECK(z == Complex(x));
    }
}

TEST_CASE("embedding and linear: small whole numbers by hand") {
    std::vector<double> wte = {1, 2, 3, 4, 5, 6}, wpe = {10, 20, 30, 40};
    const std::vector<int32_t> tokens = {2, 0}, positions = {0, 1}, token = {1};
    CHECK(oracle::embedding(wte, wpe, tokens, positions, 2) == std::vector<double>{15, 26, 31, 42});
    CHECK(oracle::embedding(wte, {}, token, {}, 2) == std::vector<double>{3, 4});
    CHECK(oracle::linear<double>({1, 2, 3, 4}, {1, 0, 0, 1, 5, 7}, {100, 200, 300}, 2) ==
          std::vector<double>{101, 202, 319, 103, 204, 343});
}

TEST_CASE("LayerNorm: mean and variance of its output are those asked for, whatever the input's shift") {
    const int64_t C = 37;
    std::vector<double> x = normal(2 * C, 1, 3), w(C, 2), b(C, 5);
    for (int64_t c = 0; c < C; c++) x[C + c] = x[c] + 1e6;
    std::vector<double> out = oracle::layernorm(x, w, b, 0);
    for (int64_t row = 0; row < 2; row++) {
        double mean = 0, square = 0;
        for (int64_t c = 0; c < C; c++) mean += out[row * C + c] / C;
        for (int64_t c = 0; c < C; c++) square += (out[row * C + c] - mean) * (out[row * C + c] - mean) / C;
        CHECK(mean == doctest::Approx(5).epsilon(1e-9));
        CHECK(square == doctest::Approx(4).epsilon(1e-9));
    }
    // eps stands inside the root: with variance 3 and eps 1 the deviation is divided by 2.
    const double side = std::sqrt(3.0);
    CHECK(oracle::layernorm<double>({-side, side}, {1, 1}, {0, 0}, 1)[1] == doctest::Approx(side / 2).epsilon(1e-14));
}

TEST_CASE("attention: a naive softmax over the keys that the offsets and documents leave") {
    const int64_t D = 5, Tq = 7, Tk = 9;
    std::vector<double> q = normal(Tq * D, 1), k = normal(Tk * D, 2), v = normal(Tk * D, 3);
    const std::vector<int64_t> documents = {0, 0, 3, 3, 3, 8, 8};
    for (int64_t q_offset : {-2, 0, 4, 20})
        for (int64_t k_offset : {0, 3})
            for (bool with_documents : {false, true}) {
                std::vector<double> o, lse;
                oracle::attention_head(o, lse, q, k, v, D, 0.4, q_offset, k_offset,
                                       with_documents ? documents : std::vector<int64_t>{});
                for (int64_t i = 0; i < Tq; i++) {
                    double sum = 0;
                    std::vector<double> weighted(D);
                    for (int64_t j = 0; j < Tk; j++) {
                        if (k_offset + j > q_offset + i || (with_documents && k_offset + j < documents[i])) continue;
                        double dot = 0;
                        for (int64_t d = 0; d < D; d++) dot += q[i * D + d] * k[j * D + d];
                        sum += std::exp(0.4 * dot);
                        for (int64_t d = 0; d < D; d++) weighted[d] += std::exp(0.4 * dot) * v[j * D + d];
                    }
                    if (sum == 0)
                        CHECK(lse[i] == -INFINITY);
                    else
                        CHECK(lse[i] == doctest::Approx(std::log(sum)).epsilon(1e-13));
                    for (int64_t d = 0; d < D; d++)
                        CHECK(o[i * D + d] == doctest::Approx(sum == 0 ? 0 : weighted[d] / sum).epsilon(1e-12));
                }
            }
}

TEST_CASE("cross-entropy: ln V when all are alike, blind to a shift, slope softmax minus one-hot") {
    CHECK(oracle::cross_entropy(std::vector<double>(50, 3.0).data(), 50, 7) == doctest::Approx(std::log(50.0)));
    std::vector<double> logits = normal(13, 1, 2), shifted = logits;
    for (double& x : shifted) x += 1e4;
    const double loss = oracle::cross_entropy(logits.data(), 13, 4);
    CHECK(oracle::cross_entropy(shifted.data(), 13, 4) == doctest::Approx(loss).epsilon(1e-10));
    double sum = 0;
    for (double x : logits) sum += std::exp(x);
    CHECK(loss == doctest::Approx(std::log(sum) - logits[4]).epsilon(1e-13));
    std::vector<Complex> z = oracle::to_complex(logits);
    for (int v = 0; v < 13; v++)
        CHECK(oracle::derivative(z[v], [&] { return oracle::cross_entropy(z.data(), 13, 4); }) ==
              doctest::Approx(std::exp(logits[v]) / sum - (v == 4)).epsilon(1e-12));
}

TEST_CASE("AdamW: under a constant gradient every step is lr·g/(|g| + eps) after the decay") {
    double p = 2, m = 0, v = 0, expected = 2;
    const double lr = 0.01, eps = 0.5, decay = 0.1, g = -3;
    for (int64_t t = 1; t <= 50; t++) {
        oracle::adamw(p, m, v, g, lr, 0.9, 0.95, eps, decay, t);
        expected = expected * (1 - lr * decay) - lr * g / (std::abs(g) + eps);
        CHECK(p == doctest::Approx(expected).epsilon(1e-13));
        CHECK(m == doctest::Approx(g * (1 - std::pow(0.9, t))).epsilon(1e-13));
        CHECK(v == doctest::Approx(g * g * (1 - std::pow(0.95, t))).epsilon(1e-13));
    }
}

namespace {

const oracle::Gpt2Config kGpt2{6, 11, 16, 2, 2, 8};
const oracle::Rope kRope{oracle::Stretch::none, 2, 2048};
const oracle::PythiaConfig kParallel{11, 16, 2, 2, 8, true, false, kRope};
const oracle::PythiaConfig kSequential{11, 16, 2, 2, 8, false, true, kRope};
const int64_t kB = 2, kT = 5;
const std::vector<int32_t> kTokens = {1, 7, 7, 0, 10, 3, 2, 9, 4, 1}, kTargets = {7, 7, 0, 10, 5, 2, 9, 4, 1, 6};

template <class Weights> void fill(Weights& w) {
    uint64_t seed = 1;
    for (auto* tensor : w.tensors()) {
        std::vector<double> values = normal(tensor->size(), seed++, 0.5f);
        std::copy(values.begin(), values.end(), tensor->begin());
    }
}

// Complex steps against central differences, in every tensor.
template <template <class> class Weights, class Config> void check_slopes(const Config& config) {
    Weights<Complex> z(config);
    Weights<double> w(config);
    fill(z), fill(w);
    auto tensors_z = z.tensors();
    auto tensors_w = w.tensors();
    for (size_t tensor = 0; tensor < tensors_z.size(); tensor++) {
        CAPTURE(tensor);
        const size_t n = tensors_z[tensor]->size(),
                     stride = std::max<size_t>(1, n / 40) | 1; // odd: no column is missed
        double largest = 0;
        for (size_t i = 0; i < n; i += stride) {
            double exact = oracle::derivative((*tensors_z[tensor])[i],
                                              [&] { return oracle::loss_of(z, kTokens, kTargets, kB, kT); });
            double& x = (*tensors_w[tensor])[i];
            // Richardson: two central differences cancel the h² error; h where rounding (1e-16/h) is 1e-13.
            const double kept = x, h = 1e-3;
            auto central = [&](double step) {
                x = kept + step;
                double above = oracle::loss_of(w, kTokens, kTargets, kB, kT);
                x = kept - step;
                double below = oracle::loss_of(w, kTokens, kTargets, kB, kT);
                x = kept;
                return (above - below) / (2 * step);
            };
            const double numeric = (4 * central(h) - central(2 * h)) / 3;
            CHECK(std::abs(exact - numeric) < 1e-9);
            largest = std::max(largest, std::abs(exact));
        }
        CHECK(largest > 1e-4); // a tensor that did not matter would agree too
    }
}

// Causal, blind to the padding rows of `embeddings`, and ln V when all weights are zero.
template <class Weights>
void check_structure(Weights w, std::initializer_list<std::vector<double> Weights::*> embeddings) {
    const auto& c = w.config;
    for (auto* tensor : w.tensors()) std::fill(tensor->begin(), tensor->end(), 0);
    CHECK(oracle::loss_of(w, kTokens, kTargets, kB, kT) == doctest::Approx(std::log(11.0)).epsilon(1e-14));
    fill(w);
    std::vector<double> before = oracle::logits_of(w, kTokens, kB, kT);
    std::vector<int32_t> tokens = kTokens;
    tokens[3] = 8; // the fourth token of the first sequence
    std::vector<double> after = oracle::logits_of(w, tokens, kB, kT);
    for (int64_t n = 0; n < kB * kT; n++) {
        bool same = std::equal(&before[n * c.V], &before[n * c.V] + c.V, &after[n * c.V]);
        CHECK(same == (n < 3 || n >= kT));
    }
    for (auto embedding : embeddings)
        for (int64_t i = c.V * c.C; i < c.Vp * c.C; i++) (w.*embedding)[i] = NAN;
    CHECK(oracle::logits_of(w, kTokens, kB, kT) == before);
}

} // namespace

TEST_CASE("the whole models' losses: complex steps agree with central differences in every tensor") {
    check_slopes<oracle::Gpt2Weights>(kGpt2);
    check_slopes<oracle::PythiaWeights>(kParallel);
    check_slopes<oracle::PythiaWeights>(kSequential);
}

TEST_CASE("the whole models: causal, blind to padding rows, ln V when they know nothing") {
    using Gpt2 = oracle::Gpt2Weights<double>;
    using Pythia = oracle::PythiaWeights<double>;
    check_structure(Gpt2(kGpt2), {&Gpt2::wte});
    check_structure(Pythia(kParallel), {&Pythia::embedin, &Pythia::embedout});
    check_structure(Pythia(kSequential), {&Pythia::embedin, &Pythia::embedout});
}

TEST_CASE(
    "rotation: dot products depend on the distance alone, unrotated dimensions stay, the factor scales the rest") {
    const oracle::Rope rope{oracle::Stretch::none, 8, 2048};
    const std::vector<double> frequencies = oracle::rotary_frequencies(rope, 100), q = normal(12, 1), k = normal(12, 2);
    auto rotated = [&](std::vector<double> x, int64_t position, double factor = 1) {
        oracle::rotate(x.data(), frequencies, factor, position);
        return x;
    };
    auto dot = [](const std::vector<double>& a, const std::vector<double>& b) {
        return std::inner_product(a.begin(), a.end(), b.begin(), 0.0);
    };
    CHECK(rotated(q, 0) == q);
    const double near = dot(rotated(q, 17), rotated(k, 12));
    CHECK(dot(rotated(q, 3005), rotated(k, 3000)) == doctest::Approx(near).epsilon(1e-12));
    CHECK(std::abs(dot(rotated(q, 18), rotated(k, 12)) - near) > 1e-3);
    for (int d = 8; d < 12; d++) CHECK(rotated(q, 77, 3)[d] == q[d]);
    for (int d = 0; d < 8; d++) CHECK(rotated(q, 77, 3)[d] == doctest::Approx(3 * rotated(q, 77)[d]).epsilon(1e-15));
    // The first pair, dimensions 0 and 4, turns by a radian a position, from the first towards the second.
    std::vector<double> unit(12);
    unit[0] = 1;
    CHECK(rotated(unit, 1)[0] == doctest::Approx(std::cos(1.0)));
    CHECK(rotated(unit, 1)[4] == doctest::Approx(std::sin(1.0)));
}

TEST_CASE("rotary frequencies: each mode where its effect is known in closed form") {
    using oracle::Stretch;
    auto frequencies = [](Stretch mode, int64_t T, double scale, double base = 10000, int64_t dims = 16) {
        return oracle::rotary_frequencies({mode, dims, 2048, base, scale}, T);
    };
    const std::vector<double> plain = frequencies(Stretch::none, 8192, 4);
    for (int i = 0; i < 8; i++) CHECK(plain[i] == doctest::Approx(std::pow(10, -i / 2.0)).epsilon(1e-14));
    const std::vector<double> linear = frequencies(Stretch::linear, 8192, 4), ntk = frequencies(Stretch::ntk, 8192, 4);
    for (int i = 0; i < 8; i++) CHECK(linear[i] == plain[i] / 4);
    // NTK leaves the fastest pair alone and slows the slowest by the whole scale.
    CHECK(ntk[0] == 1);
    CHECK(ntk[7] == doctest::Approx(plain[7] / 4).epsilon(1e-14));
    // Dynamic is NTK with a scale that the length gives: at four windows, scale 2 acts as 2·4 − 1 = 7.
    CHECK(frequencies(Stretch::dynamic, 2048, 2) == plain);
    CHECK(frequencies(Stretch::dynamic, 8192, 2)[7] == doctest::Approx(plain[7] / 7).epsilon(1e-14));
    // Rotations of pair i over the window: 326·10^(−i/2). Above 32 up to pair 2, below 1 from 5.03, which is rounded
    // up.
    const std::vector<double> yarn = frequencies(Stretch::yarn, 8192, 4);
    for (int i = 0; i < 8; i++) {
        double stretched = i <= 2 ? 0 : i >= 6 ? 1 : (i - 2) / 4.0;
        CHECK(yarn[i] == doctest::Approx(plain[i] * (1 - stretched) + linear[i] * stretched).epsilon(1e-14));
    }
    CHECK(oracle::yarn_temperature({Stretch::yarn, 16, 2048, 10000, std::exp(5)}) == doctest::Approx(1.5));
    CHECK(oracle::yarn_temperature({Stretch::linear, 16, 2048, 10000, 4}) == 1);
}
