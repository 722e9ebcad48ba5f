#include "../kernels/layernorm.h"

#include "check.h"
#include "oracle.h"

#include <numeric>

using check::kSimulated;

namespace {

struct Shape {
    int64_t N, C;
};
const Shape kShapes[] = {{1, 1},    {3, 5},    {2, 16},   {5, 33},   {7, 64},    {4, 129},  {3, 768},
                         {5, 1024}, {2, 1600}, {2, 2056}, {1, 4099}, {1, 16384}, {1, 33280}};

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
    // Narrow and wide rows, and on a GPU each way to cut them: one to four warps a row, several rows a block, a row too
    // wide for registers. The oracle goes over a row for each derivative, so of wide rows some columns are looked at.
    for (const Shape& s : {Shape{1, 1},
                           {3, 5},
                           {2, 16},
                           {5, 33},
                           {3, 64},
                           {4, 129},
                           {19, 80},
                           {270, 40},
                           {2, 300},
                           {3, 512},
                           {9, 768},
                           {8, 1024},
                           {9, 1600},
                           {5, 2056},
                           {2, 4096},
                           {3, 4104},
                           {2, 8200},
                           {2, 5001}})
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
            const std::vector<double> dinp0 = to_double(dinp), dw0 = to_double(dw), db0 = to_double(db);
            check::Scratch scratch(layernorm_backward_scratch(s.N, s.C));
            layernorm_backward(nullptr, dinp.data(), dw.data(), db.data(), dout.data(), x.data(), w.data(),
                               f.mean.data(), f.rstd.data(), scratch, s.N, s.C);

            std::vector<int64_t> columns;
            for (int64_t c = 0; c < s.C; c += std::max<int64_t>(1, s.C / 300 * 25 + s.C / 5000 * 350))
                columns.push_back(c);
            if (columns.back() != s.C - 1) columns.push_back(s.C - 1);
            auto w_z = oracle::to_complex(to_double(w)), b_z = oracle::to_complex(to_double(b));
            Vector<real> got_dinp;
            Vector<float> got_dw, got_db;
            std::vector<double> want_dinp, want_dw, want_db;
            for (int64_t c : columns) {
                got_dw.push_back(dw[c]), want_dw.push_back(dw0[c]);
                got_db.push_back(db[c]), want_db.push_back(db0[c]);
            }
            for (int64_t n = 0; n < s.N; n++) { // a row at a time: rows do not see each other
                auto begin = x.begin() + n * s.C;
                auto x_z = oracle::to_complex(to_double(Vector<real>(begin, begin + s.C)));
                auto loss = [&] {
                    auto out = oracle::layernorm(x_z, w_z, b_z, kLayerNormEps);
                    oracle::Complex sum = 0;
                    for (int64_t c = 0; c < s.C; c++) sum += out[c] * double(to_float(dout[n * s.C + c]));
                    return sum;
                };
                for (size_t i = 0; i < columns.size(); i++) {
                    const int64_t c = columns[i];
                    got_dinp.push_back(dinp[n * s.C + c]);
                    want_dinp.push_back(dinp0[n * s.C + c] + oracle::derivative(x_z[c], loss));
                    want_dw[i] += oracle::derivative(w_z[c], loss);
                    want_db[i] += oracle::derivative(b_z[c], loss);
                }
            }
            const double sums = 1.2e-7 * std::sqrt(double(s.N));
            check_close("dinp", got_dinp, want_dinp, tolerance(s.C, shift));
            check_close("dw", got_dw, want_dw, 1.2e-7 * (4 + 0.25 * std::sqrt(double(s.C)) + shift) + sums);
            check_close("db", got_db, want_db, 2 * sums);
        }
}

