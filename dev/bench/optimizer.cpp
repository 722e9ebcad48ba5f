// The optimizer over all parameters of GPT-2 124M and over one small matrix, for every rule and type of state: in the
// bf16 build with master weights and without, and with bf16 gradients.
#include "../../kernels/optimizer.h"

#include "bench.h"

void bench::run(const std::string&) {
    bench::Table table;
    const bool half = sizeof(real) < sizeof(float);
    for (int64_t n : {int64_t(768) * 768, int64_t(124439808)}) {
        bench::Buffer params(n * sizeof(real)), master(half ? n * sizeof(float) : 0), m(n * sizeof(float)),
            v(n * sizeof(float)), grads(n * sizeof(float)), counts(sizeof(OptimizerCounts));
        bench::Buffer m_absmax(absmax_count(n) * sizeof(float)), v_absmax(absmax_count(n) * sizeof(float));
        bench::Buffer scale(std::vector<float>{1});
        // Gradients such that codes differ from one element to the next, as in training.
        std::vector<float> some(n);
        for (int64_t i = 0; i < n; i++) some[i] = float(i * 7919 % 2003) / 1001 - 1;
        for (Rule rule : {Rule::adamw, Rule::lion})
            for (StateType type : {StateType::fp32, StateType::bf16, StateType::int8})
                for (bool with_master : {true, false})
                    for (bool bf16_grads : {false, true}) {
                        if (with_master && !half) continue;
                        if (bf16_grads && (!half || with_master)) continue;
                        const Optimizer opt{.lr = 3e-4f, .rule = rule};
                        const States states{type, m.as<void>(), v.as<void>(), m_absmax.floats(), v_absmax.floats()};
                        const std::string name = std::string(rule == Rule::adamw ? "adamw " : "lion ") +
                                                 (type == StateType::fp32   ? "fp32"
                                                  : type == StateType::bf16 ? "bf16"
                                                                            : "int8") +
                                                 (with_master  ? " +master"
                                                  : bf16_grads ? " grads bf16"
                                                               : "");
                        bench::upload(grads.floats(), some.data(), n * sizeof(float));
                        for (bench::Buffer* state : {&m, &v}) {
                            const std::vector<float> zero(n);
                            bench::upload(state->floats(), zero.data(), n * sizeof(float));
                        }
                        const Gradients g = bf16_grads ? Gradients(grads.as<bf16>()) : Gradients(grads.floats());
                        table.run(name, std::to_string(n), optimizer_cost(n, rule, type, bf16_grads, with_master), [&] {
                            optimizer_update(nullptr, params.reals(), with_master ? master.floats() : nullptr, states,
                                             g, scale.floats(), counts.as<OptimizerCounts>(), n, opt);
                        });
                    }
    }
}
