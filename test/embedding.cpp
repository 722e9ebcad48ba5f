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

void backward(Vector<float>& dwte, Vector<float>* dwpe, const Vector<real>& dout, const Vector<int32_t>& tokens,
              const EmbeddingShape& shape) {
    check::Scratch scratch(embedding_backward_scratch(shape));
    embedding_backward(nullptr, dwte.data(), dwpe ? dwpe->data() : nullptr, dout.data(), tokens.data(), scratch, shape);
}

// table (rows,C) += dout, one row after another.
void add_in_order(Vector<float>& table, const Vector<real>& dout, const Vector<int32_t>& keys, int64_t C) {
    for (size_t n = 0; n < keys.size(); n++)
        for (int64_t c = 0; c < C; c++) table[keys[n] * C + c] += to_float(dout[n * C + c]);
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
            backward(dwte, with_positions ? &dwpe : nullptr, in.dout, in.tokens, shape);

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
        add_in_order(want_wte, in.dout, in.tokens, C);
        add_in_order(want_wpe, in.dout, positions_of(shape), C);
        check::with_threads({1, 2, 3, 8, 13}, [&](int threads) {
            CAPTURE(C);
            CAPTURE(threads);
            Vector<float> dwte = dwte0, dwpe = dwpe0;
            backward(dwte, &dwpe, in.dout, in.tokens, shape);
            CHECK(check::same_bits(dwte, want_wte));
            CHECK(check::same_bits(dwpe, want_wpe));
        });
    }
}

// Rows whose numbers differ in any of their bits, and enough tokens that a sort takes them in several parts.
TEST_CASE("backward: to the bit in a large vocabulary, by token and by position") {
    const int64_t T = 1300, rows = 1 << 18;
    std::mt19937_64 rng(5);
    auto byte = [&] { return int32_t(1 << rng() % 9) & 255; }; // no bit or one
    auto scattered = [&] {
        Vector<int32_t> keys(T);
        for (int32_t& key : keys) key = byte() | byte() << 8 | int32_t(rng() % 4) << 16;
        return keys;
    };
    for (int64_t C : {1, 8}) {
        CAPTURE(C);
        const Vector<int32_t> tokens = scattered(), positions = scattered();
        const Vector<real> dout = random_normal<real>(T * C, 6);
        Vector<float> want_wte = random_normal<float>(rows * C, 7), want_wpe(rows * C, 1.f);
        Vector<float> dwte = want_wte, dwpe = want_wpe;
        add_in_order(want_wte, dout, tokens, C);
        add_in_order(want_wpe, dout, positions, C);
        backward(dwte, &dwpe, dout, tokens, {1, T, C, 0, positions.data()});
        CHECK(check::same_bits(dwte, want_wte));
        CHECK(check::same_bits(dwpe, want_wpe));
    }
}

// Long runs may be summed in pieces: these lengths lie around where the pieces end, and begin anywhere.
TEST_CASE("backward: tokens that repeat hundreds of times") {
    const std::vector<int> lengths = {255, 256, 257, 3, 511, 512, 513, 1, 1100};
    const int64_t rows = lengths.size();
    Vector<int32_t> tokens;
    for (int64_t row = 0; row < rows; row++) tokens.insert(tokens.end(), lengths[row], int32_t(row));
    std::shuffle(tokens.begin(), tokens.end(), std::mt19937_64(3));
    const int64_t T = tokens.size();
    for (int64_t C : {3, 24}) {
        CAPTURE(C);
        const Vector<real> dout = random_normal<real>(T * C, 4);
        const Vector<float> before = random_normal<float>(rows * C, 5);
        Vector<float> in_order = before, dwte = before;
        add_in_order(in_order, dout, tokens, C);
        std::vector<double> want = to_double(before);
        for (int64_t n = 0; n < T * C; n++) want[tokens[n / C] * C + n % C] += to_float(dout[n]);
        backward(dwte, nullptr, dout, tokens, {1, T, C});
        for (int64_t row = 0; row < rows; row++) {
            CAPTURE(lengths[row]);
            auto part = [&](const auto& v) {
                return std::remove_cvref_t<decltype(v)>(v.begin() + row * C, v.begin() + (row + 1) * C);
            };
            // As many roundings, each of a partial sum that is about as large as the result at most.
            check_close("dwte", part(dwte), part(want), 2 * 1.2e-7 * std::sqrt(double(lengths[row])) + 1.2e-7);
            if (lengths[row] <= 256) CHECK(check::same_bits(part(dwte), part(in_order)));
        }
        Vector<float> again = before;
        backward(again, nullptr, dout, tokens, {1, T, C});
        CHECK(check::same_bits(dwte, again));
    }
}

