// dev/simt itself: every fault is planted once in a small kernel, and the report must name its kind, kernel, block,
// thread and line; beside each stands the mended kernel, which must run clean. A watchman who never calls and one who
// always does are equally useless.
#include <doctest/doctest.h>

#include <algorithm>
#include <functional>
#include <set>
#include <string>
#include <vector>

#include "../dev/simt/simt.h"
#include "../kernels/device.h"
#include "../kernels/launch.h"
#include "../kernels/ptx.h"
#include "simt_buffer.h"

using simt::FaultKind;

namespace {

// Runs under a few seeds; every one of them must raise this fault, on this line. -1: any line.
void must_fault(const std::function<void()>& run, FaultKind kind, const char* kernel, int line,
                const std::vector<std::string>& words = {}) {
    simt::SettingsGuard guard;
    for (uint64_t seed = 1; seed <= 5; seed++) {
        simt::settings().seed = seed;
        bool told = false;
        try {
            run();
        } catch (const simt::Fault& fault) {
            told = true;
            INFO(std::string(fault.what()));
            CHECK(simt::fault_name(fault.kind) == simt::fault_name(kind));
            CHECK(fault.kernel.find(kernel) != std::string::npos);
            CHECK(fault.file == "simt.cpp");
            if (line >= 0) CHECK(fault.line == line);
            for (const std::string& word : words) CHECK(fault.text.find(word) != std::string::npos);
        }
        CHECK_MESSAGE(told, kernel << " ran without a report");
    }
}

void must_run(const std::function<void()>& run) {
    simt::SettingsGuard guard;
    for (uint64_t seed = 1; seed <= 5; seed++) {
        simt::settings().seed = seed;
        CHECK_NOTHROW(run());
    }
}

} // namespace

// ---- What works ----
__global__ void note_indices(uint32_t* out) {
    uint32_t block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    uint32_t thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    uint32_t threads = blockDim.x * blockDim.y * blockDim.z;
    out[block * threads + thread] = block * 1000 + thread;
}

TEST_CASE("every thread of every block runs once, with its indices") {
    Buffer<uint32_t> out(24 * 30);
    launch(note_indices, dim3(2, 3, 4), dim3(5, 3, 2), 0, nullptr, out.data);
    std::vector<uint32_t> got = out.host();
    for (uint32_t i = 0; i < got.size(); i++) CHECK(got[i] == i / 30 * 1000 + i % 30);
}

__global__ void sum_blocks(float* out, const float* in, int64_t n) {
    float* scratch = reinterpret_cast<float*>(dynamic_shared());
    float sum = 0;
    for (int64_t i = global_thread(); i < n; i += global_threads()) sum += load_global(in + i);
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0) atomicAdd(out, sum);
}

TEST_CASE("a reduction through shuffles, shared memory, a barrier and atomics") {
    Buffer<float> in(10007, 1), out(1);
    for (int threads : {32, 96, 1024}) {
        launch(sum_blocks, 7, threads, 32 * sizeof(float), nullptr, out.data, in.data, 10007);
        CHECK(out.host()[0] == 10007);
        check_cuda(cudaMemset(out.data, 0, 4), "clearing");
    }
}

__global__ void note_order(uint32_t* place, uint32_t* counter) { place[threadIdx.x] = atomicAdd(counter, 1); }

TEST_CASE("the seed decides the order of threads, and alone does") {
    simt::SettingsGuard guard;
    std::set<std::vector<uint32_t>> orders;
    for (uint64_t seed : {1, 2, 3, 1, 2, 3}) {
        simt::settings().seed = seed;
        Buffer<uint32_t> place(64), counter(1);
        launch(note_order, 1, 64, 0, nullptr, place.data, counter.data);
        orders.insert(place.host());
        std::vector<uint32_t> sorted = place.host();
        std::sort(sorted.begin(), sorted.end());
        for (uint32_t i = 0; i < 64; i++) CHECK(sorted[i] == i);
    }
    CHECK(orders.size() == 3);
}

__global__ void count_blocks(unsigned long long* sum, unsigned* count) {
    if (threadIdx.x == 0) atomicAdd(sum, blockIdx.x), atomicAdd(count, 1u);
}

