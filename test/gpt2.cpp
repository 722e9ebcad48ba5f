// The whole GPT-2 trainer: against HuggingFace (test/golden), against numeric differentiation of the oracle in double,
// and against itself where two ways must agree.
#include <doctest/doctest.h>

#define main trainer_main
#include "../train_gpt2.cu"
#undef main

#include "trainer_check.h"

static std::unique_ptr<Model> make(const golden::Config& c, int64_t B, bool training) {
    Gpt2Config config{c.maxT, c.V, c.Vp, c.L, c.H, c.C};
    return std::make_unique<Gpt2>(trainer::device(), config, B, c.T, training);
}

TEST_CASE("logits, loss and gradients are HuggingFace's") {
    for (const char* name : {"gpt2_d32", "gpt2_d64", "gpt2_d80"}) trainer::check_golden(make, name);
}

TEST_CASE("twenty steps follow HuggingFace with torch's AdamW") { trainer::check_training(make, "gpt2_training"); }

TEST_CASE("the gradient is the derivative of the oracle's loss") {
    trainer::check_derivative(make, {7, 2, 64, 2, 29, 128, 11, 2, 9});
}

TEST_CASE("micro-batches add up to the batch, and a step repeats bit for bit") {
    golden::Config c{11, 2, 64, 2, 50, 128, 300, 4, 300}; // 1200 tokens: three classifier chunks, the last one ragged
    if (check::kSimulated) c.L = 1, c.C = 32, c.H = 1;
    trainer::check_repetition(make, c);
}

TEST_CASE("named sizes have the published parameter counts") {
    struct {
        const char* name;
        int64_t count;
    } published[] = {{"124M", 124439808}, {"355M", 354823168}, {"774M", 774030080}, {"1558M", 1557611200}};
    for (auto [name, count] : published) {
        Options options;
        options.model = name;
        Gpt2Config c = config_from_options(options);
        CHECK(gpt2_tensors(c).count() - (c.Vp - c.V) * c.C == count);
    }
}