TEST_CASE("backward: arrays that begin anywhere, and no tokens at all") {
    Inputs in(2, 20, 16);
    Vector<float> want_wte(in.Vp * in.C), want_wpe(in.maxT * in.C);
    EmbeddingShape shape{in.B, in.T, in.C};
    add_in_order(want_wte, in.dout, in.tokens, in.C);
    add_in_order(want_wpe, in.dout, positions_of(shape), in.C);
    for (int late = 0; late < 3; late++) {
        CAPTURE(late);
        Vector<float> dwte(want_wte.size() + 1), dwpe(want_wpe.size() + 1);
        Vector<real> dout = in.dout;
        if (late == 2) dout.insert(dout.begin(), dout[0]);
        check::Scratch scratch(embedding_backward_scratch(shape));
        embedding_backward(nullptr, dwte.data() + (late == 0), dwpe.data() + (late == 1), dout.data() + (late == 2),
                           in.tokens.data(), scratch, shape);
        dwte.erase(late == 0 ? dwte.begin() : dwte.end() - 1), dwpe.erase(late == 1 ? dwpe.begin() : dwpe.end() - 1);
        CHECK(check::same_bits(dwte, want_wte));
        CHECK(check::same_bits(dwpe, want_wpe));
    }
    Vector<float> untouched = {1, 2};
    EmbeddingShape none{0, 5, 2};
    check::Scratch scratch(embedding_backward_scratch(none));
    embedding_forward(nullptr, nullptr, nullptr, in.wte.data(), in.wpe.data(), none);
    embedding_backward(nullptr, untouched.data(), untouched.data(), nullptr, nullptr, scratch, none);
    CHECK(untouched == Vector<float>{1, 2});
}

TEST_CASE("an output larger than the cache, aligned and not") {
    const int64_t C = 768, T = check::kSimulated ? 50 : (20 << 20) / sizeof(real) / C;
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
    simt::SettingsGuard guard;
    simt::settings().device_bytes = size_t{1} << 40; // of which next to nothing is touched
    // Of these only the rows in use take memory. The first two differ in the highest byte of their numbers alone.
    struct Table {
        int64_t C, rows, often, once;
    };
    for (Table table : {Table{128, 20000000, 3000000 + (1 << 24), 3000000}, Table{4099, 600000, 599999, 550000}}) {
        CAPTURE(table.C);
        const int64_t C = table.C, rows = table.rows;
        check::Huge<real> wte(rows * C), wpe(rows * C);
        check::Huge<float> dwte(rows * C), dwpe(rows * C);
        const Vector<int32_t> tokens = {int32_t(table.often), int32_t(table.once), int32_t(table.often)};
        EmbeddingShape shape{1, 3, C, rows - 3};
        Vector<real> a = random_normal<real>(C, 1), b = random_normal<real>(C, 2);
        Vector<real> dout = random_normal<real>(3 * C, 3), out = poisoned<real>(3 * C);
        for (int64_t c = 0; c < C; c++) wte[table.often * C + c] = a[c], wpe[(rows - 1) * C + c] = b[c];
        check::Scratch scratch(embedding_backward_scratch(shape));
        embedding_forward(nullptr, out.data(), tokens.data(), wte.data(), wpe.data(), shape);
        embedding_backward(nullptr, dwte.data(), dwpe.data(), dout.data(), tokens.data(), scratch, shape);
        int64_t wrong = 0;
        for (int64_t c = 0; c < C; c++) {
            real sum;
            assign(sum, to_float(a[c]) + to_float(b[c]));
            const float d0 = to_float(dout[c]), d1 = to_float(dout[C + c]), d2 = to_float(dout[2 * C + c]);
            wrong += to_float(out[2 * C + c]) != to_float(sum) || to_float(out[C + c]) != 0;
            wrong += dwte[table.often * C + c] != d0 + d2 || dwte[table.once * C + c] != d1;
            wrong += dwpe[(rows - 3) * C + c] != d0 || dwpe[(rows - 1) * C + c] != d2;
        }
        CHECK(wrong == 0);
    }
}

