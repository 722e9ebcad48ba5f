// What the attention tests share: tensors with guards between their rows, a problem of any shape, and its answer in
// double.
#pragma once
#include "../kernels/attention.h"
#include "check.h"
#include "oracle.h"

constexpr double kFloatEpsilon = 1.1920929e-7;
constexpr float kGuard = -54321.f; // between rows, where no kernel may write

// Rows of H·D elements, `gap` guards after each and `gap` before the first.
template <class T> struct Tensor {
    int64_t B, rows, H, D, gap, token;
    Vector<T> data;

    Tensor(int64_t B, int64_t rows, int64_t H, int64_t D, int64_t gap)
        : B(B), rows(rows), H(H), D(D), gap(gap), token(H * D + gap), data(gap + B * rows * token) {
        for (T& x : data) assign(x, kGuard);
    }
    Heads<T> heads() { return {data.data() + gap, rows * token, token, D}; }
    Heads<const T> view() const { return {data.data() + gap, rows * token, token, D}; }

    template <class F> void each(F f) { // f(element, index in (B,rows,H,D))
        int64_t n = 0;
        for (int64_t r = 0; r < B * rows; r++)
            for (int64_t c = 0; c < H * D; c++) f(data[gap + r * token + c], n++);
    }
    void fill(const Vector<T>& from) {
        each([&](T& x, int64_t n) { x = from[n]; });
    }
    Vector<T> dense() {
        Vector<T> out(B * rows * H * D);
        each([&](T& x, int64_t n) { out[n] = x; });
        return out;
    }
    bool guards_hold() {
        T guard;
        assign(guard, kGuard);
        Vector<T> kept = data;
        each([&](T& x, int64_t) { x = guard; });
        bool hold = true;
        for (T x : data) hold = hold && to_float(x) == to_float(guard);
        data = std::move(kept);
        return hold;
    }
};

using check::Scratch;

// One head of a dense (B,rows,H,D).
template <class N>
std::vector<N> head_of(const std::vector<N>& x, int64_t rows, int64_t H, int64_t D, int64_t b, int64_t h) {
    std::vector<N> out(rows * D);
    for (int64_t t = 0; t < rows; t++)
        for (int64_t d = 0; d < D; d++) out[t * D + d] = x[((b * rows + t) * H + h) * D + d];
    return out;
}
inline void put_head(std::vector<double>& x, const std::vector<double>& from, int64_t rows, int64_t H, int64_t D,
                     int64_t b, int64_t h) {
    for (int64_t t = 0; t < rows; t++)
        for (int64_t d = 0; d < D; d++) x[((b * rows + t) * H + h) * D + d] = from[t * D + d];
}

struct Problem;
// Tensor cores take P and dS rounded to bf16, by half an epsilon of each at the most, in either direction: the error of
// a sum of such terms is that times the root of the sum of their squares. Twice as much bounds the worst of a tensor
// (five deviations of a uniform error), and any sum of up to four terms. 0 where the weights stay floats.
double weight_rounding(const Problem& p);

// Sums in double, and the sums of their terms' squares.
struct Sums {
    std::vector<double> value, squares;

    explicit Sums(size_t n = 0) : value(n), squares(n) {}
    void add(size_t i, double term) { value[i] += term, squares[i] += term * term; }
    std::vector<double> allowance(const Problem& p) const {
        std::vector<double> all(squares.size());
        for (size_t i = 0; i < all.size(); i++) all[i] = weight_rounding(p) * std::sqrt(squares[i]);
        return all;
    }
};

struct HeadGradients {
    Sums dq, dk, dv;
    HeadGradients(size_t queries, size_t keys) : dq(queries), dk(keys), dv(keys) {}
};

