// The whole GPT-2 trainer: against HuggingFace (test/golden), against numeric differentiation of the oracle in double,
// and against itself where two ways must agree.
#include <doctest/doctest.h>

#define main trainer_main
#include "../train_gpt2.cu"
#undef main

#include "check.h"
#include "golden.h"
#include "oracle.h"

static Gpt2Config config_of(const golden::Config& c) { return {c.maxT, c.V, c.Vp, c.L, c.H, c.C}; }

static Device& device() {
    static Device one(0);
    return one;
}

template <class T> static void set_weights(Gpt2& model, const std::vector<std::vector<T>>& weights) {
    for (size_t i = 0; i < weights.size(); i++) {
        Tensor& tensor = model.tensors().list[i];
        REQUIRE(int64_t(weights[i].size()) == tensor.count);
        fill_weights(device(), tensor, [&](int64_t k) { return to_float(weights[i][k]); });
    }
}

// Gradients as the host sees them, wherever the device keeps them.
static std::vector<float> gradient(const Tensor& tensor) {
    std::vector<float> host(tensor.count);
    download(device(), host.data(), tensor.grad, host.size() * sizeof(float));
    return host;
}

static void step(Gpt2& model, const std::vector<int32_t>& tokens, const std::vector<int32_t>& targets, int64_t B) {
    model.clear(true);
    model.accumulate(tokens.data(), targets.data(), B, 1.0 / tokens.size());
}

TEST_CASE("logits, loss and gradients are HuggingFace's") {
    for (std::string name : {"gpt2_d32", "gpt2_d64", "gpt2_d80"}) {
        CAPTURE(name);
        golden::Golden want = golden::load("test/golden/" + name + ".json");
        const golden::Config& c = want.config;
        golden::Batch batch = golden::batch(c);
        Gpt2 model(device(), config_of(c), c.B, c.T, true);
        set_weights(model, golden::weights(c));

        // One sequence through a single pass for each length, the others token by token through the KV cache.
        std::vector<float> logits(c.B * c.T * c.V);
        for (int64_t b = 0; b < c.B; b++)
            for (int64_t t = 0; t < c.T; t++) {
                const int32_t* row = &batch.tokens[b * c.T];
                float* out = &logits[(b * c.T + t) * c.V];
                b == 0 ? model.next_logits(row, 0, t + 1, out) : model.next_logits(row + t, t, 1, out);
            }
        golden::Comparison compared = golden::compare("logits", c, want.logits, logits.data(), logits.size());
        CHECK_MESSAGE(compared.ok(), compared.said);

        step(model, batch.tokens, batch.targets, c.B);
        double torch = sizeof(real) == 2 ? want.loss.bf16 : want.loss.fp32;
        double allowed = 2 * std::abs(torch - want.loss.fp64) + kRealEpsilon * want.loss.fp64 / 2;
        CHECK(std::abs(model.loss() - want.loss.fp64) <= allowed);
        for (int i = 0; i < golden::kTensors; i++) {
            const Tensor& tensor = model.tensors().list[i];
            compared = golden::compare(tensor.name, c, want.gradients[i], gradient(tensor).data(), tensor.count);
            CHECK_MESSAGE(compared.ok(), compared.said);
        }
    }
}

TEST_CASE("twenty steps follow HuggingFace with torch's AdamW") {
    golden::Training want = golden::load_training("test/golden/gpt2_training.json");
    const golden::Config& c = want.config;
    Gpt2 model(device(), config_of(c), c.B, c.T, true);
    set_weights(model, golden::weights(c));
    // fp32: the bound. bf16: master weights keep the course; what is left is the rounding of one forward pass.
    double tolerance = sizeof(real) == 4 ? 1e-4 : kRealEpsilon;
    for (int64_t i = 0; i < want.optimizer.steps; i++) {
        CAPTURE(i);
        golden::Batch batch = golden::batch(c, i);
        step(model, batch.tokens, batch.targets, c.B);
        model.measure_gradients(want.optimizer.clip);
        CHECK(std::abs(model.loss() / want.fp64.losses[i] - 1) <= tolerance);
        CHECK(std::abs(model.grad_norm() / want.fp64.grad_norms[i] - 1) <= 4 * tolerance);
        const auto& o = want.optimizer;
        model.update({float(o.lr), float(o.beta1), float(o.beta2), float(o.eps), float(o.weight_decay), i + 1});
    }
}

