// GELU against the oracle: every value of a fine grid, the ends, the derivative by complex step, odd lengths.
#include "check.h"
#include "oracle.h"

#include "../kernels/common.h"
#include "../kernels/gelu.h"
#include "../kernels/math.h"

namespace {

// Φ in double with its left tail intact, and the tanh form likewise; oracle.h's plain forms cancel below −5.
double gelu_exact(double x, Gelu kind) {
    if (kind == Gelu::erf) return 0.5 * x * std::erfc(-x * M_SQRT1_2);
    return x / (1 + std::exp(-2 * std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
}

// The truth of the derivative: a complex step through the oracle.
double slope_exact(double x, Gelu kind) {
    oracle::Complex z(x, 1e-30);
    return (kind == Gelu::tanh ? oracle::gelu_tanh(z) : oracle::gelu_erf(z)).imag() / 1e-30;
}

double ulps(float got, double want) {
    float f = std::max(std::abs(float(want)), 1.17549435e-38f);
    return std::abs(got - want) / (double(std::nextafter(f, INFINITY)) - f);
}

Vector<real> forward(const Vector<real>& inp, Gelu kind) {
    Vector<real> out = poisoned<real>(inp.size());
    gelu_forward(nullptr, out.data(), inp.data(), inp.size(), kind);
    return out;
}
Vector<real> backward(const Vector<real>& dout, const Vector<real>& inp, Gelu kind) {
    Vector<real> dinp = poisoned<real>(inp.size());
    gelu_backward(nullptr, dinp.data(), dout.data(), inp.data(), inp.size(), kind);
    return dinp;
}
Vector<real> reals(const std::vector<double>& values) {
    Vector<real> v(values.size());
    for (size_t i = 0; i < v.size(); i++) assign(v[i], values[i]);
    return v;
}

using check::same_bits;

constexpr Gelu kForms[] = {Gelu::tanh, Gelu::erf};

// From −13 to 13 in steps of about 1/6000, and a million random ones nearer the middle.
Vector<real> grid() {
    Vector<real> x = random_normal<real>(1000001, 7, 3);
    for (int i = 0; i <= 150000; i++) x.emplace_back(), assign(x.back(), -13 + 26 * (i / 150000.));
    return x;
}

} // namespace

// Relative to each value, so that the left tail counts: the 6 ulp of math.h and one more for the product, and half a
// step of bf16. The tanh form's argument 2y carries five roundings, and the exp turns each into |2y|/2 ulp.
TEST_CASE("forward is exact to a few ulp of each value") {
    Vector<real> x = grid();
    for (Gelu kind : kForms) {
        Vector<real> out = forward(x, kind);
        double worst = 0, at = 0;
        for (size_t i = 0; i < x.size(); i++) {
            double v = to_float(x[i]), want = gelu_exact(v, kind);
            // Below this lie subnormals (and their last neighbours), which either form may flush to 0.
            if (std::abs(want) < 1e-35) {
                CHECK(std::abs(to_float(out[i])) <= 1.1e-35);
                continue;
            }
            double argument = kind == Gelu::tanh ? std::abs(1.6 * v * (1 + 0.0447 * v * v)) : 0;
            double bound = 7 + 2.5 * argument + (sizeof(real) == 2 ? 32768 : 0);
            double error = ulps(to_float(out[i]), want) / bound;
            if (!(error <= worst)) worst = error, at = v;
        }
        CAPTURE(at);
        CHECK(worst <= 1);
    }
}

TEST_CASE("backward is dout times the oracle's derivative") {
    Vector<real> x = grid(), dout = random_normal<real>(x.size(), 8);
    for (Gelu kind : kForms) {
        Vector<real> dinp = backward(dout, x, kind);
        double worst = 0, at = 0;
        for (size_t i = 0; i < x.size(); i++) {
            double v = to_float(x[i]), d = to_float(dout[i]), want = d * slope_exact(v, kind);
            // Two terms of size up to 1 are added, each a few float epsilons off; the product is rounded to real.
            double bound = std::abs(d) * 8 * 1.2e-7 + std::abs(want) * kRealEpsilon / 2;
            double error = std::abs(to_float(dinp[i]) - want) / (bound + 1e-35);
            if (!(error <= worst)) worst = error, at = v;
        }
        CAPTURE(at);
        CHECK(worst <= 1);
    }
}

TEST_CASE("ends: infinities, huge values, zeros and NaN") {
    float huge = 3e38f;
    Vector<real> x = reals({-INFINITY, -huge, -1e20, -50, -13.5, 0.0, 13.5, 50, 1e20, huge, INFINITY});
    Vector<real> one = reals(std::vector<double>(x.size(), 1)), nan = reals({NAN}), just = reals({1});
    for (Gelu kind : kForms) {
        Vector<real> out = forward(x, kind), dinp = backward(one, x, kind);
        for (size_t i = 0; i < x.size(); i++) {
            double v = to_float(x[i]);
            CAPTURE(v);
            CHECK(to_float(out[i]) == (v > 0 ? v : 0));
            CHECK(to_float(dinp[i]) == (v > 0 ? 1 : v < 0 ? 0 : 0.5));
        }
        CHECK(std::isnan(to_float(forward(nan, kind)[0])));
        CHECK(std::isnan(to_float(backward(just, nan, kind)[0])));
        CHECK(std::isnan(to_float(backward(nan, just, kind)[0])));
    }
}

TEST_CASE("every length: nothing past the end is touched, in place or not") {
    for (int64_t n : {0, 1, 2, 15, 16, 17, 31, 33, 8191, 8193, 100003}) {
        CAPTURE(n);
        Vector<real> inp = random_normal<real>(n, 9), dout = random_normal<real>(n, 10);
        for (Gelu kind : {Gelu::none, Gelu::tanh, Gelu::erf}) {
            std::vector<double> want(n), dwant(n);
            for (int64_t i = 0; i < n; i++) {
                double v = to_float(inp[i]), d = to_float(dout[i]);
                want[i] = kind == Gelu::none ? v : gelu_exact(v, kind);
                dwant[i] = d * (kind == Gelu::none ? 1 : slope_exact(v, kind));
            }
            Vector<real> out = poisoned<real>(n + 1), dinp = poisoned<real>(n + 1);
            gelu_forward(nullptr, out.data(), inp.data(), n, kind);
            gelu_backward(nullptr, dinp.data(), dout.data(), inp.data(), n, kind);
            CHECK(std::isnan(to_float(out[n])));
            CHECK(std::isnan(to_float(dinp[n])));
            out.pop_back(), dinp.pop_back();
            check_close("out", out, want, 4 * kRealEpsilon);
            check_close("dinp", dinp, dwant, 4 * kRealEpsilon);

            Vector<real> in_place = inp, gradient = dout;
            gelu_forward(nullptr, in_place.data(), in_place.data(), n, kind);
            gelu_backward(nullptr, gradient.data(), gradient.data(), inp.data(), n, kind);
            CHECK(same_bits(in_place, out));
            CHECK(same_bits(gradient, dinp));
        }
    }
}

TEST_CASE("the same bits from arrays that start anywhere") {
    const int64_t n = 777;
    Vector<real> inp = random_normal<real>(n + 1, 12), dout = random_normal<real>(n + 1, 13);
    for (Gelu kind : {Gelu::none, Gelu::tanh, Gelu::erf}) {
        Vector<real> shifted(inp.begin() + 1, inp.end()), dshifted(dout.begin() + 1, dout.end());
        Vector<real> out = poisoned<real>(n + 1), dinp = poisoned<real>(n + 1);
        gelu_forward(nullptr, out.data() + 1, inp.data() + 1, n, kind);
        gelu_backward(nullptr, dinp.data() + 1, dout.data() + 1, inp.data() + 1, n, kind);
        CHECK(std::isnan(to_float(out[0])));
        CHECK(std::isnan(to_float(dinp[0])));
        Vector<real> want = poisoned<real>(n), dwant = poisoned<real>(n);
        gelu_forward(nullptr, want.data(), shifted.data(), n, kind);
        gelu_backward(nullptr, dwant.data(), dshifted.data(), shifted.data(), n, kind);
        CHECK(memcmp(out.data() + 1, want.data(), n * sizeof(real)) == 0);
        CHECK(memcmp(dinp.data() + 1, dwant.data(), n * sizeof(real)) == 0);
    }
}

TEST_CASE("the same bits from any number of threads") {
    Vector<real> inp = random_normal<real>(50021, 11);
    int threads = omp_get_max_threads();
    Vector<real> out = forward(inp, Gelu::tanh);
    omp_set_num_threads(3);
    Vector<real> again = forward(inp, Gelu::tanh);
    omp_set_num_threads(threads);
    CHECK(same_bits(out, again));
}

// Zeros stay zeros, so that only the last elements need to be known. In the simulator also element by element, which
// is how a GPU takes arrays that start anywhere.
TEST_CASE("more than 2^31 elements: the last ones are right" * doctest::test_suite(check::kSimulated ? "" : "long")) {
    const int64_t n = (int64_t(1) << 31) + 100003, tail = 1000;
    const Vector<real> inp = random_normal<real>(tail, 14), dout = random_normal<real>(tail, 15);
    check::Huge<real> all(n + 1), gradients(n + 1), out(n + 1, true);
    check::OnlyBlocks some(check::blocks_at(double(int64_t(1) << 31) / n, 5));
    for (int64_t start : {0, 1}) {
        if (start > 0 && !check::kSimulated) continue;
        std::copy(inp.begin(), inp.end(), &all[start + n - tail]);
        std::copy(dout.begin(), dout.end(), &gradients[start + n - tail]);
        auto last = [&] { return Vector<real>(&out[start + n - tail], &out[start + n - tail] + tail); };
        for (Gelu kind : {Gelu::none, Gelu::tanh, Gelu::erf}) {
            CAPTURE(start);
            Vector<real> want = inp, dwant = dout;
            gelu_forward(nullptr, want.data(), inp.data(), tail, kind);
            gelu_backward(nullptr, dwant.data(), dout.data(), inp.data(), tail, kind);
            gelu_forward(nullptr, &out[start], &all[start], n, kind);
            CHECK(same_bits(last(), want));
            gelu_backward(nullptr, &out[start], &gradients[start], &all[start], n, kind);
            CHECK(same_bits(last(), dwant));
        }
    }
}
