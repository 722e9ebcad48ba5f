// What the kernel tests share: fresh random inputs, poisoned outputs, and a comparison that names the worst element.
#pragma once
#include <cmath>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include <doctest/doctest.h>

#include "../kernels/types.h"

// Values that a wrong kernel cannot leave behind by luck: NaN in every output until it is written.
template <class T> std::vector<T> poisoned(size_t n) {
    std::vector<T> v(n);
    for (T& x : v) assign(x, NAN);
    return v;
}

// n normal values, rounded to T, so that kernel and oracle start from the same numbers.
template <class T> std::vector<T> random_normal(size_t n, uint64_t seed, float scale = 1, float mean = 0) {
    std::mt19937_64 rng(seed);
    std::normal_distribution<float> normal(mean, scale);
    std::vector<T> v(n);
    for (T& x : v) assign(x, normal(rng));
    return v;
}

template <class T> std::vector<double> to_double(const std::vector<T>& v) {
    std::vector<double> d(v.size());
    for (size_t i = 0; i < v.size(); i++) d[i] = to_float(v[i]);
    return d;
}

// |got − want| <= tolerance·(norm of want per element + floor) for every element. `tolerance` is a derived bound: an
// epsilon times the square root of the number of additions, times a small constant stated where it is used.
template <class T> void check_close(const char* name, const std::vector<T>& got, const std::vector<double>& want,
                                    double tolerance, double floor = 0) {
    REQUIRE(got.size() == want.size());
    double norm = 0;
    for (double w : want) norm += w * w;
    norm = std::sqrt(norm / (want.empty() ? 1 : want.size()));
    double bound = tolerance * (norm + floor), worst = -1;
    size_t at = 0;
    for (size_t i = 0; i < want.size(); i++) {
        double error = std::abs(to_float(got[i]) - want[i]);
        // An element much larger than the norm is allowed its own rounding.
        error -= tolerance * std::abs(want[i]);
        if (std::isnan(error)) error = INFINITY;
        if (std::isinf(want[i]) && to_float(got[i]) == want[i]) error = 0;
        if (error > worst) worst = error, at = i;
    }
    std::string said = std::string(name) + ": worst at " + std::to_string(at) + " of " + std::to_string(want.size());
    if (worst > bound)
        said += ": got " + std::to_string(to_float(got[at])) + ", want " + std::to_string(want[at]) + ", error " +
                std::to_string(worst) + " > bound " + std::to_string(bound);
    CHECK_MESSAGE(worst <= bound, said);
}
