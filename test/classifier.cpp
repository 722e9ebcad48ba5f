#include "../kernels/classifier.h"

#include "check.h"
#include "oracle.h"

namespace {

struct Batch {
    int64_t N, V, Vp;
    Vector<real> logits;     // (N,Vp), NaN and large numbers in the padding
    Vector<int32_t> targets; // (N)

    Batch(int64_t N, int64_t V, int64_t Vp, float scale = 2, float mean = 0, uint64_t seed = 1)
        : N(N), V(V), Vp(Vp), logits(random_normal<real>(N * Vp, seed, scale, mean)), targets(N) {
        std::mt19937_64 rng(seed + 1);
        for (int64_t n = 0; n < N; n++) {
            targets[n] = rng() % V;
            for (int64_t v = V; v < Vp; v++) assign(logits[n * Vp + v], v % 2 ? NAN : 3e38f);
        }
    }
    std::vector<double> row(int64_t n) const {
        return to_double(Vector<real>(logits.begin() + n * Vp, logits.begin() + n * Vp + V));
    }
    double loss(int64_t n) const { return targets[n] < 0 ? 0 : oracle::cross_entropy(row(n).data(), V, targets[n]); }
};

constexpr double kFloat = 1.2e-7;

// The sum of V exponentials, each good to 1.5 ulp and added into one of 64 running sums; then ln and two additions.
double loss_tolerance(int64_t V) { return kFloat * (3 + 0.25 * std::sqrt(double(V))); }

// Gradients, all of them by complex step up to `checked` columns a row (the first, the last and a stride between).
void check_gradient(const Batch& in, const Vector<real>& got, float dloss, int64_t checked = 400) {
    Vector<real> taken;
    std::vector<double> want;
    for (int64_t n = 0; n < in.N; n++) {
        auto z = oracle::to_complex(in.row(n));
        const int64_t stride = std::max<int64_t>(1, in.V / checked);
        for (int64_t v = 0; v < in.V; v++) {
            const bool seen = v % stride == 0 || v == in.V - 1 || v == in.targets[n];
            if (!seen) continue;
            taken.push_back(got[n * in.Vp + v]);
            want.push_back(in.targets[n] < 0 ? 0 : dloss * oracle::derivative(z[v], [&] {
                                                       return oracle::cross_entropy(z.data(), in.V, in.targets[n]);
                                                   }));
        }
        for (int64_t v = in.V; v < in.Vp; v++) {
            const float padding = to_float(got[n * in.Vp + v]);
            if (padding != 0) CHECK(padding == 0);
        }
    }
    check_close("dlogits", taken, want, kRealEpsilon / 2 + loss_tolerance(in.V));
}

} // namespace

TEST_CASE("loss and gradient, ragged vocabularies, NaN in the padding") {
    const int64_t shapes[][3] = {{1, 1, 1},    {3, 2, 5},     {1, 16, 16},   {5, 17, 32},
                                 {2, 65, 128}, {3, 257, 257}, {4, 300, 320}, {2, 1003, 1024}};
    for (auto [N, V, Vp] : shapes)
        for (float mean : {0.f, 100.f}) {
            CAPTURE(N);
            CAPTURE(V);
            CAPTURE(mean);
            Batch in(N, V, Vp, 2, mean);
            if (N > 2) in.targets[1] = -1;
            std::vector<double> want;
            for (int64_t n = 0; n < N; n++) want.push_back(in.loss(n));

            Vector<real> logits = in.logits;
            Vector<float> losses = poisoned<float>(N), forward_losses = poisoned<float>(N);
            classifier_forward(nullptr, forward_losses.data(), logits.data(), in.targets.data(), N, V, Vp);
            CHECK(check::same_bits(logits, in.logits));
            classifier_forward_backward(nullptr, losses.data(), logits.data(), in.targets.data(), 0.37f, N, V, Vp);
            CHECK(check::same_bits(losses, forward_losses));
            check_close("losses", losses, want, loss_tolerance(V), 1);
            check_gradient(in, logits, 0.37f);
        }
}

