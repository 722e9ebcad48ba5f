#include "../kernels/embedding.h"

#include "check.h"
#include "oracle.h"

namespace {

struct Inputs {
    int64_t B, T, C, Vp, maxT;
    Vector<int32_t> tokens, positions; // (B,T)
    Vector<real> wte, wpe, dout;       // (Vp,C), (maxT,C), (B,T,C)

    // Few rows for many tokens, so that most of them repeat.
    Inputs(int64_t B, int64_t T, int64_t C, int64_t Vp = 7, uint64_t seed = 1)
        : B(B), T(T), C(C), Vp(Vp), maxT(T + 11), tokens(B * T), positions(B * T),
          wte(random_normal<real>(Vp * C, seed)), wpe(random_normal<real>(maxT * C, seed + 1)),
          dout(random_normal<real>(B * T * C, seed + 2)) {
        std::mt19937_64 rng(seed + 3);
        for (int32_t& token : tokens) token = rng() % Vp;
        for (int32_t& position : positions) position = rng() % maxT;
    }
};

// The position that each token has under the shape.
Vector<int32_t> positions_of(const EmbeddingShape& s) {
    Vector<int32_t> p(s.B * s.T);
    for (int64_t n = 0; n < s.B * s.T; n++) p[n] = s.positions ? s.positions[n] : int32_t(s.position0 + n % s.T);
    return p;
}

} // namespace

TEST_CASE("forward: the oracle's sum, rounded once") {
    for (int64_t C : {1, 3, 16, 17, 63, 64, 100, 768})
        for (int64_t T : {1, 5, 9})
            for (int64_t B : {1, 2})
                for (int variant = 0; variant < 4; variant++) {
                    CAPTURE(C);
                    CAPTURE(T);
                    CAPTURE(B);
                    CAPTURE(variant);
                    Inputs in(B, T, C);
                    EmbeddingShape shape{B, T, C};
                    if (variant == 1) shape.position0 = 10;
                    if (variant == 2) shape.positions = in.positions.data();
                    const bool with_positions = variant != 3;
                    Vector<real> out = poisoned<real>(B * T * C);
                    embedding_forward(nullptr, out.data(), in.tokens.data(), in.wte.data(),
                                      with_positions ? in.wpe.data() : nullptr, shape);
                    std::vector<double> want =
                        oracle::embedding(to_double(in.wte), with_positions ? to_double(in.wpe) : std::vector<double>{},
                                          in.tokens, positions_of(shape), C);
                    // Two reals add exactly in double, so one rounding takes the oracle's value to the kernel's.
                    Vector<real> rounded(want.size());
                    for (size_t i = 0; i < want.size(); i++) assign(rounded[i], float(want[i]));
                    CHECK(check::same_bits(out, rounded));
                }
}

TEST_CASE("backward: complex steps through the oracle, on top of what the gradients held") {
    for (int64_t C : {1, 16, 19})
        for (int variant = 0; variant < 4; variant++) {
            CAPTURE(C);
            CAPTURE(variant);
            Inputs in(2, 9, C);
            EmbeddingShape shape{in.B, in.T, C};
            if (variant == 1) shape.position0 = 10;
            if (variant == 2) shape.positions = in.positions.data();
            const bool with_positions = variant != 3;
            Vector<float> dwte = random_normal<float>(in.Vp * C, 8), dwpe = random_normal<float>(in.maxT * C, 9);
            std::vector<double> want_wte = to_double(dwte), want_wpe = to_double(dwpe);
            embedding_backward(nullptr, dwte.data(), with_positions ? dwpe.data() : nullptr, in.dout.data(),
                               in.tokens.data(), shape);

            auto wte = oracle::to_complex(to_double(in.wte)), wpe = oracle::to_complex(to_double(in.wpe));
            std::vector<double> dout = to_double(in.dout);
            const Vector<int32_t> positions = positions_of(shape);
            auto loss = [&] {
                auto out = oracle::embedding(wte, with_positions ? wpe : std::vector<oracle::Complex>{}, in.tokens,
                                             positions, C);
                oracle::Complex sum = 0;
                for (size_t i = 0; i < out.size(); i++) sum += out[i] * dout[i];
                return sum;
            };
            for (size_t i = 0; i < wte.size(); i++) want_wte[i] += oracle::derivative(wte[i], loss);
            if (with_positions)
                for (size_t i = 0; i < wpe.size(); i++) want_wpe[i] += oracle::derivative(wpe[i], loss);
            // Up to 18 float additions, each within half an epsilon of a partial sum that may pass the result.
            check_close("dwte", dwte, want_wte, 18 * 1.2e-7);
            check_close("dwpe", dwpe, want_wpe, 18 * 1.2e-7);
        }
}

