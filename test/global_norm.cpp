#include "../kernels/global_norm.h"

#include "check.h"
#include "oracle.h"

namespace {

template <class T> float norm_of(const T* x, int64_t n) {
    check::Scratch scratch(global_norm_scratch(n));
    Vector<float> norm = {NAN};
    global_norm(nullptr, norm.data(), x, scratch, n);
    return norm[0];
}

} // namespace

TEST_CASE_TEMPLATE("norm: the double sum, rounded once to float", T, float, bf16) {
    for (int64_t n : {0, 1, 15, 16, 33, 1000, 65535, 65536, 65537, 300001})
        for (float scale : {1.f, 1e-30f, 1e30f}) { // squares of the last two do not fit a float
            CAPTURE(n);
            CAPTURE(scale);
            Vector<T> x = random_normal<T>(n, 1, scale);
            long double sum = 0;
            for (T value : x) sum += static_cast<long double>(to_float(value)) * to_float(value);
            const double want = double(std::sqrt(sum));
            CHECK(std::abs(norm_of(x.data(), n) - want) <= 0x1.0001p-24 * want);
        }
}

TEST_CASE_TEMPLATE("small gradients beside a large one are not lost", T, float, bf16) {
    Vector<T> x(3 << 19);
    for (T& value : x) assign(value, 0.1f);
    assign(x[77], 1e4f); // in float, 1e8 + 0.01 is 1e8
    const double small = to_float(x[0]), large = to_float(x[77]);
    CHECK(norm_of(x.data(), x.size()) == float(std::sqrt(large * large + (x.size() - 1.0) * small * small)));
}

TEST_CASE_TEMPLATE("the same bits on any number of threads, unaligned", T, float, bf16) {
    Vector<T> x = random_normal<T>(500001, 1);
    const float first = norm_of(x.data() + 1, 500000);
    check::with_threads({1, 2, 3, 16}, [&](int threads) {
        CAPTURE(threads);
        CHECK(norm_of(x.data() + 1, 500000) == first);
    });
}

TEST_CASE_TEMPLATE("NaN and infinity anywhere reach the norm", T, float, bf16) {
    for (int64_t at : {0, 40, 65536, 70000, 70002})
        for (float bad : {NAN, INFINITY, -INFINITY}) {
            Vector<T> x = random_normal<T>(70003, 1);
            assign(x[at], bad);
            CHECK_FALSE(std::isfinite(norm_of(x.data(), x.size())));
        }
}

TEST_CASE_TEMPLATE("more than 2^31 gradients", T, float, bf16) {
    const int64_t n = (int64_t(1) << 31) + 5000003;
    check::Huge<T> x(n);
    assign(x[0], 1), assign(x[(int64_t(1) << 31) - 1], 2), assign(x[int64_t(1) << 31], 4), assign(x[n - 1], 10);
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

TEST_CASE("the norm of parts") {
    Vector<float> norms = {3, 4, 12}, norm = poisoned<float>(1);
    combine_norms(nullptr, norm.data(), norms.data(), 3);
    CHECK(norm[0] == 13);
    norms[1] = 0;
    combine_norms(nullptr, norm.data(), norms.data(), 2);
    CHECK(norm[0] == 3);
    for (float broken : {float(NAN), INFINITY}) {
        norms[1] = broken;
        combine_norms(nullptr, norm.data(), norms.data(), 3);
        CHECK_FALSE(std::isfinite(norm[0]));
    }
}