TEST_CASE("a launch can run some blocks of a huge grid") {
    simt::SettingsGuard guard;
    simt::settings().blocks = simt::some_blocks(2, {uint64_t{1} << 30});
    Buffer<unsigned long long> sum(1);
    Buffer<unsigned> count(1);
    launch(count_blocks, 0x7fffffff, 32, 0, nullptr, sum.data, count.data);
    uint64_t middle = uint64_t{1} << 30, last = 0x7fffffff - 1;
    CHECK(count.host()[0] == 8);
    CHECK(sum.host()[0] == 0 + 1 + (4 * middle - 2) + (2 * last - 1));
}

__global__ void do_nothing() {}

TEST_CASE("launches that no GPU would take are refused by name") {
    CHECK_THROWS_WITH_AS(launch(do_nothing, 1, 1025, 0, nullptr), doctest::Contains("do_nothing"), RunFailed);
    CHECK_THROWS_AS(launch(do_nothing, dim3(1, 65536), 32, 0, nullptr), RunFailed);
    CHECK_THROWS_AS(launch(do_nothing, 0, 32, 0, nullptr), RunFailed);
    CHECK_THROWS_AS(launch(do_nothing, 1, 32, 228 * 1024, nullptr), RunFailed);
    CHECK_NOTHROW(launch(do_nothing, 1, 1024, 227 * 1024, nullptr));
}

// ---- Barriers ----
enum { kReturnedLine = __LINE__ + 3 };
__global__ void return_before_barrier() {
    if (threadIdx.x >= 40) return;
    __syncthreads();
}
enum { kBranchLine = __LINE__ + 3 };
__global__ void barrier_in_branch(int* out) {
    if (threadIdx.x < 16) {
        __syncthreads();
        out[threadIdx.x] = 1;
    } else {
        out[threadIdx.x] = 2;
        __syncthreads();
    }
}
TEST_CASE("divergent barriers") {
    Buffer<int> out(64);
    must_fault([] { launch(return_before_barrier, 1, 64, 0, nullptr); }, FaultKind::divergent_barrier,
               "return_before_barrier", kReturnedLine);
    must_fault([&] { launch(barrier_in_branch, 1, 64, 0, nullptr, out.data); }, FaultKind::divergent_barrier,
               "barrier_in_branch", -1, {"simt.cpp:"});
}

__global__ void barriers_crossed() {
    int first = threadIdx.x < 32 ? 1 : 2;
    barrier_sync(first, 64);
    barrier_sync(3 - first, 64);
}
__global__ void shuffle_against_barrier(int* out) {
    if (threadIdx.x < 16) out[threadIdx.x] = __shfl_sync(kFullWarp, 1, 0);
    __syncthreads();
}
TEST_CASE("deadlocks") {
    Buffer<int> out(64);
    must_fault([] { launch(barriers_crossed, 1, 64, 0, nullptr); }, FaultKind::deadlock, "barriers_crossed", -1,
               {"32 threads", "(barrier 1)", "(barrier 2)"});
    must_fault([&] { launch(shuffle_against_barrier, 1, 32, 0, nullptr, out.data); }, FaultKind::deadlock,
               "shuffle_against_barrier", -1, {"mask ffffffff, still missing ffff0000"});
}

__global__ void produce_and_consume(int* out, bool order) {
    int* cell = reinterpret_cast<int*>(dynamic_shared());
    int lane = lane_index();
    for (int round = 0; round < 4; round++) {
        if (warp_index() == 0) {
            if (round > 0) barrier_sync(2, 64);
            store_shared(cell + lane, round * 100 + lane);
            barrier_arrive(1, 64);
        } else {
            if (order) barrier_sync(1, 64);
            out[round * 32 + lane] = load_shared(cell + 31 - lane);
            if (!order) barrier_sync(1, 64);
            if (round < 3) barrier_arrive(2, 64);
        }
    }
}
TEST_CASE("named barriers order producers and consumers") {
    Buffer<int> out(128);
    must_run([&] {
        launch(produce_and_consume, 1, 64, 128, nullptr, out.data, true);
        for (int i = 0; i < 128; i++) CHECK(out.host()[i] == i / 32 * 100 + 31 - i % 32);
    });
    simt::SettingsGuard guard;
    for (uint64_t seed = 1; seed <= 5; seed++) {
        simt::settings().seed = seed;
        CHECK_THROWS_AS(launch(produce_and_consume, 1, 64, 128, nullptr, out.data, false), simt::Fault);
    }
}

