// GPT-2 124M's token and position embedding. Tokens are uniformly random: the worst case, in which nearly every token
// is another row; real text repeats rows and finds them in the cache.
#include "../../kernels/embedding.h"

#include <random>

#include "bench.h"

void bench::run(const std::string&) {
    bench::Table table;
    const int64_t C = 768, V = 50257;
    for (int64_t T : {256, 8192, 65536}) {
        bench::Buffer wte(V * C * sizeof(real)), wpe(T * C * sizeof(real)), out(T * C * sizeof(real));
        bench::Buffer dwte(V * C * sizeof(float)), dwpe(T * C * sizeof(float));
        std::vector<int32_t> drawn(T);
        std::mt19937 rng(1);
        for (int32_t& token : drawn) token = int32_t(rng() % V);
        bench::Buffer tokens_(drawn);
        const int32_t* tokens = tokens_.as<int32_t>();
        EmbeddingShape shape{1, T, C};
        bench::Buffer scratch(embedding_backward_scratch(shape));
        const std::string name = std::to_string(T) + "x" + std::to_string(C);
        table.run("embedding forward", name, embedding_forward_cost(shape, true),
                  [&] { embedding_forward(nullptr, out.reals(), tokens, wte.reals(), wpe.reals(), shape); });
        table.run("embedding backward", name, embedding_backward_cost(shape, true), [&] {
            embedding_backward(nullptr, dwte.floats(), dwpe.floats(), out.reals(), tokens, scratch.floats(), shape);
        });
    }
}
