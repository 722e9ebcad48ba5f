// Linear layers against the oracle: ragged shapes, every fusion, accumulation, determinism, and sizes past 2^31.
#include "check.h"
#include "oracle.h"

#include <memory>

#include <sys/mman.h>
#include <unistd.h>

#include "../kernels/common.h"
#include "../kernels/matmul.h"

namespace {

struct Close {
    void operator()(Matmul* mm) const { matmul_close(mm); }
};
using Handle = std::unique_ptr<Matmul, Close>;
Handle open_matmul() { return Handle(matmul_open(nullptr)); }

double gelu(double x, Gelu kind) {
    return kind == Gelu::tanh ? oracle::gelu_tanh(x) : kind == Gelu::erf ? oracle::gelu_erf(x) : x;
}
double gelu_slope(double x, Gelu kind) {
    oracle::Complex z(x, 1e-30);
    if (kind == Gelu::none) return 1;
    return (kind == Gelu::tanh ? oracle::gelu_tanh(z) : oracle::gelu_erf(z)).imag() / 1e-30;
}

// Sums of n products are kept in float: an epsilon of float for each addition, adding up like a random walk, twice over
// for the blocks that a kernel sums apart. Then one rounding to T, half an epsilon, and the same again for margin.
template <class T> double tolerance(int64_t n) {
    return 2 * 1.2e-7 * std::sqrt(double(n)) + 2 * 1.2e-7 + (sizeof(T) == 2 ? 7.8125e-3 / 2 : 0);
}

struct Shape {
    int64_t N, C, OC;
};
constexpr Shape kShapes[] = {{1, 1, 1},      {1, 64, 33},    {1, 768, 2304}, {7, 1, 5},
                             {5, 9, 1},      {64, 64, 64},   {63, 65, 127},  {130, 129, 17},
                             {33, 48, 1031}, {300, 37, 256}, {17, 5000, 3},  {1023, 3, 2}};

std::vector<double> transpose(const std::vector<double>& m, int64_t rows, int64_t columns) {
    std::vector<double> t(m.size());
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < columns; c++) t[c * rows + r] = m[r * columns + c];
    return t;
}

using check::same_bits;

} // namespace

TEST_CASE("forward") {
    Handle mm = open_matmul();
    for (Shape s : kShapes) {
        INFO("N ", s.N, ", C ", s.C, ", OC ", s.OC);
        // Weights of 1/sqrt(C) keep the sums near 1, where GELU bends.
        Vector<real> inp = random_normal<real>(s.N * s.C, 1), bias = random_normal<real>(s.OC, 3);
        Vector<real> w = random_normal<real>(s.OC * s.C, 2, 1 / std::sqrt(float(s.C)));
        for (bool with_bias : {false, true}) {
            std::vector<double> sums =
                oracle::linear(to_double(inp), to_double(w), with_bias ? to_double(bias) : std::vector<double>{}, s.C);
            double norm = 0;
            for (double x : sums) norm += x * x / sums.size();
            for (Gelu kind : {Gelu::none, Gelu::tanh, Gelu::erf})
                for (bool keep : {false, true}) {
                    if (keep && kind == Gelu::none) continue;
                    Vector<real> out = poisoned<real>(s.N * s.OC), pre = poisoned<real>(s.N * s.OC);
                    matmul_forward(mm.get(), out.data(), keep ? pre.data() : nullptr, inp.data(), w.data(),
                                   with_bias ? bias.data() : nullptr, s.N, s.C, s.OC, kind);
                    std::vector<double> want(sums.size());
                    // What was kept has been rounded, and GELU is taken of that.
                    for (size_t i = 0; i < sums.size(); i++) want[i] = gelu(keep ? to_float(pre[i]) : sums[i], kind);
                    // Where GELU is near 0 its error is still one of the sum: its slope is about 1 at most, and
                    // oneDNN's x/2·(1 + tanh) cancels to an epsilon of x.
                    check_close("out", out, want, tolerance<real>(s.C), kind == Gelu::none ? 0 : std::sqrt(norm));
                    if (keep) check_close("pre", pre, sums, tolerance<real>(s.C));
                }
        }
    }
}

