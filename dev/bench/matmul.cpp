// The products of a GPT-2 124M step, at the 256 tokens of B=4 T=64 and at 2048; the logits; and one decoded token,
// which can be no faster than the weights are read. `bench_matmul logits`: the logits alone, by the tokens at a time.
#include "../../runtime/base/errors.h"
#include "bench.h"

void bench::run(const std::string& what) {
    if (!what.empty() && what != "logits") throw BadInput("bench_matmul: logits or nothing, not " + what);
    bench::Table table;
    Matmul* mm = matmul_open(nullptr);
    struct Layer {
        const char* name;
        int64_t C, OC;
        Gelu kind;
    };
    constexpr Layer kLayers[] = {{"qkv", 768, 2304, Gelu::none},
                                 {"attproj", 768, 768, Gelu::none},
                                 {"fc+gelu", 768, 3072, Gelu::tanh},
                                 {"fcproj", 3072, 768, Gelu::none},
                                 {"logits", 768, 50304, Gelu::none}};
    std::vector<int64_t> tokens = {1, 256, 2048};
    if (bench::is_gpu()) tokens = {1, 16384};
    if (what == "logits") tokens = {512, 4096, 16384};
    for (int64_t N : tokens)
        for (const Layer& l : kLayers) {
            int64_t C = l.C, OC = l.OC;
            if (what == "logits" && what != l.name) continue;
            bench::Buffer out(N * OC * sizeof(real)), pre(N * OC * sizeof(real)), inp(N * C * sizeof(real)),
                w(OC * C * sizeof(real)), bias(OC * sizeof(real)), dw(OC * C * sizeof(float)),
                dbias(OC * sizeof(float));
            // Zeros would flatter a GPU, whose clocks rise where no bits change.
            for (auto [buffer, n] : {std::pair(&out, N * OC), {&pre, N * OC}, {&inp, N * C}, {&w, OC * C}})
                buffer->fill(n, [](int64_t i) { return float(i * 7919 % 251) / 125 - 1; });
            std::string shape = std::to_string(N) + "x" + std::to_string(C) + "x" + std::to_string(OC), name = l.name;
            bool gelu = l.kind != Gelu::none;
            table.run(name + " forward", shape, matmul_forward_cost(N, C, OC), [&] {
                matmul_forward(mm, out.reals(), nullptr, inp.reals(), w.reals(), bias.reals(), N, C, OC, l.kind);
            });
            if (N == 1) continue; // decoding has no backward pass
            if (gelu) {
                table.run(name + " forward, pre", shape, matmul_forward_cost(N, C, OC) + gelu_forward_cost(N * OC),
                          [&] {
                              matmul_forward(mm, out.reals(), pre.reals(), inp.reals(), w.reals(), bias.reals(), N, C,
                                             OC, l.kind);
                          });
            }
            table.run(name + " dinput", shape, matmul_backward_input_cost(N, C, OC),
                      [&] { matmul_backward_input(mm, inp.reals(), out.reals(), w.reals(), nullptr, N, C, OC); });
            if (name == "qkv") { // whose gradients come head group by head group
                table.run(name + " dinput, add", shape, matmul_backward_input_add_cost(N, C, OC),
                          [&] { matmul_backward_input_add(mm, inp.reals(), out.reals(), w.reals(), N, C, OC); });
            }
            if (name == "fcproj") { // its input is the GELU's output
                bench::Buffer act(N * C * sizeof(real));
                table.run(name + " dinput, gelu", shape,
                          matmul_backward_input_cost(N, C, OC) + gelu_backward_cost(N * C), [&] {
                              matmul_backward_input(mm, inp.reals(), out.reals(), w.reals(), act.reals(), N, C, OC,
                                                    Gelu::tanh);
                          });
            }
            table.run(name + " dweight", shape, matmul_backward_weight_cost(N, C, OC), [&] {
                matmul_backward_weight(mm, dw.floats(), dbias.floats(), out.reals(), inp.reals(), N, C, OC);
            });
        }
    matmul_close(mm);
}