TEST_CASE("backward: to the bit the float sum in token order, on any number of threads") {
    for (int64_t C : {1, 30, 64, 130, 768}) {
        Inputs in(2, 150, C, 23);
        EmbeddingShape shape{in.B, in.T, C, 4};
        const Vector<float> dwte0 = random_normal<float>(in.Vp * C, 8), dwpe0 = random_normal<float>(in.maxT * C, 9);
        Vector<float> want_wte = dwte0, want_wpe = dwpe0;
        const Vector<int32_t> positions = positions_of(shape);
        for (int64_t n = 0; n < in.B * in.T; n++)
            for (int64_t c = 0; c < C; c++) {
                want_wte[in.tokens[n] * C + c] += to_float(in.dout[n * C + c]);
                want_wpe[positions[n] * C + c] += to_float(in.dout[n * C + c]);
            }
        check::with_threads({1, 2, 3, 8, 13}, [&](int threads) {
            CAPTURE(C);
            CAPTURE(threads);
            Vector<float> dwte = dwte0, dwpe = dwpe0;
            embedding_backward(nullptr, dwte.data(), dwpe.data(), in.dout.data(), in.tokens.data(), shape);
            CHECK(check::same_bits(dwte, want_wte));
            CHECK(check::same_bits(dwpe, want_wpe));
        });
    }
}

TEST_CASE("an output larger than the cache, aligned and not") {
    const int64_t C = 768, T = (20 << 20) / sizeof(real) / C;
    Inputs in(1, T, C, 1000);
    EmbeddingShape shape{1, T, C};
    Vector<real> want(T * C);
    for (int64_t t = 0; t < T; t++)
        for (int64_t c = 0; c < C; c++)
            assign(want[t * C + c], to_float(in.wte[in.tokens[t] * C + c]) + to_float(in.wpe[t * C + c]));
    for (int64_t shift : {0, 1, 16}) {
        CAPTURE(shift);
        check::Scratch memory((T * C + shift) * sizeof(real));
        real* out = static_cast<real*>(static_cast<void*>(memory)) + shift;
        embedding_forward(nullptr, out, in.tokens.data(), in.wte.data(), in.wpe.data(), shape);
        CHECK(memcmp(out, want.data(), want.size() * sizeof(real)) == 0);
    }
}

TEST_CASE("tables with more than 2^31 elements") {
    const int64_t C = 4099, rows = 600000; // 2.46e9 elements, of which only the rows in use take memory
    check::Huge<real> wte(rows * C), wpe(rows * C);
    check::Huge<float> dwte(rows * C), dwpe(rows * C);
    const Vector<int32_t> tokens = {int32_t(rows - 1), 550000, int32_t(rows - 1)};
    EmbeddingShape shape{1, 3, C, rows - 3};
    Vector<real> a = random_normal<real>(C, 1), b = random_normal<real>(C, 2), dout = random_normal<real>(3 * C, 3);
    for (int64_t c = 0; c < C; c++) wte[(rows - 1) * C + c] = a[c], wpe[(rows - 1) * C + c] = b[c];
    Vector<real> out = poisoned<real>(3 * C);
    embedding_forward(nullptr, out.data(), tokens.data(), wte.data(), wpe.data(), shape);
    embedding_backward(nullptr, dwte.data(), dwpe.data(), dout.data(), tokens.data(), shape);
    int64_t wrong = 0;
    for (int64_t c = 0; c < C; c++) {
        real sum;
        assign(sum, to_float(a[c]) + to_float(b[c]));
        const float d0 = to_float(dout[c]), d1 = to_float(dout[C + c]), d2 = to_float(dout[2 * C + c]);
        wrong += to_float(out[2 * C + c]) != to_float(sum) || to_float(out[C + c]) != 0;
        wrong += dwte[(rows - 1) * C + c] != d0 + d2 || dwte[550000 * C + c] != d1;
        wrong += dwpe[(rows - 3) * C + c] != d0 || dwpe[(rows - 1) * C + c] != d2;
    }
    CHECK(wrong == 0);
}
