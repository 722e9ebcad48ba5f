// Causal attention: GPT-2 124M's training step and 8192-token contexts, every head dim, and decoding with a cache.
// FLOPs are those of the visible pairs, so the percentage also charges the masked halves of the tiles on the diagonal.
#include "../../kernels/attention.h"

#include <cmath>
#include <random>

#include "bench.h"

namespace {

void fill_normal(bench::Buffer& b, int64_t n, uint64_t seed) {
    std::mt19937_64 rng(seed);
    std::normal_distribution<float> normal;
    b.fill(n, [&](int64_t) { return normal(rng); });
}

// Training: packed qkv (B,T,3C), both passes.
void bench_training(bench::Table& table, int64_t B, int64_t T, int64_t H, int64_t D) {
    const int64_t C = H * D;
    const float scale = float(1 / std::sqrt(double(D)));
    const AttentionShape shape{B, T, T, H, D};
    bench::Buffer qkv(B * T * 3 * C * sizeof(real)), dqkv(B * T * 3 * C * sizeof(real)); // (B,T,3C)
    bench::Buffer o(B * T * C * sizeof(real)), dout(B * T * C * sizeof(real));           // (B,T,C)
    bench::Buffer lse(B * H * T * sizeof(float));                                        // (B,H,T)
    bench::Buffer scratch(std::max(attention_forward_scratch(shape), attention_backward_scratch(shape)));
    fill_normal(qkv, B * T * 3 * C, 1);
    fill_normal(dout, B * T * C, 2);
    auto in = [&](int64_t i) { return Heads<const real>{qkv.reals() + i * C, T * 3 * C, 3 * C, D}; };
    auto grad = [&](int64_t i) { return Heads<real>{dqkv.reals() + i * C, T * 3 * C, 3 * C, D}; };
    const Heads<real> out{o.reals(), T * C, C, D};
    const Heads<const real> seen{out.data, T * C, C, D}, arriving{dout.reals(), T * C, C, D};
    auto forward = [&] {
        attention_forward(nullptr, out, lse.floats(), in(0), in(1), in(2), scale, scratch.floats(), shape);
    };
    auto backward = [&] {
        attention_backward(nullptr, grad(0), grad(1), grad(2), arriving, in(0), in(1), in(2), seen, lse.floats(), scale,
                           scratch.floats(), shape);
    };
    const std::string name =
        "B=" + std::to_string(B) + " T=" + std::to_string(T) + " H=" + std::to_string(H) + " D=" + std::to_string(D);
    const Cost forward_cost = attention_forward_cost(shape), backward_cost = attention_backward_cost(shape);
    table.run("attention forward", name, forward_cost, forward);
    table.run("attention backward", name, backward_cost, backward);
    table.run("attention both", name, forward_cost + backward_cost, [&] {
        forward();
        backward();
    });
}

// One query against Tk cached keys.
void bench_decoding(bench::Table& table, int64_t B, int64_t Tk, int64_t H, int64_t D) {
    const int64_t C = H * D;
    AttentionShape shape{B, 1, Tk, H, D};
    shape.q_offset = Tk - 1;
    bench::Buffer q(B * C * sizeof(real)), o(B * C * sizeof(real));                      // (B,1,C)
    bench::Buffer k(B * Tk * C * sizeof(real)), v(B * Tk * C * sizeof(real));            // (B,Tk,C)
    bench::Buffer lse(B * H * sizeof(float)), scratch(attention_forward_scratch(shape)); // (B,H,1)
    fill_normal(q, B * C, 1);
    fill_normal(k, B * Tk * C, 2);
    fill_normal(v, B * Tk * C, 3);
    auto in = [&](bench::Buffer& x, int64_t T) { return Heads<const real>{x.reals(), T * C, C, D}; };
    table.run("attention decode", "B=" + std::to_string(B) + " Tk=" + std::to_string(Tk) + " H=" + std::to_string(H),
              attention_forward_cost(shape), [&] {
                  attention_forward(nullptr, {o.reals(), C, C, D}, lse.floats(), in(q, 1), in(k, Tk), in(v, Tk),
                                    float(1 / std::sqrt(double(D))), scratch.floats(), shape);
              });
}

} // namespace

int main() {
    bench::Table table;
    if (bench::is_gpu()) {
        // 16k tokens of width 2048, as the published tables have it; then the long end.
        for (int64_t D : {64, 128})
            for (int64_t T : {2048, 4096, 8192, 16384}) bench_training(table, 16384 / T, T, 2048 / D, D);
        bench_training(table, 1, 131072, 4, 64);
        for (int64_t D : {32, 80, 256}) bench_training(table, 1, 4096, 2, D);
        for (int64_t Tk : {1024, 131072}) bench_decoding(table, 1, Tk, 12, 64);
        return 0;
    }
    bench_training(table, 4, 64, 12, 64);
    bench_training(table, 1, 1024, 12, 64);
    bench_training(table, 1, 8192, 4, 64);
    bench_training(table, 1, 8192, 1, 64); // one head: the threads share it
    for (int64_t D : {32, 80, 128, 256}) bench_training(table, 1, 4096, 2, D);
    for (int64_t Tk : {1024, 16384}) bench_decoding(table, 1, Tk, 12, 64);
}
