// The truth from outside: what HuggingFace's GPT2LMHeadModel and GPTNeoXForCausalLM computed on weights and tokens that
// are a hash of (seed, stream, index), so that they are made again here instead of being stored. scripts/golden.py,
// with a script for each family beside it, writes the files and holds the same formulas.
//
// A tensor is known by its fingerprint: norm, some entries, and products with random sign vectors. For an error e the
// expectation of (sign·e)² is |e|², so the products measure the norm of the whole error (within some 18% of it, with 16
// of them), and a wrong entry anywhere shows; the sampled entries then say where to look. Errors are divided by the
// norm of the true tensor. The measure of ours is PyTorch's own error in the same precision, which the file holds.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include <nlohmann/json_fwd.hpp>

#include "../kernels/gelu.h"
#include "../kernels/types.h"
#include "../runtime/model/rope.h"

namespace golden {

enum class Family { gpt2, pythia };

struct Config {
    uint64_t seed;
    int64_t L, C, H, V, Vp, maxT, B, T;
    Family family = Family::gpt2;
    // Of a Pythia alone: both branches of a block read the same x, or one after the other.
    bool parallel = true;
    Gelu gelu = Gelu::tanh;
    Rope rope = {};
};

constexpr uint64_t kTokenStream = 16, kSignStream = 18;

// The finaliser of splitmix64.
inline uint64_t mix(uint64_t z) {
    z += 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}
inline uint64_t hash(uint64_t seed, uint64_t stream, uint64_t i) { return mix(mix(mix(seed) + stream) + i); }

// A parameter tensor, contiguous over layers, matrices (out, in): an entry is mean + step·k, k uniform in ±2^(bits−1).
// Every value is exact in bf16: all precisions start from the same numbers. Entries from `live` on, the padding rows of
// an embedding, are zero.
struct Recipe {
    const char* name;
    int64_t n;
    float mean;
    int bits;
    float step;
    int64_t live = n;
};

// In the order of the family's weights file, the order of weights() and of Golden::gradients.
inline std::vector<Recipe> tensors(const Config& c) {
    int64_t C = c.C, LC = c.L * c.C;
    const float strong_step = C < 256 ? 0x1p-9f : 0x1p-10f; // wide sums need smaller terms
    auto matrix = [](const char* name, int64_t n) { return Recipe{name, n, 0, 8, 0x1p-10f}; };
    auto strong = [&](const char* name, int64_t n) { return Recipe{name, n, 0, 8, strong_step}; };
    auto gain = [](const char* name, int64_t n) { return Recipe{name, n, 1, 6, 0x1p-7f}; };
    auto embedding = [&](const char* name) { return Recipe{name, c.Vp * C, 0, 8, strong_step, c.V * C}; };
    std::vector<Recipe> all;
    if (c.family == Family::gpt2)
        all = {embedding("wte"), matrix("wpe", c.maxT * C)};
    else
        all = {embedding("embedin")};
    all.insert(all.end(), {gain("ln1w", LC), matrix("ln1b", LC), strong("qkvw", LC * 3 * C), matrix("qkvb", LC * 3),
                           matrix("attprojw", LC * C), matrix("attprojb", LC), gain("ln2w", LC), matrix("ln2b", LC),
                           matrix("fcw", LC * 4 * C), matrix("fcb", LC * 4), matrix("fcprojw", LC * 4 * C),
                           matrix("fcprojb", LC), gain("lnfw", C), matrix("lnfb", C)});
    if (c.family == Family::pythia) all.push_back(embedding("embedout"));
    return all;
}

template <class T = float> std::vector<std::vector<T>> weights(const Config& c) {
    std::vector<std::vector<T>> made;
    for (const Recipe& r : tensors(c)) {
        const uint64_t stream = made.size();
        std::vector<T>& tensor = made.emplace_back(r.n);
        for (int64_t i = 0; i < r.live; i++) {
            int64_t k = static_cast<int64_t>(hash(c.seed, stream, i)) >> (64 - r.bits);
            float value = r.mean + r.step * k;
            if constexpr (std::is_same_v<T, bf16>)
                tensor[i] = to_bf16(value);
            else
                tensor[i] = value;
        }
    }
    return made;
}

// Inputs and targets of one step, both (B,T): B rows of T+1 tokens, read at t and at t+1.
struct Batch {
    std::vector<int32_t> tokens, targets;
};
inline Batch batch(const Config& c, int64_t step = 0) {
    Batch made;
    for (int64_t b = 0; b < c.B; b++)
        for (int64_t t = 0; t <= c.T; t++) {
            int32_t token = hash(c.seed, kTokenStream, (step * c.B + b) * (c.T + 1) + t) % c.V;
            if (t < c.T) made.tokens.push_back(token);
            if (t > 0) made.targets.push_back(token);
        }
    return made;
}

// Errors relative to the norm of the true tensor: of the whole tensor (L2) and of its worst entry.
struct Error {
    double whole, worst_element;
};

struct Fingerprint {
    int64_t n;
    double norm;
    std::vector<double> projections;
    std::vector<std::pair<int64_t, double>> samples; // (index, value)
    Error fp32, bf16;                                // PyTorch's, over all entries