// ---- Races ----
enum { kExchangeLine = __LINE__ + 6 };
__global__ void exchange(float* out, bool barrier) {
    float* cells = reinterpret_cast<float*>(dynamic_shared());
    int i = static_cast<int>(threadIdx.x), n = static_cast<int>(blockDim.x);
    cells[i] = static_cast<float>(i);
    if (barrier) __syncthreads();
    out[i] = cells[n - 1 - i];
}
__global__ void refill(float* out, bool barrier) {
    float* cells = reinterpret_cast<float*>(dynamic_shared());
    int i = static_cast<int>(threadIdx.x), n = static_cast<int>(blockDim.x);
    for (int round = 0; round < 3; round++) {
        cells[i] = static_cast<float>(round);
        __syncthreads();
        out[i] = cells[(i + 32) % n];
        if (barrier) __syncthreads();
    }
}
// Neighbours write halves of one word: no race. Then one warp reads another's.
__global__ void halves(bf16* out, bool barrier) {
    bf16* cells = reinterpret_cast<bf16*>(dynamic_shared());
    int i = static_cast<int>(threadIdx.x), n = static_cast<int>(blockDim.x);
    cells[i] = to_bf16(static_cast<float>(i));
    if (barrier) __syncthreads();
    out[i] = cells[n - 1 - i];
}
__global__ void read_shared_by_all(float* out, bool barrier) {
    float* cell = reinterpret_cast<float*>(dynamic_shared());
    if (threadIdx.x == 0) *cell = 1;
    __syncthreads();
    out[threadIdx.x] = *cell;
    if (barrier) __syncthreads();
    if (threadIdx.x == 37) *cell = 2;
}
TEST_CASE("races between threads of a block") {
    Buffer<float> out(64);
    Buffer<bf16> half(64);
    // Without a barrier the first thread to read finds nothing written: told as that, before it can be told as a race.
    must_fault([&] { launch(exchange, 1, 64, 256, nullptr, out.data, false); }, FaultKind::unwritten_read, "exchange",
               kExchangeLine);
    must_run([&] { launch(exchange, 1, 64, 256, nullptr, out.data, true); });
    must_fault([&] { launch(refill, 1, 64, 256, nullptr, out.data, false); }, FaultKind::race, "refill", -1,
               {"no barrier between", "simt.cpp:"});
    must_run([&] { launch(refill, 1, 64, 256, nullptr, out.data, true); });
    CHECK_THROWS_AS(launch(halves, 1, 64, 128, nullptr, half.data, false), simt::Fault);
    must_run([&] { launch(halves, 1, 64, 128, nullptr, half.data, true); });
    must_fault([&] { launch(read_shared_by_all, 1, 64, 4, nullptr, out.data, false); }, FaultKind::race,
               "read_shared_by_all", -1);
    must_run([&] { launch(read_shared_by_all, 1, 64, 4, nullptr, out.data, true); });
}

__global__ void exchange_in_warp(int* out, unsigned mask, int distance) {
    int* cells = reinterpret_cast<int*>(dynamic_shared());
    int i = static_cast<int>(threadIdx.x);
    cells[i] = 0; // written once, so that what is missing below is order alone
    __syncthreads();
    cells[i] = i;
    if (mask != 0) __syncwarp(i % 32 < 16 ? mask & 0xffffu : mask & 0xffff0000u);
    if (mask == 0) __syncwarp();
    out[i] = cells[i ^ distance];
}
TEST_CASE("__syncwarp orders the lanes in its mask, and no others") {
    Buffer<int> out(64);
    must_run([&] { launch(exchange_in_warp, 1, 64, 256, nullptr, out.data, 0u, 16); });
    must_run([&] { launch(exchange_in_warp, 1, 64, 256, nullptr, out.data, kFullWarp, 8); });
    must_fault([&] { launch(exchange_in_warp, 1, 64, 256, nullptr, out.data, kFullWarp, 16); }, FaultKind::race,
               "exchange_in_warp", -1);
    must_fault([&] { launch(exchange_in_warp, 1, 64, 256, nullptr, out.data, 0u, 32); }, FaultKind::race,
               "exchange_in_warp", -1);
}

__global__ void exchange_across(int* out, bool synchronize) {
    int* cells = reinterpret_cast<int*>(dynamic_shared());
    int i = static_cast<int>(threadIdx.x);
    cells[i] = 0;
    __syncwarp();
    cells[i] = i;
    int other = __shfl_xor_sync(kFullWarp, i, 1);
    if (synchronize) __syncwarp();
    out[i] = cells[other];
}
TEST_CASE("a shuffle moves values and orders no memory") {
    Buffer<int> out(32);
    must_run([&] { launch(exchange_across, 1, 32, 128, nullptr, out.data, true); });
    must_fault([&] { launch(exchange_across, 1, 32, 128, nullptr, out.data, false); }, FaultKind::race,
               "exchange_across", -1);
}

