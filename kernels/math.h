// Portable SIMD for the CPU kernels: g++ vector types, as wide as the machine's registers, and the transcendental
// functions that the layers need, since libm's vector forms come only with -ffast-math.
#pragma once
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX512BW__)
#include <immintrin.h>
#endif

#include "types.h"

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kLanes), may_alias));
typedef int32_t VecInt __attribute__((vector_size(4 * kLanes), may_alias));
typedef uint32_t VecBits __attribute__((vector_size(4 * kLanes), may_alias));
typedef uint16_t VecHalf __attribute__((vector_size(2 * kLanes), may_alias));

inline Vec splat(float x) { return Vec{} + x; }

inline Vec load(const float* p) {
    Vec v;
    memcpy(&v, p, sizeof v);
    return v;
}

// 16 bits to and from the upper half of 32. g++ 12 makes three instructions of widening and a table permutation of
// narrowing where AVX-512 has one for each; bf16 LayerNorm gains a quarter. (The forms with a full mask, because the
// plain ones draw false warnings of uninitialised values.)
inline VecBits widen(VecHalf h) {
#if defined(__AVX512BW__)
    return (VecBits)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)h);
#else
    return __builtin_convertvector(h, VecBits);
#endif
}
inline VecHalf narrow(VecBits v) {
#if defined(__AVX512BW__)
    return (VecHalf)_mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)v);
#else
    return __builtin_convertvector(v, VecHalf);
#endif
}
inline Vec load(const bf16* p) {
    VecHalf h;
    memcpy(&h, p, sizeof h);
    return (Vec)(widen(h) << 16);
}
inline void store(float* p, Vec v) { memcpy(p, &v, sizeof v); }
inline void store(bf16* p, Vec v) {
    VecBits bits = (VecBits)v;
    VecBits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    VecBits nan = (bits >> 16) | 0x40u;
    VecHalf h = narrow(v != v ? nan : rounded);
    memcpy(p, &h, sizeof h);
}

inline Vec max(Vec a, Vec b) { return a > b ? a : b; }
inline Vec min(Vec a, Vec b) { return a < b ? a : b; }

// Lane i of the result is lane i ^ distance of v. The lanes are template arguments because g++ computes a vector of
// them at run time otherwise.
template <int distance, int... lane> inline Vec swap_lanes(Vec v, std::integer_sequence<int, lane...>) {
    return __builtin_shufflevector(v, v, (lane ^ distance)...);
}
// combine(…) over all lanes, by halves, so that four steps wait for each other and not sixteen.
template <int distance = kLanes / 2, class Combine> inline float reduce(Vec v, Combine combine) {
    if constexpr (distance == 0)
        return v[0];
    else
        return reduce<distance / 2>(combine(v, swap_lanes<distance>(v, std::make_integer_sequence<int, kLanes>())),
                                    combine);
}
inline float sum(Vec v) {
    return reduce(v, [](Vec a, Vec b) { return a + b; });
}
inline float max(Vec v) {
    return reduce(v, [](Vec a, Vec b) { return max(a, b); });
}

constexpr float kLog2e = 1.44269504088896341f;
constexpr float kRound = 12582912.f; // 1.5·2^23: adding it rounds to the nearest integer

// e^r for r = x − n·ln2, |r| <= ln2/2: a degree-6 polynomial (Cephes' expf). ln2 is taken in two parts, the first of so
// few bits that its product with n is exact.
inline Vec exp_reduced(Vec x, Vec n) {
    Vec r = x - n * 0.693359375f - n * -2.12194440e-4f;
    Vec p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    return p * r * r + r + 1.f;
}

// e^x within 1.5 ulp on [-87.3, 88.7]: e^r from above, 2^n through the exponent bits. Below -87.3 (where floats turn
// subnormal) it is 0, above 88.7 it is +Inf, NaN stays NaN.
inline Vec exp(Vec x) {
    Vec clamped = min(max(x, splat(-87.3f)), splat(88.7f));
    Vec n = (clamped * kLog2e + kRound) - kRound;
    Vec p = exp_reduced(clamped, n);
    // Two factors, since 2^n alone overflows at n = 128.
    VecInt half = __builtin_convertvector(n, VecInt) >> 1, rest = __builtin_convertvector(n, VecInt) - half;
    Vec result = p * (Vec)((half + 127) << 23) * (Vec)((rest + 127) << 23);
    result = x < -87.3f ? Vec{} : result;
    result = x > 88.7f ? splat(__builtin_inff()) : result;
    return x != x ? x : result;
}

// The same for |x| <= 87.3 and half the instructions: no end to guard, and 2^n is read off the rounded sum's low bits.
// NaN stays NaN.
inline Vec exp_bounded(Vec x) {
    Vec shifted = x * kLog2e + kRound, n = shifted - kRound;
    return exp_reduced(x, n) * (Vec)(((VecBits)shifted << 23) + 0x3f800000u);
}

// The standard normal distribution, by which erf(x) = 2·below(x·sqrt(2)) − 1 without losing the left tail.
struct Normal {
    Vec below;   // Φ(x): the probability of a value below x
    Vec density; // Φ'(x) = exp(-x²/2) / sqrt(2π)
};

// Both within 7.5 ulp (6 where products are fused into sums) on [-13, Inf); below -13 they are as good as 0, NaN stays
// NaN. Φ(-|x|) = e^(-x²/2) · R(|x|), and R (Mills' ratio over sqrt(2π)) is smooth: a degree-9 polynomial in t = (|x| −
// 3) / (|x| + 3), fitted to 7e-9 relative on [0, 13.3] by reweighted least squares.
inline Vec abs(Vec x) { return (Vec)((VecBits)x & 0x7fffffffu); }
inline Normal normal_distribution(Vec x) {
    Vec a = abs(x);
    a = a > 13.2f ? splat(13.2f) : a; // here e^(-x²/2) leaves the normal floats; NaN compares false and stays
    // Rounding x² would cost its tail x² half-ulps, so the square is taken in two parts: of x rounded to twelve bits,
    // exactly, and of the rest, at most 0.026, whose exponential is a short series.
    Vec upper = (Vec)(((VecBits)a + 0x800u) & 0xfffff000u);
    Vec rest = (a - upper) * (a + upper) * -0.5f;
    Vec e = exp_bounded(upper * upper * -0.5f);
    e += e * (rest + rest * rest * (0.5f + rest * 0.166666667f));
    Vec t = (a - 3.f) / (a + 3.f);
    Vec p = splat(5.41589434e-05f);
    p = p * t + 0.000116051466f;
    p = p * t - 0.000339911756f;
    p = p * t - 0.000984193059f;
    p = p * t + 0.00290470058f;
    p = p * t + 0.00613218546f;
    p = p * t - 0.0462133139f;
    p = p * t + 0.123225018f;
    p = p * t - 0.206402615f;
    p = p * t + 0.121513948f;
    Vec tail = e * p;
    return {x < 0.f ? tail : 1.f - tail, e * 0.398942280f};
}
