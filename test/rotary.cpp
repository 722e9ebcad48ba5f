// Rotary positions against the equation in double, with angles in quadruple precision: values, the transpose, every
// layout of queries, keys and values, positions far out, arrays past 2^31 elements.
#include "../kernels/rotary.h"

#include <numeric>

#include "check.h"
#include "oracle.h"

namespace {

using oracle::Complex;

// The angle at position p of a pair that turns by turns/2^64 a position, in radians. 113 bits hold the product of 63
// and 64 bits to 2^-50 turns; here |p| stays below 2^41 and leaves it exact.
double angle_of(int64_t p, uint64_t turns) {
    const __float128 all = __float128(p) * turns / 18446744073709551616.0;
    return 2 * M_PI * double(all - __int128(all));
}

struct Setup {
    RotaryShape shape;
    Rotary rotary;
    Vector<int32_t> positions; // (B,T) or empty

    Setup(RotaryShape s, int64_t dims, float factor = 1, uint64_t seed = 1) : shape(s) {
        std::mt19937_64 rng(seed);
        rotary.dims = dims, rotary.factor = factor;
        // Between a turn a position and none, as real frequencies lie: the first fast, the last slow.
        for (int64_t i = 0; i < dims / 2; i++) rotary.turns[i] = rng() >> (3 + 40 * i / dims);
    }
    int64_t values() const { return shape.B * shape.T * shape.H * 3 * shape.D; }
    int64_t position(int64_t n) const { return positions.empty() ? shape.position0 + n % shape.T : positions[n]; }
    void use(Vector<int32_t> p) { positions = std::move(p), shape.positions = positions.data(); }
};

// qkv (B,T,H,3,D), bias (H,3,D) or empty → the same shape as qkv. sign −1 turns backwards.
template <class N>
std::vector<N> truth(const std::vector<N>& qkv, const std::vector<N>& bias, const Setup& in, double sign = 1) {
    const int64_t D = in.shape.D, H = in.shape.H, half = in.rotary.dims / 2;
    std::vector<N> out = qkv;
    for (size_t i = 0; i < out.size(); i++) out[i] += bias.empty() ? N(0) : bias[i % (H * 3 * D)];
    for (int64_t row = 0; row < int64_t(out.size()) / D; row++) {
        if (row % 3 == 2) continue;
        for (int64_t i = 0; i < half; i++) {
            const double theta = sign * angle_of(in.position(row / (3 * H)), in.rotary.turns[i]);
            const double c = in.rotary.factor * std::cos(theta), s = in.rotary.factor * std::sin(theta);
            N &y1 = out[row * D + i], &y2 = out[row * D + half + i];
            const N x1 = y1, x2 = y2;
            y1 = x1 * c - x2 * s;
            y2 = x2 * c + x1 * s;
        }
    }
    return out;
}

// Against `want`, which comes from `x` (what is rotated, bias and all). Of |x1| + |x2|: cosine and sine are within
// 1e-7, and x, the factor's product and x's product round by 2^-24 each, 3.1e-7 together. Then a rounding to real.
void check_values(const char* name, const Vector<real>& got, const std::vector<double>& want,
                  const std::vector<double>& x, const Setup& in) {
    const int64_t D = in.shape.D, half = in.rotary.dims / 2;
    REQUIRE(got.size() == want.size());
    double worst = 0;
    size_t at = 0;
    for (size_t n = 0; n < want.size(); n++) {
        const int64_t d = n % D;
        const bool rotated = n / D % 3 < 2 && d < 2 * half;
        double bound = kRealEpsilon / 2 * std::abs(want[n]) + 1e-37;
        if (rotated)
            bound += 3.1e-7 * in.rotary.factor * (std::abs(x[n]) + std::abs(x[d < half ? n + half : n - half]));
        const double error = std::abs(to_float(got[n]) - want[n]) / (bound * 1.001);
        if (!(error <= worst)) worst = error, at = n;
        if (std::isnan(error)) break;
    }
    std::string said = std::string(name) + ": " + std::to_string(worst) + " of the bound, at row " +
                       std::to_string(at / D) + ", d = " + std::to_string(at % D) + ": got " +
                       std::to_string(got.empty() ? 0 : to_float(got[at])) + ", want " +
                       std::to_string(got.empty() ? 0 : want[at]);
    CHECK_MESSAGE(worst <= 1, said);
}

// How q, k and v lie: within one (B,T,H,3,D); apart as (B,T,H,D); apart as (B,H,T,D), longer than the T in use as in a
// KV cache; apart with gaps between rows, of 16 bytes or an odd number of elements.
enum Layout { packed, tokens, cache, gaps, odd, kLayouts };

struct Parts {
    Vector<real> data;
    Heads<real> heads[3];
    RotaryShape shape;

