// The norm of all gradients of GPT-2 124M, and of a tensor that fits the cache, in float and in bf16.
#include "../../kernels/global_norm.h"

#include "bench.h"

void bench::run(const std::string&) {
    bench::Table table;
    for (int64_t n : {int64_t(768) * 768, int64_t(124439808)}) {
        bench::Buffer grads(n * sizeof(float)), scratch(global_norm_scratch(n)), norm(sizeof(float));
        table.run("global norm", std::to_string(n), global_norm_cost(n),
                  [&] { global_norm(nullptr, norm.floats(), grads.floats(), scratch.floats(), n); });
        table.run("global norm of bf16", std::to_string(n), global_norm_cost(n, true),
                  [&] { global_norm(nullptr, norm.floats(), grads.as<bf16>(), scratch.floats(), n); });
    }
}