TEST_CASE("backward to the input, alone and through the GELU before it") {
    Handle mm = open_matmul();
    for (Shape s : kShapes) {
        INFO("N ", s.N, ", C ", s.C, ", OC ", s.OC);
        Vector<real> dout = random_normal<real>(s.N * s.OC, 4), pre = random_normal<real>(s.N * s.C, 5);
        Vector<real> w = random_normal<real>(s.OC * s.C, 6);
        std::vector<double> sums = oracle::linear(to_double(dout), transpose(to_double(w), s.OC, s.C), {}, s.OC);
        for (Gelu kind : {Gelu::none, Gelu::tanh, Gelu::erf}) {
            std::vector<double> want(sums);
            for (size_t i = 0; i < want.size(); i++) want[i] *= gelu_slope(to_float(pre[i]), kind);
            Vector<real> dinp = poisoned<real>(s.N * s.C);
            matmul_backward_input(mm.get(), dinp.data(), dout.data(), w.data(),
                                  kind == Gelu::none ? nullptr : pre.data(), s.N, s.C, s.OC, kind);
            // The product is rounded before GELU's slope is taken to it, so two roundings.
            check_close("dinp", dinp, want, 2 * tolerance<real>(s.OC));
        }
    }
}

TEST_CASE("backward to the input over as many outputs as logits") {
    Handle mm = open_matmul();
    for (int64_t OC : {4095, 4097, 12345}) {
        int64_t N = 9, C = 24;
        Vector<real> dout = random_normal<real>(N * OC, 4), w = random_normal<real>(OC * C, 6);
        std::vector<double> want = oracle::linear(to_double(dout), transpose(to_double(w), OC, C), {}, OC);
        Vector<real> dinp = poisoned<real>(N * C);
        matmul_backward_input(mm.get(), dinp.data(), dout.data(), w.data(), nullptr, N, C, OC);
        check_close("dinp", dinp, want, tolerance<real>(OC));
    }
}

TEST_CASE("backward to weight and bias adds to what is there") {
    Handle mm = open_matmul();
    for (Shape s : kShapes) {
        INFO("N ", s.N, ", C ", s.C, ", OC ", s.OC);
        Vector<real> dout = random_normal<real>(s.N * s.OC, 7, 1, 0.5f), inp = random_normal<real>(s.N * s.C, 8);
        Vector<float> dw = random_normal<float>(s.OC * s.C, 9), dbias = random_normal<float>(s.OC, 10);
        Vector<float> dw_alone = dw;
        std::vector<double> dout_t = transpose(to_double(dout), s.N, s.OC);
        std::vector<double> want = oracle::linear(dout_t, transpose(to_double(inp), s.N, s.C), {}, s.N);
        std::vector<double> want_bias = oracle::linear(dout_t, std::vector<double>(s.N, 1), {}, s.N);
        for (size_t i = 0; i < want.size(); i++) want[i] += dw[i];
        for (size_t i = 0; i < want_bias.size(); i++) want_bias[i] += dbias[i];
        matmul_backward_weight(mm.get(), dw.data(), dbias.data(), dout.data(), inp.data(), s.N, s.C, s.OC);
        check_close("dw", dw, want, tolerance<float>(s.N));
        check_close("dbias", dbias, want_bias, tolerance<float>(s.N));
        matmul_backward_weight(mm.get(), dw_alone.data(), nullptr, dout.data(), inp.data(), s.N, s.C, s.OC);
        CHECK(same_bits(dw, dw_alone));
    }
}

TEST_CASE("dbias of many rows keeps its digits, wide or narrow") {
    Handle mm = open_matmul();
    for (Shape s : {Shape{100003, 1, 3}, Shape{3001, 1, 2050}}) {
        // The mean of 1 makes sums far larger than their parts, where adding one by one would show.
        Vector<real> dout = random_normal<real>(s.N * s.OC, 11, 1, 1), inp = random_normal<real>(s.N, 12);
        Vector<float> dw(s.OC), dbias(s.OC);
        std::vector<double> want(s.OC);
        for (int64_t n = 0; n < s.N; n++)
            for (int64_t o = 0; o < s.OC; o++) want[o] += to_float(dout[n * s.OC + o]);
        matmul_backward_weight(mm.get(), dw.data(), dbias.data(), dout.data(), inp.data(), s.N, 1, s.OC);
        // Sums of eight rows at a time: N/8 additions.
        check_close("dbias", dbias, want, 1.2e-7 * std::sqrt(s.N / 8.0));
    }
}