// Very wide rows, and of them only the strips of columns at both ends: the blocks between would do the same.
TEST_CASE("outputs and gradients of more than 2^31 elements" * doctest::skip(!check::kSimulated)) {
    simt::SettingsGuard guard;
    simt::settings().device_bytes = size_t{1} << 40;
    const int64_t C = 1 << 22, B = 520, ends = 64; // elements at each end of a row that are looked at
    check::Huge<real> dout(B * C);
    Vector<real> wte(2 * C);
    Vector<float> dwte(2 * C), dwpe(C);
    Vector<int32_t> tokens(B, 0);
    tokens[1] = tokens[B - 1] = 1;
    EmbeddingShape shape{B, 1, C};
    Vector<real> values = random_normal<real>(2 * ends, 1);
    for (int64_t i = 0; i < ends; i++) {
        dout[C + i] = values[i], dout[B * C - ends + i] = values[ends + i];
        wte[C + i] = values[i], wte[2 * C - ends + i] = values[ends + i];
    }
    // The sort's few blocks all run; of the others the first and the last strip of every row.
    simt::settings().blocks = [](uint64_t blocks) { return simt::some_blocks(blocks < 1000 ? blocks : 65)(blocks); };
    check::Scratch scratch(embedding_backward_scratch(shape));
    embedding_backward(nullptr, dwte.data(), dwpe.data(), dout.data(), tokens.data(), scratch, shape);
    int64_t wrong = 0;
    for (int64_t i = 0; i < ends; i++) {
        float first = to_float(values[i]), last = to_float(values[ends + i]);
        wrong += dwte[C + i] != first || dwte[2 * C - ends + i] != last;
        wrong += dwpe[i] != first || dwpe[C - ends + i] != last;
    }
    CHECK(wrong == 0);
}

// A token more than 2^31, which only the forward pass takes.
// One precision says it all in `make test`: what could overflow are indices.
TEST_CASE("more than 2^31 tokens forward" * doctest::test_suite(check::kSimulated || sizeof(real) == 2 ? "" : "long")) {
    const int64_t N = (int64_t{1} << 31) + 5;
    check::Huge<real> out(N);
    check::Huge<int32_t> tokens(N), positions(N);
    const Vector<real> wte = random_normal<real>(2, 1), wpe = random_normal<real>(3, 2);
    tokens[N - 1] = 1, positions[N - 1] = 2;
    EmbeddingShape shape{1, N, 1};
    shape.positions = positions.data();
    check::OnlyBlocks some(check::blocks_at(0.5));
    embedding_forward(nullptr, out.data(), tokens.data(), wte.data(), wpe.data(), shape);
    real sum;
    assign(sum, to_float(wte[1]) + to_float(wpe[2]));
    CHECK(to_float(out[N - 1]) == to_float(sum));
}

TEST_CASE("rows of more than 2^31 elements out and back: the last tokens are right" *
          doctest::test_suite(check::kSimulated ? "" : "long")) {
    // Tokens of the last row and of the first, where all others add zeros.
    const int64_t C = 4096, B = 3, T = ((int64_t(1) << 31) / C + 5) / B + 1, N = B * T, tail = 2 * C;
    check::Huge<real> dout(check::kSimulated ? 1 : N * C), out(N * C, true);
    Vector<int32_t> tokens(N);
    tokens[N - 1] = 1, tokens[N - 2] = 2;
    const Vector<real> wte = random_normal<real>(3 * C, 1), values = random_normal<real>(tail, 2);
    check::Huge<real> wpe(T * C);
    const EmbeddingShape shape{B, T, C};
    check::OnlyBlocks some(check::blocks_at(0.5));
    embedding_forward(nullptr, out.data(), tokens.data(), wte.data(), wpe.data(), shape);
    CHECK(memcmp(&out[N * C - C], &wte[C], C * sizeof(real)) == 0);
    CHECK(memcmp(&out[N * C - 2 * C], &wte[2 * C], C * sizeof(real)) == 0);
    if (check::kSimulated) return; // gradients are above, where the sort has fewer tokens
    Vector<float> dwte(3 * C);
    check::Huge<float> dwpe(T * C, true);
    std::copy(values.begin(), values.end(), &dout[N * C - tail]);
    check::Scratch scratch(embedding_backward_scratch(shape));
    embedding_backward(nullptr, dwte.data(), dwpe.data(), dout.data(), tokens.data(), scratch, shape);
    int64_t wrong = 0;
    for (int64_t c = 0; c < C; c++) {
        const float before_last = to_float(values[c]), last = to_float(values[C + c]);
        wrong += dwte[2 * C + c] != before_last || dwte[C + c] != last || dwte[c] != 0;
        wrong += dwpe[(T - 2) * C + c] != before_last || dwpe[(T - 1) * C + c] != last;
    }
    CHECK(wrong == 0);
}