// The contract's formula for one head in double, with O and LSE as the forward pass left them.
inline HeadGradients head_gradients(const std::vector<double>& dout, const std::vector<double>& q,
                                    const std::vector<double>& k, const std::vector<double>& v,
                                    const std::vector<double>& o, const std::vector<double>& lse, int64_t D,
                                    double scale, int64_t q_offset, int64_t k_offset,
                                    const Vector<int64_t>& doc_start) {
    int64_t Tq = q.size() / D, Tk = k.size() / D;
    HeadGradients g(Tq * D, Tk * D);
    for (int64_t i = 0; i < Tq; i++)
        for (int64_t j = 0; j < Tk; j++) {
            int64_t position = k_offset + j;
            if (position > q_offset + i || (!doc_start.empty() && position < doc_start[i])) continue;
            double score = 0, dp = 0, delta = 0;
            for (int64_t d = 0; d < D; d++) {
                score += scale * q[i * D + d] * k[j * D + d];
                dp += dout[i * D + d] * v[j * D + d];
                delta += dout[i * D + d] * o[i * D + d];
            }
            double p = std::exp(score - lse[i]), ds = p * (dp - delta) * scale;
            for (int64_t d = 0; d < D; d++) {
                g.dq.add(i * D + d, ds * k[j * D + d]);
                g.dk.add(j * D + d, ds * q[i * D + d]);
                g.dv.add(j * D + d, p * dout[i * D + d]);
            }
        }
    return g;
}

struct Problem {
    AttentionShape shape;
    float scale;
    Vector<int64_t> documents; // (B,Tq) or empty
    int64_t gap = 0;
    bool plain = false; // answered by kernels that keep P and dS in float
    Tensor<real> q, k, v, dout;

    Problem(AttentionShape s, uint64_t seed, Vector<int64_t> documents = {}, int64_t gap = 0)
        : shape(s), scale(float(1 / std::sqrt(double(s.D)))), documents(documents), gap(gap),
          q(s.B, s.Tq, s.H, s.D, gap), k(s.B, s.Tk, s.H, s.D, gap), v(s.B, s.Tk, s.H, s.D, gap),
          dout(s.B, s.Tq, s.H, s.D, gap) {
        q.fill(random_normal<real>(s.B * s.Tq * s.H * s.D, seed));
        k.fill(random_normal<real>(s.B * s.Tk * s.H * s.D, seed + 1));
        v.fill(random_normal<real>(s.B * s.Tk * s.H * s.D, seed + 2, 1, 0.5f));
        dout.fill(random_normal<real>(s.B * s.Tq * s.H * s.D, seed + 3));
    }
    AttentionShape call() const {
        AttentionShape s = shape;
        s.doc_start = documents.empty() ? nullptr : documents.data();
        return s;
    }
};

inline double weight_rounding(const Problem& p) {
    bool tensor_cores = sizeof(real) == 2 && !device_is_host();
    return tensor_cores && !p.plain ? 2 * (kRealEpsilon / 2) : 0;
}

template <class T> struct Output {
    Tensor<T> o;
    Vector<float> lse;
};

// T = real calls attention_forward, T = float with `partial` attention_forward_partial.
template <class T = real> Output<T> forward(const Problem& p, bool partial = false) {
    AttentionShape s = p.call();
    Output<T> out{Tensor<T>(s.B, s.Tq, s.H, s.D, p.gap), poisoned<float>(s.B * s.H * s.Tq)};
    out.o.fill(poisoned<T>(s.B * s.Tq * s.H * s.D));
    Scratch scratch(attention_forward_scratch(s));
    if constexpr (std::is_same_v<T, float>)
        if (partial) {
            attention_forward_partial(nullptr, out.o.heads(), out.lse.data(), p.q.view(), p.k.view(), p.v.view(),
                                      p.scale, scratch.get(), s);
            return out;
        }
    if constexpr (std::is_same_v<T, real>)
        attention_forward(nullptr, out.o.heads(), out.lse.data(), p.q.view(), p.k.view(), p.v.view(), p.scale,
                          scratch.get(), s);
    return out;
}

template <class T> struct Backward {
    Tensor<T> dq, dk, dv;
    explicit Backward(const Problem& p)
        : dq(p.shape.B, p.shape.Tq, p.shape.H, p.shape.D, p.gap),
          dk(p.shape.B, p.shape.Tk, p.shape.H, p.shape.D, p.gap), dv(dk) {
        for (Tensor<T>* x : {&dq, &dk, &dv}) x->each([](T& e, int64_t) { assign(e, NAN); });
    }
};

