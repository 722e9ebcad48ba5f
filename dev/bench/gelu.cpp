// GELU at GPT-2 124M's MLP width: 256 tokens, which stay in cache, and 16384, which do not.
#include "bench.h"

void bench::run(const std::string&) {
    bench::Table table;
    for (int64_t N : {256, 16384}) {
        constexpr int64_t C = 3072;
        int64_t n = N * C;
        bench::Buffer out(n * sizeof(real)), dout(n * sizeof(real)), inp(n * sizeof(real));
        inp.fill(n, [](int64_t i) { return float(i % 1021) / 128 - 4; });
        dout.fill(n, [](int64_t i) { return float(i % 509) / 256 - 1; });
        std::string shape = std::to_string(N) + "x" + std::to_string(C);
        for (Gelu kind : {Gelu::tanh, Gelu::erf}) {
            std::string form = kind == Gelu::tanh ? "tanh" : "erf";
            table.run("gelu " + form + " forward", shape, gelu_forward_cost(n),
                      [&] { gelu_forward(nullptr, out.reals(), inp.reals(), n, kind); });
            table.run("gelu " + form + " backward", shape, gelu_backward_cost(n),
                      [&] { gelu_backward(nullptr, out.reals(), dout.reals(), inp.reals(), n, kind); });
        }
    }
}
