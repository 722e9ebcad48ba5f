// What dev/simt counts, on kernels whose traffic is known by construction.
#include <doctest/doctest.h>

#include <algorithm>
#include <string>

#include "../dev/simt/simt.h"
#include "../kernels/device.h"
#include "../kernels/launch.h"
#include "../kernels/ptx.h"

using simt::Traffic;

namespace {

// Device memory of n elements, zeroed, its first at a multiple of 256 bytes.
template <class T> struct Buffer {
    T* data = nullptr;

    explicit Buffer(size_t n) {
        check_cuda(cudaMalloc(&data, n * sizeof(T)), "allocating");
        check_cuda(cudaMemset(data, 0, n * sizeof(T)), "clearing");
    }
    ~Buffer() { cudaFree(data); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
};

// The traffic of `run`, the same from every order of threads.
template <class Run> Traffic counted(Run run) {
    simt::SettingsGuard guard;
    simt::settings().count = true;
    std::string table;
    for (uint64_t seed : {1, 2, 3}) {
        simt::settings().seed = seed;
        simt::reset_traffic();
        run();
        if (seed > 1) CHECK(simt::traffic_table() == table);
        table = simt::traffic_table();
    }
    return simt::traffic_of("");
}

} // namespace

// ---- Global memory ----
__global__ void copy_wide(float* to, const float* from) {
    store128(to + global_thread() * 4, load128(from + global_thread() * 4));
}
TEST_CASE("coalesced: no more sectors than bytes need, streaming or not") {
    Buffer<float> from(4096), to(4096);
    Traffic t = counted([&] { launch(copy_wide, 4, 256, 0, nullptr, to.data, from.data); });
    CHECK(t.launches == 1);
    CHECK(t.blocks == 4);
    for (const auto& side : {t.read, t.written}) {
        CHECK(side.instructions == 4 * 8);
        CHECK(side.bytes == 4 * 256 * 16);
        CHECK(side.sectors == side.bytes / 32);
        CHECK(side.unique == side.sectors);
    }
    CHECK(t.atomic.instructions == 0);
    CHECK(t.shared().instructions == 0);
    CHECK(t.plain_global == 0);
}

__global__ void copy_strided(float* to, const float* from, int stride, int shift) {
    int i = static_cast<int>(threadIdx.x);
    store_global(to + i, load_global(from + i * stride + shift));
}
TEST_CASE("strides and shifts cost the sectors that they touch") {
    Buffer<float> from(32 * 16), to(32);
    auto sectors = [&](int stride, int shift) {
        Traffic t = counted([&] { launch(copy_strided, 1, 32, 0, nullptr, to.data, from.data, stride, shift); });
        CHECK(t.read.bytes == 128);
        CHECK(t.read.instructions == 1);
        CHECK(t.written.sectors == 4);
        return t.read.sectors;
    };
    CHECK(sectors(1, 0) == 4);
    CHECK(sectors(2, 0) == 8);
    CHECK(sectors(8, 0) == 32);
    CHECK(sectors(16, 0) == 32);
    CHECK(sectors(1, 3) == 5); // 128 bytes that begin in the middle of a sector
    CHECK(sectors(0, 5) == 1); // all lanes at one element
}

// Rows of `columns` bf16, two bytes a lane, as ragged layers walk them.
__global__ void sum_rows(float* sums, const bf16* rows, int columns) {
    const bf16* row = rows + blockIdx.x * columns;
    float sum = 0;
    for (int c = lane_index(); c < columns; c += kWarpSize) sum += to_float(load_global(row + c));
    sum = warp_sum(sum);
    if (lane_index() == 0) store_global(sums + blockIdx.x, sum);
}
TEST_CASE("rows that do not begin at a sector: each iteration of a loop is an instruction of its own") {
    const int rows = 8, columns = 83;
    Buffer<bf16> in(rows * columns);
    Buffer<float> sums(rows);
    Traffic t = counted([&] { launch(sum_rows, rows, 32, 0, nullptr, sums.data, in.data, columns); });
    CHECK(t.read.instructions == rows * 3);
    CHECK(t.read.bytes == rows * columns * 2);
    uint64_t want = 0;
    for (int row = 0; row < rows; row++)
        for (int c = 0; c < columns; c += 32) {
            int begin = (row * columns + c) * 2, end = (row * columns + std::min(c + 32, columns)) * 2;
            want += (end - 1) / 32 - begin / 32 + 1;
        }
    CHECK(t.read.sectors == want);
    CHECK(t.read.unique == (rows * columns * 2 + 31) / 32);
    CHECK(t.written.instructions == rows);
    CHECK(t.written.bytes == rows * 4);
    CHECK(t.written.sectors == rows);
    CHECK(t.written.unique == 1);
    CHECK(t.shuffles == rows * 5);
}

__global__ void read_twice(float* out, const float* in) {
    float once = load_global(in + threadIdx.x);
    store_global(out + threadIdx.x, once + load_global(in + threadIdx.x));
}
TEST_CASE("what a launch reads again is unique once, in every launch") {
    Buffer<float> in(64), out(64);
    Traffic t = counted([&] {
        for (int i = 0; i < 3; i++) launch(read_twice, 2, 64, 0, nullptr, out.data, in.data);
    });
    CHECK(t.launches == 3);
    CHECK(t.read.sectors == 3 * 2 * 2 * 8);
    CHECK(t.read.unique == 3 * 8);
    CHECK(t.written.sectors == 3 * 2 * 8);
    CHECK(t.written.unique == 3 * 8);
}

TEST_CASE("the sum over several threads of the machine is that of one") {
    simt::SettingsGuard guard;
    Buffer<float> from(16384), to(16384);
    for (int threads : {1, 4}) {
        simt::settings().threads = threads;
        Traffic t = counted([&] { launch(copy_wide, 64, 64, 0, nullptr, to.data, from.data); });
        CHECK(t.blocks == 64);
        CHECK(t.read.sectors == 64 * 32);
        CHECK(t.read.unique == 64 * 32);
        CHECK(t.written.unique == 64 * 32);
    }
}

// ---- Instructions put together from lanes ----
__global__ void diverge(float* out, const float* in, int bound) {
    int lane = lane_index();
    if (lane >= bound) return;
    if (lane % 2 == 0)
        store_global(out + lane, load_global(in + lane));
    else
        store_global(out + 64 + lane, load_global(in + 64 + lane) + 1);
}
TEST_CASE("divergent lanes make an instruction on each side") {
    Buffer<float> in(128), out(128);
    Traffic t = counted([&] { launch(diverge, 1, 32, 0, nullptr, out.data, in.data, 32); });
    CHECK(t.read.instructions == 2);
    CHECK(t.read.bytes == 128);
    CHECK(t.read.sectors == 8);
    t = counted([&] { launch(diverge, 1, 32, 0, nullptr, out.data, in.data, 8); });
    CHECK(t.read.instructions == 2);
    CHECK(t.read.bytes == 32);
    CHECK(t.read.sectors == 2);
}

// Lane l goes round l % 4 + 1 times.
__global__ void uneven(float* out, const float* in) {
    int lane = lane_index();
    float sum = 0;
    for (int i = 0; i <= lane % 4; i++) sum += load_global(in + i * 32 + lane);
    store_global(out + lane, sum);
}
TEST_CASE("a loop that lanes leave one by one") {
    Buffer<float> in(128), out(32);
    Traffic t = counted([&] { launch(uneven, 1, 32, 0, nullptr, out.data, in.data); });
    CHECK(t.read.instructions == 4);
    CHECK(t.read.bytes == (32 + 24 + 16 + 8) * 4);
    CHECK(t.read.sectors == 16); // every sector of 8 floats has a lane of each kind
}

// Each round another lane reads: 32 instructions, that must not be taken for one because each lane came here once.
template <bool Block> __global__ void in_turns(float* out, const float* in) {
    float x = 0;
    for (int turn = 0; turn < 32; turn++) {
        if (lane_index() == turn) x = load_global(in + turn);
        if constexpr (Block)
            __syncthreads();
        else
            __syncwarp();
    }
    store_global(out + lane_index(), x);
}
TEST_CASE("lanes that come to one place at different times are apart when the warp met in between") {
    Buffer<float> in(32), out(32);
    for (bool block : {false, true}) {
        auto kernel = block ? in_turns<true> : in_turns<false>;
        Traffic t = counted([&] { launch(kernel, 1, 32, 0, nullptr, out.data, in.data); });
        CHECK(t.read.instructions == 32);
        CHECK(t.read.sectors == 32);
        CHECK(t.read.unique == 4);
        CHECK(t.warp_syncs == (block ? 0 : 32));
        CHECK(t.barriers == (block ? 32 : 0));
    }
}

// ---- Shared memory ----
__global__ void read_words(float* out, int stride, int groups) {
    float* words = reinterpret_cast<float*>(dynamic_shared());
    for (int i = lane_index(); i < 1024; i += kWarpSize) store_shared(words + i, 0.f);
    __syncwarp();
    out[lane_index()] = load_shared(words + lane_index() / groups * stride);
}
TEST_CASE("4-byte accesses: strides, conflicts and words that lanes share") {
    Buffer<float> out(32);
    auto wavefronts = [&](int stride, int groups) {
        Traffic t = counted([&] { launch(read_words, 1, 32, 4096, nullptr, out.data, stride, groups); });
        CHECK(t.store.instructions == 32);
        CHECK(t.store.wavefronts == 32);
        CHECK(t.store.conflicts == 0);
        CHECK(t.load.instructions == 1);
        CHECK(t.load.bytes == 128);
        CHECK(t.load.conflicts == t.load.wavefronts - 1);
        CHECK(t.plain_global == 32);
        return t.load.wavefronts;
    };
    CHECK(wavefronts(1, 1) == 1);
    CHECK(wavefronts(2, 1) == 2);
    CHECK(wavefronts(3, 1) == 1);
    CHECK(wavefronts(8, 1) == 8);
    CHECK(wavefronts(32, 1) == 32);
    CHECK(wavefronts(0, 1) == 1);   // broadcast
    CHECK(wavefronts(32, 16) == 2); // two words, of 16 lanes each, in one bank
}

__global__ void move_halves(bf16* out) {
    bf16* all = reinterpret_cast<bf16*>(dynamic_shared());
    store_shared(all + lane_index(), bf16{1});
    __syncwarp();
    store_global(out + lane_index(), load_shared(all + lane_index() * 7 % 32));
}
TEST_CASE("two lanes with halves of one word share it") {
    Buffer<bf16> out(32);
    Traffic t = counted([&] { launch(move_halves, 1, 32, 64, nullptr, out.data); });
    CHECK(t.store.wavefronts == 1);
    CHECK(t.load.wavefronts == 1);
    CHECK(t.load.bytes == 64);
}

template <int N> __global__ void read_packs(float* out, int stride) {
    float* words = reinterpret_cast<float*>(dynamic_shared());
    for (int i = lane_index(); i < 2048; i += kWarpSize) store_shared(words + i, 0.f);
    __syncwarp();
    Pack<float, N> got = load_pack_shared<N>(words + lane_index() * stride);
    store_global(out + lane_index(), got[0]);
}
TEST_CASE("8-byte accesses go by half-warps, 16-byte accesses by quarters") {
    Buffer<float> out(32);
    auto loads = [&](auto kernel, int stride) {
        return counted([&] { launch(kernel, 1, 32, 8192, nullptr, out.data, stride); }).load;
    };
    CHECK(loads(read_packs<2>, 2).wavefronts == 2);
    CHECK(loads(read_packs<2>, 2).conflicts == 0);
    CHECK(loads(read_packs<2>, 4).wavefronts == 4); // 16 lanes, 4 words apart: two of them in every bank used
    CHECK(loads(read_packs<2>, 4).conflicts == 2);
    CHECK(loads(read_packs<2>, 32).wavefronts == 32);
    CHECK(loads(read_packs<2>, 0).conflicts == 0);
    CHECK(loads(read_packs<4>, 4).wavefronts == 4);
    CHECK(loads(read_packs<4>, 4).conflicts == 0);
    CHECK(loads(read_packs<4>, 8).wavefronts == 8);
    CHECK(loads(read_packs<4>, 8).conflicts == 4);
    CHECK(loads(read_packs<4>, 32).conflicts == 28); // rows of 128 bytes, one column: 8 lanes in 4 banks
    CHECK(loads(read_packs<4>, 32).bytes == 512);
}

// A tile of 16 rows × 64 bf16 (128 bytes a row), 16-byte pieces, piece c of row r at c, or at c XOR r % 8. Written by
// rows through cp.async, read by columns through 16-byte loads, then by ldmatrix.
template <bool Swizzled, int Tiles> __global__ void swizzle(uint32_t* out, const bf16* in) {
    bf16* tile = reinterpret_cast<bf16*>(dynamic_shared());
    auto at = [&](int row, int piece) { return tile + row * 64 + (Swizzled ? piece ^ row % 8 : piece) * 8; };
    int lane = lane_index();
    for (int i = lane; i < 16 * 8; i += kWarpSize) cp_async(shared_address(at(i / 8, i % 8)), in + i * 8);
    cp_async_commit();
    cp_async_wait<0>();
    __syncwarp();
    Pack128<bf16> piece = load128_shared(at(lane % 16, lane / 16));
    uint32_t r[Tiles];
    if constexpr (Tiles == 4) ldmatrix_x4(r, shared_address(at(lane % 16, 2 + lane / 16)));
    if constexpr (Tiles == 2) ldmatrix_x2_trans(r, shared_address(at(lane % 16, 2)));
    store_global(out + lane, piece[0].bits + r[0] + r[Tiles - 1]);
}
TEST_CASE("an XOR swizzle frees rows and columns of conflicts, for cp.async, 16-byte loads and ldmatrix") {
    Buffer<bf16> in(16 * 64);
    Buffer<uint32_t> out(32);
    Traffic t = counted([&] { launch(swizzle<true, 4>, 1, 32, 2048, nullptr, out.data, in.data); });
    CHECK(t.async.instructions == 4);
    CHECK(t.async.bytes == 2048);
    CHECK(t.async.wavefronts == 16);
    CHECK(t.read.bytes == 2048);
    CHECK(t.read.sectors == 64);
    CHECK(t.load.wavefronts == 4);
    CHECK(t.matrix.instructions == 1);
    CHECK(t.matrix.bytes == 512);
    CHECK(t.matrix.wavefronts == 4);
    CHECK(t.shared().conflicts == 0);
    CHECK(t.shared().wavefronts == 24);

    t = counted([&] { launch(swizzle<false, 4>, 1, 32, 2048, nullptr, out.data, in.data); });
    CHECK(t.async.conflicts == 0); // rows were never a problem
    CHECK(t.load.conflicts == 4 * 7);
    CHECK(t.matrix.wavefronts == 4 * 8);
    CHECK(t.matrix.conflicts == 4 * 7);
    t = counted([&] { launch(swizzle<false, 2>, 1, 32, 2048, nullptr, out.data, in.data); });
    CHECK(t.matrix.bytes == 256);
    CHECK(t.matrix.conflicts == 2 * 7);
    t = counted([&] { launch(swizzle<true, 2>, 1, 32, 2048, nullptr, out.data, in.data); });
    CHECK(t.matrix.conflicts == 0);
}

__global__ void copy_ragged(float* out, const float* in, int valid) {
    float* cells = reinterpret_cast<float*>(dynamic_shared());
    int lane = lane_index();
    cp_async_or_zero(shared_address(cells + lane * 4), in + lane * 4, lane < valid);
    cp_async<4>(shared_address(cells + 128 + lane), in + 128 + lane);
    cp_async_commit();
    cp_async_wait<0>();
    store_global(out + lane, load_shared(cells + lane * 4) + load_shared(cells + 128 + lane));
}
TEST_CASE("zeros of a cp.async past the end cost shared memory only") {
    Buffer<float> in(160), out(32);
    Traffic t = counted([&] { launch(copy_ragged, 1, 32, 640, nullptr, out.data, in.data, 10); });
    CHECK(t.read.bytes == 160 + 128);
    CHECK(t.read.sectors == 5 + 4);
    CHECK(t.async.bytes == 512 + 128);
    CHECK(t.async.wavefronts == 4 + 1);
    CHECK(t.load.conflicts == 3); // 4 words apart
    t = counted([&] { launch(copy_ragged, 1, 32, 640, nullptr, out.data, in.data, 0); });
    CHECK(t.read.bytes == 128);
    CHECK(t.read.instructions == 1);
}

// ---- Everything else ----
__global__ void add_up(float* sums, int* votes) {
    int* counts = reinterpret_cast<int*>(dynamic_shared());
    if (threadIdx.x < 32) store_shared(counts + threadIdx.x, 0);
    __syncthreads();
    atomicAdd(counts + threadIdx.x / 4 % 8, 1); // 4 lanes at each of 8 words
    reduce_add(sums + threadIdx.x, 1.f);
    reduce_add(sums, 1.f);
    unsigned voted = __ballot_sync(kFullWarp, threadIdx.x % 3 == 0);
    int total = __reduce_add_sync(kFullWarp, static_cast<int>(voted & 1));
    __syncthreads();
    if (threadIdx.x == 0) store_global(votes, total + load_shared(counts));
}
TEST_CASE("atomics, votes, reductions and barriers") {
    Buffer<float> sums(64);
    Buffer<int> votes(1);
    Traffic t = counted([&] { launch(add_up, 3, 64, 128, nullptr, sums.data, votes.data); });
    CHECK(t.exchange.instructions == 3 * 2);
    CHECK(t.exchange.wavefronts == 3 * 2 * 4);
    CHECK(t.exchange.conflicts == 3 * 2 * 3);
    CHECK(t.atomic.instructions == 3 * 4);
    CHECK(t.atomic.bytes == 3 * 4 * 128);
    CHECK(t.atomic.sectors == 3 * 2 * (4 + 1));
    CHECK(t.atomic.unique == 8);
    CHECK(t.votes == 6);
    CHECK(t.reductions == 6);
    CHECK(t.barriers == 3 * 2 * 2);
    CHECK(t.written.instructions == 3);
    CHECK(t.plain_shared == 0);
}

__global__ void compute(float* out, uint32_t a, float x) {
    float c[4] = {};
    const uint32_t rows[4] = {a, a, a, a};
    for (int i = 0; i < 5; i++) mma_m16n8k16(c, rows, a, a);
    float y = exp2_approx(x) + (lane_index() < 8 ? log2_approx(x) : tanh_approx(x));
    barrier_sync(1, 64);
    store_global(out + global_thread(), c[0] + y);
}
TEST_CASE("mma, special functions, named barriers") {
    Buffer<float> out(64);
    Traffic t = counted([&] { launch(compute, 1, 64, 0, nullptr, out.data, 0u, 0.5f); });
    CHECK(t.mma == 10);
    CHECK(t.flops() == 10 * 2 * 16 * 8 * 16);
    CHECK(t.exp2 == 64);
    CHECK(t.log2 == 16);
    CHECK(t.tanh == 48);
    CHECK(t.barriers == 2);
}

// ---- The interface ----
__global__ void out_of_place(float* out, int64_t n) {
    if (global_thread() < n) store_global(out + global_thread(), 0.f);
}
TEST_CASE("counting is off unless asked for; only blocks that run count; a launch with a fault does not") {
    simt::SettingsGuard guard;
    Buffer<float> out(64);
    simt::settings().count = false;
    simt::reset_traffic();
    launch(out_of_place, 2, 32, 0, nullptr, out.data, 64);
    CHECK(simt::traffic().empty());
    simt::settings().count = true;
    CHECK_THROWS_AS(launch(out_of_place, 3, 32, 0, nullptr, out.data, 96), simt::Fault);
    CHECK(simt::traffic().empty());
    for (int threads : {1, 4}) {
        simt::settings().threads = threads;
        launch(out_of_place, 1000, 32, 0, nullptr, out.data, 64);
    }
    simt::settings().blocks = simt::some_blocks(1);
    launch(out_of_place, 1000, 32, 0, nullptr, out.data, 64);
    REQUIRE(simt::traffic().size() == 1);
    CHECK(simt::traffic().begin()->first == "simt_traffic.cpp out_of_place");
    Traffic t = simt::traffic_of("out_of_place");
    CHECK(t.launches == 3);
    CHECK(t.blocks == 2002);
    CHECK(t.written.bytes == 256 + 256 + 128);
    CHECK(simt::traffic_of("copy_wide").launches == 0);
    std::string table = simt::traffic_table();
    CHECK(table.find("simt_traffic.cpp out_of_place\n") != std::string::npos);
    CHECK(table.find("     640 ") != std::string::npos);
}
