// Linear layers through oneDNN. Every product is one matmul primitive over plain row-major memory; a transposed operand
// is the same memory with its strides swapped, which oneDNN's blocked kernels take at full speed. (A transposed
// *destination* is another matter: that falls back to oneDNN's reference loops, a thousand times slower.)
#include "matmul.h"

#include <compare>
#include <cstdlib>
#include <map>
#include <memory>
#include <new>
#include <string>
#include <tuple>
#include <unordered_map>
#include <vector>

#include <oneapi/dnnl/dnnl.hpp>
#include <sys/mman.h>

#include "common.h"
#include "math.h"

namespace {

using dnnl::memory;
using Type = memory::data_type;

constexpr Type kReal = sizeof(real) == sizeof(float) ? Type::f32 : Type::bf16;

// One product dst (M,N) = a (M,K) · b (K,N), in oneDNN's letters, and all that decides its code.
struct Product {
    int64_t M, K, N;
    bool a_transposed, b_transposed; // stored (K,M), stored (N,K)
    bool bias;                       // + bias (N)
    bool accumulate;                 // dst += instead of =
    Gelu gelu;                       // applied to what is stored
    Type type;                       // of dst
    int threads;                     // oneDNN cuts the work when it prepares, not when it runs
    // Elements from one row to the next, where that is more than the width.
    int64_t a_row = 0, b_row = 0, dst_row = 0;
    Type input = kReal; // of a, b and bias

    auto operator<=>(const Product&) const = default;
};

struct Prepared {
    dnnl::matmul primitive;
    std::unordered_map<int, memory> arguments;
    size_t scratch;
};

// oneDNN 2 describes an operation apart from its primitive and gives each element-wise step a scale of its own; oneDNN
// 3 does neither. These two functions are all that knows.
template <class Primitive> auto describe(const dnnl::engine& engine, const memory::desc& a, const memory::desc& b,
                                         const memory::desc& bias, const memory::desc& dst,
                                         const dnnl::primitive_attr& attributes) {
    using Description = typename Primitive::primitive_desc;
    if constexpr (requires { typename Primitive::desc; })
        return Description(typename Primitive::desc(a, b, bias, dst), attributes, engine);
    else
        return Description(engine, a, b, bias, dst, attributes);
}

template <class PostOps> void append_eltwise(PostOps& steps, dnnl::algorithm algorithm) {
    if constexpr (requires { steps.append_eltwise(1.f, algorithm, 0.f, 0.f); })
        steps.append_eltwise(1.f, algorithm, 0.f, 0.f);
    else
        steps.append_eltwise(algorithm, 0.f, 0.f);
}

memory::desc matrix(int64_t rows, int64_t columns, Type type, bool transposed, int64_t row = 0) {
    memory::dims strides = transposed ? memory::dims{1, row ? row : rows} : memory::dims{row ? row : columns, 1};
    return memory::desc({rows, columns}, type, strides);
}

// oneDNN makes a primitive's code in memory that it does not look whether it got (2.6 writes to address 0), tens of
// pieces of 256 KiB and more; under a limit on the address space that is a crash. So room for them is asked for first.
void check_room() {
    constexpr size_t kCode = size_t(16) << 20;
    void* room = mmap(nullptr, kCode, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (room == MAP_FAILED) throw std::bad_alloc();
    munmap(room, kCode);
}

Prepared prepare(const dnnl::engine& engine, const Product& p) {
    check_room();
    memory::desc a = matrix(p.M, p.K, p.input, p.a_transposed, p.a_row);
    memory::desc b = matrix(p.K, p.N, p.input, p.b_transposed, p.b_row);
    memory::desc bias = p.bias ? matrix(1, p.N, p.input, false) : memory::desc();
    memory::desc dst = matrix(p.M, p.N, p.type, false, p.dst_row);
    dnnl::post_ops steps;
    if (p.accumulate) steps.append_sum(1.f);
    if (p.gelu == Gelu::tanh) append_eltwise(steps, dnnl::algorithm::eltwise_gelu_tanh);
    if (p.gelu == Gelu::erf) append_eltwise(steps, dnnl::algorithm::eltwise_gelu_erf);
    dnnl::primitive_attr attributes;
    attributes.set_post_ops(steps);
    attributes.set_scratchpad_mode(dnnl::scratchpad_mode::user);
    try {
        auto description = describe<dnnl::matmul>(engine, a, b, bias, dst, attributes);
        memory::desc scratch = description.scratchpad_desc();
        std::unordered_map<int, memory> arguments = {{DNNL_ARG_SRC, memory(a, engine, nullptr)},
                                                     {DNNL_ARG_WEIGHTS, memory(b, engine, nullptr)},
                                                     {DNNL_ARG_DST, memory(dst, engine, nullptr)},
                                                     {DNNL_ARG_SCRATCHPAD, memory(scratch, engine, nullptr)}};
        if (p.bias) arguments.emplace(DNNL_ARG_BIAS, memory(bias, engine, nullptr));
        return {dnnl::matmul(description), std::move(arguments), scratch.get_size()};
    } catch (const dnnl::error& e) {
        throw std::runtime_error("matmul: oneDNN cannot multiply (" + std::to_string(p.M) + "x" + std::to_string(p.K) +
                                 ") by (" + std::to_string(p.K) + "x" + std::to_string(p.N) +
                                 ") on this CPU: " + e.what());
    }
}

// Does oneDNN multiply bf16 here? It needs AVX-512 for that.
bool multiplies_real(const dnnl::engine& engine) {
    const memory::desc square = matrix(64, 64, kReal, false);
    try {
        describe<dnnl::matmul>(engine, square, square, memory::desc(), square, {});
        return true;
    } catch (const dnnl::error&) {
        return false;
    }
}

// Between arrays of real and float copies of them: `rows` of `columns`, `row` apart in the array, dense in the copy.
void widen(float* copy, const real* from, int64_t rows, int64_t columns, int64_t row) {
#pragma omp parallel for
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < columns; c++) copy[r * columns + c] = to_float(from[r * row + c]);
}
void narrow(real* to, const float* copy, int64_t rows, int64_t columns, int64_t row) {
#pragma omp parallel for
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < columns; c++) assign(to[r * row + c], copy[r * columns + c]);
}

