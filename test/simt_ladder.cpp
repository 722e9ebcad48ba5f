// dev/ladder: every step gives the right answer, and costs what its README says. In bf16 builds only, as the product's
// flash kernels, which are the last step.
#include "attention_problem.h"

#include "../dev/ladder/ladder.h"
#include "../dev/simt/simt.h"

namespace {

constexpr bool kBf16 = sizeof(real) == 2;

// One step's answer to a problem. A template, so that fp32 builds do not compile the calls.
template <class Any> Output<bf16> answer(const ladder::Step& step, const Any& p) {
    const AttentionShape& s = p.shape;
    Output<bf16> out{Tensor<bf16>(s.B, s.Tq, s.H, s.D, p.gap), poisoned<float>(s.B * s.H * s.Tq)};
    out.o.fill(poisoned<bf16>(s.B * s.Tq * s.H * s.D));
    if constexpr (kBf16)
        step.forward(nullptr, out.o.heads(), out.lse.data(), p.q.view(), p.k.view(), p.v.view(), p.scale, s);
    return out;
}

// What one launch costs at T = 1024, one head: dev/ladder/README.md's table.
struct Counted {
    const char* source;
    uint64_t read, written; // sectors of global memory
    uint64_t wavefronts, conflicts;
    uint64_t mma, shuffles, barriers, exp2;
};
constexpr Counted kCounted[] = {{"step1", 73728, 4224, 810496, 661504, 34816, 98368, 1088, 0},
                                {"step2", 73728, 4224, 645120, 548352, 34816, 3456, 1088, 0},
                                {"step3", 73728, 4224, 96768, 0, 34816, 3456, 1088, 0},
                                {"step4", 73728, 4224, 96768, 0, 34816, 3456, 544, 0},
                                {"step5", 73728, 4224, 96768, 0, 34816, 3456, 544, 591872},
                                {"attention_forward", 40960, 4224, 51872, 0, 36864, 2432, 288, 608256}};
static_assert(std::size(kCounted) == std::size(ladder::kSteps));

} // namespace

TEST_CASE("every step against the oracle, ragged and strided" * doctest::skip(!kBf16)) {
    const AttentionShape shapes[] = {{1, 1, 1, 1, 64}, {2, 65, 65, 1, 64}, {1, 150, 150, 2, 64}};
    simt::SettingsGuard guard;
    for (uint64_t seed : {1, 2, 3}) {
        simt::settings().seed = seed;
        for (const AttentionShape& s : shapes) {
            Problem p(s, seed, {}, 8 * seed);
            Expected want = expected_forward(p);
            for (const ladder::Step& step : ladder::kSteps) {
                INFO(std::string(step.name), ", T ", s.Tq, ", seed ", seed);
                Output<bf16> out = answer(step, p);
                check_close("o", out.o.dense(), want.o.value, tolerance_of<bf16>(p), 0, want.o.allowance(p));
                check_lse(out.lse, want.lse, float_tolerance(p));
                CHECK(out.o.guards_hold());
            }
        }
    }
}

// Scores that grow from tile to tile, so that sums must be rescaled again and again, and nothing may overflow.
TEST_CASE("every step with large scores that grow along the keys" * doctest::skip(!kBf16)) {
    Problem p({1, 130, 130, 1, 64}, 5);
    int64_t n = 0;
    p.k.each([&](real& x, int64_t) { assign(x, to_float(x) * float(1 + n++ / 64) / 16); });
    Expected want = expected_forward(p);
    for (const ladder::Step& step : ladder::kSteps) {
        INFO(std::string(step.name));
        Output<bf16> out = answer(step, p);
        check_close("o", out.o.dense(), want.o.value, tolerance_of<bf16>(p, 40), 0, want.o.allowance(p));
        check_lse(out.lse, want.lse, float_tolerance(p, 40));
    }
}

TEST_CASE("what each step costs" * doctest::skip(!kBf16)) {
    Problem p({1, 1024, 1024, 1, 64}, 7);
    simt::SettingsGuard guard;
    simt::settings().count = true;
    simt::reset_traffic();
    for (const ladder::Step& step : ladder::kSteps) answer(step, p);
    for (const Counted& want : kCounted) {
        INFO(std::string(want.source));
        simt::Traffic t = simt::traffic_of(want.source);
        CHECK(t.launches == 1);
        CHECK(t.read.sectors == want.read);
        CHECK(t.written.sectors == want.written);
        CHECK(t.shared().wavefronts == want.wavefronts);
        CHECK(t.shared().conflicts == want.conflicts);
        CHECK(t.mma == want.mma);
        CHECK(t.shuffles == want.shuffles);
        CHECK(t.barriers == want.barriers);
        CHECK(t.exp2 == want.exp2);
        CHECK(t.plain_shared == 0);
        CHECK(t.plain_global == 0);
    }
}
