// runtime/loop/outliers.h: z-scores against numbers known by hand, far from zero and at the ends of the range; the
// state.
#include <doctest/doctest.h>
#include <nlohmann/json.hpp>

#include <cmath>

#include "../runtime/base/errors.h"
#include "../runtime/base/random.h"
#include "../runtime/loop/outliers.h"
#include "scratch.h"

namespace {

// 64 values at mean-spread and 64 at mean+spread: their standard deviation is spread·sqrt(128/127).
OutlierWindow two_valued(double mean, double spread) {
    OutlierWindow window;
    for (int i = 0; i < 128; i++) window.accept(i % 2 ? mean + spread : mean - spread);
    return window;
}

const double kRoot = std::sqrt(128.0 / 127);

} // namespace

TEST_CASE("z-scores, wherever the values lie") {
    for (double mean : {0.0, 3.5, -7.0, 1e3, 1e9, 0x1p40}) {
        OutlierWindow window = two_valued(mean, 0.5);
        CAPTURE(mean);
        CHECK(window.score(mean) == doctest::Approx(0).epsilon(1e-12));
        CHECK(window.score(mean + 2) == doctest::Approx(4 / kRoot).epsilon(1e-9));
        CHECK(window.score(mean - 3) == doctest::Approx(-6 / kRoot).epsilon(1e-9));
    }
    CHECK(two_valued(0, 1e300).score(5e300) == doctest::Approx(5 / kRoot));
    CHECK(two_valued(0, 1e-200).score(5e-200) == doctest::Approx(5 / kRoot));
}

TEST_CASE("no verdict before the window is full, or while it does not vary") {
    OutlierWindow window;
    for (int i = 0; i < 127; i++) {
        window.accept(i % 2);
        CHECK(window.score(1e9) == 0);
    }
    window.accept(1);
    CHECK(window.score(1e9) > 1e6);

    OutlierWindow flat;
    for (int i = 0; i < 128; i++) flat.accept(0.1); // a value whose mean does not come out exactly
    CHECK(flat.score(0.1) == 0);
    CHECK(flat.score(5) == 0);
}

TEST_CASE("the window slides, and scoring does not move it") {
    OutlierWindow window = two_valued(100, 1);
    for (int i = 0; i < 128; i++) {
        CHECK(window.score(1e6) > 8);
        window.accept(i % 2 ? 5.0 : 3.0);
    }
    CHECK(window.score(4) == doctest::Approx(0));
    CHECK(window.score(6) == doctest::Approx(2 / kRoot));
}

TEST_CASE("values that are not finite score infinity and are left out") {
    OutlierWindow window = two_valued(0, 1);
    nlohmann::json before = window.state();
    for (double x : {double(NAN), double(INFINITY), double(-INFINITY)}) {
        CHECK(window.score(x) == INFINITY);
        CHECK(OutlierWindow().score(x) == INFINITY);
        window.accept(x);
    }
    CHECK(window.state() == before);
}

TEST_CASE("the state survives a checkpoint's text to the last bit") {
    OutlierWindow window;
    for (uint64_t i = 0; i < 300; i++) {
        OutlierWindow copy;
        copy.accept(-1); // what was there goes
        copy.restore(nlohmann::json::parse(window.state().dump()));
        CHECK(copy.state() == window.state());
        CHECK(copy.score(3.3) == window.score(3.3));
        window.accept(random_normal(1, 1, i) * 1e-3 + 3);
        copy.accept(random_normal(1, 1, i) * 1e-3 + 3);
        CHECK(copy.score(3.01) == window.score(3.01));
    }
    CHECK(window.state().size() == 128);
}

TEST_CASE("a state that no window wrote is refused, and nothing changes") {
    OutlierWindow window = two_valued(0, 1);
    nlohmann::json before = window.state();
    nlohmann::json long_list = nlohmann::json::array();
    for (int i = 0; i < 129; i++) long_list.push_back(1.0);
    for (const nlohmann::json& bad :
         {nlohmann::json(), nlohmann::json(3), nlohmann::json("x"), nlohmann::json::parse("{\"a\":1}"),
          nlohmann::json::parse("[1,null]"), nlohmann::json::parse("[1,\"2\"]"), nlohmann::json::parse("[[1]]"),
          nlohmann::json(std::vector<double>{1, INFINITY}), long_list}) {
        CHECK(contains(message_of<BadInput>([&] { window.restore(bad); }), "window of losses or norms"));
        CHECK(window.state() == before);
    }
}