    Parts(Layout layout, const RotaryShape& s) : shape(s) {
        const int64_t gap = layout == gaps ? 16 / sizeof(real) : layout == odd ? 3 : 0, row = s.D + gap;
        int64_t size = s.B * s.T * s.H * row, longer = s.T + 2;
        if (layout == cache) size = s.B * s.H * longer * s.D;
        data = poisoned<real>(3 * size);
        for (int i = 0; i < 3; i++) {
            real* p = data.data() + i * size;
            heads[i] = {p, s.T * s.H * row, s.H * row, row};
            if (layout == packed) heads[i] = rotary_part(data.data(), i, s);
            if (layout == cache) heads[i] = {p, s.H * longer * s.D, s.D, longer * s.D};
        }
    }
    template <class Use> void each(Use use) {
        int64_t n = 0;
        for (int64_t b = 0; b < shape.B; b++)
            for (int64_t t = 0; t < shape.T; t++)
                for (int64_t h = 0; h < shape.H; h++)
                    for (const Heads<real>& part : heads)
                        for (int64_t d = 0; d < shape.D; d++) use(part.row(b, t, h)[d], n++);
    }
    void fill(const Vector<real>& from) {
        each([&](real& x, int64_t n) { x = from[n]; });
    }
    // As (B,T,H,3,D); all that lies between rows must be as poisoned as it was.
    Vector<real> gather() {
        Vector<real> all(shape.B * shape.T * shape.H * 3 * shape.D);
        each([&](real& x, int64_t n) { all[n] = x; });
        auto poison = [](const auto& v) {
            return std::count_if(v.begin(), v.end(), [](real x) { return std::isnan(to_float(x)); });
        };
        CHECK(poison(data) - poison(all) == int64_t(data.size() - all.size()));
        return all;
    }
    Heads<const real> read(int i) const { return {heads[i].data, heads[i].batch, heads[i].token, heads[i].head}; }
};

void forward(Parts& to, const real* qkv, const real* bias, const Setup& in) {
    rotary_forward(nullptr, to.heads[0], to.heads[1], to.heads[2], qkv, bias, in.rotary, in.shape);
}
void backward(real* dqkv, const Parts& from, const Setup& in) {
    rotary_backward(nullptr, dqkv, from.read(0), from.read(1), from.read(2), in.rotary, in.shape);
}

// Forward with a bias and without, and backward, in every layout and in place.
void check_all(const Setup& in, std::initializer_list<Layout> layouts = {packed, tokens, cache, gaps, odd}) {
    const RotaryShape& s = in.shape;
    CAPTURE(s.B);
    CAPTURE(s.T);
    CAPTURE(s.H);
    CAPTURE(s.D);
    CAPTURE(in.rotary.dims);
    const Vector<real> qkv = random_normal<real>(in.values(), 11), bias = random_normal<real>(s.H * 3 * s.D, 12);
    const std::vector<double> x = to_double(qkv), b = to_double(bias);
    std::vector<double> sum = x;
    for (size_t i = 0; i < sum.size(); i++) sum[i] += b[i % b.size()];
    const std::vector<double> plain = truth(x, {}, in), biased = truth(x, b, in), back = truth(x, {}, in, -1);
    for (Layout layout : layouts) {
        CAPTURE(layout);
        Parts to(layout, s), to_biased(layout, s), from(layout, s);
        forward(to, qkv.data(), nullptr, in);
        check_values("forward", to.gather(), plain, x, in);
        forward(to_biased, qkv.data(), bias.data(), in);
        check_values("forward with a bias", to_biased.gather(), biased, sum, in);
        from.fill(qkv);
        Vector<real> dqkv = poisoned<real>(qkv.size());
        backward(dqkv.data(), from, in);
        check_values("backward", dqkv, back, x, in);
        if (layout != packed) continue;

        Parts place(packed, s);
        place.fill(qkv);
        forward(place, place.data.data(), nullptr, in);
        CHECK(check::same_bits(place.data, to.data));
        place.fill(qkv);
        forward(place, place.data.data(), bias.data(), in);
        CHECK(check::same_bits(place.data, to_biased.data));
        place.fill(qkv);
        backward(place.data.data(), place, in);
        CHECK(check::same_bits(place.data, dqkv));
    }
}

constexpr int64_t kHeadDims[] = {32, 64, 80, 128, 256};

} // namespace

