#include "../kernels/layernorm.h"

#include "check.h"
#include "oracle.h"

namespace {

struct Shape {
    int64_t N, C;
};
const Shape kShapes[] = {{1, 1}, {3, 5}, {2, 16}, {5, 33}, {7, 64}, {4, 129}, {3, 768}, {2, 1600}, {1, 4099}};

// What kernel and oracle may differ by. An output is rounded to real once, and its row went through a handful of float
// operations, whose sums take sqrt(C) roundings in the worst usual case. At mean µ and deviation 1 the stored mean is
// half a float's ulp of µ off, and x − mean with it.
double tolerance(int64_t C, double shift = 0) {
    const double kFloat = 1.2e-7;
    return kRealEpsilon / 2 + kFloat * (4 + 0.25 * std::sqrt(double(C)) + shift / 2);
}

struct Forward {
    Vector<real> out, residual;
    Vector<float> mean, rstd;

    Forward(const Shape& s)
        : out(poisoned<real>(s.N * s.C)), residual(poisoned<real>(s.N * s.C)), mean(poisoned<float>(s.N)),
          rstd(poisoned<float>(s.N)) {}
};

Vector<real> rounded_sum(const Vector<real>& x, const Vector<real>& y) {
    Vector<real> sum(x.size());
    for (size_t i = 0; i < x.size(); i++) assign(sum[i], to_float(x[i]) + to_float(y[i]));
    return sum;
}

void check_forward(const Forward& got, const Vector<real>& x, const Vector<real>& w, const Vector<real>& b,
                   const Shape& s, double shift, float eps) {
    check_close("out", got.out, oracle::layernorm(to_double(x), to_double(w), to_double(b), eps),
                tolerance(s.C, shift));
    std::vector<double> mean(s.N), rstd(s.N);
    for (int64_t n = 0; n < s.N; n++) {
        double square = 0;
        for (int64_t c = 0; c < s.C; c++) mean[n] += to_float(x[n * s.C + c]) / double(s.C);
        for (int64_t c = 0; c < s.C; c++) square += std::pow(to_float(x[n * s.C + c]) - mean[n], 2) / double(s.C);
        rstd[n] = 1 / std::sqrt(square + eps);
    }
    // The mean in units of the row's deviation 1; rstd in its own, whatever the shift.
    check_close("mean", got.mean, mean, 1.2e-7, 2 + std::sqrt(double(s.C)));
    check_close("rstd", got.rstd, rstd, 1.2e-7 * (4 + 0.25 * std::sqrt(double(s.C))));
}

} // namespace

TEST_CASE("forward") {
    for (const Shape& s : kShapes)
        for (float shift : {0.f, 1000.f}) {
            CAPTURE(s.N);
            CAPTURE(s.C);
            CAPTURE(shift);
            auto x = random_normal<real>(s.N * s.C, 1, 1, shift), w = random_normal<real>(s.C, 2, 1, 1);
            auto b = random_normal<real>(s.C, 3);
            Forward got(s);
            layernorm_forward(nullptr, got.out.data(), got.mean.data(), got.rstd.data(), x.data(), w.data(), b.data(),
                              s.N, s.C);
            check_forward(got, x, w, b, s, shift, kLayerNormEps);

            Forward in_place(s);
            in_place.out = x;
            layernorm_forward(nullptr, in_place.out.data(), in_place.mean.data(), in_place.rstd.data(),
                              in_place.out.data(), w.data(), b.data(), s.N, s.C);
            CHECK(check::same_bits(in_place.out, got.out));
        }
}

TEST_CASE("forward with another eps, large against the variance") {
    const Shape s{3, 40};
    auto x = random_normal<real>(s.N * s.C, 1, 0.1f), w = random_normal<real>(s.C, 2), b = random_normal<real>(s.C, 3);
    Forward got(s);
    layernorm_forward(nullptr, got.out.data(), got.mean.data(), got.rstd.data(), x.data(), w.data(), b.data(), s.N, s.C,
                      0.5f);
    check_forward(got, x, w, b, s, 0, 0.5f);
}

TEST_CASE("residual forward: the sum rounded once, then LayerNorm of what was rounded; in place too") {
    for (const Shape& s : kShapes)
        for (float shift : {0.f, 1000.f}) {
            CAPTURE(s.N);
            CAPTURE(s.C);
            CAPTURE(shift);
            auto x = random_normal<real>(s.N * s.C, 1, 1, shift), y = random_normal<real>(s.N * s.C, 4);
            auto w = random_normal<real>(s.C, 2, 1, 1), b = random_normal<real>(s.C, 3);
            const Vector<real> sum = rounded_sum(x, y);
            for (int alias = 0; alias < 3; alias++) {
                CAPTURE(alias);
                Forward got(s);
                if (alias == 1) got.residual = x;
                if (alias == 2) got.residual = y;
                residual_layernorm_forward(nullptr, got.residual.data(), got.out.data(), got.mean.data(),
                                           got.rstd.data(), alias == 1 ? got.residual.data() : x.data(),
                                           alias == 2 ? got.residual.data() : y.data(), w.data(), b.data(), s.N, s.C);
                CHECK(check::same_bits(got.residual, sum));
                check_forward(got, sum, w, b, s, shift, kLayerNormEps);
            }
        }
}

