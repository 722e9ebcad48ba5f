// dev/simt's models of PTX instructions against the tables of the PTX ISA ("Matrix Fragments for mma.m16n8k16",
// "ldmatrix", "cp.async"), written out here once more from the tables' own formulas.
#include <doctest/doctest.h>

#include <cmath>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "../dev/simt/simt.h"
#include "../kernels/device.h"
#include "../kernels/launch.h"
#include "../kernels/ptx.h"
#include "simt_buffer.h"

using simt::FaultKind;

namespace {

FaultKind fault_of(const std::function<void()>& run) {
    try {
        run();
    } catch (const simt::Fault& fault) {
        return fault.kind;
    }
    FAIL("ran without a report");
    return FaultKind::invalid;
}

float small_integer(std::mt19937& rng) { return static_cast<float>(static_cast<int>(rng() % 17) - 8); }

} // namespace

// ---- mma ----
// a (16,16), b (16,8), c (16,8) row-major, taken apart by the ISA's formulas: for a_i, row is groupID for i in 0, 1, 4,
// 5 and groupID + 8 otherwise, column is threadID_in_group·2 + (i & 1), + 8 from i = 4 on; for b_i, row is
// threadID_in_group·2 + (i & 1), + 8 from i = 2 on, column is groupID.
__global__ void multiply(float* d, const float* a, const float* b, const float* c) {
    int group = lane_index() >> 2, within = lane_index() % 4;
    float av[8], bv[4], cv[4];
    for (int i = 0; i < 8; i++) {
        int row = i == 0 || i == 1 || i == 4 || i == 5 ? group : group + 8;
        int column = within * 2 + (i & 1) + (i >= 4 ? 8 : 0);
        av[i] = a[row * 16 + column];
    }
    for (int i = 0; i < 4; i++) bv[i] = b[(within * 2 + (i & 1) + (i >= 2 ? 8 : 0)) * 8 + group];
    for (int i = 0; i < 4; i++) cv[i] = c[(i < 2 ? group : group + 8) * 8 + within * 2 + (i & 1)];
    uint32_t ar[4], br[2];
    for (int i = 0; i < 4; i++) ar[i] = pack_bf16(av[2 * i], av[2 * i + 1]);
    for (int i = 0; i < 2; i++) br[i] = pack_bf16(bv[2 * i], bv[2 * i + 1]);
    mma_m16n8k16(cv, ar, br[0], br[1]);
    for (int i = 0; i < 4; i++) d[(i < 2 ? group : group + 8) * 8 + within * 2 + (i & 1)] = cv[i];
}

TEST_CASE("mma.m16n8k16 multiplies fragments laid out as the ISA says") {
    std::mt19937 rng(5);
    std::vector<float> a(256), b(128), c(128);
    for (auto* v : {&a, &b, &c})
        for (float& x : *v) x = small_integer(rng);
    Buffer<float> da(a), db(b), dc(c), dd(std::vector<float>(128, NAN));
    launch(multiply, 1, 32, 0, nullptr, dd.data, da.data, db.data, dc.data);
    std::vector<float> got = dd.host();
    for (int row = 0; row < 16; row++)
        for (int column = 0; column < 8; column++) {
            float want = c[row * 8 + column];
            for (int k = 0; k < 16; k++) want += a[row * 16 + k] * b[k * 8 + column];
            CHECK(got[row * 8 + column] == want);
        }
}

// ---- ldmatrix ----
// tiles × 8 rows of 8 values, rows apart by a padded stride; out: (lane, register).
template <int Tiles, bool Transposed> __global__ void load_tiles(uint32_t* out, const bf16* in) {
    bf16* rows = reinterpret_cast<bf16*>(dynamic_shared());
    const int stride = 24;
    for (int i = lane_index(); i < Tiles * 64; i += 32) store_shared(rows + i / 8 * stride + i % 8, in[i]);
    __syncwarp();
    uint32_t r[Tiles], address = shared_address(rows + lane_index() % (Tiles * 8) * stride);
    if constexpr (Tiles == 1 && !Transposed) ldmatrix_x1(r, address);
    if constexpr (Tiles == 2 && !Transposed) ldmatrix_x2(r, address);
    if constexpr (Tiles == 4 && !Transposed) ldmatrix_x4(r, address);
    if constexpr (Tiles == 1 && Transposed) ldmatrix_x1_trans(r, address);
    if constexpr (Tiles == 2 && Transposed) ldmatrix_x2_trans(r, address);
    if constexpr (Tiles == 4 && Transposed) ldmatrix_x4_trans(r, address);
    for (int i = 0; i < Tiles; i++) out[lane_index() * Tiles + i] = r[i];
}

