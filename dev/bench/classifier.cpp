// GPT-2 124M's softmax and cross-entropy over 50257 tokens, padded to 50304.
#include "../../kernels/classifier.h"

#include "bench.h"

void bench::run(const std::string&) {
    bench::Table table;
    const int64_t V = 50257, Vp = 50304;
    for (int64_t N : {256, 8192}) {
        // A trainer holds a chunk of logits at a time; a call of 1024 tokens is far beyond any cache all the same.
        const int64_t chunk = std::min<int64_t>(N, 1024), chunks = N / chunk;
        bench::Buffer logits_(chunk * Vp * sizeof(real)), losses(chunk * sizeof(float));
        real* logits = logits_.reals();
        std::vector<int32_t> wanted(chunk);
        for (int64_t n = 0; n < chunk; n++) wanted[n] = int32_t(n * 49 % V);
        bench::Buffer targets_(wanted);
        const int32_t* targets = targets_.as<int32_t>();
        const std::string shape = std::to_string(N) + "x" + std::to_string(Vp);
        table.run("classifier forward", shape, double(chunks) * classifier_forward_cost(chunk, V), [&] {
            for (int64_t i = 0; i < chunks; i++)
                classifier_forward(nullptr, losses.floats(), logits, targets, chunk, V, Vp);
        });
        table.run("classifier with gradient", shape, double(chunks) * classifier_forward_backward_cost(chunk, V, Vp),
                  [&] {
                      for (int64_t i = 0; i < chunks; i++)
                          classifier_forward_backward(nullptr, losses.floats(), logits, targets, 1.f / N, chunk, V, Vp);
                  });
    }
}