TEST_CASE("backward: complex steps through the oracle, on top of what the gradients held") {
    for (const Shape& s : {Shape{1, 1}, {3, 5}, {2, 16}, {5, 33}, {3, 64}, {4, 129}, {19, 80}, {2, 300}})
        for (float shift : {0.f, 1000.f}) {
            CAPTURE(s.N);
            CAPTURE(s.C);
            CAPTURE(shift);
            auto x = random_normal<real>(s.N * s.C, 1, 1, shift), w = random_normal<real>(s.C, 2, 1, 1);
            auto b = random_normal<real>(s.C, 3), dout = random_normal<real>(s.N * s.C, 4);
            Forward f(s);
            layernorm_forward(nullptr, f.out.data(), f.mean.data(), f.rstd.data(), x.data(), w.data(), b.data(), s.N,
                              s.C);
            auto dinp = random_normal<real>(s.N * s.C, 5);
            auto dw = random_normal<float>(s.C, 6), db = random_normal<float>(s.C, 7);
            std::vector<double> want_dinp = to_double(dinp), want_dw = to_double(dw), want_db = to_double(db);
            check::Scratch scratch(layernorm_backward_scratch(s.N, s.C));
            layernorm_backward(nullptr, dinp.data(), dw.data(), db.data(), dout.data(), x.data(), w.data(),
                               f.mean.data(), f.rstd.data(), scratch, s.N, s.C);

            auto w_z = oracle::to_complex(to_double(w)), b_z = oracle::to_complex(to_double(b));
            for (int64_t n = 0; n < s.N; n++) { // a row at a time: rows do not see each other
                auto begin = x.begin() + n * s.C;
                auto x_z = oracle::to_complex(to_double(Vector<real>(begin, begin + s.C)));
                auto loss = [&] {
                    auto out = oracle::layernorm(x_z, w_z, b_z, kLayerNormEps);
                    oracle::Complex sum = 0;
                    for (int64_t c = 0; c < s.C; c++) sum += out[c] * double(to_float(dout[n * s.C + c]));
                    return sum;
                };
                for (int64_t c = 0; c < s.C; c++) {
                    want_dinp[n * s.C + c] += oracle::derivative(x_z[c], loss);
                    want_dw[c] += oracle::derivative(w_z[c], loss);
                    want_db[c] += oracle::derivative(b_z[c], loss);
                }
            }
            const double sums = 1.2e-7 * std::sqrt(double(s.N));
            check_close("dinp", dinp, want_dinp, tolerance(s.C, shift));
            check_close("dw", dw, want_dw, 1.2e-7 * (4 + 0.25 * std::sqrt(double(s.C)) + shift) + sums);
            check_close("db", db, want_db, 2 * sums);
        }
}

TEST_CASE("backward: many rows; the same bits again, and the same rows whatever the threads") {
    const Shape s{1000, 72};
    auto x = random_normal<real>(s.N * s.C, 1), w = random_normal<real>(s.C, 2),
         dout = random_normal<real>(s.N * s.C, 4);
    auto b = random_normal<real>(s.C, 3), dinp0 = random_normal<real>(s.N * s.C, 5);
    Forward f(s);
    layernorm_forward(nullptr, f.out.data(), f.mean.data(), f.rstd.data(), x.data(), w.data(), b.data(), s.N, s.C);
    std::vector<double> want_dw(s.C), want_db(s.C);
    for (int64_t n = 0; n < s.N; n++)
        for (int64_t c = 0; c < s.C; c++) {
            const double d = to_float(dout[n * s.C + c]);
            want_dw[c] += d * (to_float(x[n * s.C + c]) - f.mean[n]) * f.rstd[n];
            want_db[c] += d;
        }
    Vector<real> first_dinp;
    check::with_threads({1, 2, 3, 8}, [&](int threads) {
        CAPTURE(threads);
        Vector<real> dinp[2] = {dinp0, dinp0};
        Vector<float> dw[2], db[2];
        for (int run = 0; run < 2; run++) {
            dw[run].assign(s.C, 0), db[run].assign(s.C, 0);
            check::Scratch scratch(layernorm_backward_scratch(s.N, s.C));
            layernorm_backward(nullptr, dinp[run].data(), dw[run].data(), db[run].data(), dout.data(), x.data(),
                               w.data(), f.mean.data(), f.rstd.data(), scratch, s.N, s.C);
        }
        CHECK(check::same_bits(dinp[0], dinp[1]));
        CHECK(check::same_bits(dw[0], dw[1]));
        CHECK(check::same_bits(db[0], db[1]));
        if (first_dinp.empty()) first_dinp = dinp[0];
        CHECK(check::same_bits(dinp[0], first_dinp));
        check_close("dw", dw[0], want_dw, 1.2e-7 * std::sqrt(double(s.N)));
        check_close("db", db[0], want_db, 1.2e-7 * std::sqrt(double(s.N)));

        Forward g(s);
        layernorm_forward(nullptr, g.out.data(), g.mean.data(), g.rstd.data(), x.data(), w.data(), b.data(), s.N, s.C);
        CHECK(check::same_bits(g.out, f.out));
    });
}