template <int Tiles, bool Transposed> void check_ldmatrix() {
    std::vector<bf16> in(Tiles * 64);
    for (size_t i = 0; i < in.size(); i++) in[i].bits = static_cast<uint16_t>(1000 + i);
    Buffer<bf16> din(in);
    Buffer<uint32_t> out(std::vector<uint32_t>(32 * Tiles));
    launch(load_tiles<Tiles, Transposed>, 1, 32, Tiles * 8 * 48, nullptr, out.data, din.data);
    std::vector<uint32_t> got = out.host();
    for (int lane = 0; lane < 32; lane++)
        for (int tile = 0; tile < Tiles; tile++)
            for (int half = 0; half < 2; half++) {
                int row = lane / 4, column = lane % 4 * 2 + half;
                if (Transposed) std::swap(row, column);
                uint32_t want = 1000u + tile * 64 + row * 8 + column;
                CHECK((got[lane * Tiles + tile] >> (16 * half) & 0xffff) == want);
            }
}

TEST_CASE("ldmatrix hands out rows, or columns with .trans") {
    check_ldmatrix<1, false>();
    check_ldmatrix<2, false>();
    check_ldmatrix<4, false>();
    check_ldmatrix<1, true>();
    check_ldmatrix<2, true>();
    check_ldmatrix<4, true>();
}

__global__ void ldmatrix_at(uint32_t* out, int offset, int written) {
    char* tile = dynamic_shared();
    for (int i = lane_index(); i < written; i += 32) tile[i] = 0;
    __syncwarp();
    uint32_t r[1];
    ldmatrix_x1(r, shared_address(tile + lane_index() % 8 * 16 + offset));
    out[lane_index()] = r[0];
}
TEST_CASE("ldmatrix is checked like any other read") {
    Buffer<uint32_t> out(std::vector<uint32_t>(32));
    CHECK_NOTHROW(launch(ldmatrix_at, 1, 32, 128, nullptr, out.data, 0, 128));
    CHECK(fault_of([&] { launch(ldmatrix_at, 1, 32, 128, nullptr, out.data, 0, 127); }) == FaultKind::unwritten_read);
    CHECK(fault_of([&] { launch(ldmatrix_at, 1, 32, 256, nullptr, out.data, 8, 256); }) == FaultKind::misaligned);
    CHECK(fault_of([&] { launch(ldmatrix_at, 1, 32, 128, nullptr, out.data, 16, 128); }) == FaultKind::out_of_bounds);
}

// A product as attention makes it: everything through ldmatrix. a (16,16) row-major; b by columns ("keys"), or by rows
// ("values") through .trans.
__global__ void multiply_from_shared(float* d, const bf16* a, const bf16* b_columns, const bf16* b_rows) {
    bf16* as = reinterpret_cast<bf16*>(dynamic_shared());
    bf16 *bc = as + 256, *br = bc + 128;
    int lane = lane_index(), group = lane / 4, pair = lane % 4;
    for (int i = lane; i < 256; i += 32) as[i] = a[i];
    for (int i = lane; i < 128; i += 32) bc[i] = b_columns[i], br[i] = b_rows[i];
    __syncwarp();
    uint32_t ar[4], keys[2], values[2];
    ldmatrix_x4(ar, shared_address(as + (lane % 16) * 16 + lane / 16 * 8));
    ldmatrix_x2(keys, shared_address(bc + lane % 8 * 16 + lane / 8 % 2 * 8));
    ldmatrix_x2_trans(values, shared_address(br + lane % 16 * 8));
    float c[4] = {};
    mma_m16n8k16(c, ar, keys[0], keys[1]);
    mma_m16n8k16(c, ar, values[0], values[1]);
    for (int i = 0; i < 4; i++) d[(group + i / 2 * 8) * 8 + 2 * pair + i % 2] = c[i];
}
TEST_CASE("ldmatrix and mma fit each other") {
    std::mt19937 rng(6);
    std::vector<float> a(256), b(128);
    std::vector<bf16> ab(256), columns(128), rows(128);
    for (int i = 0; i < 256; i++) assign(ab[i], a[i] = small_integer(rng));
    for (int i = 0; i < 128; i++) {
        assign(rows[i], b[i] = small_integer(rng));
        columns[i % 8 * 16 + i / 8] = rows[i];
    }
    Buffer<bf16> da(ab), dc(columns), dr(rows);
    Buffer<float> dd(std::vector<float>(128, NAN));
    launch(multiply_from_shared, 1, 32, 1024, nullptr, dd.data, da.data, dc.data, dr.data);
    std::vector<float> got = dd.host();
    for (int row = 0; row < 16; row++)
        for (int column = 0; column < 8; column++) {
            float want = 0;
            for (int k = 0; k < 16; k++) want += 2 * a[row * 16 + k] * b[k * 8 + column];
            CHECK(got[row * 8 + column] == want);
        }
}

