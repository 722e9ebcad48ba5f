// The plain CUDA kernels on their own, and the choice between them and the flash kernels. Only simt and cuda builds
// have both.
#include "attention_problem.h"

#include "../kernels/attention_flash.h"
#include "../kernels/attention_plain.h"

namespace {

using check::same_bits;

Output<real> plain_forward(const Problem& p) {
    AttentionShape s = p.call();
    Output<real> out{Tensor<real>(s.B, s.Tq, s.H, s.D, p.gap), poisoned<float>(s.B * s.H * s.Tq)};
    out.o.fill(poisoned<real>(s.B * s.Tq * s.H * s.D));
    plain::forward(nullptr, out.o.heads(), out.lse.data(), p.q.view(), p.k.view(), p.v.view(), p.scale, s);
    return out;
}

Backward<real> plain_backward(const Problem& p, const Output<real>& out) {
    Backward<real> g(p);
    Scratch scratch(plain::backward_scratch(p.call()));
    plain::backward(nullptr, g.dq.heads(), g.dk.heads(), g.dv.heads(), p.dout.view(), p.q.view(), p.k.view(),
                    p.v.view(), out.o.view(), out.lse.data(), p.scale, scratch.get(), p.call());
    return g;
}

bool goes_to_flash(const Problem& p) { return flash::supports(p.call(), p.scale, p.q.view(), p.k.view()); }

// Shapes of all head dims: causal, ragged, with documents, off the diagonal. The simulator has a part of them.
std::vector<Problem> problems(int64_t gap) {
    std::vector<Problem> all;
    for (int64_t D : {32, 64, 80, 128, 256}) {
        if (!check::kSimulated || D < 128) all.push_back(Problem({2, 33, 33, 2, D}, 1 + D, {}, gap));
        if (!check::kSimulated || D == 64 || D == 80)
            all.push_back(Problem({1, 129, 129, 1, D}, 2 + D, starts(1, 129, 0, {{17, 64}}), gap));
        if (!check::kSimulated || D > 80) all.push_back(Problem({1, 40, 90, 1, D, 60, 20}, 3 + D, {}, gap));
    }
    return all;
}

} // namespace

TEST_CASE("the plain kernels against the oracle, where the flash kernels are the default") {
    for (Problem& p : problems(16)) {
        p.plain = true;
        Output<real> out = plain_forward(p);
        Backward<real> g = plain_backward(p, out);
        check_answer(p, out, g);
    }
}

// Each is one tolerance from the truth.
TEST_CASE("the kernels of choice and the plain ones agree") {
    for (Problem& p : problems(16)) {
        CHECK(goes_to_flash(p) == (sizeof(real) == 2));
        Output<real> chosen = forward(p), plain = plain_forward(p);
        CHECK(same_bits(chosen.o.data, plain.o.data) != goes_to_flash(p)); // rounding tells which it was
        double tolerance = 2 * tolerance_of<real>(p);
        Expected want = expected_forward(p);
        check_close("o", chosen.o.dense(), to_double(plain.o.dense()), tolerance, 0, want.o.allowance(p));
        check_lse(chosen.lse, to_double(plain.lse), 2 * float_tolerance(p));
        Backward<real> g = backward(p, plain), plain_g = plain_backward(p, plain);
        HeadGradients gradients = expected_backward(p, to_double(plain.o.dense()), to_double(plain.lse));
        check_close("dq", g.dq.dense(), to_double(plain_g.dq.dense()), tolerance, 1, gradients.dq.allowance(p));
        check_close("dk", g.dk.dense(), to_double(plain_g.dk.dense()), tolerance, 1, gradients.dk.allowance(p));
        check_close("dv", g.dv.dense(), to_double(plain_g.dv.dense()), tolerance, 0, gradients.dv.allowance(p));
        CHECK(same_bits(g.dv.data, plain_g.dv.data) != goes_to_flash(p));
    }
}

TEST_CASE("rows that are not 16 bytes apart go to the plain kernels") {
    for (Problem& p : problems(1)) {
        CHECK(!goes_to_flash(p));
        Output<real> out = forward(p), plain = plain_forward(p);
        CHECK((same_bits(out.o.data, plain.o.data) && same_bits(out.lse, plain.lse)));
        Backward<real> g = backward(p, out), plain_g = plain_backward(p, out);
        CHECK((same_bits(g.dq.data, plain_g.dq.data) && same_bits(g.dk.data, plain_g.dk.data) &&
               same_bits(g.dv.data, plain_g.dv.data)));
    }
}

TEST_CASE("tiles for other cards: 99 and 163 KB of shared memory a block" * doctest::skip(!check::kSimulated)) {
    simt::SettingsGuard guard;
    for (size_t room : {99, 163})
        for (int64_t D : {32, 64, 80, 128, 256}) {
            if (room == 163 && D != 128) continue; // the others are those of 227 KB
            simt::settings().shared_per_block = room * 1024;
            Problem p({1, 137, 137, 1, D}, 4 + D, starts(1, 137, 0, {{50}}));
            Output<real> out = forward(p);
            for (bool deterministic : {true, false}) {
                if (!deterministic && D != 64) continue; // no other has a kernel for it
                p.shape.deterministic = deterministic;
                Backward<real> g = backward(p, out);
                check_answer(p, out, g);
            }
        }
}