inline Backward<real> backward(const Problem& p, const Output<real>& out) {
    Backward<real> g(p);
    Scratch scratch(attention_backward_scratch(p.call()));
    attention_backward(nullptr, g.dq.heads(), g.dk.heads(), g.dv.heads(), p.dout.view(), p.q.view(), p.k.view(),
                       p.v.view(), out.o.view(), out.lse.data(), p.scale, scratch.get(), p.call());
    return g;
}

// A row that saw nothing must be −Inf in both; the others are compared as they are.
inline void check_lse(const Vector<float>& got, const std::vector<double>& want, double tolerance) {
    Vector<float> finite_got;
    std::vector<double> finite_want;
    for (size_t i = 0; i < want.size(); i++)
        if (std::isinf(want[i]))
            CHECK(got[i] == -INFINITY);
        else
            finite_got.push_back(got[i]), finite_want.push_back(want[i]);
    check_close("lse", finite_got, finite_want, tolerance, 1);
}

// A float sum of n products rounds by half an epsilon of a partial sum at each addition, so its error grows with the
// square root of n. A score's absolute error is its weight's relative error. Both at once, twice: two products in a
// row.
inline double float_tolerance(const Problem& p, double largest_score = 4) {
    return kFloatEpsilon * (largest_score * std::sqrt(double(p.shape.D)) + std::sqrt(double(p.shape.Tk + p.shape.Tq)));
}
// Results in `real` are rounded once more, by half the distance to the next.
template <class T> double tolerance_of(const Problem& p, double largest_score = 4) {
    double rounding = std::is_same_v<T, bf16> ? kRealEpsilon / 2 : 0;
    return rounding + float_tolerance(p, largest_score);
}

inline Vector<int64_t> documents_of(const Problem& p, int64_t b) {
    if (p.documents.empty()) return {};
    return {p.documents.begin() + b * p.shape.Tq, p.documents.begin() + (b + 1) * p.shape.Tq};
}

// Documents of the given lengths, from position `first` on, for B sequences one after another.
inline Vector<int64_t> starts(int64_t B, int64_t Tq, int64_t first, const std::vector<Vector<int64_t>>& lengths) {
    Vector<int64_t> doc_start;
    for (int64_t b = 0; b < B; b++) {
        int64_t begin = first, at = first;
        size_t next = 0;
        for (int64_t i = 0; i < Tq; i++, at++) {
            while (next < lengths[b].size() && at - begin == lengths[b][next]) begin = at, next++;
            doc_start.push_back(begin);
        }
    }
    return doc_start;
}

// Σ_j (p_ij·v_jd)² of one head: (Tq,D).
inline std::vector<double> attention_squares(const std::vector<double>& q, const std::vector<double>& k,
                                             const std::vector<double>& v, const std::vector<double>& lse,
                                             const Problem& p, const Vector<int64_t>& doc_start) {
    const AttentionShape& s = p.shape;
    std::vector<double> squares(s.Tq * s.D);
    for (int64_t i = 0; i < s.Tq; i++)
        for (int64_t j = 0; j < s.Tk; j++) {
            int64_t position = s.k_offset + j;
            if (position > s.q_offset + i || (!doc_start.empty() && position < doc_start[i])) continue;
            double score = 0;
            for (int64_t d = 0; d < s.D; d++) score += p.scale * q[i * s.D + d] * k[j * s.D + d];
            double weight = std::exp(score - lse[i]);
            for (int64_t d = 0; d < s.D; d++) squares[i * s.D + d] += std::pow(weight * v[j * s.D + d], 2);
        }
    return squares;
}