// ---- cp.async ----
// Two buffers, refilled in turns: the shape of every pipelined loop. The number left, `first_barrier` and
// `second_barrier` are what it may forget.
template <int Left>
__global__ void pipeline(float* out, const float* in, int rounds, bool first_barrier, bool second_barrier) {
    float* buffers = reinterpret_cast<float*>(dynamic_shared());
    int i = static_cast<int>(threadIdx.x), n = static_cast<int>(blockDim.x);
    auto fetch = [&](int round) {
        if (round < rounds) cp_async(shared_address(buffers + (round % 2 * n + i) * 4), in + (round * n + i) * 4);
        cp_async_commit();
    };
    fetch(0);
    for (int round = 0; round < rounds; round++) {
        fetch(round + 1);
        cp_async_wait<Left>();
        if (first_barrier) __syncthreads();
        Pack128<float> got = load128_shared(buffers + (round % 2 * n + n - 1 - i) * 4);
        store128(out + (round * n + n - 1 - i) * 4, got);
        if (second_barrier) __syncthreads();
    }
}
TEST_CASE("a double-buffered copy is whole, and each forgotten wait is told") {
    simt::SettingsGuard guard;
    std::vector<float> in(5 * 64 * 4);
    for (size_t i = 0; i < in.size(); i++) in[i] = static_cast<float>(i);
    Buffer<float> din(in);
    for (uint64_t seed = 1; seed <= 5; seed++) {
        simt::settings().seed = seed;
        Buffer<float> out(std::vector<float>(in.size(), NAN));
        launch(pipeline<1>, 1, 64, 2048, nullptr, out.data, din.data, 5, true, true);
        CHECK(out.host() == in);
        launch(pipeline<0>, 1, 64, 2048, nullptr, out.data, din.data, 5, true, true);
        CHECK(out.host() == in);
        CHECK(fault_of([&] { launch(pipeline<2>, 1, 64, 2048, nullptr, out.data, din.data, 5, true, true); }) ==
              FaultKind::unwritten_read);
        CHECK_THROWS_AS(launch(pipeline<1>, 1, 64, 2048, nullptr, out.data, din.data, 5, false, true), simt::Fault);
        // The refill meets a read of before, or the slow reader meets the refill, as the order happens to be.
        FaultKind kind =
            fault_of([&] { launch(pipeline<1>, 1, 64, 2048, nullptr, out.data, din.data, 5, true, false); });
        CHECK((kind == FaultKind::race || kind == FaultKind::unwritten_read));
    }
}