TEST_CASE("the same call gives the same bits, on a fresh handle too") {
    Handle first = open_matmul(), second = open_matmul();
    Shape s = {517, 200, 1536};
    Vector<real> inp = random_normal<real>(s.N * s.C, 13), w = random_normal<real>(s.OC * s.C, 14);
    Vector<real> bias = random_normal<real>(s.OC, 15), dout = random_normal<real>(s.N * s.OC, 16);
    struct Results {
        Vector<real> out, dinp;
        Vector<float> dw, dbias;
    };
    auto run = [&](Matmul* mm) {
        Results r{poisoned<real>(s.N * s.OC), poisoned<real>(s.N * s.C), Vector<float>(s.OC * s.C, 0.25f),
                  Vector<float>(s.OC, 0.25f)};
        matmul_forward(mm, r.out.data(), nullptr, inp.data(), w.data(), bias.data(), s.N, s.C, s.OC, Gelu::tanh);
        matmul_backward_input(mm, r.dinp.data(), dout.data(), w.data(), nullptr, s.N, s.C, s.OC);
        matmul_backward_weight(mm, r.dw.data(), r.dbias.data(), dout.data(), inp.data(), s.N, s.C, s.OC);
        return r;
    };
    Results a = run(first.get());
    for (int i = 0; i < 6; i++) {
        Results b = run(i % 2 ? first.get() : second.get());
        CHECK(same_bits(a.out, b.out));
        CHECK(same_bits(a.dinp, b.dinp));
        CHECK(same_bits(a.dw, b.dw));
        CHECK(same_bits(a.dbias, b.dbias));
    }
}

TEST_CASE("a change of thread count is noticed") {
    Handle mm = open_matmul();
    int threads = omp_get_max_threads();
    Shape s = {65, 40, 700};
    Vector<real> dout = random_normal<real>(s.N * s.OC, 17), inp = random_normal<real>(s.N * s.C, 18);
    std::vector<double> dout_t = transpose(to_double(dout), s.N, s.OC);
    std::vector<double> want = oracle::linear(dout_t, transpose(to_double(inp), s.N, s.C), {}, s.N);
    std::vector<double> want_bias = oracle::linear(dout_t, std::vector<double>(s.N, 1), {}, s.N);
    for (int n : {1, 3, 2}) {
        omp_set_num_threads(n);
        Vector<float> dw(s.OC * s.C), dbias(s.OC);
        matmul_backward_weight(mm.get(), dw.data(), dbias.data(), dout.data(), inp.data(), s.N, s.C, s.OC);
        check_close("dw", dw, want, tolerance<float>(s.N));
        check_close("dbias", dbias, want_bias, tolerance<float>(s.N));
    }
    omp_set_num_threads(threads);
}

TEST_CASE("no rows: nothing is touched") {
    Handle mm = open_matmul();
    Vector<real> w = random_normal<real>(6, 19), out = poisoned<real>(1);
    Vector<float> dw = {1, 2, 3, 4, 5, 6};
    matmul_forward(mm.get(), out.data(), nullptr, w.data(), w.data(), nullptr, 0, 3, 2);
    matmul_backward_input(mm.get(), out.data(), w.data(), w.data(), nullptr, 0, 3, 2);
    matmul_backward_weight(mm.get(), dw.data(), nullptr, w.data(), w.data(), 0, 3, 2);
    CHECK(std::isnan(to_float(out[0])));
    CHECK(dw == Vector<float>{1, 2, 3, 4, 5, 6});
    CHECK_THROWS(matmul_forward(mm.get(), out.data(), out.data(), w.data(), w.data(), nullptr, 1, 1, 1, Gelu::none));
    CHECK_THROWS(matmul_backward_input(mm.get(), out.data(), w.data(), w.data(), nullptr, 1, 1, 1, Gelu::erf));
}

// An input of more than 2^31 elements that takes no memory: pages never written are all the same page of zeros.
class Sparse {
public:
    explicit Sparse(int64_t n) : bytes_(n * sizeof(real)) {
        void* p = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        REQUIRE(p != MAP_FAILED);
        madvise(p, bytes_, MADV_HUGEPAGE); // fewer page faults, where the machine has huge pages
        data_ = static_cast<real*>(p);
    }
    Sparse(const Sparse&) = delete;
    ~Sparse() { munmap(data_, bytes_); }
    real* data() { return data_; }

private:
    size_t bytes_;
    real* data_;
};

