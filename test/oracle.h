// The truth: every layer once more, in the plainest form of its equation, templated on the number type. With double it
// gives values; with std::complex<double> the complex step gives derivatives to machine precision:
// f'(x) = Im f(x + ih) / h. Nothing here is shared with the kernels.
#pragma once
#include <algorithm>
#include <cmath>
#include <complex>
#include <cstdint>
#include <span>
#include <vector>

namespace oracle {

using std::exp;
using std::log;
using std::sqrt;
using std::tanh;
using Complex = std::complex<double>;

inline double real_part(double x) { return x; }
inline double real_part(Complex x) { return x.real(); }

inline double erf(double x) { return std::erf(x); }
// First order in the imaginary part, which is all that a complex step needs.
inline Complex erf(Complex x) {
    double re = x.real();
    return {std::erf(re), x.imag() * 2 / std::sqrt(M_PI) * std::exp(-re * re)};
}

// d f() / d x for a real f that reads x, wherever x lies. The step is far below any rounding, and nothing is
// subtracted.
template <class F> double derivative(Complex& x, F f) {
    constexpr double h = 1e-100;
    const Complex kept = x;
    x += Complex(0, h);
    double slope = f().imag() / h;
    x = kept;
    return slope;
}

inline std::vector<Complex> to_complex(const std::vector<double>& v) {
    return std::vector<Complex>(v.begin(), v.end());
}

template <class N> N gelu_tanh(N x) { return 0.5 * x * (1.0 + tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x))); }
template <class N> N gelu_erf(N x) { return 0.5 * x * (1.0 + erf(x * M_SQRT1_2)); }

// out (B,T,C)
template <class N> std::vector<N> embedding(const std::vector<N>& wte, const std::vector<N>& wpe,
                                            std::span<const int32_t> tokens, std::span<const int32_t> positions,
                                            int64_t C) {
    std::vector<N> out(tokens.size() * C);
    for (size_t n = 0; n < tokens.size(); n++)
        for (int64_t c = 0; c < C; c++)
            out[n * C + c] = wte[tokens[n] * C + c] + (wpe.empty() ? N(0) : wpe[positions[n] * C + c]);
    return out;
}

// out (rows,C)
template <class N>
std::vector<N> layernorm(const std::vector<N>& x, const std::vector<N>& w, const std::vector<N>& b, double eps = 1e-5) {
    int64_t C = w.size(), rows = x.size() / C;
    std::vector<N> out(x.size());
    for (int64_t r = 0; r < rows; r++) {
        N mean = 0, var = 0;
        for (int64_t c = 0; c < C; c++) mean += x[r * C + c] / double(C);
        for (int64_t c = 0; c < C; c++) var += (x[r * C + c] - mean) * (x[r * C + c] - mean) / double(C);
        for (int64_t c = 0; c < C; c++) out[r * C + c] = (x[r * C + c] - mean) / sqrt(var + eps) * w[c] + b[c];
    }
    return out;
}

// inp (rows,C), w (OC,C), bias (OC) or empty → (rows,OC)
template <class N>
std::vector<N> linear(const std::vector<N>& inp, const std::vector<N>& w, const std::vector<N>& bias, int64_t C) {
    int64_t rows = inp.size() / C, OC = w.size() / C;
    std::vector<N> out(rows * OC);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t o = 0; o < OC; o++) {
            N sum = bias.empty() ? N(0) : bias[o];
            for (int64_t c = 0; c < C; c++) sum += inp[r * C + c] * w[o * C + c];
            out[r * OC + o] = sum;
        }
    return out;
}

// One head of one sequence: q (Tq,D), k and v (Tk,D) → o (Tq,D), lse (Tq). doc_start (Tq) or empty.
template <class N> void attention_head(std::vector<N>& o, std::vector<N>& lse, const std::vector<N>& q,
                                       const std::vector<N>& k, const std::vector<N>& v, int64_t D, double scale,
                                       int64_t q_offset = 0, int64_t k_offset = 0,
                                       std::span<const int64_t> doc_start = {}) {
    int64_t Tq = q.size() / D, Tk = k.size() / D;
    o.assign(Tq * D, N(0));
    lse.assign(Tq, N(-INFINITY));
    std::vector<N> s(Tk);
    for (int64_t i = 0; i < Tq; i++) {
        int64_t first = doc_start.empty() ? INT64_MIN : doc_start[i];
        auto visible = [&](int64_t j) { return k_offset + j <= q_offset + i && k_offset + j >= first; };
        double largest = -INFINITY;
        for (int64_t j = 0; j < Tk; j++) {
            if (!visible(j)) continue;
            s[j] = 0;
            for (int64_t d = 0; d < D; d++) s[j] += q[i * D + d] * k[j * D + d] * scale;
            largest = std::max(largest, real_part(s[j]));
        }
        if (largest == -INFINITY) continue;
        N sum = 0;
        for (int64_t j = 0; j < Tk; j++)
            if (visible(j)) sum += exp(s[j] - largest);
        lse[i] = log(sum) + largest;
        for (int64_t j = 0; j < Tk; j++)
            if (visible(j))
                for (int64_t d = 0; d < D; d++) o[i * D + d] += exp(s[j] - lse[i]) * v[j * D + d];
    }
}

// Cross-entropy of one row of V logits.
template <class N> N cross_entropy(const N* logits, int64_t V, int64_t target) {
    double largest = -INFINITY;
    for (int64_t v = 0; v < V; v++) largest = std::max(largest, real_part(logits[v]));
    N sum = 0;
    for (int64_t v = 0; v < V; v++) sum += exp(logits[v] - largest);
    return log(sum) + largest - logits[target];
}

