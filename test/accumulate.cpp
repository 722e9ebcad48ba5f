// bf16 gradients that take in staged ones: every bit by the contract's formula, the mean over many draws, the ends.
#include "../kernels/accumulate.h"

#include <bit>

#include "../kernels/optimizer.h"
#include "check.h"

namespace {

constexpr uint64_t kSeed = 0x123456789abcdef, kStream = 5;

// Gradients and staging, which begin at `offset`, so that other alignments have their turn.
struct Pair {
    int64_t n, offset;
    Vector<bf16> grads;
    Vector<float> staged;

    Pair(const Vector<bf16>& g, const Vector<float>& s, int64_t shift = 0)
        : n(g.size()), offset(shift), grads(poisoned<bf16>(n + shift + 1)), staged(poisoned<float>(n + shift + 1)) {
        std::copy(g.begin(), g.end(), grads.begin() + shift);
        std::copy(s.begin(), s.end(), staged.begin() + shift);
    }
    void add(uint64_t draw_value, uint64_t seed = kSeed, uint64_t stream = kStream) {
        const Vector<uint64_t> draw = {draw_value};
        accumulate_gradients(nullptr, grads.data() + offset, staged.data() + offset, n, seed, stream, draw.data());
    }
    Vector<bf16> result() const { return Vector<bf16>(grads.begin() + offset, grads.begin() + offset + n); }
    float at(int64_t i) const { return to_float(grads[offset + i]); }
    bool cleared() const {
        const uint32_t* bits = reinterpret_cast<const uint32_t*>(staged.data() + offset);
        return std::all_of(bits, bits + n, [](uint32_t x) { return x == 0; });
    }
    // Nothing before or behind was written.
    bool poison_stays() const {
        return std::isnan(staged[offset + n]) && std::isnan(to_float(grads[offset + n])) &&
               (offset == 0 || (std::isnan(staged[0]) && std::isnan(to_float(grads[0]))));
    }
};

// The neighbours in bf16 of a float that is not negative, and where it lies between them, 0 to 1.
struct Place {
    double low, high, part;
    explicit Place(float x) {
        const uint32_t below = std::bit_cast<uint32_t>(x) & 0xffff0000u;
        low = std::bit_cast<float>(below), high = std::bit_cast<float>(below + 0x10000u);
        part = (x - low) / (high - low);
    }
};

// The contract once more, from the words of Philox.
bf16 by_chance(float x, int64_t i, uint64_t draw, uint64_t seed = kSeed, uint64_t stream = kStream) {
    const uint32_t word = philox(seed, draw, (uint64_t(1) << 61) + (stream << 36) + uint64_t(i) / 8).word[i % 8 / 2];
    return bf16{uint16_t((std::bit_cast<uint32_t>(x) + (i % 2 ? word >> 16 : word & 0xffff)) >> 16)};
}

int64_t differing(const Vector<bf16>& a, const Vector<bf16>& b) {
    int64_t count = 0;
    for (size_t i = 0; i < a.size(); i++) count += a[i].bits != b[i].bits;
    return count;
}

} // namespace

TEST_CASE("the bits of the formula for any length, alignment and number; staging is cleared, its neighbours are not") {
    for (int64_t n : {0, 1, 3, 4, 7, 8, 9, 255, 257, 1003, 2048, 2053, 5000})
        for (int64_t offset : {0, 1, 4})
            for (uint64_t draw : {uint64_t(0), uint64_t(1) << 40 | 3, ~uint64_t(0)}) {
                CAPTURE(n);
                CAPTURE(offset);
                CAPTURE(draw);
                const Vector<bf16> grads = random_normal<bf16>(n, 1);
                const Vector<float> staged = random_normal<float>(n, 2, 0.1f);
                Pair pair(grads, staged, offset);
                pair.add(draw);
                int64_t wrong = 0;
                for (int64_t i = 0; i < n; i++)
                    wrong += pair.grads[offset + i].bits != by_chance(to_float(grads[i]) + staged[i], i, draw).bits;
                CHECK(wrong == 0);
                CHECK(pair.cleared());
                CHECK(pair.poison_stays());
            }
}

TEST_CASE("each result is a neighbour of the sum, the sum itself where bf16 has it") {
    const int64_t n = 4000;
    for (float scale : {1e-39f, 1e-3f, 1.f, 1e30f}) { // the first is subnormal
        CAPTURE(scale);
        const Vector<bf16> grads = random_normal<bf16>(n, 1, scale), more = random_normal<bf16>(n, 3, scale);
        Vector<float> staged = random_normal<float>(n, 2, scale);
        Pair pair(grads, staged);
        pair.add(1);
        int64_t wrong = 0, up = 0;
        for (int64_t i = 0; i < n; i++) {
            const float sum = to_float(grads[i]) + staged[i];
            const Place place(std::abs(sum));
            const double got = std::abs(pair.at(i));
            wrong += got != place.low && got != place.high;
            wrong += sum != 0 && std::signbit(sum) != std::signbit(pair.at(i));
            up += got == place.high;
        }
        CHECK(wrong == 0);
        CHECK(up > n / 3);
        CHECK(up < 2 * n / 3);

        // Zeros and bf16 values into zeros, zeros into bf16 values.
        for (int64_t i = 0; i < n; i++) staged[i] = to_float(more[i]);
        Pair first(Vector<bf16>(n), staged), second(grads, Vector<float>(n));
        first.add(2), second.add(2);
        CHECK(to_double(first.result()) == to_double(more)); // −0 plus 0 is 0
        CHECK(to_double(second.result()) == to_double(grads));
    }
}

