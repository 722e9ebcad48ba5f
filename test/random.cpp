// runtime/base/random.h: the known answers of Philox4x32-10, and that what is drawn from it is uniform and normal.
#include <doctest/doctest.h>

#include <vector>

#include "../runtime/base/random.h"

namespace {

void check_words(Philox got, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    CHECK(got.word[0] == a);
    CHECK(got.word[1] == b);
    CHECK(got.word[2] == c);
    CHECK(got.word[3] == d);
}

uint64_t pair(uint32_t low, uint32_t high) { return uint64_t(high) << 32 | low; }

constexpr int64_t kDraws = 1 << 20;

} // namespace

// From the known-answer file that comes with the paper's library; the third takes its words from the digits of pi, so
// that a swapped word or half shows.
TEST_CASE("Philox gives its published answers") {
    check_words(philox(0, 0, 0), 0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8);
    check_words(philox(~0ull, ~0ull, ~0ull), 0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd);
    uint64_t index = pair(0x243f6a88, 0x85a308d3), stream = pair(0x13198a2e, 0x03707344);
    check_words(philox(pair(0xa4093822, 0x299f31d0), stream, index), 0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1);
}

TEST_CASE("uniform numbers: range, mean, variance, every sixteenth, pairs") {
    std::vector<int64_t> cells(16), pairs(64);
    double sum = 0, squares = 0, low = 1, high = 0, before = 0;
    for (int64_t i = 0; i < kDraws; i++) {
        double u = random_uniform(3, 5, uint64_t(i));
        low = std::min(low, u), high = std::max(high, u);
        sum += u, squares += (u - 0.5) * (u - 0.5);
        cells[size_t(u * 16)]++;
        if (i % 2) pairs[size_t(before * 8) * 8 + size_t(u * 8)]++;
        before = u;
    }
    CHECK(low >= 0);
    CHECK(high < 1);
    CHECK(low < 2e-5); // 1M draws all miss [0, 2e-5) once in 1e9 runs
    CHECK(high > 1 - 2e-5);
    // Five standard errors: sqrt(1/12/n) for the mean; the variance of (u-1/2)^2 is 1/180.
    CHECK(std::abs(sum / kDraws - 0.5) < 5 * std::sqrt(1.0 / 12 / kDraws));
    CHECK(std::abs(squares / kDraws - 1.0 / 12) < 5 * std::sqrt(1.0 / 180 / kDraws));
    // Chi-squared: mean k-1, variance 2(k-1).
    auto chi = [](const std::vector<int64_t>& counts, double n) {
        double expected = n / double(counts.size()), sum = 0;
        for (int64_t c : counts) sum += (double(c) - expected) * (double(c) - expected) / expected;
        return sum;
    };
    CHECK(chi(cells, kDraws) < 15 + 5 * std::sqrt(30.0));
    CHECK(chi(pairs, kDraws / 2) < 63 + 5 * std::sqrt(126.0));
}

TEST_CASE("normal numbers: moments, tails, and streams that know nothing of each other") {
    double sum[5] = {}, product = 0, neighbours = 0, seeds = 0, before = 0;
    int64_t beyond = 0;
    for (int64_t i = 0; i < kDraws; i++) {
        double x = random_normal(11, 2, uint64_t(i)), power = 1;
        for (double& s : sum) s += power, power *= x;
        beyond += std::abs(x) > 3;
        product += x * random_normal(11, 3, uint64_t(i));
        seeds += x * random_normal(12, 2, uint64_t(i));
        neighbours += x * before;
        before = x;
    }
    // Five standard errors each: E x^2k = 1, 3, 15, 105 for k = 1..4.
    double root = std::sqrt(double(kDraws));
    CHECK(std::abs(sum[1]) < 5 * root);
    CHECK(std::abs(sum[2] - kDraws) < 5 * root * std::sqrt(3.0 - 1));
    CHECK(std::abs(sum[3]) < 5 * root * std::sqrt(15.0));
    CHECK(std::abs(sum[4] - 3.0 * kDraws) < 5 * root * std::sqrt(105.0 - 9));
    double tail = 0.0026998 * kDraws; // P(|x| > 3)
    CHECK(std::abs(double(beyond) - tail) < 5 * std::sqrt(tail));
    CHECK(std::abs(product) < 5 * root);
    CHECK(std::abs(seeds) < 5 * root);
    CHECK(std::abs(neighbours) < 5 * root);
}

TEST_CASE("all 64 bits of seed, stream and index count") {
    uint64_t base = philox(1, 2, 3).word[0];
    for (int bit = 0; bit < 64; bit++) {
        uint64_t flip = uint64_t(1) << bit;
        CHECK(philox(1 ^ flip, 2, 3).word[0] != base);
        CHECK(philox(1, 2 ^ flip, 3).word[0] != base);
        CHECK(philox(1, 2, 3 ^ flip).word[0] != base);
    }
}