TEST_CASE("GPT-2's vocabulary") {
    Batch in(3, 50257, 50304);
    Vector<float> losses = poisoned<float>(3);
    Vector<real> logits = in.logits;
    classifier_forward_backward(nullptr, losses.data(), logits.data(), in.targets.data(), 1 / 3.f, in.N, in.V, in.Vp);
    check_close("losses", losses, {in.loss(0), in.loss(1), in.loss(2)}, loss_tolerance(in.V));
    check_gradient(in, logits, 1 / 3.f, 12);
    for (int64_t n = 0; n < in.N; n++) { // what complex steps at a few columns leave out: the whole row sums to zero
        double sum = 0;
        for (int64_t v = 0; v < in.Vp; v++) sum += to_float(logits[n * in.Vp + v]);
        CHECK(std::abs(sum) < (kRealEpsilon + loss_tolerance(in.V)) / 3);
    }
}

TEST_CASE("logits of ±1e4, ties, and minus infinity") {
    for (int kind = 0; kind < 5; kind++) {
        CAPTURE(kind);
        Batch in(6, 100, 112);
        for (int64_t n = 0; n < in.N; n++)
            for (int64_t v = 0; v < in.V; v++) {
                real& x = in.logits[n * in.Vp + v];
                if (kind == 0) assign(x, v % 3 ? 1e4f : -1e4f); // two thirds share the maximum
                if (kind == 1) assign(x, to_float(x) * 1e4f);   // one wins, the rest vanish
                if (kind == 2) assign(x, -1e4f);                // all alike
                if (kind == 3 && v % 2) assign(x, -INFINITY);   // half are ruled out
                if (kind == 4 && v >= 40) assign(x, -INFINITY); // whole stretches are
            }
        for (int64_t n = 0; n < in.N; n++) in.targets[n] = kind == 3 ? 2 * n : kind == 0 ? 3 * n + 1 : n;
        if (kind == 0) in.targets[5] = 3; // one of the vanishing ones: loss 2e4 + ln 66
        std::vector<double> want;
        for (int64_t n = 0; n < in.N; n++) want.push_back(in.loss(n));
        Vector<float> losses = poisoned<float>(in.N);
        Vector<real> logits = in.logits;
        classifier_forward_backward(nullptr, losses.data(), logits.data(), in.targets.data(), 1, in.N, in.V, in.Vp);
        for (int64_t n = 0; n < in.N; n++) // each against its own size: an error at 2e4 must not excuse one at 4
            check_close("loss", Vector<float>{losses[n]}, {want[n]}, loss_tolerance(in.V), 1);
        if (kind < 3) check_gradient(in, logits, 1);
        if (kind == 3)
            for (int64_t v = 1; v < in.V; v += 2) CHECK(to_float(logits[v]) == 0);
        if (kind == 4)
            for (int64_t v = 40; v < in.V; v++) CHECK(to_float(logits[v]) == 0);
    }
}

TEST_CASE("a vocabulary of which all but the end is minus infinity") {
    Batch in(1, 50257, 50304);
    for (int64_t v = 0; v < 50000; v++) assign(in.logits[v], -INFINITY);
    in.targets[0] = 50123;
    Vector<float> losses = poisoned<float>(1);
    classifier_forward(nullptr, losses.data(), in.logits.data(), in.targets.data(), 1, in.V, in.Vp);
    check_close("losses", losses, {in.loss(0)}, loss_tolerance(257), 1);
}

TEST_CASE("logits from any address") {
    Batch in(2, 150, 160);
    check::Unaligned<real> logits(in.logits);
    Vector<float> losses = poisoned<float>(2), forward_losses = poisoned<float>(2);
    classifier_forward(nullptr, forward_losses.data(), logits.data(), in.targets.data(), 2, in.V, in.Vp);
    classifier_forward_backward(nullptr, losses.data(), logits.data(), in.targets.data(), 1, 2, in.V, in.Vp);
    check_close("losses", losses, {in.loss(0), in.loss(1)}, loss_tolerance(in.V), 1);
    CHECK(check::same_bits(losses, forward_losses));
    check_gradient(in, logits.copy(), 1);
}

TEST_CASE("an ignored row costs nothing, whatever stands in it") {
    for (int64_t V : {7, 64, 70}) {
        Batch in(3, V, 80);
        in.targets = {2, -1, -100};
        for (int64_t v = 0; v < in.Vp; v++) assign(in.logits[in.Vp + v], NAN);
        Vector<float> losses = poisoned<float>(3), forward_losses = poisoned<float>(3);
        classifier_forward(nullptr, forward_losses.data(), in.logits.data(), in.targets.data(), 3, V, in.Vp);
        classifier_forward_backward(nullptr, losses.data(), in.logits.data(), in.targets.data(), 1, 3, V, in.Vp);
        CHECK(losses[1] == 0);
        CHECK(losses[2] == 0);
        CHECK(losses[0] > 0);
        CHECK(check::same_bits(losses, forward_losses));
        for (int64_t i = in.Vp; i < 3 * in.Vp; i++)
            if (to_float(in.logits[i]) != 0) CHECK(to_float(in.logits[i]) == 0);
    }
}

