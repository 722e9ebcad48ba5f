// What the tests of 8-bit states share: the scheme once more, written from its description and from bitsandbytes' rules
// and not from the kernels.
#pragma once
#include "../kernels/optimizer.h"

#include <array>
#include <bit>

#include "check.h"

namespace codes {

using Values = std::array<float, 256>;

// create_dynamic_map as torch computes it: linspace in float, each half from its own end with one rounding (its vector
// code fuses), the middles in float, times a power of ten in float. (Products and sums of these floats are exact in
// double.)
inline Values make_book(bool is_signed) {
    std::vector<float> all = {0, 1};
    for (int i = 0; i < 7; i++) {
        const int n = 1 << (is_signed ? i : i + 1);
        const float start = 0.1f, end = 1, step = (end - start) / n, power = float(std::pow(10.0, i - 6));
        std::vector<float> boundaries(n + 1);
        for (int j = 0; j <= n; j++)
            boundaries[j] =
                j < (n + 1) / 2 ? float(double(start) + double(step) * j) : float(1 - double(step) * (n - j));
        for (int j = 0; j < n; j++) {
            const float middle = (boundaries[j] + boundaries[j + 1]) / 2, value = power * middle;
            all.push_back(value);
            if (is_signed) all.push_back(-value);
        }
    }
    std::sort(all.begin(), all.end());
    Values book;
    std::copy(all.begin(), all.end(), book.begin());
    return book;
}
inline const Values kSigned = make_book(true), kUnsigned = make_book(false);

// The code nearest to x by looking at all of them; of two as near, the one of smaller magnitude.
inline int nearest(const Values& book, float x) {
    int best = 0;
    auto distance = [&](int code) { return std::abs(double(x) - book[code]); }; // exact
    for (int code = 1; code < 256; code++)
        if (distance(code) < distance(best) ||
            (distance(code) == distance(best) && std::abs(book[code]) < std::abs(book[best])))
            best = code;
    return best;
}
// The same by halving, for many values.
inline int nearest_by_halving(const Values& book, float x) {
    const int above = int(std::lower_bound(book.begin(), book.end(), x) - book.begin());
    if (above == 0 || above == 256) return std::min(above, 255);
    const double down = double(x) - book[above - 1], up = double(book[above]) - x;
    if (down == up) return std::abs(book[above]) < std::abs(book[above - 1]) ? above : above - 1;
    return up < down ? above : above - 1;
}
// How far x is from the border between two neighbouring codes, in parts of x: 1e-7 and less is a tie to within
// rounding.
inline double from_border(const Values& book, float x, int one, int other) {
    const double border = (double(book[one]) + book[other]) / 2;
    return std::abs(x - border) / std::max(std::abs(border), 1e-30);
}

// Weights, 8-bit states and all that goes with them; starts from zeros.
struct State {
    int64_t n;
    Vector<float> weights;            // (n), wherever this build keeps them
    Vector<real> params;              // (n), beside float weights
    Vector<uint8_t> m, v;             // (n)
    Vector<float> m_absmax, v_absmax; // (blocks)
    Vector<OptimizerCounts> counts;

    explicit State(int64_t count, uint64_t seed = 1)
        : n(count), weights(random_normal<float>(count, seed)), params(poisoned<real>(count)), m(count), v(count),
          m_absmax(absmax_count(count)), v_absmax(absmax_count(count)), counts(1) {}

    States states() { return {StateType::int8, m.data(), v.data(), m_absmax.data(), v_absmax.data()}; }
    void update(Gradients grads, float scale_value, const Optimizer& opt) {
        const Vector<float> scale = {scale_value};
        const bool master = sizeof(real) < sizeof(float);
        optimizer_update(nullptr, master ? params.data() : reinterpret_cast<real*>(weights.data()),
                         master ? weights.data() : nullptr, states(), grads, scale.data(), counts.data(), n, opt);
    }
    float m_value(int64_t i) const { return kSigned[m[i]] * m_absmax[i / 256]; }
    float v_value(int64_t i) const { return kUnsigned[v[i]] * v_absmax[i / 256]; }
};

inline bool same(const State& a, const State& b) {
    return check::same_bits(a.weights, b.weights) && check::same_bits(a.params, b.params) &&
           check::same_bits(a.m, b.m) && check::same_bits(a.v, b.v) && check::same_bits(a.m_absmax, b.m_absmax) &&
           check::same_bits(a.v_absmax, b.v_absmax);
}

// One step of the contract for one tensor, a scalar at a time. It begins from what `s` holds and leaves weights, values
// of m and v before they are coded, and codes.
struct Transcription {
    std::vector<float> weights, m, v, m_absmax, v_absmax;
    std::vector<int> m_codes, v_codes;
    uint64_t non_finite = 0, vanished = 0, saturated = 0;

