// kernels/math.h against libm in double: accuracy on grids that take every lane, the ends, and what is no number.
#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "../kernels/math.h"

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity(), kNaN = std::numeric_limits<float>::quiet_NaN();

// |got − want| in units of the distance between floats at want.
double ulps(float got, double want) {
    double spacing = std::ldexp(1.0, std::max(std::ilogb(want), -126) - 23);
    double error = std::abs(got - want) / spacing;
    return std::isnan(error) ? INFINITY : error;
}

struct Worst {
    double error = -1;
    float x = 0;
};

// The worst of f(x) against want(double(x)) over a million points of [low, high], evenly spread but for a jitter, so
// that all the low bits of x take part.
template <class F, class Want> Worst worst_over(float low, float high, F f, Want want) {
    constexpr int64_t kPoints = 1 << 20;
    std::mt19937 rng(1);
    std::uniform_real_distribution<double> jitter(0, 1);
    Worst worst;
    for (int64_t n = 0; n < kPoints; n += kLanes) {
        float x[kLanes], y[kLanes];
        for (int i = 0; i < kLanes; i++)
            x[i] = n + i == 0 ? low
                   : n + i == kPoints - 1
                       ? high
                       : std::min(float(low + (double(high) - low) * (n + i + jitter(rng)) / kPoints), high);
        store(y, f(load(x)));
        for (int i = 0; i < kLanes; i++)
            if (double error = ulps(y[i], want(double(x[i]))); error > worst.error) worst = {error, x[i]};
    }
    return worst;
}

template <class F> float at(F f, float x) {
    Vec y = f(splat(x));
    for (int i = 1; i < kLanes; i++) CHECK((y[i] == y[0] || (std::isnan(y[i]) && std::isnan(y[0]))));
    return y[0];
}

void check_worst(const char* what, Worst worst, double bound) {
    CHECK_MESSAGE(worst.error <= bound, what, ": ", worst.error, " ulp at ", worst.x, ", bound ", bound);
}

} // namespace

TEST_CASE("exp: 1.5 ulp where floats are normal") {
    auto f = [](Vec x) { return exp(x); };
    auto want = [](double x) { return std::exp(x); };
    check_worst("all", worst_over(-87.3f, 88.7f, f, want), 1.5);
    check_worst("near 0", worst_over(-1, 1, f, want), 1.5);
    check_worst("tiny", worst_over(-1e-6f, 1e-6f, f, want), 1.5);
    CHECK(at(f, 0.f) == 1.f);
    CHECK(at(f, -0.f) == 1.f);
}

TEST_CASE("exp: the ends and what is no number") {
    auto f = [](Vec x) { return exp(x); };
    CHECK(at(f, std::nextafter(-87.3f, -kInfinity)) == 0);
    CHECK(at(f, std::nextafter(88.7f, kInfinity)) == kInfinity);
    CHECK(at(f, -1e30f) == 0);
    CHECK(at(f, 1e30f) == kInfinity);
    CHECK(at(f, -kInfinity) == 0);
    CHECK(at(f, kInfinity) == kInfinity);
    CHECK(std::isnan(at(f, kNaN)));
    CHECK(std::isnan(at(f, -kNaN)));
}

TEST_CASE("exp_bounded: 1.5 ulp on its whole range, NaN stays") {
    auto f = [](Vec x) { return exp_bounded(x); };
    check_worst("all", worst_over(-87.3f, 87.3f, f, [](double x) { return std::exp(x); }), 1.5);
    CHECK(at(f, 0.f) == 1.f);
    CHECK(std::isnan(at(f, kNaN)));
}

TEST_CASE("normal_distribution: a few ulp down its left tail") {
    auto below = [](Vec x) { return normal_distribution(x).below; };
    auto density = [](Vec x) { return normal_distribution(x).density; };
    auto want_below = [](double x) { return 0.5 * std::erfc(-x * M_SQRT1_2); };
    auto want_density = [](double x) { return std::exp(-x * x / 2) / std::sqrt(2 * M_PI); };
    constexpr double kBound = 7.5; // 6 where the compiler fuses multiply-adds, 7.1 where it does not
    check_worst("below", worst_over(-13, 13, below, want_below), kBound);
    check_worst("density", worst_over(-13, 13, density, want_density), kBound);
    CHECK(at(below, -1000.f) <= 1e-37f);
    CHECK(at(below, 1000.f) == 1.f);
    CHECK(at(density, 1000.f) <= 1e-37f);
    CHECK(std::isnan(at(below, kNaN)));
    CHECK(std::isnan(at(density, kNaN)));
}

TEST_CASE("bf16 vectors round as to_bf16 does, and load as to_float does") {
    std::mt19937 rng(2);
    std::vector<uint32_t> bits = {0, 0x80000000u, 0x7f800000u, 0xff800000u, 0x7fc00000u, 0x7f800001u, 0xffffffffu,
                                  1, 0x7f7fffffu, 0x3f808000u, 0x3f818000u, 0x3f807fffu, 0x3f808001u, 0x007fffffu};
    while (bits.size() < (1 << 16)) bits.push_back(rng());
    for (size_t n = 0; n < bits.size(); n += kLanes) {
        float x[kLanes] = {}, back[kLanes];
        for (int i = 0; i < kLanes && n + i < bits.size(); i++) memcpy(&x[i], &bits[n + i], sizeof x[i]);
        bf16 y[kLanes];
        store(y, load(x));
        store(back, load(y));
        for (int i = 0; i < kLanes; i++) {
            float want = to_float(to_bf16(x[i]));
            CHECK(y[i].bits == to_bf16(x[i]).bits);
            CHECK(memcmp(&want, &back[i], sizeof want) == 0);
        }
    }
}

TEST_CASE("sum, max and min take every lane") {
    for (int lane = 0; lane < kLanes; lane++) {
        Vec v = {};
        v[lane] = 3;
        CHECK(sum(v) == 3);
        CHECK(max(v) == 3);
        CHECK(max(v - 5.f) == -2);
        for (int i = 0; i < kLanes; i++) {
            CHECK(max(v, splat(1))[i] == (i == lane ? 3 : 1));
            CHECK(min(v, splat(1))[i] == (i == lane ? 1 : 0));
        }
    }
}