struct Expected {
    Sums o;
    std::vector<double> lse;
};
inline Expected expected_forward(Problem& p) {
    const AttentionShape& s = p.shape;
    Expected want{Sums(s.B * s.Tq * s.H * s.D), {}};
    auto q = to_double(p.q.dense()), k = to_double(p.k.dense()), v = to_double(p.v.dense());
    for (int64_t b = 0; b < s.B; b++)
        for (int64_t h = 0; h < s.H; h++) {
            std::vector<double> o, lse;
            oracle::attention_head(o, lse, head_of(q, s.Tq, s.H, s.D, b, h), head_of(k, s.Tk, s.H, s.D, b, h),
                                   head_of(v, s.Tk, s.H, s.D, b, h), s.D, p.scale, s.q_offset, s.k_offset,
                                   documents_of(p, b));
            put_head(want.o.value, o, s.Tq, s.H, s.D, b, h);
            want.lse.insert(want.lse.end(), lse.begin(), lse.end());
            if (weight_rounding(p) > 0) {
                auto squares = attention_squares(head_of(q, s.Tq, s.H, s.D, b, h), head_of(k, s.Tk, s.H, s.D, b, h),
                                                 head_of(v, s.Tk, s.H, s.D, b, h), lse, p, documents_of(p, b));
                put_head(want.o.squares, squares, s.Tq, s.H, s.D, b, h);
            }
        }
    return want;
}

// o and lse: what the backward pass is given.
inline HeadGradients expected_backward(Problem& p, const std::vector<double>& o, const std::vector<double>& lse) {
    const AttentionShape& s = p.shape;
    HeadGradients want(s.B * s.Tq * s.H * s.D, s.B * s.Tk * s.H * s.D);
    auto q = to_double(p.q.dense()), k = to_double(p.k.dense()), v = to_double(p.v.dense()),
         dout = to_double(p.dout.dense());
    for (int64_t b = 0; b < s.B; b++)
        for (int64_t h = 0; h < s.H; h++) {
            std::vector<double> head_lse(lse.begin() + (b * s.H + h) * s.Tq, lse.begin() + (b * s.H + h + 1) * s.Tq);
            HeadGradients g = head_gradients(head_of(dout, s.Tq, s.H, s.D, b, h), head_of(q, s.Tq, s.H, s.D, b, h),
                                             head_of(k, s.Tk, s.H, s.D, b, h), head_of(v, s.Tk, s.H, s.D, b, h),
                                             head_of(o, s.Tq, s.H, s.D, b, h), head_lse, s.D, p.scale, s.q_offset,
                                             s.k_offset, documents_of(p, b));
            for (auto [all, one, rows] :
                 {std::tuple(&want.dq, &g.dq, s.Tq), {&want.dk, &g.dk, s.Tk}, {&want.dv, &g.dv, s.Tk}}) {
                put_head(all->value, one->value, rows, s.H, s.D, b, h);
                put_head(all->squares, one->squares, rows, s.H, s.D, b, h);
            }
        }
    return want;
}

// What a backend made of a problem, held against double, and nothing written that should not be.
inline void check_answer(Problem& p, Output<real>& out, Backward<real>& g, double largest_score = 4) {
    const AttentionShape& s = p.shape;
    INFO("B ", s.B, " Tq ", s.Tq, " Tk ", s.Tk, " H ", s.H, " D ", s.D, " q_offset ", s.q_offset, " k_offset ",
         s.k_offset);
    double tolerance = tolerance_of<real>(p, largest_score);
    Expected want = expected_forward(p);
    check_close("o", out.o.dense(), want.o.value, tolerance, 0, want.o.allowance(p));
    check_lse(out.lse, want.lse, float_tolerance(p, largest_score));
    CHECK(out.o.guards_hold());

    std::vector<double> o = to_double(out.o.dense()), lse(out.lse.begin(), out.lse.end());
    HeadGradients gradients = expected_backward(p, o, lse);
    // dS is a difference of sums of D unit normals, so of numbers around sqrt(D); with the scale, around 1.
    check_close("dq", g.dq.dense(), gradients.dq.value, tolerance, 1, gradients.dq.allowance(p));
    check_close("dk", g.dk.dense(), gradients.dk.value, tolerance, 1, gradients.dk.allowance(p));
    check_close("dv", g.dv.dense(), gradients.dv.value, tolerance, 0, gradients.dv.allowance(p));
    CHECK((g.dq.guards_hold() && g.dk.guards_hold() && g.dv.guards_hold()));
}