// dbias (OC) += Σ_n dout[n,:]. Rows are taken eight at a time, so that a sum costs an eighth of a load and a store, and
// added to a float total a thread (so small sums never meet a large dbias one by one).
constexpr int64_t kRows = 8;

// total (columns) += Σ rows of dout, dout's rows OC apart.
void add_rows(float* total, const real* dout, int64_t rows, int64_t columns, int64_t OC) {
    for (int64_t n = 0; n < rows; n += kRows) {
        int64_t left = std::min(kRows, rows - n);
        const real* row = dout + n * OC;
        int64_t c = 0;
        if (left == kRows)
            for (; c + kLanes <= columns; c += kLanes) {
                Vec low = (load(row + c) + load(row + c + OC)) + (load(row + c + 2 * OC) + load(row + c + 3 * OC));
                Vec high = (load(row + c + 4 * OC) + load(row + c + 5 * OC)) +
                           (load(row + c + 6 * OC) + load(row + c + 7 * OC));
                store(total + c, load(total + c) + (low + high));
            }
        for (; c < columns; c++) {
            float s = 0;
            for (int64_t i = 0; i < left; i++) s += to_float(row[i * OC + c]);
            total[c] += s;
        }
    }
}

} // namespace

struct Matmul {
    dnnl::engine engine{dnnl::engine::kind::cpu, 0};
    dnnl::stream stream{engine};
    const bool widens = !multiplies_real(engine); // bf16 is multiplied as floats, in widened copies
    std::map<Product, Prepared> cache;
    std::vector<float> copies; // of a, b, bias and dst
    std::unique_ptr<char, decltype(&std::free)> scratch{nullptr, std::free};
    size_t scratch_bytes = 0;

    // bytes of work space, aligned to a cache line; what it held is lost.
    void* work_space(size_t bytes) {
        if (bytes > scratch_bytes) {
            scratch_bytes = (bytes + 63) / 64 * 64;
            scratch.reset(); // before the new one, so that both never exist together
            scratch.reset(static_cast<char*>(std::aligned_alloc(64, scratch_bytes)));
            if (!scratch) throw std::bad_alloc();
        }
        return scratch.get();
    }

    void run(void* dst, const real* a, const real* b, const real* bias, const Product& p) {
        if (widens)
            run_widened(dst, a, b, bias, p);
        else
            execute(dst, a, b, bias, p);
    }

    void execute(void* dst, const void* a, const void* b, const void* bias, const Product& p) {
        auto found = cache.find(p);
        if (found == cache.end()) {
            // A training step has a few dozen shapes; only prompts of ever new lengths could fill memory with code.
            constexpr size_t kMostShapes = 512;
            if (cache.size() >= kMostShapes) cache.clear();
            found = cache.emplace(p, prepare(engine, p)).first;
        }
        Prepared& prepared = found->second;
        auto point = [&](int argument, const void* data) {
            prepared.arguments.at(argument).set_data_handle(const_cast<void*>(data));
        };
        point(DNNL_ARG_SRC, a), point(DNNL_ARG_WEIGHTS, b), point(DNNL_ARG_DST, dst);
        point(DNNL_ARG_SCRATCHPAD, work_space(prepared.scratch));
        if (p.bias) point(DNNL_ARG_BIAS, bias);
        try {
            prepared.primitive.execute(stream, prepared.arguments);
            stream.wait();
        } catch (const dnnl::error& e) {
            if (e.status == dnnl_out_of_memory) throw std::bad_alloc();
            throw;
        }
    }