    Error torch_error() const { return sizeof(real) == 2 ? bf16 : fp32; }
};

// 1 or −1: entry i of sign vector p.
inline double sign(const Config& c, int64_t i, size_t p) { return hash(c.seed, kSignStream, i) >> p & 1 ? -1 : 1; }

struct Comparison {
    Error error, allowed;
    std::string said;
    bool ok() const { return error.whole <= allowed.whole && error.worst_element <= allowed.worst_element; }
};

// got (n): at most twice PyTorch's error in the precision of this build, plus half an epsilon that one final rounding
// may cost. A NaN or a wrong length never passes.
template <class T>
Comparison compare(const std::string& name, const Config& c, const Fingerprint& want, const T* got, int64_t n) {
    auto value = [&](int64_t i) -> double {
        if constexpr (std::is_same_v<T, bf16>)
            return to_float(got[i]);
        else
            return got[i];
    };
    Comparison made{{INFINITY, INFINITY}, {}, name};
    Error torch = want.torch_error();
    double half = kRealEpsilon / 2;
    made.allowed = {2 * torch.whole + half, 2 * torch.worst_element + half / std::sqrt(double(want.n))};
    if (n != want.n) {
        made.said += ": " + std::to_string(n) + " entries, not " + std::to_string(want.n);
        return made;
    }
    std::vector<double> projections(want.projections.size());
    for (int64_t i = 0; i < n; i++) {
        uint64_t bits = hash(c.seed, kSignStream, i);
        for (size_t p = 0; p < projections.size(); p++) projections[p] += bits >> p & 1 ? -value(i) : value(i);
    }
    double squares = 0, worst = -1;
    for (size_t p = 0; p < projections.size(); p++) squares += std::pow(projections[p] - want.projections[p], 2);
    int64_t at = -1;
    double at_want = NAN;
    for (auto [i, truth] : want.samples) {
        double error = std::abs(value(i) - truth);
        if (!(error <= worst)) worst = error, at = i, at_want = truth;
        if (std::isnan(error)) break;
    }
    made.error = {std::sqrt(squares / projections.size()) / want.norm, worst / want.norm};
    char line[400];
    snprintf(line, sizeof line,
             "%s: error %.3g (allowed %.3g, PyTorch %.3g); worst sample %.3g of the norm (allowed %.3g) at %lld: "
             "got %.9g, want %.9g",
             name.c_str(), made.error.whole, made.allowed.whole, torch.whole, made.error.worst_element,
             made.allowed.worst_element, static_cast<long long>(at), value(at), at_want);
    made.said = line;
    return made;
}

struct Golden {
    Config config;
    struct {
        double fp64, fp32, bf16;
    } loss;             // mean over B·T; fp32 and bf16 are PyTorch's
    Fingerprint logits; // (B,T,V), no padding
    Fingerprint losses; // (B,T)
    std::vector<Fingerprint> gradients;
};

// Twenty steps of torch's AdamW, a fresh batch(config, step) each, decay on matrices and embeddings alone, not on
// biases and norms. Gradient norms are taken before clipping.
struct Training {
    Config config;
    struct {
        int64_t steps;
        double lr, beta1, beta2, eps, weight_decay, clip;
    } optimizer;
    struct Curve {
        std::vector<double> losses, grad_norms;
    } fp64, fp32;
};

// What a file of test/golden holds (test/support/golden_files.cpp).
nlohmann::json read(const std::string& path);
Golden load(const std::string& path);
Training load_training(const std::string& path);

} // namespace golden
