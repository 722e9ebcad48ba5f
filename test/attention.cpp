// kernels/attention against the oracle: values head by head in double, gradients by the plain formula in double, which
// is itself held against the complex step.
#include "attention_problem.h"

namespace {

// Both passes of one problem against double, guards and poison included.
void check_problem(Problem& p, double largest_score = 4) {
    Output<real> out = forward(p);
    Backward<real> g = backward(p, out);
    check_answer(p, out, g, largest_score);
}

using check::kSimulated;
using check::same_bits;

} // namespace

TEST_CASE("the plain gradient formula agrees with the complex step") {
    constexpr int64_t Tq = 7, Tk = 9, D = 3, q_offset = 11, k_offset = 8;
    constexpr double scale = 0.7, h = 1e-30;
    Vector<int64_t> documents = {8, 8, 10, 10, 10, 14, 14};
    auto draw = [](size_t n, uint64_t seed) { return to_double(random_normal<float>(n, seed)); };
    std::vector<double> x[3] = {draw(Tq * D, 1), draw(Tk * D, 2), draw(Tk * D, 3)}, dout = draw(Tq * D, 4), o, lse;
    oracle::attention_head(o, lse, x[0], x[1], x[2], D, scale, q_offset, k_offset, documents);
    HeadGradients g = head_gradients(dout, x[0], x[1], x[2], o, lse, D, scale, q_offset, k_offset, documents);
    const std::vector<double>* analytic[3] = {&g.dq.value, &g.dk.value, &g.dv.value};
    for (int which = 0; which < 3; which++)
        for (size_t n = 0; n < x[which].size(); n++) {
            std::vector<oracle::Complex> c[3], co, clse;
            for (int i = 0; i < 3; i++) c[i].assign(x[i].begin(), x[i].end());
            c[which][n] += oracle::Complex(0, h);
            oracle::attention_head(co, clse, c[0], c[1], c[2], D, scale, q_offset, k_offset, documents);
            double derivative = 0;
            for (size_t i = 0; i < co.size(); i++) derivative += dout[i] * co[i].imag() / h;
            CHECK(std::abs(derivative - (*analytic[which])[n]) <= 1e-14 * (1 + std::abs(derivative)));
        }
}

// One row, tiles that are not full, one more and one less than a tile. The simulator shares the lengths out among the
// head dims.
TEST_CASE("causal attention, ragged lengths, every head dim") {
    struct {
        int64_t D;
        std::vector<int64_t> simulated;
    } cases[] = {
        {32, {1, 65, 200}}, {64, {1, 5, 63, 64, 65, 129, 200}}, {80, {5, 63, 129}}, {128, {1, 65, 129}}, {256, {33}}};
    for (auto& c : cases)
        for (int64_t T : kSimulated ? c.simulated : std::vector<int64_t>{1, 5, 63, 64, 65, 129, 200}) {
            bool few = T >= (kSimulated ? 33 : 100);
            int64_t B = few ? 1 : 2, H = !few ? 3 : kSimulated ? 1 : 2;
            Problem p({B, T, T, H, c.D}, 10 * c.D + T, {}, T % 2 ? 16 : 0);
            check_problem(p);
        }
}

TEST_CASE("sums in any order: within the same tolerances") {
    for (int64_t D : {32, 64, 80, 128, 256}) {
        const int64_t T = kSimulated ? 70 : 140, H = kSimulated ? 1 : 2;
        Problem p({1, T, T, H, D}, 80 + D, starts(1, T, 0, {{40, 3}}), 16);
        p.shape.deterministic = false;
        check_problem(p);
        Problem late({1, kSimulated ? 17 : 40, kSimulated ? 137 : 150, 1, D, 300, 170}, 81 + D);
        late.shape.deterministic = false;
        check_problem(late);
    }
}

TEST_CASE("sums in any order, held for some heads at a time") {
    constexpr int64_t B = 2, T = 70, H = 3, D = 64;
    Problem p({B, T, T, H, D}, 90, {}, 16);
    p.shape.deterministic = false;
    for (int64_t heads : {2, 1}) { // two and the third; one by one, also where not even one fits
        p.shape.most_sums = B * T * D * int64_t(sizeof(float)) * heads - (heads == 1);
        check_problem(p);
    }
    if (sizeof(real) == 2 && !device_is_host()) {
        auto scratch = [](int64_t heads) {
            AttentionShape s{1, 16384, 16384, heads, D};
            s.deterministic = false;
            return attention_backward_scratch(s);
        };
        CHECK(scratch(16) > scratch(8));
        CHECK(scratch(64) == scratch(16));
    }
}