// Each rounding is a coin of its own with known mean and variance, so a sum of M·n of them, in steps, is off by more
// than 4 of its standard deviations once in 16000 times; the seed is fixed.
TEST_CASE("the mean over draws, tensors and elements is the sum, at each of the eight places that share noise") {
    const int64_t n = 2048;
    const Vector<bf16> grads = random_normal<bf16>(n, 1);
    const Vector<float> staged = random_normal<float>(n, 2);
    for (bool by_draw : {true, false}) {
        double error[8] = {}, variance[8] = {}, per_element = 0;
        const int runs = 64;
        std::vector<double> error_of(n), variance_of(n);
        for (int run = 0; run < runs; run++) {
            Pair pair(grads, staged);
            pair.add(by_draw ? run : 1, kSeed, by_draw ? kStream : run);
            for (int64_t i = 0; i < n; i++) {
                const Place place(std::abs(to_float(grads[i]) + staged[i]));
                const double off = (std::abs(pair.at(i)) - place.low) / (place.high - place.low) - place.part;
                const double chance = place.part * (1 - place.part);
                error[i % 8] += off, variance[i % 8] += chance;
                error_of[i] += off, variance_of[i] += chance;
            }
        }
        for (int place = 0; place < 8; place++) {
            CAPTURE(place);
            CHECK(std::abs(error[place]) < 4 * std::sqrt(variance[place]));
        }
        // And of each element alone over its 64 coins, which must not all fall alike: the squares of the errors average
        // to the variance, within 4 · sqrt(2/n) of it.
        int64_t counted = 0;
        for (int64_t i = 0; i < n; i++)
            if (variance_of[i] > 0.05 * runs) per_element += error_of[i] * error_of[i] / variance_of[i], counted++;
        CHECK(per_element / counted == doctest::Approx(1).epsilon(4 * std::sqrt(2. / counted)));
    }
}

// Nearest rounding would stop at 256, where 1 is half a step.
TEST_CASE("a thousand micro-batches far below a step add up") {
    const int64_t n = check::kSimulated ? 256 : 4096;
    const int steps = 1000;
    Pair pair{Vector<bf16>(n), Vector<float>(n)};
    for (int step = 0; step < steps; step++) {
        std::fill_n(pair.staged.begin(), n, 1.f);
        pair.add(step);
    }
    double mean = 0;
    for (int64_t i = 0; i < n; i++) mean += pair.at(i) / n;
    // Steps of 2 from 256 to 512 and of 4 from there on: variances of (1/2)(1 − 1/2)·4 = 1 for 256 calls and of
    // (1/4)(1 − 1/4)·16 = 3 for 488.
    CHECK(std::abs(mean - steps) < 4 * std::sqrt((256 * 1 + 488 * 3.) / n));
}

TEST_CASE("another draw, tensor or seed is another noise; the same again repeats, on any threads") {
    const int64_t n = 6000;
    const Vector<bf16> grads = random_normal<bf16>(n, 1);
    const Vector<float> staged = random_normal<float>(n, 2);
    auto result = [&](uint64_t draw, uint64_t seed, uint64_t stream) {
        Pair pair(grads, staged);
        pair.add(draw, seed, stream);
        return pair.result();
    };
    const Vector<bf16> base = result(7, kSeed, kStream);
    // The last two of each line change only what a number's lower half does not hold, or what one plus another is.
    const Vector<bf16> others[] = {result(8, kSeed, kStream),
                                   result(7 + (uint64_t(1) << 32), kSeed, kStream),
                                   result(7 + (uint64_t(1) << 63), kSeed, kStream),
                                   result(7, kSeed + 1, kStream),
                                   result(7, kSeed + (uint64_t(1) << 32), kStream),
                                   result(7, kSeed, kStream + 1),
                                   result(7, kSeed, kStream + (uint64_t(1) << 23)),
                                   result(8, kSeed, kStream - 1),
                                   result(kStream, kSeed, 7)};
    for (size_t i = 0; i < std::size(others); i++) {
        CAPTURE(i);
        // Two draws that go up with p in 0 .. 1, on average, differ in a third. Within 5 standard deviations.
        CHECK(std::abs(differing(base, others[i]) - n / 3.) < 5 * std::sqrt(n * 2 / 9.));
        for (size_t k = 0; k < i; k++) CHECK(differing(others[k], others[i]) > n / 4);
    }
    check::with_threads({1, 2, 3, 16}, [&](int threads) {
        CAPTURE(threads);
        CHECK(check::same_bits(result(7, kSeed, kStream), base));
    });
}