__global__ void histogram(int* out, bool atomic, bool barrier) {
    int* bins = reinterpret_cast<int*>(dynamic_shared());
    if (threadIdx.x < 4) bins[threadIdx.x] = 0;
    __syncthreads();
    if (atomic)
        atomicAdd(bins + threadIdx.x % 4, 1);
    else
        bins[threadIdx.x % 4] += 1;
    if (barrier) __syncthreads();
    if (threadIdx.x < 4) out[threadIdx.x] = bins[threadIdx.x];
}
TEST_CASE("atomics do not race with each other, but with everything else") {
    Buffer<int> out(4);
    must_run([&] {
        launch(histogram, 1, 64, 16, nullptr, out.data, true, true);
        CHECK(out.host() == std::vector<int>(4, 16));
    });
    must_fault([&] { launch(histogram, 1, 64, 16, nullptr, out.data, false, true); }, FaultKind::race, "histogram", -1);
    must_fault([&] { launch(histogram, 1, 64, 16, nullptr, out.data, true, false); }, FaultKind::race, "histogram", -1);
}

// ---- Memory ----
enum { kUnwrittenLine = __LINE__ + 4 };
__global__ void read_unwritten(float* out, int written) {
    float* cells = reinterpret_cast<float*>(dynamic_shared());
    for (int i = 0; i < written; i++) cells[i] = 1;
    out[threadIdx.x] = cells[7];
}
enum { kSharedEndLine = __LINE__ + 3 };
__global__ void write_shared(int index) {
    float* cells = reinterpret_cast<float*>(dynamic_shared());
    cells[index] = 1;
}
enum { kGlobalLine = __LINE__ + 1 };
__global__ void write_global(float* out, int64_t index) { out[index] = 1; }
enum { kReadLine = __LINE__ + 1 };
__global__ void read_global(float* out, const float* in, int64_t index) { *out = load_global(in + index); }

TEST_CASE("reads of shared memory that nobody wrote") {
    Buffer<float> out(1);
    must_fault([&] { launch(read_unwritten, 1, 1, 64, nullptr, out.data, 7); }, FaultKind::unwritten_read,
               "read_unwritten", kUnwrittenLine, {"byte 28"});
    must_run([&] { launch(read_unwritten, 1, 1, 64, nullptr, out.data, 8); });
    // What an earlier block or launch wrote does not count.
    must_fault([&] { launch(read_unwritten, 3, 1, 64, nullptr, out.data, 0); }, FaultKind::unwritten_read,
               "read_unwritten", kUnwrittenLine);
}

TEST_CASE("out of bounds") {
    Buffer<float> out(1), in(5);
    float host = 0;
    must_fault([] { launch(write_shared, 1, 1, 64, nullptr, 16); }, FaultKind::out_of_bounds, "write_shared",
               kSharedEndLine, {"offset 64 of 64 bytes of shared memory"});
    must_fault([] { launch(write_shared, 1, 1, 64, nullptr, -1); }, FaultKind::out_of_bounds, "write_shared",
               kSharedEndLine, {"offset -4"});
    must_run([] { launch(write_shared, 1, 1, 64, nullptr, 15); });
    for (int64_t index : {int64_t{1}, int64_t{-1}, int64_t{1} << 31, -(int64_t{1} << 31)})
        must_fault([&] { launch(write_global, 1, 1, 0, nullptr, out.data, index); }, FaultKind::out_of_bounds,
                   "write_global", kGlobalLine, {"4 bytes"});
    must_fault([&] { launch(read_global, 1, 1, 0, nullptr, out.data, in.data, 5); }, FaultKind::out_of_bounds,
               "read_global", kReadLine, {"offset 20 of a device allocation of 20 bytes"});
    must_run([&] { launch(read_global, 1, 1, 0, nullptr, out.data, in.data, 4); });
    must_fault([&] { launch(write_global, 1, 1, 0, nullptr, nullptr, 0); }, FaultKind::out_of_bounds, "write_global",
               kGlobalLine, {"no device memory"});
    must_fault([&] { launch(write_global, 1, 1, 0, nullptr, &host, 0); }, FaultKind::out_of_bounds, "write_global",
               kGlobalLine, {"host pointer"});
    float* freed = Buffer<float>(9).data;
    must_fault([&] { launch(write_global, 1, 1, 0, nullptr, freed, 3); }, FaultKind::out_of_bounds, "write_global",
               kGlobalLine, {"freed"});
}

