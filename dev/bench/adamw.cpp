// AdamW over all parameters of GPT-2 124M, and over one small matrix; in the bf16 build with master weights.
#include "../../kernels/adamw.h"

#include "bench.h"

int main() {
    bench::Table table;
    const bool with_master = sizeof(real) < sizeof(float);
    for (int64_t n : {int64_t(768) * 768, int64_t(124439808)}) {
        bench::Buffer params(n * sizeof(real)), master(with_master ? n * sizeof(float) : 0);
        bench::Buffer m(n * sizeof(float)), v(n * sizeof(float)), grads(n * sizeof(float));
        bench::Buffer scale(std::vector<float>{1});
        const AdamW opt{.lr = 3e-4f};
        table.run("adamw", std::to_string(n), adamw_cost(n, with_master), [&] {
            adamw_update(nullptr, params.reals(), with_master ? master.floats() : nullptr, m.floats(), v.floats(),
                         grads.floats(), scale.floats(), n, opt);
        });
    }
}
