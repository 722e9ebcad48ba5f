// What the optimizer's update is of a step of GPT-2 124M at B = 4, T = 64, with states in fp32, in 8 bits, and in 8
// bits for the embeddings too: medians of 26 steps, the clock's time.
#define main trainer_main
#include "../../train_gpt2.cu"
#undef main

#include <chrono>

#include "backend.h"

static double seconds() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

static double median(std::vector<double> values) {
    std::sort(values.begin(), values.end());
    return values[values.size() / 2];
}

static void measure(const char* state, const char* embeddings) {
    Options options;
    options.model = "124M", options.context = 64, options.batch = 4, options.sample_every = 0;
    options.state = state, options.state_embeddings = embeddings;
    Device device(0);
    Gpt2 model(device, config_from_options(options), make_setup(options, options.context));
    model.allocate();
    model.init_weights(1);
    std::vector<int32_t> tokens(257);
    for (size_t i = 0; i < tokens.size(); i++) tokens[i] = int32_t(i * 37 % 50000);
    std::vector<double> steps, updates, shares;
    for (int step = 1; step <= 30; step++) {
        const double begin = seconds();
        model.begin_step(step);
        model.accumulate(tokens.data(), tokens.data() + 1, 4, 1 / 256.0, true);
        model.measure_gradients(1);
        model.grad_norm(); // waits
        const double middle = seconds();
        Optimizer optimizer{1e-4f};
        optimizer.t = step;
        model.update(optimizer);
        model.counts(); // waits
        const double end = seconds();
        if (step <= 4) continue; // while libraries choose their kernels and pages are first touched
        steps.push_back(end - begin), updates.push_back(end - middle), shares.push_back((end - middle) / (end - begin));
    }
    printf("update of 124M, B=4 T=64, states %s, of embeddings %s: %.1f of %.1f ms, %.1f%%\n", state, embeddings,
           1e3 * median(updates), 1e3 * median(steps), 100 * median(shares));
}

void bench::run(const std::string&) {
    measure("fp32", "fp32");
    measure("int8", "fp32");
    measure("int8", "int8");
}