TEST_CASE("the gradient is the derivative of the oracle's loss") {
    golden::Config c{7, 2, 64, 2, 29, 128, 11, 2, 9};
    golden::Batch batch = golden::batch(c);
    std::vector<std::vector<float>> weights = golden::weights(c);
    Gpt2 model(device(), config_of(c), c.B, c.T, true);
    set_weights(model, weights);
    step(model, batch.tokens, batch.targets, c.B);

    oracle::Gpt2Config oc{c.maxT, c.V, c.Vp, c.L, c.H, c.C};
    oracle::Gpt2Weights<oracle::Complex> w(oc);
    for (int i = 0; i < golden::kTensors; i++)
        for (size_t k = 0; k < weights[i].size(); k++) (*w.tensors()[i])[k] = weights[i][k];
    const double h = 1e-30;
    auto derivative = [&] { return oracle::gpt2_loss(w, oc, batch.tokens, batch.targets, c.B, c.T).imag() / h; };

    // Every entry of a tensor takes part in the derivative along a random direction; single entries say where.
    std::mt19937_64 rng(5);
    for (int i = 0; i < golden::kTensors; i++) {
        const Tensor& tensor = model.tensors().list[i];
        const std::vector<float> grad = gradient(tensor);
        std::vector<oracle::Complex>& x = *w.tensors()[i];
        int64_t live = i == wte ? c.V * c.C : tensor.count;
        double norm = 0;
        for (int64_t k = 0; k < tensor.count; k++) norm += double(grad[k]) * grad[k];
        norm = std::sqrt(norm);
        // Norm-wise error of a backward pass: fp32 about 30 epsilons, bf16 (whose epsilon counts twice: activations and
        // their gradients are rounded at every layer) about 3.
        double tolerance = sizeof(real) == 4 ? 30 * kRealEpsilon : 3 * kRealEpsilon;
        CAPTURE(tensor.name);
        for (int direction = 0; direction < 3; direction++) {
            double along = 0;
            for (int64_t k = 0; k < live; k++) {
                double u = rng() & 1 ? 1 : -1;
                x[k] = {x[k].real(), u * h};
                along += u * grad[k];
            }
            CHECK(std::abs(along - derivative()) <= 3 * tolerance * norm);
            for (oracle::Complex& value : x) value = value.real();
        }
        for (int sample = 0; sample < 8; sample++) {
            int64_t k = rng() % live;
            x[k] = {x[k].real(), h};
            CHECK(std::abs(grad[k] - derivative()) <= tolerance * norm);
            x[k] = x[k].real();
        }
        for (int64_t k = live; k < tensor.count; k++) CHECK(grad[k] == 0);
    }
}

TEST_CASE("micro-batches add up to the batch, and a step repeats bit for bit") {
    golden::Config c{11, 2, 64, 2, 50, 128, 300, 4, 300}; // 1200 tokens: three classifier chunks, the last one ragged
    if (check::kSimulated) c.L = 1, c.C = 32, c.H = 1;
    golden::Batch batch = golden::batch(c);
    Gpt2 whole(device(), config_of(c), 4, c.T, true), parts(device(), config_of(c), 1, c.T, true);
    set_weights(whole, golden::weights(c));
    set_weights(parts, golden::weights(c));
    step(whole, batch.tokens, batch.targets, 4);
    parts.clear(true);
    for (int64_t b = 0; b < 4; b++)
        parts.accumulate(&batch.tokens[b * c.T], &batch.targets[b * c.T], 1, 1.0 / batch.tokens.size());
    CHECK(std::abs(whole.loss() - parts.loss()) <= 4 * kRealEpsilon * whole.loss());
    Gpt2 again(device(), config_of(c), 4, c.T, true);
    set_weights(again, golden::weights(c));
    step(again, batch.tokens, batch.targets, 4);
    CHECK(again.loss() == whole.loss());
    double tolerance = std::sqrt(1200.) * kRealEpsilon; // another order of summation over the tokens
    for (int i = 0; i < golden::kTensors; i++) {
        const std::vector<float> a = gradient(whole.tensors().list[i]), b = gradient(parts.tensors().list[i]);
        check_close(whole.tensors().list[i].name.c_str(), b, to_double(a), tolerance);
        CHECK(check::same_bits(a, gradient(again.tensors().list[i])));
    }
    // The validation path is the training path without its gradient.
    double loss = whole.loss();
    whole.clear(false);
    whole.evaluate(batch.tokens.data(), batch.targets.data(), 4, 1.0 / batch.tokens.size());
    CHECK(whole.loss() == loss);
    Gpt2 inference(device(), config_of(c), 4, c.T, false);
    set_weights(inference, golden::weights(c));
    inference.clear(false);
    inference.evaluate(batch.tokens.data(), batch.targets.data(), 4, 1.0 / batch.tokens.size());
    // Without a backward pass the GELU is fused into the matmul, whose polynomial is oneDNN's.
    CHECK(std::abs(inference.loss() - loss) <= 4 * kRealEpsilon * loss);
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
