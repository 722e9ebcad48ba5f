// Rotary positions on the CPU: threads take runs of tokens, compute a token's angles once and go through its rows.
#include "rotary.h"

#include <algorithm>

#include "common.h"
#include "math.h"

namespace {

constexpr int64_t kMostD = 2 * kMostRotaryPairs, kMostVectors = kMostRotaryPairs / kLanes;

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

// out (D) = in (D) + bias (D) or null, its first 2·half dims rotated. out may be in, so these are read and rotated
// first, and written last: over what the pass over the whole row has put there. The last vector of each half reaches
// past it, and keeps what it read there.
void rotate_row(real* out, const real* in, const real* bias, const Angles& angles, int64_t half, int64_t D) {
    const int64_t vectors = (half + kLanes - 1) / kLanes;
    auto sum = [&](int64_t d) { return bias ? load(in + d) + load(bias + d) : load(in + d); };
    Vec first[kMostVectors], second[kMostVectors];
    for (int64_t n = 0; n < vectors; n++) {
        const int64_t i = n * kLanes;
        Vec x1 = sum(i), x2 = sum(half + i), cos = load(angles.cos + i), sin = load(angles.sin + i);
        first[n] = select(half - i, x1 * cos - x2 * sin, x1);
        second[n] = select(half - i, x2 * cos + x1 * sin, x2);
    }
    if (bias) {
        int64_t d = 0;
        for (; d + kLanes <= D; d += kLanes) store(out + d, sum(d));
        for (; d < D; d++) assign(out[d], to_float(in[d]) + to_float(bias[d]));
    } else if (out != in) {
        memcpy(out, in, D * sizeof(real));
    }
    for (int64_t n = 0; n < vectors; n++) store(out + n * kLanes, first[n]);
    for (int64_t n = 0; n < vectors; n++) store(out + half + n * kLanes, second[n]);
}

// The same where those vectors would reach past the row's end.
void rotate_short_row(real* out, const real* in, const real* bias, const Angles& angles, int64_t half, int64_t D) {
    float row[kMostD];
    for (int64_t d = 0; d < D; d++) row[d] = to_float(in[d]) + (bias ? to_float(bias[d]) : 0);
    for (int64_t i = 0; i < half; i++) {
        const float x1 = row[i], x2 = row[half + i];
        row[i] = x1 * angles.cos[i] - x2 * angles.sin[i];
        row[half + i] = x2 * angles.cos[i] + x1 * angles.sin[i];
    }
    for (int64_t d = 0; d < D; d++) assign(out[d], row[d]);
}

// out[s] (B,T,H,D) = in[s], for s of query, key and value; the sine's sign is that of forward or of its transpose.
void rotate_all(const Heads<real> (&out)[3], const Heads<const real> (&in)[3], const real* bias, const Rotary& rotary,
                const RotaryShape& shape, float sign) {
    const int64_t T = shape.T, H = shape.H, D = shape.D, half = rotary.dims / 2;
    require(D <= kMostD && rotary.dims <= D && rotary.dims % 2 == 0, "rotary: dims must be even, at most D <= 256");
    const auto row = half + (half + kLanes - 1) / kLanes * kLanes <= D ? rotate_row : rotate_short_row;
    parallel_ranges(shape.B * T, 1, [&](int64_t begin, int64_t end, int) {
        Angles angles;
        for (int64_t n = begin; n < end; n++) {
            const int64_t b = n / T, t = n % T;
            angles.set(rotary, shape.positions ? shape.positions[n] : shape.position0 + t, sign);
            for (int64_t h = 0; h < H; h++)
                for (int s = 0; s < 3; s++)
                    row(out[s].row(b, t, h), in[s].row(b, t, h), bias ? bias + (h * 3 + s) * D : nullptr, angles,
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