TEST_CASE("a head dim without a kernel is refused") {
    AttentionShape shape{1, 4, 4, 1, 48};
    CHECK(!attention_supports(48));
    CHECK(attention_supports(80));
    CHECK_THROWS_AS(attention_forward_scratch(shape), std::invalid_argument);
    CHECK_THROWS_AS(attention_backward_scratch(shape), std::invalid_argument);
}

TEST_CASE("packed qkv gives the bits that separate tensors give") {
    const int64_t B = 2, T = kSimulated ? 41 : 101, H = kSimulated ? 2 : 3, D = 64, C = H * D;
    Problem p({B, T, T, H, D}, 7);
    Vector<real> qkv(B * T * 3 * C), dqkv = poisoned<real>(B * T * 3 * C);
    auto q = p.q.dense(), k = p.k.dense(), v = p.v.dense();
    for (int64_t n = 0; n < B * T * C; n++) {
        int64_t at = n / C * 3 * C + n % C;
        qkv[at] = q[n], qkv[at + C] = k[n], qkv[at + 2 * C] = v[n];
    }
    auto in = [&](int64_t i) { return Heads<const real>{qkv.data() + i * C, T * 3 * C, 3 * C, D}; };
    auto grad = [&](int64_t i) { return Heads<real>{dqkv.data() + i * C, T * 3 * C, 3 * C, D}; };
    Tensor<real> o(B, T, H, D, 0);
    Vector<float> lse(B * H * T);
    Scratch forward_scratch(attention_forward_scratch(p.shape)), backward_scratch(attention_backward_scratch(p.shape));
    attention_forward(nullptr, o.heads(), lse.data(), in(0), in(1), in(2), p.scale, forward_scratch.get(), p.shape);
    attention_backward(nullptr, grad(0), grad(1), grad(2), p.dout.view(), in(0), in(1), in(2), o.view(), lse.data(),
                       p.scale, backward_scratch.get(), p.shape);

    Output<real> out = forward(p);
    Backward<real> g = backward(p, out);
    CHECK(same_bits(o.data, out.o.data));
    CHECK(same_bits(lse, out.lse));
    Vector<real> want(dqkv.size());
    auto dq = g.dq.dense(), dk = g.dk.dense(), dv = g.dv.dense();
    for (int64_t n = 0; n < B * T * C; n++) {
        int64_t at = n / C * 3 * C + n % C;
        want[at] = dq[n], want[at + C] = dk[n], want[at + 2 * C] = dv[n];
    }
    CHECK(same_bits(dqkv, want));
}

TEST_CASE("offsets: the key block before, across and after the queries") {
    // Behind: every key seen. Decoding: one query. Across: a ramp, some queries see nothing. Ahead: nothing seen at
    // all.
    struct {
        int64_t Tq, Tk, q_offset, k_offset;
    } blocks[] = {{70, 110, 300, 100}, {1, 333, 332, 0},  {130, 130, 50, 0},    {130, 130, 0, 50},
                  {99, 40, 20, 60},    {64, 64, 100, 64}, {50, 70, 1000, 5000}, {33, 1, 0, 16}};
    for (auto& block : blocks) {
        int64_t B = kSimulated ? 1 : 2, H = B;
        Problem p({B, block.Tq, block.Tk, H, 64, block.q_offset, block.k_offset}, 50 + block.Tk);
        check_problem(p);
    }
}

TEST_CASE("a query that sees nothing: O and dQ are 0, LSE is -Inf") {
    Problem p({1, 40, 60, 1, 32, 100, 120}, 3); // queries 0 .. 19 stand before the first key
    Output<real> out = forward(p);
    Backward<real> g = backward(p, out);
    auto o = out.o.dense(), dq = g.dq.dense();
    for (int64_t i = 0; i < 20; i++) {
        CHECK(out.lse[i] == -INFINITY);
        for (int64_t d = 0; d < 32; d++) {
            CHECK(to_float(o[i * 32 + d]) == 0);
            CHECK(to_float(dq[i * 32 + d]) == 0);
        }
    }
    CHECK(std::isfinite(out.lse[20]));
}

