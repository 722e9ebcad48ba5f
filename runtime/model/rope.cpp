#include "rope.h"

#include <algorithm>
#include <cmath>
#include <sstream>

#include "../base/errors.h"

namespace {

constexpr const char* kNames[] = {"none", "linear", "ntk", "dynamic", "yarn"};
constexpr long double kTwoPi = 6.28318530717958647692528676655900577L;

// Base of the frequencies: NTK's modes raise it such that the slowest pair is slowed down by `stretch`.
long double stretched_base(const Rope& rope, long double stretch) {
    return rope.base * powl(stretch, rope.dims / (rope.dims - 2.0L));
}

// How far pair i is from being kept (0) to being interpolated (1), as a function of i. The steps are transformers', in
// double like Python's, so that the rounded ends of the ramp are the same pairs.
struct Ramp {
    double low, high;

    explicit Ramp(const Rope& rope) {
        auto pair_of = [&](double rotations) {
            return rope.dims * std::log(rope.original / (rotations * 2 * M_PI)) / (2 * std::log(rope.base));
        };
        low = std::max(std::floor(pair_of(32)), 0.0);
        high = std::min(std::ceil(pair_of(1)), rope.dims - 1.0);
        if (low == high) high += 0.001;
    }
    long double at(int64_t i) const {
        return std::clamp((i - static_cast<long double>(low)) / (static_cast<long double>(high) - low), 0.0L, 1.0L);
    }
};

double yarn_factor(const Rope& rope) { return rope.scale <= 1 ? 1 : 0.1 * std::log(rope.scale) + 1; }

} // namespace

RopeMode parse_rope_mode(const std::string& name) {
    for (int mode = 0; mode < 5; mode++)
        if (name == kNames[mode]) return RopeMode(mode);
    throw BadInput("--rope " + name + ": choose one of none, linear, ntk, dynamic, yarn");
}

const char* rope_mode_name(RopeMode mode) { return kNames[int(mode)]; }

void check_rope(const Rope& rope, const std::string& where) {
    constexpr double kMostBase = 1e30, kMostScale = 1e12;
    auto refuse = [&](const std::string& what) { throw BadInput(where + ": " + what); };
    auto text = [](double x) { return (std::ostringstream() << x).str(); };
    const std::string mode = rope_mode_name(rope.mode);
    if (rope.dims < 0 || rope.dims % 2 || rope.dims > 2 * kMostRotaryPairs)
        refuse("the rotated dimensions of a head must be even and at most " + std::to_string(2 * kMostRotaryPairs) +
               ", not " + std::to_string(rope.dims));
    if (!(rope.base > 1 && rope.base <= kMostBase))
        refuse("the rotary base must be above 1 and at most " + text(kMostBase) + ", not " + text(rope.base));
    if (!(rope.scale >= 1 && rope.scale <= kMostScale))
        refuse("the rotary scale must be at least 1 and at most " + text(kMostScale) + ", not " + text(rope.scale));
    if (rope.original < 1) refuse("an original context of " + std::to_string(rope.original) + " tokens");
    if ((rope.mode == RopeMode::ntk || rope.mode == RopeMode::dynamic) && rope.dims == 2)
        refuse("the base of 2 rotated dimensions cannot be stretched, which " + mode + " would do");
}

Rotary make_rotary(const Rope& rope, int64_t T) {
    const long double scale = rope.scale;
    long double base = rope.base;
    if (rope.mode == RopeMode::ntk) base = stretched_base(rope, scale);
    if (rope.mode == RopeMode::dynamic && T > rope.original)
        base = stretched_base(rope, scale * T / rope.original - scale + 1);
    Rotary made;
    made.dims = rope.dims;
    if (rope.mode == RopeMode::yarn && !rope.softmax_temperature) made.factor = float(yarn_factor(rope));
    for (int64_t i = 0; i < rope.dims / 2; i++) {
        long double frequency = powl(base, -2.0L * i / rope.dims);
        if (rope.mode == RopeMode::linear) frequency /= scale;
        if (rope.mode == RopeMode::yarn) {
            const long double interpolated = Ramp(rope).at(i);
            frequency = frequency * (1 - interpolated) + frequency / scale * interpolated;
        }
        // At most 1/2π turns a position: 2^64 times that is in the range of an integer.
        made.turns[i] = static_cast<uint64_t>(roundl(frequency / kTwoPi * 18446744073709551616.0L));
    }
    return made;
}

double rope_score_factor(const Rope& rope) {
    if (rope.mode != RopeMode::yarn || !rope.softmax_temperature) return 1;
    return yarn_factor(rope) * yarn_factor(rope);
}
