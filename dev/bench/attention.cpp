// Causal attention: GPT-2 124M's training step and 8192-token contexts, every head dim, and decoding with a cache.
// FLOPs are those of the visible pairs, so the percentage also charges the masked halves of the tiles on the diagonal.
//
//   bench_attention            all
//   bench_attention quick      on a GPU, heads of 64 and 128 at three lengths, dQ in a fixed and in any order
//   bench_attention once       one forward and one backward pass, for a profiler
#include "../../kernels/attention.h"

#include <cmath>

#include "../../runtime/base/errors.h"
#include "../../runtime/base/random.h"
#include "bench.h"

namespace {

void fill_normal(bench::Buffer& b, int64_t n, uint64_t seed) {
    b.fill(n, [&](int64_t i) { return float(random_normal(seed, 0, i)); });
}

// Training: packed qkv (B,T,3C), both passes; without a table once each.
void bench_training(bench::Table* table, int64_t B, int64_t T, int64_t H, int64_t D, bool any_order = false) {
    const int64_t C = H * D;
    const float scale = float(1 / std::sqrt(double(D)));
    AttentionShape shape{B, T, T, H, D};
    shape.deterministic = !any_order;
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
    if (!table) {
        forward();
        backward();
        bench::wait();
        return;
    }
    const Cost forward_cost = attention_forward_cost(shape), backward_cost = attention_backward_cost(shape);
    if (any_order) {
        forward();
        table->run("attention backward, any", name, backward_cost, backward);
        return;
    }
    table->run("attention forward", name, forward_cost, forward);
    table->run("attention backward", name, backward_cost, backward);
    table->run("attention both", name, forward_cost + backward_cost, [&] {
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

void bench::run(const std::string& what) {
    if (what == "once") {
        bench_training(nullptr, 1, 8192, 16, 128);
        bench_training(nullptr, 1, 8192, 32, 64);
        return;
    }
    if (!what.empty() && what != "quick") throw BadInput("bench_attention: quick, once or nothing, not " + what);
    bench::Table table;
    if (what == "quick" && bench::is_gpu()) {
        for (int64_t T : {2048, 16384, 131072})
            for (int64_t D : {64, 128}) {
                const int64_t B = std::max<int64_t>(16384 / T, 1), H = (T > 16384 ? 256 : 2048) / D;
                bench_training(&table, B, T, H, D);
                if (D == 64) bench_training(&table, B, T, H, D, true);
            }
        return;
    }
    if (bench::is_gpu()) {
        // 16k tokens of width 2048, as the published tables have it; then the long end.
        for (int64_t D : {64, 128})
            for (int64_t T : {2048, 4096, 8192, 16384}) bench_training(&table, 16384 / T, T, 2048 / D, D);
        bench_training(&table, 1, 131072, 4, 64);
        for (int64_t D : {32, 80, 256}) bench_training(&table, 1, 4096, 2, D);
        for (int64_t Tk : {1024, 131072}) bench_decoding(table, 1, Tk, 12, 64);
        return;
    }
    bench_training(&table, 4, 64, 12, 64);
    bench_training(&table, 1, 1024, 12, 64);
    bench_training(&table, 1, 8192, 4, 64);
    bench_training(&table, 1, 8192, 1, 64); // one head: the threads share it
    for (int64_t D : {32, 80, 128, 256}) bench_training(&table, 1, 4096, 2, D);
    for (int64_t Tk : {1024, 16384}) bench_decoding(table, 1, Tk, 12, 64);
}
