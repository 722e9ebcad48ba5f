// LayerNorm in GPT-2 124M: a small batch that stays in the cache, and contexts that do not.
#include "../../kernels/layernorm.h"

#include "bench.h"

void bench::run(const std::string&) {
    bench::Table table;
    const int64_t C = 768;
    for (int64_t N : {256, 8192, 65536}) {
        const std::string shape = std::to_string(N) + "x" + std::to_string(C);
        const int64_t bytes = N * C * sizeof(real);
        bench::Buffer x_(bytes), y_(bytes), out_(bytes), residual_(bytes), w_(C * sizeof(real)), b_(C * sizeof(real));
        bench::Buffer mean(N * 4), rstd(N * 4), dw(C * 4), db(C * 4), scratch(layernorm_backward_scratch(N, C));
        real *x = x_.reals(), *y = y_.reals(), *out = out_.reals(), *residual = residual_.reals();
        real *w = w_.reals(), *b = b_.reals();
        table.run("layernorm forward", shape, layernorm_forward_cost(N, C),
                  [&] { layernorm_forward(nullptr, out, mean.floats(), rstd.floats(), x, w, b, N, C); });
        table.run("residual + layernorm", shape, residual_layernorm_forward_cost(N, C), [&] {
            residual_layernorm_forward(nullptr, residual, out, mean.floats(), rstd.floats(), x, y, w, b, N, C);
        });
        table.run("layernorm backward", shape, layernorm_backward_cost(N, C), [&] {
            layernorm_backward(nullptr, residual, dw.floats(), db.floats(), y, x, w, mean.floats(), rstd.floats(),
                               scratch.floats(), N, C);
        });
    }
}
