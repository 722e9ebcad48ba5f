// From a mode to frequencies, against transformers' own code run in float64 (scripts/golden_rope.py), and rows of
// queries and keys rotated by it.
#include "../runtime/model/rope.h"

#include <nlohmann/json.hpp>

#include "check.h"
#include "golden.h"

#include "../runtime/base/errors.h"

namespace {

constexpr double kTurn = 18446744073709551616.0; // 2^64

double frequency(const Rotary& rotary, int64_t i) { return 2 * M_PI * (rotary.turns[i] / kTurn); }

// Turns are whole: half of one may be missing. The truth is a few operations in double, the largest the logarithm of
// the base (at most 30) inside its power: 30·2^-53 and a little.
void check_frequency(double got, double want) {
    CAPTURE(got);
    CAPTURE(want);
    CHECK(std::abs(got - want) <= M_PI / kTurn + 1e-14 * want);
}

Rope rope_of(const nlohmann::json& j) {
    return {parse_rope_mode(j.at("mode")), j.at("dims"), j.at("original"), j.at("base"), j.at("scale")};
}

} // namespace

TEST_CASE("frequencies and factor are transformers'") {
    int cases = 0;
    const nlohmann::json file = golden::read("test/golden/rope.json");
    for (const nlohmann::json& j : file.at("frequencies")) {
        const Rope rope = rope_of(j);
        const int64_t T = j.at("T");
        CAPTURE(rope_mode_name(rope.mode));
        CAPTURE(rope.dims);
        CAPTURE(rope.base);
        CAPTURE(rope.scale);
        CAPTURE(rope.original);
        CAPTURE(T);
        const Rotary rotary = make_rotary(rope, T);
        const std::vector<double> want = j.at("frequencies");
        CHECK(rotary.dims == rope.dims);
        REQUIRE(int64_t(want.size()) == rope.dims / 2);
        CHECK(rotary.factor == float(double(j.at("factor"))));
        CHECK(rope_score_factor(rope) == 1);
        for (int64_t i = 0; i < rope.dims / 2; i++) check_frequency(frequency(rotary, i), want[i]);
        cases++;
    }
    CHECK(cases >= 60);
}

TEST_CASE("turns are right to the last of their 64 bits") {
    // 1/2π, and it divided by 16 as often as asked: base 2^16, so that the frequencies of 8 dims are 2^-4i.
    const uint64_t one = 0x28BE60DB9391054A;
    const Rotary rotary = make_rotary({RopeMode::none, 8, 2048, 65536, 1}, 2048);
    for (int i = 0; i < 4; i++) CHECK(std::abs(int64_t(rotary.turns[i] - ((one >> 4 * i) + (i > 0)))) <= 1);
    // Tenths, which a double does not hold.
    const Rotary tenths = make_rotary({RopeMode::none, 8, 2048, 10000, 1}, 2048);
    uint64_t power = 1;
    for (int i = 0; i < 4; i++, power *= 10) CHECK(std::abs(int64_t(tenths.turns[i] - one / power)) <= 1);
    const Rotary linear = make_rotary({RopeMode::linear, 8, 2048, 65536, 16}, 2048);
    for (int i = 0; i < 3; i++) CHECK(linear.turns[i] == rotary.turns[i + 1]);
}

TEST_CASE("ntk is its formula, and dynamic is ntk where the run asks for as much") {
    for (double scale : {1.0, 2.0, 8.0, 500.0})
        for (int64_t dims : {4, 8, 20, 64, 256}) {
            const Rotary ntk = make_rotary({RopeMode::ntk, dims, 2048, 10000, scale}, 1 << 20);
            const double base = 10000 * std::pow(scale, dims / (dims - 2.0));
            for (int64_t i = 0; i < dims / 2; i++) check_frequency(frequency(ntk, i), std::pow(base, -2.0 * i / dims));
            // The slowest pair is slower by the scale exactly, the fastest as it was.
            const Rotary none = make_rotary({RopeMode::none, dims, 2048, 10000, 1}, 2048);
            CHECK(ntk.turns[0] == none.turns[0]);
            check_frequency(frequency(ntk, dims / 2 - 1), frequency(none, dims / 2 - 1) / scale);
            CHECK(ntk.factor == 1);
        }
    // s·T/T0 − s + 1 is 4 for s = 2 and T = 2.5·T0.
    const Rotary dynamic = make_rotary({RopeMode::dynamic, 16, 1000, 10000, 2}, 2500);
    const Rotary ntk = make_rotary({RopeMode::ntk, 16, 1000, 10000, 4}, 2500);
    const Rotary within = make_rotary({RopeMode::dynamic, 16, 1000, 10000, 2}, 1000);
    const Rotary none = make_rotary({RopeMode::none, 16, 1000, 10000, 1}, 1000);
    for (int i = 0; i < 8; i++) {
        CHECK(dynamic.turns[i] == ntk.turns[i]);
        CHECK(within.turns[i] == none.turns[i]);
    }
    // Two dims turn by one radian a position whatever the base.
    CHECK(make_rotary({RopeMode::ntk, 2, 2048, 10000, 8}, 4096).turns[0] == none.turns[0]);
    CHECK(make_rotary({RopeMode::none, 0, 2048, 10000, 1}, 2048).dims == 0);
}

