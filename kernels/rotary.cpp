// Rotary positions on the CPU: threads take runs of tokens, compute a token's angles once and go through its rows. A
// row is turned to floats, gets its bias, is rotated and rounded, all in L1.
#include "rotary.h"

#include <algorithm>

#include "common.h"
#include "math.h"

namespace {

constexpr int64_t kMostD = 2 * kMostRotaryPairs;

// Of one token, f·cos θ and f·sin θ for each pair; past the last pair there is room for a vector to end.
struct Angles {
    float cos[kMostRotaryPairs + kLanes] = {}, sin[kMostRotaryPairs + kLanes] = {};

    void set(const Rotary& rotary, int64_t position, float sign) {
        for (int64_t i = 0; i < rotary.dims / 2; i++) {
            CosSin a = cos_sin_of_turns(rotary_angle(rotary, position, i));
            cos[i] = rotary.factor * a.cos, sin[i] = rotary.factor * sign * a.sin;
        }
    }
};

// Lanes below count are a's, the others b's.
Vec select(int64_t count, Vec a, Vec b) {
    VecInt lane;
    for (int i = 0; i < kLanes; i++) lane[i] = i;
    return lane < int32_t(std::min<int64_t>(count, kLanes)) ? a : b;
}

// The two halves of row's first 2·half dims. The last vector of a half reaches into the other half or past it: what it
// stores there is what it read, and the other half is stored later.
void rotate(float* row, const Angles& angles, int64_t half) {
    for (int64_t i = 0; i < half; i += kLanes) {
        float *first = row + i, *second = row + half + i;
        Vec x1 = load(first), x2 = load(second), cos = load(angles.cos + i), sin = load(angles.sin + i);
        Vec y1 = x1 * cos - x2 * sin, y2 = x2 * cos + x1 * sin;
        store(first, select(half - i, y1, x1));
        store(second, select(half - i, y2, x2));
    }
}

// out (D) = in (D) + bias (D) or null, its first 2·half dims rotated. out may be in.
void rotate_row(real* out, const real* in, const real* bias, const Angles& angles, int64_t half, int64_t D) {
    float row[kMostD + 2 * kLanes];
    const int64_t floats = bias ? D : 2 * half; // what is not copied as it is
    int64_t d = 0;
    for (; d + kLanes <= floats; d += kLanes) store(row + d, bias ? load(in + d) + load(bias + d) : load(in + d));
    for (; d < floats; d++) row[d] = to_float(in[d]) + (bias ? to_float(bias[d]) : 0);
    if (half) rotate(row, angles, half);
    for (d = 0; d + kLanes <= floats; d += kLanes) store(out + d, load(row + d));
    for (; d < floats; d++) assign(out[d], row[d]);
    if (floats < D && out != in) memcpy(out + floats, in + floats, (D - floats) * sizeof(real));
}

// out[s] (B,T,H,D) = in[s], for s of query, key and value; the sine's sign is that of forward or of its transpose.
void rotate_all(const Heads<real> (&out)[3], const Heads<const real> (&in)[3], const real* bias, const Rotary& rotary,
                const RotaryShape& shape, float sign) {
    const int64_t T = shape.T, H = shape.H, D = shape.D, half = rotary.dims / 2;
    require(D <= kMostD && rotary.dims <= D && rotary.dims % 2 == 0, "rotary: dims must be even, at most D <= 256");
    parallel_ranges(shape.B * T, 1, [&](int64_t begin, int64_t end, int) {
        Angles angles;
        for (int64_t n = begin; n < end; n++) {
            const int64_t b = n / T, t = n % T;
            angles.set(rotary, shape.positions ? shape.positions[n] : shape.position0 + t, sign);
            for (int64_t h = 0; h < H; h++)
                for (int s = 0; s < 3; s++)
                    rotate_row(out[s].row(b, t, h), in[s].row(b, t, h), bias ? bias + (h * 3 + s) * D : nullptr, angles,
                               s < 2 ? half : 0, D);
        }
    });
}

} // namespace

void rotary_forward(Stream, Heads<real> q, Heads<real> k, Heads<real> v, const real* qkv, const real* bias,
                    const Rotary& rotary, const RotaryShape& shape) {
    rotate_all({q, k, v}, {rotary_part(qkv, 0, shape), rotary_part(qkv, 1, shape), rotary_part(qkv, 2, shape)}, bias,
               rotary, shape, 1);
}

void rotary_backward(Stream, real* dqkv, Heads<const real> dq, Heads<const real> dk, Heads<const real> dv,
                     const Rotary& rotary, const RotaryShape& shape) {
    rotate_all({rotary_part(dqkv, 0, shape), rotary_part(dqkv, 1, shape), rotary_part(dqkv, 2, shape)}, {dq, dk, dv},
               nullptr, rotary, shape, -1);
}