    Transcription(const State& s, const std::vector<float>& grads, float scale, const Optimizer& o)
        : weights(s.weights.begin(), s.weights.end()), m(s.n), v(s.n), m_codes(s.n), v_codes(s.n) {
        const bool adamw = o.rule == Rule::adamw;
        const double correct_m = 1 - std::pow(double(o.beta1), double(o.t)),
                     correct_v = 1 - std::pow(double(o.beta2), double(o.t));
        for (int64_t i = 0; i < s.n; i++) {
            m[i] = s.m_value(i), v[i] = adamw ? s.v_value(i) : 0;
            const float g = scale * grads[i];
            if (!std::isfinite(g * g)) {
                non_finite++;
                continue;
            }
            double p = weights[i] * (1 - double(o.lr) * o.weight_decay);
            if (adamw) {
                m[i] = o.beta1 * m[i] + (1 - o.beta1) * g;
                v[i] = o.beta2 * v[i] + (1 - o.beta2) * (g * g);
                p -= o.lr * (m[i] / correct_m) / (std::sqrt(v[i] / correct_v) + o.eps);
            } else {
                const float c = o.beta1 * m[i] + (1 - o.beta1) * g;
                p -= c > 0 ? o.lr : c < 0 ? -o.lr : 0;
                m[i] = o.beta2 * m[i] + (1 - o.beta2) * g;
            }
            weights[i] = float(p);
        }
        for (int64_t begin = 0; begin < s.n; begin += 256) {
            const int64_t end = std::min(begin + 256, s.n);
            float m_largest = 1.17549435e-38f, v_largest = 1.17549435e-38f;
            for (int64_t i = begin; i < end; i++)
                m_largest = std::max(m_largest, std::abs(m[i])), v_largest = std::max(v_largest, v[i]);
            m_absmax.push_back(m_largest), v_absmax.push_back(v_largest);
            int positive = 0, low = 0;
            for (int64_t i = begin; i < end; i++) {
                m_codes[i] = nearest_by_halving(kSigned, m[i] * (1 / m_largest));
                if (!adamw && m[i] != 0) positive++, low += std::abs(m_codes[i] - 127) <= 1;
                if (m[i] < 0 && m_codes[i] == 127) m_codes[i] = 126;
                if (!adamw) continue;
                v_codes[i] = nearest_by_halving(kUnsigned, v[i] * (1 / v_largest));
                if (v[i] > 0) positive++, low += v_codes[i] <= 1;
                if (v[i] > 0 && v_codes[i] == 0) vanished++, v_codes[i] = o.floor_v ? 1 : 0;
            }
            saturated += 2 * low > positive;
        }
    }

    // Codes equal those of `got` unless m or v lies within `tie` of the border between two neighbouring codes.
    void check_codes(const State& got, bool adamw, double tie = 4e-7) const {
        int64_t wrong = 0, ties = 0;
        for (int64_t i = 0; i < got.n; i++) {
            auto compare = [&](const Values& book, int code, int want, float x) {
                if (code == want) return;
                if (std::abs(code - want) == 1 && from_border(book, x, code, want) <= tie)
                    ties++;
                else
                    wrong++;
            };
            compare(kSigned, got.m[i], m_codes[i], m[i] * (1 / m_absmax[i / 256]));
            if (adamw) compare(kUnsigned, got.v[i], v_codes[i], v[i] * (1 / v_absmax[i / 256]));
        }
        CHECK(wrong == 0);
        CHECK(ties <= 2 + got.n / 1000);
    }
};

} // namespace codes