// One AdamW update of one scalar, t counted from 1.
inline void adamw(double& p, double& m, double& v, double g, double lr, double beta1, double beta2, double eps,
                  double weight_decay, int64_t t) {
    m = beta1 * m + (1 - beta1) * g;
    v = beta2 * v + (1 - beta2) * g * g;
    p -= lr * weight_decay * p;
    p -= lr * (m / (1 - std::pow(beta1, t))) / (std::sqrt(v / (1 - std::pow(beta2, t))) + eps);
}

// One Lion update of one scalar.
inline void lion(double& p, double& m, double g, double lr, double beta1, double beta2, double weight_decay) {
    const double c = beta1 * m + (1 - beta1) * g;
    p -= lr * weight_decay * p;
    p -= lr * ((c > 0) - (c < 0));
    m = beta2 * m + (1 - beta2) * g;
}

// A whole GPT-2, tensors in the order of llm.c's file, each contiguous over layers.
struct Gpt2Config {
    int64_t maxT, V, Vp, L, H, C;
};

template <class N> struct Gpt2Weights {
    std::vector<N> wte, wpe, ln1w, ln1b, qkvw, qkvb, attprojw, attprojb, ln2w, ln2b, fcw, fcb, fcprojw, fcprojb, lnfw,
        lnfb;

    std::vector<std::vector<N>*> tensors() {
        return {&wte,  &wpe,  &ln1w, &ln1b, &qkvw,    &qkvb,    &attprojw, &attprojb,
                &ln2w, &ln2b, &fcw,  &fcb,  &fcprojw, &fcprojb, &lnfw,     &lnfb};
    }
    explicit Gpt2Weights(const Gpt2Config& c) {
        int64_t C = c.C, L = c.L;
        int64_t sizes[] = {c.Vp * C, c.maxT * C, L * C,         L * C,     L * 3 * C * C, L * 3 * C, L * C * C, L * C,
                           L * C,    L * C,      L * 4 * C * C, L * 4 * C, L * 4 * C * C, L * C,     C,         C};
        auto all = tensors();
        for (size_t i = 0; i < all.size(); i++) all[i]->assign(sizes[i], N(0));
    }
};

template <class N> std::vector<N> part(const std::vector<N>& all, int64_t layer, int64_t layers) {
    int64_t n = all.size() / layers;
    return std::vector<N>(all.begin() + layer * n, all.begin() + (layer + 1) * n);
}

// tokens (B,T) → logits (B,T,V)
template <class N> std::vector<N> gpt2_logits(Gpt2Weights<N>& w, const Gpt2Config& c, std::span<const int32_t> tokens,
                                              int64_t B, int64_t T) {
    int64_t C = c.C, D = C / c.H;
    std::vector<int32_t> positions(B * T);
    for (int64_t n = 0; n < B * T; n++) positions[n] = n % T;
    std::vector<N> x = embedding(w.wte, w.wpe, tokens, positions, C);
    for (int64_t l = 0; l < c.L; l++) {
        auto of = [&](const std::vector<N>& all) { return part(all, l, c.L); };
        std::vector<N> qkv = linear(layernorm(x, of(w.ln1w), of(w.ln1b)), of(w.qkvw), of(w.qkvb), C);
        std::vector<N> atty(B * T * C);
        for (int64_t b = 0; b < B; b++)
            for (int64_t h = 0; h < c.H; h++) {
                std::vector<N> q(T * D), k(T * D), v(T * D), o, lse;
                for (int64_t t = 0; t < T; t++)
                    for (int64_t d = 0; d < D; d++) {
                        const N* row = &qkv[(b * T + t) * 3 * C + h * D + d];
                        q[t * D + d] = row[0], k[t * D + d] = row[C], v[t * D + d] = row[2 * C];
                    }
                attention_head(o, lse, q, k, v, D, 1 / std::sqrt(double(D)));
                for (int64_t t = 0; t < T; t++)
                    for (int64_t d = 0; d < D; d++) atty[(b * T + t) * C + h * D + d] = o[t * D + d];
            }
        std::vector<N> att = linear(atty, of(w.attprojw), of(w.attprojb), C);
        for (size_t i = 0; i < x.size(); i++) x[i] += att[i];
        std::vector<N> h = linear(layernorm(x, of(w.ln2w), of(w.ln2b)), of(w.fcw), of(w.fcb), C);
        for (N& a : h) a = gelu_tanh(a);
        std::vector<N> mlp = linear(h, of(w.fcprojw), of(w.fcprojb), 4 * C);
        for (size_t i = 0; i < x.size(); i++) x[i] += mlp[i];
    }
    std::vector<N> wte(w.wte.begin(), w.wte.begin() + c.V * C);
    return linear(layernorm(x, w.lnfw, w.lnfb), wte, {}, C);
}

// Mean cross-entropy of tokens (B,T) against targets (B,T).
template <class N> N gpt2_loss(Gpt2Weights<N>& w, const Gpt2Config& c, std::span<const int32_t> tokens,
                               std::span<const int32_t> targets, int64_t B, int64_t T) {
    std::vector<N> logits = gpt2_logits(w, c, tokens, B, T);
    N sum = 0;
    for (int64_t n = 0; n < B * T; n++) sum += cross_entropy(&logits[n * c.V], c.V, targets[n]) / double(B * T);
    return sum;
}

} // namespace oracle
