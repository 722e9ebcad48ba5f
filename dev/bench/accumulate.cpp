// Adding what a micro-batch has staged: a transformer layer of GPT-2 124M and of GPT-2 1558M.
#include "../../kernels/accumulate.h"

#include "bench.h"

void bench::run(const std::string&) {
    bench::Table table;
    for (int64_t C : {768, 1600}) {
        const int64_t n = 12 * C * C + 13 * C;
        std::vector<float> some(n);
        for (int64_t i = 0; i < n; i++) some[i] = float(i * 7919 % 2003) / 1001 - 1;
        bench::Buffer grads(n * sizeof(bf16)), staged(some), draw(sizeof(uint64_t));
        table.run("accumulate", std::to_string(n), accumulate_gradients_cost(n), [&] {
            accumulate_gradients(nullptr, grads.as<bf16>(), staged.floats(), n, 1, 2, draw.as<uint64_t>());
        });
    }
}