TEST_CASE("positions beyond 2^31 and 2^40 are positions like others") {
    const int64_t T = kSimulated ? 110 : 150;
    Problem p({2, T, T, 1, 64}, 9, starts(2, T, 0, {{10, 97}, {96, 40}}));
    Output<real> out = forward(p);
    Backward<real> g = backward(p, out);
    for (int64_t offset : {(int64_t(1) << 31) - 70, (int64_t(1) << 32) + 5, int64_t(1) << 40}) {
        Problem far = p;
        far.shape.q_offset = far.shape.k_offset = offset;
        for (int64_t& start : far.documents) start += offset;
        Output<real> far_out = forward(far);
        Backward<real> far_g = backward(far, far_out);
        CHECK(same_bits(out.o.data, far_out.o.data));
        CHECK(same_bits(out.lse, far_out.lse));
        CHECK((same_bits(g.dq.data, far_g.dq.data) && same_bits(g.dk.data, far_g.dk.data) &&
               same_bits(g.dv.data, far_g.dv.data)));
    }
    // Queries 2^33 behind or ahead of the keys: all or nothing.
    Problem ahead({1, 20, 30, 1, 32, int64_t(1) << 33, 0}, 4), behind({1, 20, 30, 1, 32, 0, int64_t(1) << 33}, 4);
    check_problem(ahead);
    check_problem(behind);
}

TEST_CASE("documents, with boundaries inside tiles and at their edges") {
    struct {
        int64_t T, D;
        std::vector<Vector<int64_t>> lengths;
    } cases[] = {{200, 64, {{48, 48, 96}, {1, 1, 1, 60, 100}}}, // edges of tiles, one key, a few
                 {200, 32, {{47, 50, 2}, {96, 96}}},
                 {300, 64, {{200}, {144, 100}}}, // whole tiles before the last document
                 {130, 80, {{}, {129}}}};
    for (auto& c : cases) {
        Problem p({2, c.T, c.T, kSimulated ? 1 : 2, c.D}, 60 + c.T, starts(2, c.T, 0, c.lengths));
        check_problem(p);
    }
    // A key block of a longer row: documents that began before it, within it and after it.
    Problem p({1, 120, 100, 2, 64, 150, 130}, 61, starts(1, 120, 150, {{30, 45}}));
    for (int64_t i = 0; i < 30; i++) p.documents[i] = 90;
    check_problem(p);
}

TEST_CASE("tiles that no document reaches are not even read") {
    // NaN in one document would poison any tile product of the other that touched it. The boundary is one of tiles in
    // all backends.
    const int64_t kHalf = kSimulated ? 128 : 384, T = 2 * kHalf;
    for (int64_t D : {32, 64}) {
        Problem p({1, T, T, 1, D}, 5, starts(1, T, 0, {{kHalf}}));
        Output<real> clean = forward(p);
        Backward<real> clean_g = backward(p, clean);
        for (int64_t from : {0, 1}) { // the document that is spoiled: keys of the first, queries of the second
            Problem spoiled = p;
            for (int64_t i = 0; i < kHalf * D; i++)
                if (from == 0)
                    assign(spoiled.k.data[i], NAN), assign(spoiled.v.data[i], NAN);
                else
                    assign(spoiled.q.data[kHalf * D + i], NAN), assign(spoiled.dout.data[kHalf * D + i], NAN);
            Output<real> out = forward(spoiled);
            Backward<real> g = backward(spoiled, out);
            auto same_in_the_other = [&](Tensor<real>& x, Tensor<real>& y) {
                int64_t begin = from == 0 ? kHalf * D : 0;
                return memcmp(x.data.data() + begin, y.data.data() + begin, kHalf * D * sizeof(real)) == 0;
            };
            CAPTURE(from);
            CHECK(same_in_the_other(out.o, clean.o));
            CHECK(same_in_the_other(g.dq, clean_g.dq));
            CHECK(same_in_the_other(g.dk, clean_g.dk));
            CHECK(same_in_the_other(g.dv, clean_g.dv));
        }
    }
}