enum { kOffsetLine = __LINE__ + 1 };
__global__ void load_at(float* out, const float* in, int offset) { out[0] = load128(in + offset)[0]; }
__global__ void load_shared_at(float* out, int offset) {
    float* cells = reinterpret_cast<float*>(dynamic_shared());
    for (int i = 0; i < 16; i++) cells[i] = 1;
    out[0] = load128_shared(cells + offset)[0];
}
TEST_CASE("misaligned vector accesses") {
    Buffer<float> out(1), in(16);
    for (int offset : {1, 2, 3, 6}) {
        must_fault([&] { launch(load_at, 1, 1, 0, nullptr, out.data, in.data, offset); }, FaultKind::misaligned,
                   "load_at", kOffsetLine, {"16 bytes"});
        must_fault([&] { launch(load_shared_at, 1, 1, 64, nullptr, out.data, offset); }, FaultKind::misaligned,
                   "load_shared_at", -1);
    }
    must_run([&] { launch(load_at, 1, 1, 0, nullptr, out.data, in.data, 12); });
    // Aligned, and begun inside, but longer than what is left.
    Buffer<float> five(5);
    must_fault([&] { launch(load_at, 1, 1, 0, nullptr, out.data, five.data, 4); }, FaultKind::out_of_bounds, "load_at",
               kOffsetLine, {"offset 16 of a device allocation of 20 bytes"});
    must_run([&] { launch(load_shared_at, 1, 1, 64, nullptr, out.data, 12); });
}

enum { kDepthLine = __LINE__ + 6 };
__global__ void block_and_thread(float* out) {
    __syncthreads();
    bool wrong = blockIdx.x == 3 && blockIdx.y == 1 && threadIdx.x == 5 && threadIdx.y == 2;
    int64_t at = wrong ? 1000000 : 0;
    __syncthreads();
    if (wrong) out[at] = 1;
}
TEST_CASE("a report names block and thread") {
    Buffer<float> out(1);
    try {
        launch(block_and_thread, dim3(4, 2), dim3(8, 4), 0, nullptr, out.data);
        FAIL("no report");
    } catch (const simt::Fault& fault) {
        CHECK((fault.block.x == 3 && fault.block.y == 1 && fault.block.z == 0));
        CHECK((fault.thread.x == 5 && fault.thread.y == 2 && fault.thread.z == 0));
        CHECK(fault.line == kDepthLine);
        CHECK(std::string(fault.what()).find("block_and_thread at simt.cpp:") != std::string::npos);
    }
    // And the next launch starts clean.
    must_run([&] { launch(do_nothing, 1, 32, 0, nullptr); });
}

struct alignas(16) Four {
    float x[4];
};
// Each kind of access that the compiler makes of plain C++, out of bounds on purpose: the hooks must see all of them.
__global__ void access_kinds(char* p, const char* in, int kind) {
    switch (kind) {
    case 0:
        *p = 1;
        break;
    case 1:
        *reinterpret_cast<uint16_t*>(p) = 1;
        break;
    case 2:
        *reinterpret_cast<double*>(p) = 1;
        break;
    case 3:
        *reinterpret_cast<Four*>(p) = *reinterpret_cast<const Four*>(in);
        break;
    case 4:
        memcpy(p, in, 16);
        break;
    case 5:
        memcpy(p, in, 48);
        break;
    case 6:
        memset(p, 0, 48);
        break;
    case 7:
        atomicAdd(reinterpret_cast<float*>(p), 1.0f);
        break;
    case 8:
        __atomic_fetch_add(reinterpret_cast<int*>(p), 1, __ATOMIC_RELAXED);
        break;
    case 9:
        *reinterpret_cast<volatile int*>(p) = 1;
        break;
    case 10:
        reduce_add(reinterpret_cast<float*>(p), make_float4(1, 1, 1, 1));
        break;
    case 11:
        store128(p, load128(in));
        break;
    }
}
TEST_CASE("no kind of access escapes") {
    Buffer<char> in(64), out(64);
    for (int kind = 0; kind < 12; kind++) {
        CAPTURE(kind);
        must_run([&] { launch(access_kinds, 1, 1, 0, nullptr, out.data, in.data, kind); });
        must_fault([&] { launch(access_kinds, 1, 1, 0, nullptr, out.data + 64, in.data, kind); },
                   FaultKind::out_of_bounds, "access_kinds", -1);
        if (kind >= 3 && kind <= 5)
            must_fault([&] { launch(access_kinds, 1, 1, 0, nullptr, out.data, in.data + 64, kind); },
                       FaultKind::out_of_bounds, "access_kinds", -1);
    }
}