TEST_CASE("cosine and sine of an angle in turns: within 1.3e-7, and exact at quarters") {
    std::mt19937_64 rng(1);
    double worst = 0;
    auto look = [&](uint64_t angle) {
        const long double theta = 2 * 3.14159265358979323846264L * (angle / 18446744073709551616.0L);
        const CosSin got = cos_sin_of_turns(angle);
        worst = std::max({worst, std::abs(double(got.cos - cosl(theta))), std::abs(double(got.sin - sinl(theta)))});
    };
    for (int i = 0; i < 1000000; i++) look(rng());
    for (int i = 0; i < 64; i++)
        for (int64_t shift : {-3, -1, 0, 1, 3})
            look((uint64_t(1) << i) + shift), look(uint64_t(i) * (uint64_t(1) << 58) + shift);
    CHECK(worst <= 1.3e-7);
    const uint64_t quarter = uint64_t(1) << 62;
    const float cosines[] = {1, 0, -1, 0}, sines[] = {0, 1, 0, -1};
    for (int i = 0; i < 4; i++) {
        CHECK(cos_sin_of_turns(i * quarter).cos == cosines[i]);
        CHECK(cos_sin_of_turns(i * quarter).sin == sines[i]);
    }
    // Small angles keep their digits.
    CHECK(cos_sin_of_turns(1000).sin == doctest::Approx(1000 * 2 * M_PI / 18446744073709551616.0).epsilon(1e-6));
}

TEST_CASE("every head dim, with none, a quarter and all of it rotated, in every layout") {
    for (int64_t D : kHeadDims)
        for (int64_t dims : {int64_t(0), D / 4, D})
            for (RotaryShape s : {RotaryShape{2, 5, 3, D, 7}, RotaryShape{1, 3, 11, D}, RotaryShape{1, 1, 1, D, 2047}})
                if (!check::kSimulated || s.H < 11 || dims == D / 4) check_all(Setup(s, dims, dims == D ? 1 : 1.25f));
}

TEST_CASE("numbers of pairs that no pack fits, and head dims that no kernel of attention has") {
    for (int64_t dims : {2, 6, 10, 12, 24, 30, 48}) check_all(Setup({2, 3, 2, 64}, dims), {packed, gaps});
    for (int64_t D : {2, 7, 24, 250}) check_all(Setup({2, 3, 2, D}, D / 2 * 2), {packed, cache});
}

TEST_CASE("many heads and many short tokens") {
    check_all(Setup({1, 2, 40, 64}, 16), {packed});
    check_all(Setup({1, 2, 41, 80}, 20), {tokens});
    check_all(Setup({3, 67, 1, 32}, 8), {packed});
    check_all(Setup({2, 33, 2, 32}, 8), {cache});
}

TEST_CASE("positions: any start, any array, far out") {
    for (int64_t D : {64, 80})
        for (int64_t position0 : {int64_t(0), int64_t(1), int64_t(131071), int64_t(1) << 30, (int64_t(1) << 31) - 2,
                                  int64_t(1) << 40, int64_t(-5)}) {
            CAPTURE(position0);
            check_all(Setup({2, 5, 2, D, position0}, D / 4, 1, position0), {packed});
        }
    for (int64_t D : kHeadDims) {
        Setup in({2, 9, 2, D, 1234}, D / 4); // position0 says nothing then
        in.use({0, 1, 2, 0, 1, 2, 3, 0, 1, 1 << 30, 5, 2147483647, 2147483646, 131072, 65535, 7, 7, 0});
        check_all(in, {packed, tokens});
    }
}

TEST_CASE("backward is the transpose: complex steps through the forward equation") {
    for (int64_t D : {32, 80}) {
        Setup in({1, 2, 2, D, 100}, D / 4, 1.5f);
        const Vector<real> dout = random_normal<real>(in.values(), 3);
        Parts from(tokens, in.shape);
        from.fill(dout);
        Vector<real> dqkv = poisoned<real>(in.values());
        backward(dqkv.data(), from, in);
        std::vector<Complex> qkv = oracle::to_complex(to_double(random_normal<real>(in.values(), 4)));
        const std::vector<double> weights = to_double(dout);
        auto loss = [&] {
            const std::vector<Complex> out = truth(qkv, {}, in);
            return std::inner_product(out.begin(), out.end(), weights.begin(), Complex(0));
        };
        std::vector<double> want(qkv.size());
        for (size_t i = 0; i < qkv.size(); i++) want[i] = oracle::derivative(qkv[i], loss);
        check_values("dqkv", dqkv, want, weights, in);
    }
}