TEST_CASE("backward: many rows; the same bits again, and the same rows whatever the threads") {
    // On a GPU 264 blocks take several turns, whichever form has such rows.
    for (const Shape& s : {Shape{kSimulated ? 600 : 2200, 72}, {1100, 1552 / sizeof(real)}, {530, 301}}) {
        CAPTURE(s.N);
        CAPTURE(s.C);
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
            Vector<real> alone(dinp0.end() - s.C, dinp0.end()); // the last row
            const int64_t last = s.N - 1;
            check::Scratch scratch(layernorm_backward_scratch(1, s.C));
            layernorm_backward(nullptr, alone.data(), dw[1].data(), db[1].data(), &dout[last * s.C], &x[last * s.C],
                               w.data(), &f.mean[last], &f.rstd[last], scratch, 1, s.C);
            CHECK(std::equal(alone.begin(), alone.end(), dinp[0].end() - s.C,
                             [](real a, real b) { return to_float(a) == to_float(b); }));
            CHECK(check::same_bits(dinp[0], first_dinp));
            check_close("dw", dw[0], want_dw, 1.2e-7 * std::sqrt(double(s.N)));
            check_close("db", db[0], want_db, 1.2e-7 * std::sqrt(double(s.N)));

            Forward g(s);
            layernorm_forward(nullptr, g.out.data(), g.mean.data(), g.rstd.data(), x.data(), w.data(), b.data(), s.N,
                              s.C);
            CHECK(check::same_bits(g.out, f.out));
        });
    }
}

TEST_CASE("each array from any address") {
    const Shape s{3, 48};
    auto x = random_normal<real>(s.N * s.C, 1), y = random_normal<real>(s.N * s.C, 4);
    auto w = random_normal<real>(s.C, 2, 1, 1), b = random_normal<real>(s.C, 3);
    const Vector<real> sum = rounded_sum(x, y);
    Forward want(s);
    layernorm_forward(nullptr, want.out.data(), want.mean.data(), want.rstd.data(), sum.data(), w.data(), b.data(), s.N,
                      s.C);
    check_forward(want, sum, w, b, s, 0, kLayerNormEps);
    auto dinp = [&] { return random_normal<real>(s.N * s.C, 5); };
    Vector<real> want_dinp = dinp();
    Vector<float> want_dw(s.C), want_db(s.C);
    check::Scratch scratch(layernorm_backward_scratch(s.N, s.C));
    layernorm_backward(nullptr, want_dinp.data(), want_dw.data(), want_db.data(), y.data(), sum.data(), w.data(),
                       want.mean.data(), want.rstd.data(), scratch, s.N, s.C);
    for (int shifted = 0; shifted < 6; shifted++) {
        CAPTURE(shifted);
        Forward got(s);
        check::Unaligned<real> out(got.out), residual(got.residual), x1(x), y1(y), w1(w), b1(b), sum1(sum);
        auto one = [&](int which, auto& there, auto& here) { return shifted == which ? there.data() : here.data(); };
        residual_layernorm_forward(nullptr, one(0, residual, got.residual), one(1, out, got.out), got.mean.data(),
                                   got.rstd.data(), one(2, x1, x), one(3, y1, y), one(4, w1, w), one(5, b1, b), s.N,
                                   s.C);
        if (shifted == 1) got.out = out.copy();
        if (shifted == 0) got.residual = residual.copy();
        CHECK(check::same_bits(got.residual, sum));
        check_forward(got, sum, w, b, s, 0, kLayerNormEps);
        got.out = poisoned<real>(s.N * s.C);
        layernorm_forward(nullptr, one(1, out, got.out), got.mean.data(), got.rstd.data(), one(2, sum1, sum),
                          one(4, w1, w), one(5, b1, b), s.N, s.C);
        if (shifted == 1) got.out = out.copy();
        check_forward(got, sum, w, b, s, 0, kLayerNormEps);

        Vector<real> dx = dinp();
        Vector<float> dw(s.C), db(s.C);
        check::Unaligned<real> dx1(dx);
        check::Unaligned<float> dw1(dw), db1(db);
        layernorm_backward(nullptr, one(0, dx1, dx), one(1, dw1, dw), one(5, db1, db), one(3, y1, y), one(2, sum1, sum),
                           one(4, w1, w), want.mean.data(), want.rstd.data(), scratch, s.N, s.C);
        check_close("dinp", shifted == 0 ? dx1.copy() : dx, to_double(want_dinp), 2 * tolerance(s.C));
        check_close("dw", shifted == 1 ? dw1.copy() : dw, to_double(want_dw), 1e-6);
        check_close("db", shifted == 5 ? db1.copy() : db, to_double(want_db), 1e-6);
    }
}

