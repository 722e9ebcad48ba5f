// The steps of dev/ladder beside the product's forward pass: 16k tokens of width 2048 with head dim 64, as
// dev/bench/attention.cpp has them. For a GPU, in bf16.
#include "../ladder/ladder.h"

#include <cmath>
#include <random>

#include "bench.h"

namespace {

std::vector<bf16> random_normal(int64_t n, uint64_t seed) {
    std::mt19937_64 rng(seed);
    std::normal_distribution<float> normal;
    std::vector<bf16> values(n);
    for (bf16& x : values) x = to_bf16(normal(rng));
    return values;
}

} // namespace

void bench::run(const std::string&) {
    static_assert(sizeof(real) == sizeof(bf16), "the product's flash kernels are in bf16 builds only");
    constexpr int64_t kTokens = 16384, H = 32, D = 64, C = H * D;
    bench::Table table;
    bench::Buffer qkv(random_normal(kTokens * 3 * C, 1));                          // (B,T,3C)
    bench::Buffer o(kTokens * C * sizeof(bf16)), lse(kTokens * H * sizeof(float)); // (B,T,C), (B,H,T)
    for (int64_t T : {4096, 16384}) {
        const AttentionShape shape{kTokens / T, T, T, H, D};
        auto in = [&](int64_t i) { return Heads<const bf16>{qkv.as<bf16>() + i * C, T * 3 * C, 3 * C, D}; };
        for (const ladder::Step& step : ladder::kSteps)
            table.run(step.name, "B=" + std::to_string(shape.B) + " T=" + std::to_string(T),
                      attention_forward_cost(shape), [&] {
                          step.forward(nullptr, {o.as<bf16>(), T * C, C, D}, lse.floats(), in(0), in(1), in(2),
                                       float(1 / std::sqrt(double(D))), shape);
                      });
    }
}