TEST_CASE("scores that grow along the row, to 80 and beyond") {
    // Each key outweighs all earlier ones, so that every tile moves the maximum.
    for (float steep : {80.f, 500.f, -500.f}) {
        const int64_t T = kSimulated ? 140 : 230, D = 64;
        Problem p({1, T, T, 1, D}, 11);
        for (int64_t t = 0; t < T; t++)
            for (int64_t d = 0; d < D; d++) {
                assign(p.q.data[t * D + d], 1.f);
                assign(p.k.data[t * D + d], steep / 8 * (2.f * t / (T - 1) - 1) + 0.01f * (d % 7));
            }
        check_problem(p, 2 * std::abs(steep));
    }
}

TEST_CASE("low scores: what lies past a ragged end weighs nothing") {
    // exp(0 − LSE), the weight of a key of zeros that nobody masked, would be e^400.
    for (int64_t D : {64, 80, 256})
        for (bool deterministic : {true, false}) {
            // Any order has more that can go wrong; in float the two are the same.
            if (kSimulated && deterministic && (D == 80 || sizeof(real) == 4)) continue;
            Problem p({1, kSimulated && D > 64 ? 50 : 250, 150, 1, D, 300}, 15);
            p.shape.deterministic = deterministic;
            float each = 400 / std::sqrt(float(D));
            p.q.each([](real& x, int64_t) { assign(x, 1.f); });
            p.k.each([&](real& x, int64_t n) { assign(x, 0.01f * (n % 7) - each); });
            check_problem(p, 800);
        }
}

TEST_CASE("nothing to do: no queries, no keys, no heads") {
    struct {
        int64_t B, Tq, Tk, H;
    } cases[] = {{1, 0, 40, 2}, {2, 40, 0, 1}, {1, 0, 0, 1}, {0, 33, 33, 2}, {2, 33, 33, 0}};
    for (auto& c : cases)
        for (bool deterministic : {true, false}) {
            CAPTURE(c.Tq);
            CAPTURE(c.Tk);
            Problem p({c.B, c.Tq, c.Tk, c.H, 64}, 16, {}, 16);
            p.shape.deterministic = deterministic;
            Output<real> out = forward(p); // poisoned before
            Backward<real> g = backward(p, out);
            CHECK(out.lse == Vector<float>(c.B * c.H * c.Tq, -INFINITY));
            for (Tensor<real>* x : {&out.o, &g.dq, &g.dk, &g.dv}) {
                x->each([](real& value, int64_t) { CHECK(to_float(value) == 0); });
                CHECK(x->guards_hold());
            }
            Output<float> part = forward<float>(p, true);
            CHECK(part.lse == out.lse);
            part.o.each([](float& value, int64_t) { CHECK(value == 0); });
            Tensor<float> dq(c.B, c.Tq, c.H, 64, 16), dk(c.B, c.Tk, c.H, 64, 16), dv = dk;
            Scratch scratch(attention_backward_scratch(p.call()));
            for (Tensor<float>* x : {&dq, &dk, &dv}) x->each([](float& value, int64_t n) { value = float(n); });
            attention_backward_partial(nullptr, dq.heads(), dk.heads(), dv.heads(), p.dout.view(), p.q.view(),
                                       p.k.view(), p.v.view(), out.o.view(), out.lse.data(), p.scale, scratch.get(),
                                       p.call());
            for (Tensor<float>* x : {&dq, &dk, &dv}) {
                x->each([](float& value, int64_t n) { CHECK(value == float(n)); });
                CHECK(x->guards_hold());
            }
        }
}

TEST_CASE("NaN in the inputs comes out as NaN, not as a number") {
    Problem p({1, 200, 200, 1, 64}, 12);
    assign(p.k.data[150 * 64 + 3], NAN);
    Output<real> out = forward(p);
    auto o = out.o.dense();
    CHECK(std::isfinite(out.lse[90]));
    for (int64_t i = 150; i < 200; i++) CHECK((std::isnan(out.lse[i]) && std::isnan(to_float(o[i * 64]))));
}

