// GELU at GPT-2 124M's MLP width: 256 tokens, which stay in cache, and 16384, which do not.
#include "bench.h"

int main() {
    bench::Table table;
    for (int64_t N : {256, 16384}) {
        constexpr int64_t C = 3072;
        int64_t n = N * C;
        bench::Buffer out(n * sizeof(real)), dout(n * sizeof(real)), inp(n * sizeof(real));
        auto at = [](bench::Buffer& b) { return reinterpret_cast<real*>(b.floats()); };
        parallel_ranges(n, 64, [&](int64_t begin, int64_t end, int) {
            for (int64_t i = begin; i < end; i++) assign(at(inp)[i], float(i % 1021) / 128 - 4), assign(at(dout)[i], 1);
        });
        std::string shape = std::to_string(N) + "x" + std::to_string(C);
        for (Gelu kind : {Gelu::tanh, Gelu::erf}) {
            std::string form = kind == Gelu::tanh ? "tanh" : "erf";
            table.run("gelu " + form + " forward", shape, gelu_forward_cost(n),
                      [&] { gelu_forward(nullptr, at(out), at(inp), n, kind); });
            table.run("gelu " + form + " backward", shape, gelu_backward_cost(n),
                      [&] { gelu_backward(nullptr, at(out), at(dout), at(inp), n, kind); });
        }
    }
}
