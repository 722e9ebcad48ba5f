// runtime/loop/schedule.h against the formulas of its header, at the points where they meet, and where they degenerate.
#include <doctest/doctest.h>

#include <cmath>

#include "../runtime/base/errors.h"
#include "../runtime/loop/schedule.h"
#include "scratch.h"

namespace {

Schedule make(const std::string& kind) { return {kind, 2e-3, 0.1, 1000, 100, 250}; }

void check_rate(const Schedule& s, int64_t step, double want) {
    CAPTURE(s.kind);
    CAPTURE(step);
    // A dozen roundings at most, each half an epsilon of lr.
    CHECK(std::abs(learning_rate(s, step) - want) <= 12 * 1.2e-16 * s.lr);
}

} // namespace

TEST_CASE("warmup is a straight line that ends at the peak, for every kind") {
    for (const char* kind : {"cosine", "linear", "constant", "wsd"}) {
        Schedule s = make(kind);
        for (int64_t step : {0, 1, 49, 98, 99}) check_rate(s, step, 2e-3 * double(step + 1) / 100);
        check_rate(s, 99, 2e-3);
        check_rate(s, 100, 2e-3);
        s.warmup = 0;
        check_rate(s, 0, 2e-3);
    }
}

TEST_CASE("values between warmup and end") {
    check_rate(make("cosine"), 550, 2e-4 + 1.8e-3 / 2);
    check_rate(make("cosine"), 100 + 300, 2e-4 + 1.8e-3 * 0.75); // cos(pi/3) = 1/2
    check_rate(make("cosine"), 100 + 600, 2e-4 + 1.8e-3 * 0.25);
    check_rate(make("linear"), 550, 2e-3 - 1.8e-3 / 2);
    check_rate(make("linear"), 325, 2e-3 - 1.8e-3 / 4);
    check_rate(make("linear"), 999, 2e-3 - 1.8e-3 * 899 / 900);
    check_rate(make("constant"), 550, 2e-3);
    check_rate(make("constant"), 999, 2e-3);
    check_rate(make("wsd"), 550, 2e-3);
    check_rate(make("wsd"), 750, 2e-3);
    check_rate(make("wsd"), 751, 2e-3 - 1.8e-3 / 250);
    check_rate(make("wsd"), 875, 2e-3 - 1.8e-3 / 2);
    check_rate(make("wsd"), 999, 2e-3 - 1.8e-3 * 249 / 250);
}

TEST_CASE("at the end and past it the rate stays") {
    for (int64_t step : {int64_t(1000), int64_t(1001), int64_t(1) << 40}) {
        for (const char* kind : {"cosine", "linear", "wsd"}) check_rate(make(kind), step, 2e-4);
        check_rate(make("constant"), step, 2e-3);
    }
}

TEST_CASE("rates only fall after warmup, and stay within their bounds") {
    for (const char* kind : {"cosine", "linear", "constant", "wsd"})
        for (int64_t step = 100; step < 1000; step++) {
            double now = learning_rate(make(kind), step), next = learning_rate(make(kind), step + 1);
            CHECK(next <= now);
            CHECK(now <= 2e-3);
            CHECK(next >= 2e-4 * (1 - 1e-15));
        }
}

TEST_CASE("degenerate lengths") {
    for (const char* kind : {"cosine", "linear", "wsd"}) {
        check_rate({kind, 2e-3, 0.1, 10, 20, 5}, 19, 2e-3); // warmup longer than the run
        check_rate({kind, 2e-3, 0.1, 10, 20, 5}, 20, 2e-4);
        check_rate({kind, 2e-3, 0.1, 10, 10, 5}, 10, 2e-4);
        check_rate({kind, 2e-3, 0.1, 0, 0, 0}, 0, kind == std::string("wsd") ? 2e-3 : 2e-4);
        check_rate({kind, 2e-3, 1, 1000, 100, 250}, 900, 2e-3); // final equals peak
        check_rate({kind, 2e-3, 0, 1000, 100, 250}, 1000, 0);
    }
    check_rate({"wsd", 2e-3, 0.1, 1000, 100, 0}, 999, 2e-3);             // no decay
    check_rate({"wsd", 2e-3, 0.1, 1000, 0, 2000}, 0, 2e-3 - 1.8e-3 / 2); // a decay that began before the run
    CHECK(contains(message_of<BadInput>([] { learning_rate({"cosin", 1, 0, 10, 0, 0}, 5); }), "'cosin'"));
}