TEST_CASE("past 2^31 elements: the first and the last rows of a sparse input count") {
    Handle mm = open_matmul();
    int64_t width = 4096, N = (int64_t(1) << 31) / width + 3;
    Sparse wide(N * width);
    Vector<real> row = random_normal<real>(width, 20), w = random_normal<real>(width, 21), narrow(N);
    double dot = 0;
    for (int64_t c = 0; c < width; c++) {
        wide.data()[c] = wide.data()[(N - 1) * width + c] = row[c];
        dot += double(to_float(row[c])) * to_float(w[c]);
    }
    auto check_rows = [&](const Vector<real>& got) {
        double bound = tolerance<real>(width) * (std::sqrt(double(width)) + std::abs(dot));
        for (int64_t n : {int64_t(0), N / 2, N - 1})
            CHECK(std::abs(to_float(got[n]) - (n == N / 2 ? 0 : dot)) <= bound);
    };

    narrow = poisoned<real>(N);
    matmul_forward(mm.get(), narrow.data(), nullptr, wide.data(), w.data(), nullptr, N, width, 1);
    check_rows(narrow);

    narrow = poisoned<real>(N);
    matmul_backward_input(mm.get(), narrow.data(), wide.data(), w.data(), nullptr, N, 1, width);
    check_rows(narrow);

    // dw of one input feature that is 1 in the first row and 3 in the last: four times the row; dbias: twice.
    Vector<real> feature(N);
    assign(feature[0], 1), assign(feature[N - 1], 3);
    Vector<float> dw(width, 0.5f), dbias(width, 0.5f);
    matmul_backward_weight(mm.get(), dw.data(), dbias.data(), wide.data(), feature.data(), N, 1, width);
    std::vector<double> want_dw(width), want_dbias(width);
    for (int64_t c = 0; c < width; c++)
        want_dw[c] = 0.5 + 4.0 * to_float(row[c]), want_dbias[c] = 0.5 + 2.0 * to_float(row[c]);
    check_close("dw", dw, want_dw, tolerance<float>(4));
    check_close("dbias", dbias, want_dbias, tolerance<float>(4));
}

// An output of more than 2^31 elements in 128 MiB: every stretch of the address range is the same memory, but for the
// last, which is its own.
class Folded {
public:
    explicit Folded(int64_t n) : bytes_((n * sizeof(real) + kFold - 1) / kFold * kFold) {
        int file = memfd_create("folded", 0);
        REQUIRE(file >= 0);
        REQUIRE(ftruncate(file, 2 * kFold) == 0);
        void* base = mmap(nullptr, bytes_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        REQUIRE(base != MAP_FAILED);
        for (size_t at = 0; at < bytes_; at += kFold) {
            char* to = static_cast<char*>(base) + at;
            off_t from = at + kFold < bytes_ ? 0 : kFold;
            REQUIRE(mmap(to, kFold, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, file, from) == to);
        }
        close(file);
        data_ = static_cast<real*>(base);
    }
    Folded(const Folded&) = delete;
    ~Folded() { munmap(data_, bytes_); }
    real* data() { return data_; }

private:
    static constexpr size_t kFold = 64 << 20;
    size_t bytes_;
    real* data_;
};

TEST_CASE("past 2^31 elements of output, through GELU and back" * doctest::test_suite("long")) {
    Handle mm = open_matmul();
    int64_t width = 4096, N = (int64_t(1) << 31) / width + 3;
    Vector<real> narrow = random_normal<real>(N, 22), w = random_normal<real>(width, 23);
    Folded pre(N * width), out(N * width);
    double x = to_float(narrow[N - 1]);
    int64_t last = (N - 1) * width;

    matmul_forward(mm.get(), out.data(), pre.data(), narrow.data(), w.data(), nullptr, N, 1, width, Gelu::tanh);
    Vector<real> got_pre(pre.data() + last, pre.data() + last + width);
    Vector<real> got_out(out.data() + last, out.data() + last + width);
    std::vector<double> want_pre(width), want_out(width);
    for (int64_t c = 0; c < width; c++)
        want_pre[c] = x * to_float(w[c]), want_out[c] = gelu(to_float(got_pre[c]), Gelu::tanh);
    check_close("pre", got_pre, want_pre, tolerance<real>(1));
    check_close("out", got_out, want_out, tolerance<real>(1));

    matmul_backward_input(mm.get(), out.data(), narrow.data(), w.data(), pre.data(), N, width, 1, Gelu::tanh);
    Vector<real> got_dinp(out.data() + last, out.data() + last + width);
    for (int64_t c = 0; c < width; c++) want_out[c] = want_pre[c] * gelu_slope(to_float(got_pre[c]), Gelu::tanh);
    check_close("dinp", got_dinp, want_out, 2 * tolerance<real>(1));
}