TEST_CASE("arrays that begin anywhere") {
    for (int64_t D : kHeadDims) {
        CAPTURE(D);
        Setup in({2, 5, 3, D, 77}, D / 4);
        const Vector<real> qkv = random_normal<real>(in.values(), 1), bias = random_normal<real>(3 * 3 * D, 2);
        const std::vector<double> x = to_double(qkv), b = to_double(bias);
        std::vector<double> sum = x;
        for (size_t i = 0; i < sum.size(); i++) sum[i] += b[i % b.size()];
        check::Unaligned<real> late_qkv(qkv), late_bias(bias);
        for (int late = 0; late < 3; late++) {
            CAPTURE(late);
            Vector<real> out = poisoned<real>(qkv.size() + 1);
            Heads<real> to[3];
            for (int s = 0; s < 3; s++) to[s] = rotary_part(out.data() + (late == 2), s, in.shape);
            rotary_forward(nullptr, to[0], to[1], to[2], late == 0 ? late_qkv.data() : qkv.data(),
                           late == 1 ? late_bias.data() : bias.data(), in.rotary, in.shape);
            CHECK(std::isnan(to_float(late == 2 ? out.front() : out.back())));
            out.erase(late == 2 ? out.begin() : out.end() - 1);
            check_values("out", out, truth(x, b, in), sum, in);
        }
        Parts from(packed, in.shape);
        from.fill(qkv);
        check::Unaligned<real> dqkv(poisoned<real>(qkv.size()));
        backward(dqkv.data(), from, in);
        check_values("dqkv", dqkv.copy(), truth(x, {}, in, -1), x, in);
    }
}

TEST_CASE("the same bits from any number of threads") {
    Setup in({2, 13, 3, 80, 5}, 20);
    const Vector<real> qkv = random_normal<real>(in.values(), 1), bias = random_normal<real>(3 * 3 * 80, 2);
    Parts want(packed, in.shape);
    forward(want, qkv.data(), bias.data(), in);
    check::with_threads({1, 3, 8, 40}, [&](int) {
        Parts got(packed, in.shape);
        forward(got, qkv.data(), bias.data(), in);
        CHECK(check::same_bits(got.data, want.data));
    });
}

TEST_CASE("no tokens") {
    Setup in({0, 5, 2, 64}, 16);
    const Heads<real> none{};
    rotary_forward(nullptr, none, none, none, nullptr, nullptr, in.rotary, in.shape);
    rotary_backward(nullptr, nullptr, {}, {}, {}, in.rotary, in.shape);
}

// Three rows of one axis lie 2^30 elements apart, the others close together; forward writes there, backward reads.
TEST_CASE("strides that pass 2^31 elements") {
    const int64_t D = 64, far = int64_t(1) << 30;
    for (int axis = 0; axis < 3; axis++) {
        CAPTURE(axis);
        Setup in({axis == 0 ? 3 : 1, axis == 1 ? 3 : 1, axis == 2 ? 3 : 1, D, 9}, 16);
        check::Huge<real> rows(2 * far + 3 * D);
        Parts apart(tokens, in.shape);
        for (int s = 0; s < 3; s++) apart.heads[s] = {rows.data() + s * D, far, far, far};
        const Vector<real> qkv = random_normal<real>(in.values(), 1);
        const std::vector<double> x = to_double(qkv);
        forward(apart, qkv.data(), nullptr, in);
        Vector<real> out(in.values()), dqkv = poisoned<real>(in.values());
        apart.each([&](real& value, int64_t n) { out[n] = value; });
        check_values("forward", out, truth(x, {}, in), x, in);
        apart.fill(qkv);
        backward(dqkv.data(), apart, in);
        check_values("backward", dqkv, truth(x, {}, in, -1), x, in);
    }
}

TEST_CASE("more than 2^31 elements: the last tokens are right" * doctest::test_suite(check::kSimulated ? "" : "long")) {
    const int64_t D = 256, H = 16, tail = 3, T = (int64_t(1) << 31) / (H * 3 * D) + 5, values = T * H * 3 * D;
    Setup in({1, T, H, D}, 64), last({1, tail, H, D, T - tail}, 64);
    check::Huge<real> qkv(values), out(values, true);
    const Vector<real> x = random_normal<real>(last.values(), 1);
    const size_t bytes = x.size() * sizeof(real);
    memcpy(&qkv[values - x.size()], x.data(), bytes);
    auto part = [&](int s) { return rotary_part(out.data(), s, in.shape); };
    auto read = [&](int s) { return rotary_part(static_cast<const real*>(qkv.data()), s, in.shape); };
    Vector<real> got(x.size());
    check::OnlyBlocks some(check::blocks_at(0.5));
    rotary_forward(nullptr, part(0), part(1), part(2), qkv.data(), nullptr, in.rotary, in.shape);
    memcpy(got.data(), &out[values - x.size()], bytes);
    check_values("forward", got, truth(to_double(x), {}, last), to_double(x), last);
    rotary_backward(nullptr, out.data(), read(0), read(1), read(2), in.rotary, in.shape);
    memcpy(got.data(), &out[values - x.size()], bytes);
    check_values("backward", got, truth(to_double(x), {}, last, -1), to_double(x), last);
}