TEST_CASE("parts over key blocks merge to the whole, and their gradients add up to it") {
    for (int64_t D : {64, 80, 128, 256}) {
        if (kSimulated && D == 128) continue; // the code of 64 with other numbers
        const int64_t B = 2, T = 150, H = kSimulated ? 1 : 2;
        Problem whole({B, T, T, H, D}, 20 + D, starts(B, T, 0, {{70}, {}}), 16);
        Expected want = expected_forward(whole);
        // The last block first: it is ahead of most queries, so that empty rows meet full ones in both orders.
        std::vector<std::pair<int64_t, int64_t>> blocks = {{101, 150}, {0, 1}, {1, 96}, {96, 101}};
        Output<float> sum{Tensor<float>(B, T, H, D, 16), {}};
        std::vector<Problem> parts;
        for (auto [begin, end] : blocks) {
            Problem p({B, T, end - begin, H, D, 0, begin}, 0, whole.documents, 16);
            p.q = whole.q, p.dout = whole.dout;
            auto k = whole.k.dense(), v = whole.v.dense();
            auto slice = [&, begin = begin, end = end](const Vector<real>& x) {
                Vector<real> out;
                for (int64_t b = 0; b < B; b++)
                    out.insert(out.end(), x.begin() + (b * T + begin) * H * D, x.begin() + (b * T + end) * H * D);
                return out;
            };
            p.k.fill(slice(k)), p.v.fill(slice(v));
            Output<float> part = forward<float>(p, true);
            CHECK(part.o.guards_hold());
            Expected want_part = expected_forward(p);
            check_close("partial o", part.o.dense(), want_part.o.value, float_tolerance(p), 0,
                        want_part.o.allowance(p));
            check_lse(part.lse, want_part.lse, float_tolerance(p));
            if (parts.empty())
                sum = part;
            else
                attention_merge(nullptr, sum.o.heads(), sum.lse.data(), part.o.view(), part.lse.data(), whole.shape);
            parts.push_back(std::move(p));
        }
        check_close("merged o", sum.o.dense(), want.o.value, float_tolerance(whole), 0, want.o.allowance(whole));
        check_lse(sum.lse, want.lse, float_tolerance(whole));
        CHECK(sum.o.guards_hold());

        // Gradients are added to what is there. The blocks' dK and dV stand alone; dQ runs through all of them.
        Output<real> out = forward(whole);
        std::vector<double> o = to_double(out.o.dense()), lse(out.lse.begin(), out.lse.end());
        HeadGradients gradients = expected_backward(whole, o, lse);
        auto before = random_normal<float>(B * T * H * D, 99);
        Tensor<float> dq(B, T, H, D, 16);
        dq.fill(before);
        for (Problem& p : parts) {
            int64_t begin = p.shape.k_offset, n = p.shape.Tk;
            Tensor<float> dk(B, n, H, D, 16), dv(B, n, H, D, 16);
            auto before_k = random_normal<float>(B * n * H * D, 98);
            dk.fill(before_k), dv.fill(before_k);
            Scratch scratch(attention_backward_scratch(p.call()));
            attention_backward_partial(nullptr, dq.heads(), dk.heads(), dv.heads(), p.dout.view(), p.q.view(),
                                       p.k.view(), p.v.view(), out.o.view(), out.lse.data(), p.scale, scratch.get(),
                                       p.call());
            auto rows = [&](const std::vector<double>& all) {
                std::vector<double> some;
                for (int64_t b = 0; b < B; b++)
                    some.insert(some.end(), &all[(b * T + begin) * H * D], &all[(b * T + begin) * H * D] + n * H * D);
                return some;
            };
            auto check_keys = [&](const char* name, Tensor<float>& got, const Sums& sums) {
                std::vector<double> want_sums = rows(sums.value);
                for (size_t i = 0; i < want_sums.size(); i++) want_sums[i] += before_k[i];
                check_close(name, got.dense(), want_sums, float_tolerance(p), 0, rows(sums.allowance(p)));
            };
            check_keys("partial dk", dk, gradients.dk);
            check_keys("partial dv", dv, gradients.dv);
            CHECK((dk.guards_hold() && dv.guards_hold()));
        }
        for (size_t i = 0; i < before.size(); i++) gradients.dq.value[i] += before[i];
        check_close("summed dq", dq.dense(), gradients.dq.value, float_tolerance(whole), 0,
                    gradients.dq.allowance(whole));
        CHECK(dq.guards_hold());
    }
}

