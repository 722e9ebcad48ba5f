// The truth: every layer once more, in the plainest form of its equation, templated on the number type. With double it
// gives values; with std::complex<double> the complex step gives derivatives to machine precision:
// f'(x) = Im f(x + ih) / h. Nothing here is shared with the kernels.
#pragma once
#include <algorithm>
#include <cmath>
#include <complex>
#include <cstdint>
#include <span>
#include <utility>
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
        for (int64_t j = 0; j < Tk; j++) {
            if (!visible(j)) continue;
            const N p = exp(s[j] - lse[i]);
            for (int64_t d = 0; d < D; d++) o[i * D + d] += p * v[j * D + d];
        }
    }
}

// All heads of B sequences: qkv (B,T,3C) → (B,T,C). A head's queries begin `head` entries after those of the head
// before it, its keys `part` after its queries, its values `part` after its keys.
template <class N> std::vector<N> self_attention(const std::vector<N>& qkv, int64_t B, int64_t T, int64_t H, int64_t D,
                                                 int64_t head, int64_t part, double scale) {
    int64_t C = H * D;
    std::vector<N> out(B * T * C);
    for (int64_t b = 0; b < B; b++)
        for (int64_t h = 0; h < H; h++) {
            std::vector<N> q(T * D), k(T * D), v(T * D), o, lse;
            for (int64_t t = 0; t < T; t++)
                for (int64_t d = 0; d < D; d++) {
                    const N* row = &qkv[(b * T + t) * 3 * C + h * head + d];
                    q[t * D + d] = row[0], k[t * D + d] = row[part], v[t * D + d] = row[2 * part];
                }
            attention_head(o, lse, q, k, v, D, scale);
            for (int64_t t = 0; t < T; t++)
                for (int64_t d = 0; d < D; d++) out[(b * T + t) * C + h * D + d] = o[t * D + d];
        }
    return out;
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

// Mean cross-entropy of logits (n,V) against n targets.
template <class N> N mean_loss(const std::vector<N>& logits, int64_t V, std::span<const int32_t> targets) {
    N sum = 0;
    for (size_t n = 0; n < targets.size(); n++)
        sum += cross_entropy(&logits[n * V], V, targets[n]) / double(targets.size());
    return sum;
}

template <class N> std::vector<N> part(const std::vector<N>& all, int64_t layer, int64_t layers) {
    int64_t n = all.size() / layers;
    return std::vector<N>(all.begin() + layer * n, all.begin() + (layer + 1) * n);
}

// The first `rows` rows of an embedding (rows, C): those of real tokens.
template <class N> std::vector<N> live(const std::vector<N>& embedding, int64_t rows, int64_t C) {
    return std::vector<N>(embedding.begin(), embedding.begin() + rows * C);
}

template <class N> void add(std::vector<N>& x, const std::vector<N>& y) {
    for (size_t i = 0; i < x.size(); i++) x[i] += y[i];
}

// The tensors that both families have, each contiguous over layers.
template <class N> struct Blocks {
    int64_t L, C;
    std::vector<N> ln1w, ln1b, qkvw, qkvb, attprojw, attprojb, ln2w, ln2b, fcw, fcb, fcprojw, fcprojb, lnfw, lnfb;

    Blocks(int64_t L, int64_t C)
        : L(L), C(C), ln1w(L * C), ln1b(L * C), qkvw(L * 3 * C * C), qkvb(L * 3 * C), attprojw(L * C * C),
          attprojb(L * C), ln2w(L * C), ln2b(L * C), fcw(L * 4 * C * C), fcb(L * 4 * C), fcprojw(L * 4 * C * C),
          fcprojb(L * C), lnfw(C), lnfb(C) {}

    // In the order of both weights files, `first` before them and `last` after.
    std::vector<std::vector<N>*> tensors(std::vector<std::vector<N>*> first, std::vector<std::vector<N>*> last) {
        std::vector<std::vector<N>*> all = std::move(first);
        for (std::vector<N>* t : {&ln1w, &ln1b, &qkvw, &qkvb, &attprojw, &attprojb, &ln2w, &ln2b, &fcw, &fcb, &fcprojw,
                                  &fcprojb, &lnfw, &lnfb})
            all.push_back(t);
        all.insert(all.end(), last.begin(), last.end());
        return all;
    }

    std::vector<N> qkv(const std::vector<N>& x, int64_t l) const {
        return linear(layernorm(x, part(ln1w, l, L), part(ln1b, l, L)), part(qkvw, l, L), part(qkvb, l, L), C);
    }
    std::vector<N> attproj(const std::vector<N>& x, int64_t l) const {
        return linear(x, part(attprojw, l, L), part(attprojb, l, L), C);
    }
    std::vector<N> mlp(const std::vector<N>& x, int64_t l, bool tanh) const {
        std::vector<N> h = layernorm(x, part(ln2w, l, L), part(ln2b, l, L));
        h = linear(h, part(fcw, l, L), part(fcb, l, L), C);
        for (N& a : h) a = tanh ? gelu_tanh(a) : gelu_erf(a);
        return linear(h, part(fcprojw, l, L), part(fcprojb, l, L), 4 * C);
    }
};

// A whole GPT-2, tensors in the order of llm.c's file.
struct Gpt2Config {
    int64_t maxT, V, Vp, L, H, C;
};

template <class N> struct Gpt2Weights : Blocks<N> {
    Gpt2Config config;
    std::vector<N> wte, wpe;

    explicit Gpt2Weights(const Gpt2Config& c) : Blocks<N>(c.L, c.C), config(c), wte(c.Vp * c.C), wpe(c.maxT * c.C) {}
    std::vector<std::vector<N>*> tensors() { return Blocks<N>::tensors({&wte, &wpe}, {}); }
};

// tokens (B,T) → logits (B,T,V)
template <class N>
std::vector<N> logits_of(const Gpt2Weights<N>& w, std::span<const int32_t> tokens, int64_t B, int64_t T) {
    const Gpt2Config& c = w.config;
    int64_t C = c.C, D = C / c.H;
    std::vector<int32_t> positions(B * T);
    for (int64_t n = 0; n < B * T; n++) positions[n] = n % T;
    std::vector<N> x = embedding(w.wte, w.wpe, tokens, positions, C);
    for (int64_t l = 0; l < c.L; l++) {
        add(x, w.attproj(self_attention(w.qkv(x, l), B, T, c.H, D, D, C, 1 / std::sqrt(double(D))), l));
        add(x, w.mlp(x, l, true));
    }
    return linear(layernorm(x, w.lnfw, w.lnfb), live(w.wte, c.V, C), {}, C);
}

// How rotary positions are stretched, numbered as in weights files.
enum class Stretch { none, linear, ntk, dynamic, yarn };

struct Rope {
    Stretch mode = Stretch::none;
    int64_t dims = 0, original = 0; // rotated dimensions of a head; the window of training
    double base = 10000, scale = 1;
    bool softmax_temperature = false;
};

// Angle a position, for each pair of rotated dimensions, in sequences of T tokens. The formulas are transformers' own;
// of yarn's ramp it rounds the ends outward to whole pairs.
inline std::vector<double> rotary_frequencies(const Rope& r, int64_t T) {
    const double d = r.dims, s = r.scale, T0 = r.original;
    double base = r.base;
    if (r.mode == Stretch::ntk) base *= std::pow(s, d / (d - 2));
    if (r.mode == Stretch::dynamic && T > T0) base *= std::pow(s * T / T0 - (s - 1), d / (d - 2));
    // The pair, as a real number, that makes so many rotations over the window of training.
    auto pair = [&](double rotations) { return d * std::log(T0 / (rotations * 2 * M_PI)) / (2 * std::log(base)); };
    std::vector<double> frequencies;
    for (int64_t i = 0; i < r.dims / 2; i++) {
        double frequency = std::pow(base, -2 * i / d);
        if (r.mode == Stretch::linear) frequency /= s;
        if (r.mode == Stretch::yarn) {
            double low = std::max(std::floor(pair(32)), 0.0), high = std::min(std::ceil(pair(1)), d - 1);
            if (low == high) high += 0.001;
            double stretched = std::clamp((i - low) / (high - low), 0.0, 1.0);
            frequency *= stretched / s + 1 - stretched;
        }
        frequencies.push_back(frequency);
    }
    return frequencies;
}

inline double yarn_temperature(const Rope& r) {
    return r.mode == Stretch::yarn && r.scale > 1 ? 0.1 * std::log(r.scale) + 1 : 1;
}

// The first dims of x (D), a query or key at one position, in place: first half and second half are the pairs.
template <class N> void rotate(N* x, const std::vector<double>& frequencies, double factor, int64_t position) {
    const size_t half = frequencies.size();
    for (size_t i = 0; i < half; i++) {
        const double cos = factor * std::cos(position * frequencies[i]),
                     sin = factor * std::sin(position * frequencies[i]);
        const N x1 = x[i], x2 = x[half + i];
        x[i] = x1 * cos - x2 * sin;
        x[half + i] = x2 * cos + x1 * sin;
    }
}

// A whole Pythia, tensors in the order of its file (data/FORMATS.md).
struct PythiaConfig {
    int64_t V, Vp, L, H, C;
    bool parallel, tanh; // residual; GELU
    Rope rope;
};

template <class N> struct PythiaWeights : Blocks<N> {
    PythiaConfig config;
    std::vector<N> embedin, embedout;

    explicit PythiaWeights(const PythiaConfig& c)
        : Blocks<N>(c.L, c.C), config(c), embedin(c.Vp * c.C), embedout(c.Vp * c.C) {}
    std::vector<std::vector<N>*> tensors() { return Blocks<N>::tensors({&embedin}, {&embedout}); }
};

// tokens (B,T) → logits (B,T,V)
template <class N>
std::vector<N> logits_of(const PythiaWeights<N>& w, std::span<const int32_t> tokens, int64_t B, int64_t T) {
    const PythiaConfig& c = w.config;
    const int64_t C = c.C, D = C / c.H;
    const std::vector<double> frequencies = rotary_frequencies(c.rope, T);
    const double temperature = yarn_temperature(c.rope), factor = c.rope.softmax_temperature ? 1 : temperature;
    const double scale = (c.rope.softmax_temperature ? temperature * temperature : 1) / std::sqrt(double(D));
    std::vector<N> x = embedding(w.embedin, {}, tokens, {}, C);
    for (int64_t l = 0; l < c.L; l++) {
        std::vector<N> qkv = w.qkv(x, l); // (B,T,H,3,D)
        for (int64_t n = 0; n < B * T; n++)
            for (int64_t h = 0; h < c.H; h++)
                for (int64_t key = 0; key < 2; key++)
                    rotate(&qkv[((n * c.H + h) * 3 + key) * D], frequencies, factor, n % T);
        std::vector<N> y = w.attproj(self_attention(qkv, B, T, c.H, D, 3 * D, D, scale), l);
        add(y, x);
        add(y, w.mlp(c.parallel ? x : y, l, c.tanh));
        x = y;
    }
    return linear(layernorm(x, w.lnfw, w.lnfb), live(w.embedout, c.V, C), {}, C);
}

// Mean cross-entropy of tokens (B,T) against targets (B,T), of either family.
template <class Weights> auto loss_of(const Weights& w, std::span<const int32_t> tokens,
                                      std::span<const int32_t> targets, int64_t B, int64_t T) {
    return mean_loss(logits_of(w, tokens, B, T), w.config.V, targets);
}

} // namespace oracle