    // The product in tiles of dst, so that all copies together stay at some 48 MiB where K allows it. Sums are whole,
    // in float, and rounded once, as oneDNN's are.
    void run_widened(void* dst, const real* a, const real* b, const real* bias, const Product& p) {
        constexpr int64_t kCopy = int64_t(1) << 22, kLeast = 64, kMost = 2048;
        const int64_t most = std::clamp(kCopy / p.K, kLeast, kMost);
        const bool to_real = p.type == kReal;
        auto row_or = [](int64_t row, int64_t width) { return row ? row : width; };
        const int64_t a_row = row_or(p.a_row, p.a_transposed ? p.M : p.K),
                      b_row = row_or(p.b_row, p.b_transposed ? p.K : p.N), dst_row = row_or(p.dst_row, p.N);
        for (int64_t n = 0; n < p.N; n += most)
            for (int64_t m = 0; m < p.M; m += most) {
                Product tile = p;
                tile.M = std::min(most, p.M - m), tile.N = std::min(most, p.N - n);
                tile.a_row = tile.b_row = 0;
                tile.dst_row = to_real ? 0 : dst_row;
                tile.type = tile.input = Type::f32;
                copies.resize(size_t((tile.M + tile.N) * p.K + tile.N + (to_real ? tile.M * tile.N : 0)));
                float *wide_a = copies.data(), *wide_b = wide_a + tile.M * p.K, *wide_bias = wide_b + p.K * tile.N,
                      *sums = wide_bias + tile.N;
                if (p.a_transposed)
                    widen(wide_a, a + m, p.K, tile.M, a_row);
                else
                    widen(wide_a, a + m * a_row, tile.M, p.K, a_row);
                if (p.b_transposed)
                    widen(wide_b, b + n * b_row, tile.N, p.K, b_row);
                else
                    widen(wide_b, b + n, p.K, tile.N, b_row);
                if (bias) widen(wide_bias, bias + n, 1, tile.N, tile.N);
                const int64_t first = m * dst_row + n;
                real* rounded = static_cast<real*>(dst) + first;
                if (to_real && p.accumulate) widen(sums, rounded, tile.M, tile.N, dst_row);
                execute(to_real ? sums : static_cast<float*>(dst) + first, wide_a, wide_b, wide_bias, tile);
                if (to_real) narrow(rounded, sums, tile.M, tile.N, dst_row);
            }
    }
};

// The product of the backward passes, whose b is (K,N) row-major. For floats oneDNN's first choice (brgemm) runs at
// half its rate where N is 3072, and at nine tenths for other widths; halves of the columns, which are no dense
// matrices, go to its second one (gemm:jit), which runs at full rate on all of them. Measured with oneDNN 2.6 at 2048
// rows, AVX-512.
template <class T> static void run_by_columns(Matmul* mm, T* dst, const real* a, const real* b, const Product& whole) {
    constexpr int64_t kWide = 1024;
    const int64_t parts = kReal == Type::f32 && whole.N >= kWide ? 2 : 1;
    for (int64_t part = 0; part < parts; part++) {
        Range r = split_range(whole.N, parts, part, 64);
        Product p = whole;
        p.N = r.end - r.begin;
        if (parts > 1) p.b_row = p.dst_row = whole.N;
        mm->run(dst + r.begin, a, b + r.begin, nullptr, p);
    }
}

Matmul* matmul_open(Stream) { return new Matmul; }
void matmul_close(Matmul* mm) { delete mm; }

// inp · wᵀ
static Product forward_product(const real* bias, int64_t N, int64_t C, int64_t OC, Gelu gelu, bool accumulate) {
    require(N >= 0 && C > 0 && OC > 0, "matmul_forward: a negative N, or C or OC below 1");
    return {.M = N,
            .K = C,
            .N = OC,
            .a_transposed = false,
            .b_transposed = true,
            .bias = bias != nullptr,
            .accumulate = accumulate,
            .gelu = gelu,
            .type = kReal,
            .threads = omp_get_max_threads()};
}