TEST_CASE("an output larger than the cache is what row by row gives, aligned or not") {
    for (int64_t C : {768, 771}) {
        const int64_t N = (18 << 20) / sizeof(real) / C;
        CAPTURE(C);
        auto x = random_normal<real>(N * C, 1), w = random_normal<real>(C, 2), b = random_normal<real>(C, 3);
        Forward want({N, C});
        for (int64_t n = 0; n < N; n += 100) {
            const int64_t rows = std::min<int64_t>(100, N - n);
            residual_layernorm_forward(nullptr, &want.residual[n * C], &want.out[n * C], &want.mean[n], &want.rstd[n],
                                       &x[n * C], &x[n * C], w.data(), b.data(), rows, C);
        }
        for (int64_t shift : {0, 1, 16}) {
            CAPTURE(shift);
            check::Scratch memory((N * C + shift) * sizeof(real)), more((N * C + shift) * sizeof(real));
            real* out = static_cast<real*>(static_cast<void*>(memory)) + shift;
            real* residual = static_cast<real*>(static_cast<void*>(more)) + shift;
            Forward got({N, C});
            residual_layernorm_forward(nullptr, residual, out, got.mean.data(), got.rstd.data(), x.data(), x.data(),
                                       w.data(), b.data(), N, C);
            CHECK(memcmp(out, want.out.data(), N * C * sizeof(real)) == 0);
            CHECK(memcmp(residual, want.residual.data(), N * C * sizeof(real)) == 0);
            CHECK(check::same_bits(got.rstd, want.rstd));
            layernorm_forward(nullptr, out, got.mean.data(), got.rstd.data(), want.residual.data(), w.data(), b.data(),
                              N, C);
            CHECK(memcmp(out, want.out.data(), N * C * sizeof(real)) == 0);
        }
    }
}

TEST_SUITE("long") {
    TEST_CASE("more than 2^31 elements: the last rows are right") {
        const int64_t C = 8192, N = 300000, tail = 3; // 2.46e9
        check::Huge<real> x(N * C), out(N * C, true), dinp(N * C, true);
        auto last = random_normal<real>(tail * C, 1), w = random_normal<real>(C, 2), b = random_normal<real>(C, 3);
        memcpy(&x[(N - tail) * C], last.data(), tail * C * sizeof(real));
        Forward got({N, 1}), want({tail, C});
        layernorm_forward(nullptr, out.data(), got.mean.data(), got.rstd.data(), x.data(), w.data(), b.data(), N, C);
        layernorm_forward(nullptr, want.out.data(), want.mean.data(), want.rstd.data(), last.data(), w.data(), b.data(),
                          tail, C);
        CHECK(memcmp(&out[(N - tail) * C], want.out.data(), tail * C * sizeof(real)) == 0);

        // x serves as dout too; all but the last rows are zero and leave every gradient as it was.
        Vector<float> dw(C), db(C), want_dw(C), want_db(C);
        Vector<real> want_dinp(tail * C);
        check::Scratch scratch(layernorm_backward_scratch(N, C));
        layernorm_backward(nullptr, dinp.data(), dw.data(), db.data(), x.data(), x.data(), w.data(), got.mean.data(),
                           got.rstd.data(), scratch, N, C);
        layernorm_backward(nullptr, want_dinp.data(), want_dw.data(), want_db.data(), last.data(), last.data(),
                           w.data(), want.mean.data(), want.rstd.data(), scratch, tail, C);
        CHECK(memcmp(&dinp[(N - tail) * C], want_dinp.data(), tail * C * sizeof(real)) == 0);
        check_close("dw", dw, to_double(want_dw), 1e-6);
        check_close("db", db, to_double(want_db), 1e-6);
    }
}