TEST_CASE("a logit that is NaN or infinite makes the loss not finite, wherever it stands") {
    for (float bad : {NAN, INFINITY})
        for (int64_t at : {0, 17, 63, 64, 130, 149}) {
            CAPTURE(bad);
            CAPTURE(at);
            Batch in(2, 150, 160);
            assign(in.logits[at], bad);
            in.targets[0] = 20;
            Vector<float> losses = poisoned<float>(2);
            classifier_forward(nullptr, losses.data(), in.logits.data(), in.targets.data(), 2, in.V, in.Vp);
            CHECK_FALSE(std::isfinite(losses[0]));
            CHECK(std::isfinite(losses[1]));
        }
}

TEST_CASE("the same bits on any number of threads") {
    Batch in(37, 333, 336);
    Vector<real> first;
    Vector<float> first_losses;
    check::with_threads({1, 2, 5, 64}, [&](int threads) {
        CAPTURE(threads);
        Vector<real> logits = in.logits;
        Vector<float> losses = poisoned<float>(in.N);
        classifier_forward_backward(nullptr, losses.data(), logits.data(), in.targets.data(), 1, in.N, in.V, in.Vp);
        if (first.empty()) first = logits, first_losses = losses;
        CHECK(check::same_bits(logits, first));
        CHECK(check::same_bits(losses, first_losses));
    });
}

TEST_CASE("losses add up in double, on top of what was there") {
    Vector<float> losses(5000, 1 + 0x1p-23f);
    losses[0] = 1e9f; // in float, everything after it would be lost
    Vector<double> total = {5};
    classifier_add_losses(nullptr, total.data(), losses.data(), 0.25, 5000);
    CHECK(total[0] == 5 + 0.25 * (1e9 + 4999 * (1 + 0x1p-23)));
    classifier_add_losses(nullptr, total.data(), losses.data(), 0.25, 0);
    CHECK(total[0] == 5 + 0.25 * (1e9 + 4999 * (1 + 0x1p-23)));
}

TEST_CASE("more than 2^31 logits: the last rows are right" * doctest::test_suite(check::kSimulated ? "" : "long")) {
    const int64_t Vp = 50304, V = 50257, N = 43000, tail = 3; // 2.16e9
    Batch in(tail, V, Vp);
    check::Huge<real> logits(N * Vp, true);
    // Gradients of the first rows land on mirrored logits that later rows read; rows that are ignored write zeros.
    Vector<int32_t> targets(N, -1);
    memcpy(&logits[(N - tail) * Vp], in.logits.data(), tail * Vp * sizeof(real));
    std::copy(in.targets.begin(), in.targets.end(), targets.end() - tail);
    Vector<float> losses = poisoned<float>(N), forward_losses = losses, want = poisoned<float>(tail);
    {
        check::OnlyBlocks some(check::blocks_at(double(int64_t(1) << 31) / (N * Vp)));
        classifier_forward(nullptr, forward_losses.data(), logits.data(), targets.data(), N, V, Vp);
        classifier_forward_backward(nullptr, losses.data(), logits.data(), targets.data(), 1, N, V, Vp);
    }
    CHECK(std::equal(forward_losses.end() - tail, forward_losses.end(), losses.end() - tail));
    classifier_forward_backward(nullptr, want.data(), in.logits.data(), in.targets.data(), 1, tail, V, Vp);
    CHECK(std::equal(want.begin(), want.end(), losses.end() - tail));
    CHECK(memcmp(&logits[(N - tail) * Vp], in.logits.data(), tail * Vp * sizeof(real)) == 0);
}

// One block adds them all, which would keep the simulator busy for hours.
TEST_CASE("more than 2^31 losses: the last ones count" * doctest::test_suite("long") *
          doctest::skip(check::kSimulated)) {
    const int64_t N = (int64_t(1) << 31) + 1001;
    check::Huge<float> losses(N);
    losses[0] = 1, losses[int64_t(1) << 31] = 2, losses[N - 1] = 4;
    Vector<double> total = {0.5};
    classifier_add_losses(nullptr, total.data(), losses.data(), 2, N);
    CHECK(total[0] == 14.5);
}
