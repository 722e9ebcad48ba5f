// Scratch for every target, told by every build: figures worked out by hand, and this build's own.
#include "check.h"

#include "../kernels/attention.h"
#include "../kernels/embedding.h"
#include "../kernels/global_norm.h"
#include "../kernels/layernorm.h"
#include "../kernels/matmul.h"

namespace {

constexpr Target kCuda{true, sizeof(bf16), 1}, kCudaFp32{true, sizeof(float), 1};
constexpr Target cpu(int64_t threads) { return {false, sizeof(float), threads}; }
constexpr int64_t kHeadDims[] = {32, 64, 80, 128, 256};

AttentionShape square(int64_t B, int64_t T, int64_t H, int64_t D, bool deterministic = true) {
    AttentionShape s{B, T, T, H, D};
    s.deterministic = deterministic;
    return s;
}

// f(shape) for ragged and round lengths up to 2^20, few and many sequences and heads, every head dim, either order.
template <class F> void each_attention_shape(F f) {
    for (int64_t D : kHeadDims)
        for (int64_t T : {1, 7, 96, 97, 1000, 1024, 4095, 65536, 1 << 20})
            for (int64_t B : {1, 2, 5})
                for (int64_t H : {1, 3, 12, 25, 64})
                    for (bool deterministic : {true, false}) f(square(B, T, H, D, deterministic));
}

} // namespace

TEST_CASE("this build is a target") {
    check::with_threads({1, 3}, [](int threads) {
        const Target own = this_target();
        CHECK(own.cuda == !device_is_host());
        CHECK(own.real_bytes == sizeof(real));
        CHECK(own.threads == threads);
    });
}

TEST_CASE("scratch without a target is this build's") {
    check::with_threads({1, 2, 5}, [](int threads) {
        const Target own{!device_is_host(), sizeof(real), threads};
        each_attention_shape([&](AttentionShape s) {
            if (attention_forward_scratch(s) != attention_forward_scratch(s, own) ||
                attention_backward_scratch(s) != attention_backward_scratch(s, own))
                FAIL_CHECK("attention, B ", s.B, ", T ", s.Tq, ", H ", s.H, ", D ", s.D);
        });
        for (int64_t N : {0, 1, 263, 265, 1 << 20})
            for (int64_t C : {1, 15, 16, 17, 768, 769, 5120}) {
                CHECK(layernorm_backward_scratch(N, C) == layernorm_backward_scratch(N, C, own));
                CHECK(embedding_backward_scratch({1, N, C}) == embedding_backward_scratch({1, N, C}, own));
                CHECK(global_norm_scratch(N * C) == global_norm_scratch(N * C, own));
            }
    });
}

TEST_CASE("scratch for a target is the same in every build and on any number of threads") {
    check::with_threads({1, 3}, [](int) {
        // A thread's tiles of queries, keys and values, O and the scores, in floats.
        CHECK(attention_forward_scratch(square(2, 1000, 12, 64), cpu(3)) == 3 * (4 * 96 * 64 + 96 * 96) * 4);
        CHECK(attention_forward_scratch(square(2, 1000, 12, 64), kCuda) == 0);

        // Twelve heads: two threads with a dQ each, of eleven tiles. One head: both share it.
        const int64_t own = 7 * 96 * 64 + 2 * 96 * 96, head = 11 * 96 * (64 + 2);
        CHECK(attention_backward_scratch(square(1, 1024, 12, 64), cpu(2)) == (2 * own + 2 * head) * 4);
        CHECK(attention_backward_scratch(square(1, 1024, 1, 64), cpu(2)) == (2 * own + head) * 4);
        CHECK(attention_backward_scratch(square(1, 1024, 12, 64), cpu(1)) == (own + head) * 4);

        for (int64_t D : kHeadDims) {
            CAPTURE(D);
            // Two floats a row for the flash kernels; one for the plain ones, which fp32 has alone.
            CHECK(attention_backward_scratch(square(2, 1000, 12, D), kCuda) == 24000 * 8);
            CHECK(attention_backward_scratch(square(2, 1000, 12, D), kCudaFp32) == 24000 * 4);
            CHECK(attention_backward_scratch(square(1, 1 << 20, 16, D), kCuda) == 16ll << 23);
            // Beyond the flash kernels' longest row.
            CHECK(attention_backward_scratch(square(1, 1 << 30, 2, D), kCuda) == 2ll << 32);
            // Rows in 64 bytes.
            CHECK(attention_backward_scratch(square(1, 7, 3, D), kCuda) == 32 * 8);
            // Beside them, where sums in any order have a kernel, dQ in float: of all heads or of as many as fit 64
            // MiB.
            const bool any_order = D == 64;
            CHECK(attention_backward_scratch(square(2, 1000, 12, D, false), kCuda) ==
                  24000 * (8 + (any_order ? 4 * D : 0)));
            CHECK(attention_backward_scratch(square(1, 1 << 17, 16, D, false), kCuda) ==
                  (any_order ? 2 * (1 << 17) * (8 + 4 * D) : 16 * (1 << 17) * 8));
            CHECK(attention_backward_scratch(square(2, 1000, 12, D, false), kCudaFp32) == 24000 * 4);
        }

        CHECK(layernorm_backward_scratch(1000, 100, cpu(3)) == 3 * 2 * 112 * 4);
        CHECK(layernorm_backward_scratch(1000, 100, kCuda) == 264 * 2 * 112 * 4);
        CHECK(layernorm_backward_scratch(5, 100, kCudaFp32) == 5 * 2 * 112 * 4);

        // Pairs twice, the counts of two tiles, the totals, and three rows of partial sums.
        CHECK(embedding_backward_scratch({2, 300, 48}, kCuda) == 2 * 600 * 8 + 2 * 1024 + 1024 + 3 * 48 * 4);
        CHECK(embedding_backward_scratch({2, 300, 48}, cpu(3)) == 0);

        CHECK(global_norm_scratch(1'000'000, cpu(3)) == 16 * 8);
        CHECK(global_norm_scratch(1'000'000, kCuda) == 245 * 8); // 4096 elements a block
        CHECK(global_norm_scratch(1'000'000'000, kCuda) == 1053 * 8);
        CHECK(global_norm_scratch(0, kCuda) == 0);

        CHECK(matmul_workspace(kCuda) == 64 << 20);
        CHECK(matmul_workspace(kCuda, 8) == 32 << 20);
        CHECK(matmul_workspace(cpu(3)) == 0);
    });
}

TEST_CASE("scratch of attention serves fewer sequences and heads") {
    for (const Target& target : {kCuda, kCudaFp32, cpu(1), cpu(2), cpu(5), cpu(8), cpu(24)})
        for (int64_t T : {1, 96, 97, 192, 1000, 65536})
            for (int64_t heads = 2; heads <= 40; heads++) {
                const size_t bytes = attention_backward_scratch(square(1, T, heads, 64), target);
                if (bytes < attention_backward_scratch(square(1, T, heads - 1, 64), target) ||
                    bytes > attention_backward_scratch(square(2, T, heads, 64), target))
                    FAIL_CHECK("T ", T, ", heads ", heads, ", threads ", target.threads);
            }
}

TEST_CASE("a head dim without a kernel is refused for every target") {
    for (Target target : {kCuda, kCudaFp32, cpu(1)}) {
        CHECK_THROWS_AS(attention_forward_scratch(square(1, 4, 1, 48), target), std::invalid_argument);
        CHECK_THROWS_AS(attention_backward_scratch(square(1, 4, 1, 48), target), std::invalid_argument);
    }
}