TEST_CASE("YaRN's temperature on the scores instead of on cosine and sine") {
    Rope rope{RopeMode::yarn, 16, 2048, 10000, 8};
    const Rotary turned = make_rotary(rope, 16384);
    const double f = 0.1 * std::log(8) + 1;
    CHECK(turned.factor == float(f));
    rope.softmax_temperature = true;
    const Rotary plain = make_rotary(rope, 16384);
    CHECK(plain.factor == 1);
    CHECK(rope_score_factor(rope) == doctest::Approx(f * f).epsilon(1e-15));
    for (int i = 0; i < 8; i++) CHECK(plain.turns[i] == turned.turns[i]);
    rope.mode = RopeMode::linear; // it is YaRN's alone
    CHECK(rope_score_factor(rope) == 1);
}

TEST_CASE("queries and keys rotated are transformers'") {
    int cases = 0;
    const nlohmann::json file = golden::read("test/golden/rope.json");
    for (const nlohmann::json& j : file.at("rotated")) {
        const Rope rope = rope_of(j);
        const int64_t D = j.at("D"), position0 = j.at("position0"), dims = rope.dims, half = dims / 2, H = 2, T = 3;
        CAPTURE(rope_mode_name(rope.mode));
        CAPTURE(D);
        CAPTURE(position0);
        const Rotary rotary = make_rotary(rope, j.at("T"));
        const RotaryShape shape{1, T, H, D, position0};
        // transformers' (H,T,D), for s of queries and keys.
        auto input = [&](int s, int64_t h, int64_t t, int64_t d) {
            return (int64_t(golden::hash(j.at("seed"), s, (h * T + t) * D + d)) >> 56) / 32.0;
        };
        Vector<real> qkv = poisoned<real>(T * H * 3 * D), out[3];
        for (int64_t t = 0; t < T; t++)
            for (int64_t h = 0; h < H; h++)
                for (int s = 0; s < 2; s++)
                    for (int64_t d = 0; d < D; d++) assign(qkv[((t * H + h) * 3 + s) * D + d], input(s, h, t, d));
        for (Vector<real>& part : out) part = poisoned<real>(H * T * D);
        auto heads = [&](int s) { return Heads<real>{out[s].data(), H * T * D, D, T * D}; };
        rotary_forward(nullptr, heads(0), heads(1), heads(2), qkv.data(), nullptr, rotary, shape);
        double worst = 0;
        for (int s = 0; s < 2; s++) {
            const std::vector<double> want = j.at(s == 0 ? "q" : "k");
            REQUIRE(int64_t(want.size()) == H * T * dims);
            for (int64_t h = 0; h < H; h++)
                for (int64_t t = 0; t < T; t++)
                    for (int64_t d = 0; d < D; d++) {
                        const double got = to_float(out[s][(h * T + t) * D + d]);
                        if (d >= dims) {
                            CHECK(got == input(s, h, t, d));
                            continue;
                        }
                        // As in test/rotary.cpp, and what double loses of the angle: p·2^-53 for each of two roundings.
                        const double size = rotary.factor * (std::abs(input(s, h, t, d)) +
                                                             std::abs(input(s, h, t, d < half ? d + half : d - half)));
                        const double true_value = want[(h * T + t) * dims + d];
                        const double bound =
                            size * (3.1e-7 + (position0 + t) * 0x1p-52) + kRealEpsilon / 2 * std::abs(true_value);
                        const double error = std::abs(got - true_value) / (1.001 * bound);
                        if (!(error <= worst)) worst = error;
                    }
        }
        CHECK(worst <= 1);
        cases++;
    }
    CHECK(cases == 4);
}

TEST_CASE("names, and what is refused") {
    for (RopeMode mode : {RopeMode::none, RopeMode::linear, RopeMode::ntk, RopeMode::dynamic, RopeMode::yarn})
        CHECK(parse_rope_mode(rope_mode_name(mode)) == mode);
    CHECK_THROWS_AS(parse_rope_mode("longrope"), BadInput);
    auto refused = [](Rope rope) { CHECK_THROWS_AS(check_rope(rope, "here"), BadInput); };
    refused({RopeMode::none, 7, 2048});
    refused({RopeMode::none, 258, 2048});
    refused({RopeMode::none, -2, 2048});
    refused({RopeMode::none, 8, 2048, 1.0});
    refused({RopeMode::none, 8, 2048, NAN});
    refused({RopeMode::linear, 8, 2048, 10000, 0.5});
    refused({RopeMode::ntk, 8, 2048, 10000, NAN});
    refused({RopeMode::yarn, 8, 0, 10000, 2});
    refused({RopeMode::dynamic, 8, 0, 10000, 2});
    refused({RopeMode::ntk, 2, 2048, 10000, 2});
    refused({RopeMode::dynamic, 2, 2048, 10000, 2});
    refused({RopeMode::none, 8, 2048, 1e31});
    refused({RopeMode::linear, 8, 2048, 10000, INFINITY});
    check_rope({RopeMode::ntk, 4, 2048, 1e30, 1e12}, "here");
    try {
        check_rope({RopeMode::none, 8, 2048, 1.0}, "a.bin");
    } catch (const BadInput& said) {
        CHECK(std::string(said.what()) == "a.bin: the rotary base must be above 1 and at most 1e+30, not 1");
    }
}
