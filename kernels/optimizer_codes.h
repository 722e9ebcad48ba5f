// The 8-bit code books of blockwise quantised states (Dettmers et al. 2022, "8-bit Optimizers via Block-wise
// Quantization"), value for value those of bitsandbytes' create_dynamic_map, and the search for the nearest code. Seen
// by the optimizer's own sources and tests only.
//
// A code stands for a part of its block's largest magnitude. Seven decades hold 1, 2, … 64 values (signed) or 2, 4, …
// 128 (unsigned): the middles of as many equal intervals of [0.1, 1] times 10^-6, … 1; to these come 0 and 1. Ordered
// by size that is
//
//   magnitude k   0   1 …                254   255      unsigned: code = k
//   magnitude k   0   1 …      127   128                signed: code = 127 + k, or 127 − k below zero; −1 has no code
//
// The magnitudes of a decade begin at a power of two: at k + 1 = n (unsigned) or k = n (signed) for a decade of n.
#pragma once
#include <cmath>

#include "types.h"

constexpr int kCodeBlock = 256;                    // elements that share one absmax
constexpr int kZeroCode = 127;                     // of the signed book
constexpr float kSmallestAbsmax = 1.17549435e-38f; // FLT_MIN: 1 / absmax stays finite

enum class Book { signed_values, unsigned_values };

constexpr int largest_magnitude(Book book) { return book == Book::signed_values ? 128 : 255; }

// boundary j of n equal intervals of [0.1, 1], as torch.linspace rounds it in float: each half from its own end.
LONGHAND_HD inline float interval_boundary(int j, int n) {
    const float step = (1.f - 0.1f) / static_cast<float>(n); // n is a power of two: exact but for the difference
    return 2 * j < n + 1 ? fmaf(step, static_cast<float>(j), 0.1f) : fmaf(-step, static_cast<float>(n - j), 1.f);
}

// Magnitude k of a book, to the bit.
LONGHAND_HD inline float code_magnitude(Book book, int k) {
    if (k == 0) return 0;
    if (k == largest_magnitude(book)) return 1;
    const bool is_signed = book == Book::signed_values;
    const int place = is_signed ? k : k + 1;
    int n = 1, decade = is_signed ? 6 : 7; // decades below [0.1, 1]
    while (2 * n <= place) n *= 2, decade--;
    const float power = decade == 0   ? 1.f
                        : decade == 1 ? 1e-1f
                        : decade == 2 ? 1e-2f
                        : decade == 3 ? 1e-3f
                        : decade == 4 ? 1e-4f
                        : decade == 5 ? 1e-5f
                                      : 1e-6f;
    return (interval_boundary(place - n, n) + interval_boundary(place - n + 1, n)) / 2 * power;
}

// ---- The nearest code ----
//
// Within a decade of n magnitudes, magnitude k ends where a·n·10^decade/0.9 + n·8/9 (unsigned: one less) is k + 1: one
// straight line for each decade. The smaller a decade, the steeper its line, so the line that holds is the lowest of
// all, and no decade need be looked for. Between two decades the border lies 0.2 past the whole number, next to 1 it
// lies 0.25 before it; float's rounding moves it by less than 0.001. So the only border that can lie between a and its
// magnitude is that of the nearest whole number r: the answer is r − 1 or r, and the exact middle of these two decides.

// The line of the decade of 2^e magnitudes, e from lowest_line to top_line.
constexpr int top_line(Book book) { return book == Book::signed_values ? 6 : 7; }
constexpr int lowest_line(Book book) { return book == Book::signed_values ? 0 : 1; }
constexpr float line_slope(Book book, int e) {
    double slope = 1 / 0.9;
    for (int i = 0; i < e; i++) slope *= 2;
    for (int i = e; i < top_line(book); i++) slope *= 10;
    return static_cast<float>(slope);
}
constexpr float line_offset(Book book, int e) {
    double offset = 8 / 9.0;
    for (int i = 0; i < e; i++) offset *= 2;
    return static_cast<float>(offset - (book == Book::signed_values ? 0 : 1));
}

// The lowest line at a >= 0: 0.7 or more. Begun from lowest = largest_magnitude(book) it is that at most, for NaN too.
// V is float or a vector of floats; min(NaN, x) must be x.
template <Book book, int e = top_line(book), class V, class Min>
LONGHAND_HD inline V code_position(V a, V lowest, Min min) {
    constexpr float slope = line_slope(book, e), offset = line_offset(book, e);
    lowest = min(a * slope + offset, lowest);
    if constexpr (e > lowest_line(book))
        return code_position<book, e - 1>(a, lowest, min);
    else
        return lowest;
}

constexpr float kRoundToInteger = 12582912.f; // 1.5·2^23: adding it leaves the nearest integer in the low bits
constexpr int kIntegerBits = 0x1ff;
