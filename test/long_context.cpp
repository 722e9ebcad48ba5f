// An optimizer step at 262,144 tokens: a model of one layer, one head and width 32, with everything kept, and in chunks
// with nothing kept but the layer's input.
#include <doctest/doctest.h>

#define main trainer_main
#include "../train_gpt2.cu"
#undef main

#include "memory_check.h"

TEST_CASE("a step at 262,144 tokens has the gradients of the unchunked path" * doctest::test_suite("long") *
          doctest::skip(check::kSimulated)) {
    const golden::Config c{17, 1, 32, 1, 61, 128, 1024, 1, 1 << 18};
    const golden::Batch batch = golden::batch(c);
    auto gradients = [&](const ActivationMemory& memory) {
        Gpt2Config config{{1024, c.V, c.Vp, c.L, c.H, c.C}};
        config.tied = c.T;
        Setup setup{1, c.T, true};
        setup.activations = memory;
        trainer::Make make = [&](const golden::Config&, const Setup& s) {
            return std::make_unique<Gpt2>(trainer::device(), config, s);
        };
        std::unique_ptr<Transformer> model = trainer::made(make, c, setup);
        trainer::step(*model, batch, 1);
        std::vector<std::vector<float>> all;
        for (const Tensor& tensor : model->tensors().list) all.push_back(trainer::gradient(tensor));
        model->measure_gradients(1);
        Optimizer options{1e-3f};
        model->update(options);
        all.push_back({float(model->loss()), model->grad_norm() > 0 ? float(model->grad_norm()) : NAN});
        return all;
    };
    const auto whole = gradients({}), chunked = gradients({Recompute::full, 4096, 1, true});
    // Sums over 262,144 tokens in another order: float's error grows with the root of their number.
    const double tolerance = std::sqrt(double(c.T)) * kRealEpsilon;
    for (size_t i = 0; i < whole.size(); i++) {
        CAPTURE(i);
        check_close("gradient", chunked[i], to_double(whole[i]), tolerance);
    }
}