__global__ void overflow_stack(float* out, int depth) {
    volatile float large[30000];
    for (int i = 0; i < depth; i++) large[30000 - 1 - i] = 1;
    out[0] = large[30000 - depth] + static_cast<float>(10 / (depth - 30000));
}
TEST_CASE("what the processor finds is told as well") {
    Buffer<float> out(1);
    CHECK_THROWS_WITH_AS(launch(overflow_stack, 1, 1, 0, nullptr, out.data, 29999), doctest::Contains("overflow_stack"),
                         simt::Fault);
}

// ---- Warps ----
__global__ void shuffle_from_absent(int* out) {
    if (threadIdx.x >= 8) return;
    out[threadIdx.x] = __shfl_sync(kFullWarp, 1, 9);
}
__global__ void mask_without_self(int* out) {
    if (threadIdx.x == 3) out[0] = __shfl_sync(0xfffffff7u, 1, 0);
}
__global__ void mixed_collectives(int* out) {
    int v = 0;
    if (threadIdx.x < 5)
        v = __shfl_sync(kFullWarp, 1, 0);
    else
        v = static_cast<int>(__ballot_sync(kFullWarp, 1));
    out[threadIdx.x] = v;
}
__global__ void mma_by_half(float* out) {
    float c[4] = {};
    uint32_t a[4] = {};
    if (threadIdx.x < 16) mma_m16n8k16(c, a, 0, 0);
    out[threadIdx.x] = c[0];
}
TEST_CASE("warps that fall apart") {
    Buffer<int> out(32);
    Buffer<float> sums(32);
    must_fault([&] { launch(shuffle_from_absent, 1, 32, 0, nullptr, out.data); }, FaultKind::divergent_warp,
               "shuffle_from_absent", -1, {"lane 9"});
    must_fault([&] { launch(mask_without_self, 1, 32, 0, nullptr, out.data); }, FaultKind::divergent_warp,
               "mask_without_self", -1);
    must_fault([&] { launch(mixed_collectives, 1, 32, 0, nullptr, out.data); }, FaultKind::divergent_warp,
               "mixed_collectives", -1);
    must_fault([&] { launch(mma_by_half, 1, 32, 0, nullptr, sums.data); }, FaultKind::divergent_warp, "mma_by_half",
               -1);
}

__global__ void shuffles(int* out) {
    int i = static_cast<int>(threadIdx.x), v = 100 + i;
    int* row = out + i * 8;
    row[0] = __shfl_sync(kFullWarp, v, i + 5, 16);
    row[1] = __shfl_up_sync(kFullWarp, v, 3, 8);
    row[2] = __shfl_down_sync(kFullWarp, v, 3, 8);
    row[3] = __shfl_xor_sync(kFullWarp, v, 9);
    row[4] = static_cast<int>(__ballot_sync(kFullWarp, i % 3 == 0));
    row[5] = __reduce_add_sync(kFullWarp, v);
    row[6] = __any_sync(kFullWarp, i == 7) * 2 + __all_sync(kFullWarp, i < 32);
    row[7] = __reduce_min_sync(kFullWarp, -i);
}
TEST_CASE("shuffles, votes and reductions") {
    Buffer<int> out(256);
    launch(shuffles, 1, 32, 0, nullptr, out.data);
    std::vector<int> got = out.host();
    unsigned thirds = 0;
    for (int i = 0; i < 32; i += 3) thirds |= 1u << i;
    for (int i = 0; i < 32; i++) {
        int segment = i / 8 * 8;
        CHECK(got[i * 8 + 0] == 100 + i / 16 * 16 + (i + 5) % 16);
        CHECK(got[i * 8 + 1] == 100 + (i - 3 >= segment ? i - 3 : i));
        CHECK(got[i * 8 + 2] == 100 + (i + 3 < segment + 8 ? i + 3 : i));
        CHECK(got[i * 8 + 3] == 100 + (i ^ 9));
        CHECK(got[i * 8 + 4] == static_cast<int>(thirds));
        CHECK(got[i * 8 + 5] == 3200 + 31 * 16);
        CHECK(got[i * 8 + 6] == 3);
        CHECK(got[i * 8 + 7] == -31);
    }
}