__global__ void copy_sizes(float* out, const float* in, bool valid) {
    float* cells = reinterpret_cast<float*>(dynamic_shared());
    cp_async<4>(shared_address(cells), in);
    cp_async<8>(shared_address(cells + 2), in + 2);
    cp_async_or_zero<16>(shared_address(cells + 4), in + 4, valid);
    cp_async_or_zero<4>(shared_address(cells + 1), in + 1, valid);
    cp_async_commit();
    cp_async_wait<0>();
    for (int i = 0; i < 8; i++) out[i] = cells[i];
}
__global__ void copy_from(const float* in, int offset, int shared_offset, bool uncommitted, float* out) {
    float* cells = reinterpret_cast<float*>(dynamic_shared());
    cp_async(shared_address(cells + shared_offset), in + offset);
    if (!uncommitted) cp_async_commit();
    cp_async_wait<0>();
    out[0] = cells[shared_offset];
}
TEST_CASE("cp.async of every size, with zeros for what is past the end") {
    std::vector<float> in = {1, 2, 3, 4, 5, 6, 7, 8};
    Buffer<float> din(in), out(std::vector<float>(8, NAN)), four(std::vector<float>{1, 2, 3, 4});
    launch(copy_sizes, 1, 1, 32, nullptr, out.data, din.data, true);
    CHECK(out.host() == in);
    launch(copy_sizes, 1, 1, 32, nullptr, out.data, din.data, false);
    CHECK(out.host() == std::vector<float>{1, 0, 3, 4, 0, 0, 0, 0});
    // What is not valid is not touched.
    CHECK_NOTHROW(launch(copy_sizes, 1, 1, 32, nullptr, out.data, four.data, false));
    CHECK(fault_of([&] { launch(copy_sizes, 1, 1, 32, nullptr, out.data, four.data, true); }) ==
          FaultKind::out_of_bounds);
    CHECK_NOTHROW(launch(copy_from, 1, 1, 32, nullptr, din.data, 4, 4, false, out.data));
    CHECK(fault_of([&] { launch(copy_from, 1, 1, 32, nullptr, din.data, 4, 8, false, out.data); }) ==
          FaultKind::out_of_bounds);
    CHECK(fault_of([&] { launch(copy_from, 1, 1, 32, nullptr, din.data, 2, 0, false, out.data); }) ==
          FaultKind::misaligned);
    CHECK(fault_of([&] { launch(copy_from, 1, 1, 32, nullptr, din.data, 0, 2, false, out.data); }) ==
          FaultKind::misaligned);
    CHECK(fault_of([&] { launch(copy_from, 1, 1, 32, nullptr, din.data, 0, 0, true, out.data); }) ==
          FaultKind::unwritten_read);
}

// ---- Arithmetic ----
__global__ void approximate(float* out, const float* in, int n) {
    for (int i = 0; i < n; i++) {
        out[3 * i] = exp2_approx(in[i]);
        out[3 * i + 1] = log2_approx(in[i]);
        out[3 * i + 2] = tanh_approx(in[i]);
    }
}
TEST_CASE("approximations are as good as the ISA promises, and no better") {
    std::vector<float> in = {-INFINITY, -200, -20.3f, -1, -0.01f, 0, 0.3f, 1, 2.5f, 100.7f, 200, INFINITY, NAN};
    Buffer<float> din(in), out(std::vector<float>(in.size() * 3));
    launch(approximate, 1, 1, 0, nullptr, out.data, din.data, static_cast<int>(in.size()));
    std::vector<float> got = out.host();
    auto near = [](float x, double want, double relative) {
        if (std::isnan(want) || std::isinf(want)) return std::isnan(want) ? std::isnan(x) : x == want;
        return std::abs(x - want) <= relative * std::abs(want) * 1.01;
    };
    bool exact = true;
    for (size_t i = 0; i < in.size(); i++) {
        double x = in[i], power = std::exp2(x);
        if (power < 0x1p-126) power = 0;
        if (power > 3.4028235e38) power = INFINITY;
        CHECK(near(got[3 * i], power, 0x1p-22 + 0x1p-24));
        CHECK(near(got[3 * i + 1], std::log2(x), 0x1p-22 + 0x1p-24));
        CHECK(near(got[3 * i + 2], std::tanh(x), 0x1p-11));
        exact &= !std::isfinite(x) || got[3 * i + 2] == std::tanh(in[i]);
    }
    CHECK(!exact);
    CHECK(got[5 * 3] == 1);
}

__global__ void add_four(float* out) {
    reduce_add(out, make_float4(1, 2, 3, 4));
    reduce_add(out + 4, 5.0f);
}
TEST_CASE("reductions into memory from every thread and block") {
    Buffer<float> out(std::vector<float>(5));
    launch(add_four, 10, 64, 0, nullptr, out.data);
    CHECK(out.host() == std::vector<float>{640, 1280, 1920, 2560, 3200});
    CHECK(fault_of([&] { launch(add_four, 1, 1, 0, nullptr, out.data + 1); }) == FaultKind::misaligned);
}