void matmul_forward(Matmul* mm, real* out, real* pre, const real* inp, const real* w, const real* bias, int64_t N,
                    int64_t C, int64_t OC, Gelu kind) {
    require(!pre || kind != Gelu::none, "matmul_forward: without a GELU there is no pre-activation apart from out");
    const Product p = forward_product(bias, N, C, OC, pre ? Gelu::none : kind, false);
    if (N == 0) return;
    mm->run(pre ? pre : out, inp, w, bias, p);
    if (pre) gelu_forward(nullptr, out, pre, N * OC, kind);
}

void matmul_forward_add(Matmul* mm, real* out, const real* inp, const real* w, const real* bias, int64_t N, int64_t C,
                        int64_t OC) {
    const Product p = forward_product(bias, N, C, OC, Gelu::none, true);
    if (N > 0) mm->run(out, inp, w, bias, p);
}

// dinp `=` or, with add, `+=` dout · w.
static void backward_input(Matmul* mm, real* dinp, const real* dout, const real* w, int64_t N, int64_t C, int64_t OC,
                           bool add) {
    // Over the 50304 logits oneDNN's float kernel loses a fifth of its speed to a sum that long (it keeps all of w in
    // flight); summed in runs that fit the cache it does not. bf16 shows no such loss, and could not hold the partial
    // sums in dinp anyway.
    constexpr int64_t kLongestSum = 4096;
    int64_t parts = kReal == Type::f32 ? (OC + kLongestSum - 1) / kLongestSum : 1;
    for (int64_t part = 0; part < parts; part++) {
        Range r = split_range(OC, parts, part, 64);
        if (r.begin == r.end) continue;
        Product p{.M = N,
                  .K = r.end - r.begin,
                  .N = C,
                  .a_transposed = false,
                  .b_transposed = false,
                  .bias = false,
                  .accumulate = add || part > 0,
                  .gelu = Gelu::none,
                  .type = kReal,
                  .threads = omp_get_max_threads(),
                  .a_row = OC};
        run_by_columns(mm, dinp, dout + r.begin, w + r.begin * C, p);
    }
}

void matmul_backward_input(Matmul* mm, real* dinp, const real* dout, const real* w, const real* pre, int64_t N,
                           int64_t C, int64_t OC, Gelu kind) {
    require(N >= 0 && C > 0 && OC > 0, "matmul_backward_input: a negative N, or C or OC below 1");
    require((pre != nullptr) == (kind != Gelu::none), "matmul_backward_input: a GELU needs pre, and only a GELU does");
    if (N == 0) return;
    backward_input(mm, dinp, dout, w, N, C, OC, false);
    if (kind != Gelu::none) gelu_backward(nullptr, dinp, dinp, pre, N * C, kind);
}

void matmul_backward_input_add(Matmul* mm, real* dinp, const real* dout, const real* w, int64_t N, int64_t C,
                               int64_t OC) {
    require(N >= 0 && C > 0 && OC > 0, "matmul_backward_input_add: a negative N, or C or OC below 1");
    if (N > 0) backward_input(mm, dinp, dout, w, N, C, OC, true);
}

void matmul_backward_weight(Matmul* mm, float* dw, float* dbias, const real* dout, const real* inp, int64_t N,
                            int64_t C, int64_t OC) {
    require(N >= 0 && C > 0 && OC > 0, "matmul_backward_weight: a negative N, or C or OC below 1");
    if (N == 0) return;
    Product p{.M = OC,
              .K = N,
              .N = C,
              .a_transposed = true,
              .b_transposed = false,
              .bias = false,
              .accumulate = true,
              .gelu = Gelu::none,
              .type = Type::f32,
              .threads = omp_get_max_threads()};
    if (dw) run_by_columns(mm, dw, dout, inp, p);
    if (!dbias) return;

    // Wide rows are cut into columns, a run for each thread: nobody's sums meet. Narrow ones are cut into rows, and the
    // threads' totals are added in order.
    int threads = p.threads;
    bool by_columns = OC >= 256 * int64_t(threads);
    float* totals = static_cast<float*>(mm->work_space(size_t(OC) * (by_columns ? 1 : threads) * sizeof(float)));
    memset(totals, 0, size_t(OC) * (by_columns ? 1 : threads) * sizeof(float));
    parallel_ranges(by_columns ? OC : N, by_columns ? 64 : kRows, [&](int64_t begin, int64_t end, int thread) {
        if (by_columns)
            add_rows(totals + begin, dout + begin, N, end - begin, OC);
        else
            add_rows(totals + thread * OC, dout + begin * OC, end - begin, OC, OC);
    });
    for (int thread = 0; thread < (by_columns ? 1 : threads); thread++)
        for (int64_t c = 0; c < OC; c++) dbias[c] += totals[thread * OC + c];
}