TEST_CASE("merging sides that are empty or far apart") {
    constexpr int64_t D = 32;
    auto merged = [&](float a, float b) {
        Vector<float> o(D, 3.f), part(D, 5.f), lse(1, a), part_lse(1, b);
        attention_merge(nullptr, {o.data(), D, D, D}, lse.data(), {part.data(), D, D, D}, part_lse.data(),
                        {1, 1, 1, 1, D});
        return std::pair(o[D - 1], lse[0]);
    };
    CHECK(merged(-INFINITY, 2) == std::pair(5.f, 2.f));
    CHECK(merged(2, -INFINITY) == std::pair(3.f, 2.f));
    CHECK(merged(-INFINITY, -INFINITY) == std::pair(3.f, -INFINITY));
    CHECK(merged(-1000, 1000) == std::pair(5.f, 1000.f));
    CHECK(merged(1000, -1000) == std::pair(3.f, 1000.f));
    CHECK(merged(7, 7).first == 4.f);
    CHECK(merged(7, 7).second == doctest::Approx(7 + std::log(2.0)).epsilon(1e-7));
}

TEST_CASE("head groups give the whole's bits") {
    // On five threads the groups' heads are shared by all of them, the whole's are not.
    check::with_threads({5}, [](int) {
        const int64_t B = 2, T = kSimulated ? 50 : 700, H = 6, D = 64;
        Problem p({B, T, T, H, D}, 30);
        Output<real> out = forward(p);
        Backward<real> g = backward(p, out);
        Output<real> parts{Tensor<real>(B, T, H, D, 0), poisoned<float>(B * H * T)};
        Backward<real> grads(p);
        for (auto [first, count] : {std::pair<int64_t, int64_t>{0, 1}, {1, 3}, {4, 2}}) {
            auto from = [&, first = first](auto heads) {
                heads.data += first * heads.head;
                return heads;
            };
            AttentionShape s{B, T, T, count, D};
            s.lse_batch = H * T;
            float* lse = parts.lse.data() + first * T;
            Scratch scratch(std::max(attention_forward_scratch(s), attention_backward_scratch(s)));
            attention_forward(nullptr, from(parts.o.heads()), lse, from(p.q.view()), from(p.k.view()), from(p.v.view()),
                              p.scale, scratch.get(), s);
            attention_backward(nullptr, from(grads.dq.heads()), from(grads.dk.heads()), from(grads.dv.heads()),
                               from(p.dout.view()), from(p.q.view()), from(p.k.view()), from(p.v.view()),
                               from(parts.o.view()), lse, p.scale, scratch.get(), s);
        }
        CHECK(same_bits(parts.o.data, out.o.data));
        CHECK(same_bits(parts.lse, out.lse));
        CHECK((same_bits(grads.dq.data, g.dq.data) && same_bits(grads.dk.data, g.dk.data) &&
               same_bits(grads.dv.data, g.dv.data)));
    });
}

TEST_CASE("the same bits in every run, and the oracle's values on any number of threads") {
    // One head makes threads share it, many heads make them take one each; a document skips tiles in both.
    std::vector<std::pair<int64_t, int64_t>> sizes = {{1, 700}, {1, 97}, {8, 150}, {3, 290}}; // H, T
    if (kSimulated) sizes = {{1, 170}, {3, 33}};
    for (auto [H, T] : sizes)
        check::with_threads({1, 2, 3, 5}, [&, H = H, T = T](int threads) {
            CAPTURE(threads);
            Problem p({1, T, T, H, 64}, 40 + T, starts(1, T, 0, {{T / 3, T / 4}}));
            check_problem(p);
            Output<real> out = forward(p);
            Backward<real> g = backward(p, out);
            for (int run = 0; run < (kSimulated ? 1 : 3); run++) {
                Output<real> again = forward(p);
                Backward<real> again_g = backward(p, again);
                CHECK((same_bits(out.o.data, again.o.data) && same_bits(out.lse, again.lse)));
                CHECK(same_bits(g.dq.data, again_g.dq.data));
                CHECK(same_bits(g.dk.data, again_g.dk.data));
                CHECK(same_bits(g.dv.data, again_g.dv.data));
            }
        });
}

TEST_CASE("scratch grows with the context, not with its square") {
    for (int64_t H : {1, 12}) {
        auto scratch = [&](int64_t T) {
            AttentionShape s{1, T, T, H, 64};
            return std::pair(double(attention_forward_scratch(s)), double(attention_backward_scratch(s)));
        };
        for (int64_t T : {16384, 32768}) {
            CHECK(scratch(2 * T).first <= 2.05 * scratch(T).first);
            CHECK(scratch(2 * T).second <= 2.05 * scratch(T).second);
        }
    }
}