TEST_CASE("an output larger than a CPU's cache is what row by row gives, aligned or not") {
    for (int64_t C : {768, 771}) {
        const int64_t N = kSimulated ? 130 : (18 << 20) / sizeof(real) / C;
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
            CHECK(memcmp(residual, want.residual.data(), N * C * sizeof(real)) == 0);
            // A GPU sums a row in another order where accesses of 16 bytes are not allowed.
            const bool same_order = shift != 1 || device_is_host();
            auto check_out = [&] {
                if (same_order)
                    CHECK(memcmp(out, want.out.data(), N * C * sizeof(real)) == 0);
                else
                    check_close("out", Vector<real>(out, out + N * C), to_double(want.out), 2 * tolerance(C));
            };
            check_out();
            if (same_order) CHECK(check::same_bits(got.rstd, want.rstd));
            layernorm_forward(nullptr, out, got.mean.data(), got.rstd.data(), want.residual.data(), w.data(), b.data(),
                              N, C);
            check_out();
        }
    }
}

// Rows for a warp each and, in the simulator, for a block each and of odd length: GPUs have kernels for all three.
TEST_CASE("more than 2^31 elements: the last rows are right" * doctest::test_suite(kSimulated ? "" : "long")) {
    for (int64_t C : {int64_t(1536 / sizeof(real)), int64_t(4096), int64_t(1023)}) {
        if (C != 1536 / sizeof(real) && !(kSimulated && check::first_seed() && sizeof(real) == 2)) continue;
        CAPTURE(C);
        // On a GPU the last row belongs to the first of 264 blocks.
        const int64_t tail = 3, N = ((int64_t(1) << 31) / C / 264 + 2) * 264 + 1;
        check::Huge<real> x(N * C), out(N * C, true), sum(N * C, true), dinp(N * C, true);
        auto last = random_normal<real>(tail * C, 1), w = random_normal<real>(C, 2), b = random_normal<real>(C, 3);
        memcpy(&x[(N - tail) * C], last.data(), tail * C * sizeof(real));
        Forward want({tail, C}), want_sum({tail, C});
        Vector<real> want_residual(tail * C);
        Vector<float> mean(N), rstd(N, 1);
        layernorm_forward(nullptr, want.out.data(), want.mean.data(), want.rstd.data(), last.data(), w.data(), b.data(),
                          tail, C);
        residual_layernorm_forward(nullptr, want_residual.data(), want_sum.out.data(), want_sum.mean.data(),
                                   want_sum.rstd.data(), last.data(), last.data(), w.data(), b.data(), tail, C);
        {
            check::OnlyBlocks some(check::blocks_at(double(int64_t(1) << 31) / (N * C)));
            residual_layernorm_forward(nullptr, sum.data(), out.data(), mean.data(), rstd.data(), x.data(), x.data(),
                                       w.data(), b.data(), N, C);
            CHECK(memcmp(&sum[(N - tail) * C], want_residual.data(), tail * C * sizeof(real)) == 0);
            CHECK(memcmp(&out[(N - tail) * C], want_sum.out.data(), tail * C * sizeof(real)) == 0);
            layernorm_forward(nullptr, out.data(), mean.data(), rstd.data(), x.data(), w.data(), b.data(), N, C);
        }
        CHECK(memcmp(&out[(N - tail) * C], want.out.data(), tail * C * sizeof(real)) == 0);

        // x serves as dout too; all but the last rows are zero and leave every gradient as it was. In the simulator one
        // block runs, which sees the last row alone; zeros are the sums of the others.
        const int64_t seen = kSimulated ? 1 : tail;
        Vector<float> dw(C), db(C), want_dw(C), want_db(C);
        Vector<real> want_dinp(seen * C);
        Vector<float> scratch(layernorm_backward_scratch(N, C) / sizeof(float));
        {
            check::OnlyBlocks some([](uint64_t count) {
                std::vector<uint64_t> all(count == 264 ? 1 : count);
                std::iota(all.begin(), all.end(), 0);
                return all;
            });
            layernorm_backward(nullptr, dinp.data(), dw.data(), db.data(), x.data(), x.data(), w.data(), mean.data(),
                               rstd.data(), scratch.data(), N, C);
        }
        const int64_t skipped = tail - seen;
        layernorm_backward(nullptr, want_dinp.data(), want_dw.data(), want_db.data(), &last[skipped * C],
                           &last[skipped * C], w.data(), &want.mean[skipped], &want.rstd[skipped], scratch.data(), seen,
                           C);
        CHECK(memcmp(&dinp[(N - seen) * C], want_dinp.data(), seen * C * sizeof(real)) == 0);
        check_close("dw", dw, to_double(want_dw), 1e-6);
        check_close("db", db, to_double(want_db), 1e-6);
    }
}
