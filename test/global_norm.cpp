#include "../kernels/global_norm.h"

#include "check.h"
#include "oracle.h"

namespace {

float norm_of(const float* x, int64_t n) {
    check::Scratch scratch(global_norm_scratch(n));
    Vector<float> norm = {NAN};
    global_norm(nullptr, norm.data(), x, scratch, n);
    return norm[0];
}

} // namespace

TEST_CASE("norm: the double sum, rounded once to float") {
    for (int64_t n : {0, 1, 15, 16, 33, 1000, 65535, 65536, 65537, 300001})
        for (float scale : {1.f, 1e-30f, 1e30f}) { // squares of the last two do not fit a float
            CAPTURE(n);
            CAPTURE(scale);
            Vector<float> x = random_normal<float>(n, 1, scale);
            long double sum = 0;
            for (float value : x) sum += static_cast<long double>(value) * value;
            const double want = double(std::sqrt(sum));
            CHECK(std::abs(norm_of(x.data(), n) - want) <= 0x1.0001p-24 * want);
        }
}

TEST_CASE("small gradients beside a large one are not lost") {
    Vector<float> x(3 << 19, 0.1f);
    x[77] = 1e4f; // in float, 1e8 + 0.01 is 1e8
    CHECK(norm_of(x.data(), x.size()) == float(std::sqrt(double(x[77]) * x[77] + (x.size() - 1.0) * x[0] * x[0])));
}

TEST_CASE("the same bits on any number of threads, from any alignment") {
    Vector<float> x = random_normal<float>(500001, 1);
    const float first = norm_of(x.data() + 1, 500000);
    check::with_threads({1, 2, 3, 16}, [&](int threads) {
        CAPTURE(threads);
        CHECK(norm_of(x.data() + 1, 500000) == first);
    });
}

TEST_CASE("NaN and infinity anywhere reach the norm") {
    for (int64_t at : {0, 40, 65536, 70000, 70002})
        for (float bad : {NAN, INFINITY, -INFINITY}) {
            Vector<float> x = random_normal<float>(70003, 1);
            x[at] = bad;
            CHECK_FALSE(std::isfinite(norm_of(x.data(), x.size())));
        }
}

TEST_CASE("more than 2^31 gradients") {
    const int64_t n = (int64_t(1) << 31) + 5000003;
    check::Huge<float> x(n);
    x[0] = 1, x[(int64_t(1) << 31) - 1] = 2, x[int64_t(1) << 31] = 4, x[n - 1] = 10;
    Vector<float> norm = {NAN};
    Vector<double> scratch(global_norm_scratch(n) / sizeof(double)); // zeros for the blocks that do not run
    check::OnlyBlocks some(check::blocks_at(double(int64_t(1) << 31) / n, 1));
    global_norm(nullptr, norm.data(), x.data(), scratch.data(), n);
    CHECK(norm[0] == 11); // sqrt(1 + 4 + 16 + 100)
}

TEST_CASE("scale") {
    auto scale_of = [](float norm, double loss, float clip) {
        Vector<float> scale = {77}, norm_there = {norm};
        Vector<double> loss_there = {loss};
        clip_scale(nullptr, scale.data(), norm_there.data(), loss_there.data(), clip);
        return scale[0];
    };
    CHECK(scale_of(4, 3, 1) == 0.25f);
    CHECK(scale_of(0.5f, 3, 1) == 1);
    CHECK(scale_of(1, 3, 1) == 1);
    CHECK(scale_of(0, 3, 1) == 1);
    CHECK(scale_of(4, 3, 0) == 1); // 0 turns clipping off
    CHECK(scale_of(3e38f, 3, 0) == 1);
    for (float bad : {NAN, INFINITY, -INFINITY}) {
        CHECK(std::isnan(scale_of(bad, 3, 1)));
        CHECK(std::isnan(scale_of(4, bad, 1)));
        CHECK(std::isnan(scale_of(4, bad, 0)));
    }
}