TEST_CASE("NaN and infinities stay; what is beyond bf16 becomes infinite") {
    // grads, staged, the result (NaN: any NaN).
    const float huge = to_float(bf16{0x7f7f}), beyond = std::bit_cast<float>(0x7f7fffffu), quiet = 1;
    const struct {
        float grad, staged, want;
    } cases[] = {{NAN, quiet, NAN},
                 {quiet, NAN, NAN},
                 {INFINITY, quiet, INFINITY},
                 {quiet, INFINITY, INFINITY},
                 {-INFINITY, quiet, -INFINITY},
                 {quiet, -INFINITY, -INFINITY},
                 {INFINITY, -INFINITY, NAN},
                 {quiet, std::bit_cast<float>(0x7f800001u), NAN}, // a NaN whose upper half is infinity's
                 {quiet, std::bit_cast<float>(0xff800001u), NAN},
                 {huge, huge, INFINITY},
                 {-huge, -huge, -INFINITY},
                 {huge, 0, huge},
                 {-huge, 0, -huge}};
    for (const auto& c : cases)
        for (int64_t n : {1, 64, 2048 + 3})
            for (int64_t at : {int64_t(0), n / 2, n - 1}) {
                CAPTURE(c.grad);
                CAPTURE(c.staged);
                CAPTURE(n);
                Vector<bf16> grads(n);
                Vector<float> staged(n);
                for (int64_t i = 0; i < n; i++) grads[i] = to_bf16(2);
                grads[at] = to_bf16(c.grad), staged[at] = c.staged;
                Pair pair(grads, staged);
                pair.add(1);
                if (std::isnan(c.want))
                    CHECK(std::isnan(pair.at(at)));
                else
                    CHECK(pair.at(at) == c.want);
                CHECK(pair.cleared());
                pair.grads[at] = to_bf16(2);
                grads[at] = to_bf16(2);
                CHECK(check::same_bits(pair.result(), grads));
            }
    // Between the largest bf16 and where infinity would be, chance decides.
    const int64_t n = 4096;
    const float middle = std::bit_cast<float>(0x7f7f8000u);
    for (float value : {middle, -middle, beyond, -beyond}) {
        CAPTURE(value);
        Pair pair(Vector<bf16>(n), Vector<float>(n, value));
        pair.add(1);
        int64_t infinite = 0, wrong = 0;
        for (int64_t i = 0; i < n; i++) {
            infinite += pair.at(i) == std::copysign(INFINITY, value);
            wrong += !std::isinf(pair.at(i)) && pair.at(i) != std::copysign(huge, value);
        }
        CHECK(wrong == 0);
        CHECK(std::abs(infinite - (std::abs(value) == middle ? n / 2 : n)) <= 4 * std::sqrt(n / 4.));
    }
}

TEST_CASE("more than 2^31 gradients: the last ones are right" * doctest::test_suite(check::kSimulated ? "" : "long")) {
    const int64_t n = (int64_t(1) << 31) + 100003, tail = 1000;
    const Vector<bf16> grads = random_normal<bf16>(tail, 1);
    const Vector<float> staged = random_normal<float>(tail, 2);
    // Zeros under zeros stay zeros, so the mirrored part may be updated in any order.
    check::Huge<bf16> all(n, true);
    check::Huge<float> all_staged(n, true);
    memcpy(&all[n - tail], grads.data(), tail * sizeof(bf16));
    memcpy(&all_staged[n - tail], staged.data(), tail * sizeof(float));
    const Vector<uint64_t> draw = {3};
    check::OnlyBlocks some(check::blocks_at(double(int64_t(1) << 31) / n));
    accumulate_gradients(nullptr, all.data(), all_staged.data(), n, kSeed, kStream, draw.data());
    int64_t wrong = 0;
    for (int64_t i = 0; i < tail; i++) {
        const float sum = to_float(grads[i]) + staged[i];
        wrong += all[n - tail + i].bits != by_chance(sum, n - tail + i, 3).bits || all_staged[n - tail + i] != 0;
    }
    CHECK(wrong == 0);
}

TEST_CASE("what would share noise is refused") {
    Pair pair(Vector<bf16>(1), Vector<float>(1));
    CHECK_NOTHROW(pair.add(1, kSeed, (1 << 24) - 1));
    CHECK_THROWS_AS(pair.add(1, kSeed, 1 << 24), std::invalid_argument);
    CHECK_THROWS_AS(accumulate_gradients(nullptr, nullptr, nullptr, (int64_t(1) << 39) + 1, 1, 1, nullptr),
                    std::invalid_argument);
}
