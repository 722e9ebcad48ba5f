// What the tests of both trainers share: a model of either family against HuggingFace (test/golden), against the
// derivative of the oracle's loss, and against itself where two ways must agree. A test includes its trainer's source
// first and says how to make its model.
#pragma once
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include <doctest/doctest.h>

#include "../runtime/device/device.h"
#include "../runtime/model/transformer.h"
#include "asynchronous.h"
#include "check.h"
#include "golden_oracle.h"

namespace trainer {

// Of the configuration.
using Make = std::function<std::unique_ptr<Transformer>(const golden::Config& c, const Setup& setup)>;

inline Device& device() {
    static Device one(0);
    return one;
}

inline std::unique_ptr<Transformer> made(const Make& make, const golden::Config& c, const Setup& setup) {
    std::unique_ptr<Transformer> model = make(c, setup);
    model->allocate();
    const std::vector<std::vector<float>> weights = golden::weights(c);
    const std::vector<golden::Recipe> recipes = golden::tensors(c);
    REQUIRE(model->tensors().list.size() == recipes.size());
    for (size_t i = 0; i < recipes.size(); i++) {
        Tensor& tensor = model->tensors().list[i];
        REQUIRE(tensor.name == recipes[i].name);
        REQUIRE(tensor.count == recipes[i].n);
        fill_weights(device(), tensor, [&](int64_t k) { return weights[i][k]; });
    }
    return model;
}
// With the configuration's context, batches of up to B sequences, and a cache for a whole one.
inline std::unique_ptr<Transformer> made(const Make& make, const golden::Config& c, int64_t B, bool training = true) {
    return made(make, c, Setup{B, c.T, training, c.T});
}

// Gradients as the host sees them, wherever the device keeps them.
inline std::vector<float> gradient(const Tensor& tensor) {
    std::vector<float> host(tensor.count);
    download(device(), host.data(), tensor.grad, host.size() * sizeof(float));
    return host;
}

inline void step(Model& model, const golden::Batch& batch, int64_t B) {
    model.begin_step(0);
    model.accumulate(batch.tokens.data(), batch.targets.data(), B, 1.0 / batch.tokens.size(), true);
}

// (B,T,V), token by token through the KV cache, every eighth row and the last by a whole pass that fills the cache anew
// (each length of a pass is another matmul to set up). dev/simt has no time for so many passes over a long text.
inline std::vector<float> logits(Model& model, const golden::Config& c, const golden::Batch& batch) {
    std::vector<float> all(c.B * c.T * c.V);
    const int64_t whole_pass = check::kSimulated && c.T > 1000 ? c.T : 8;
    for (int64_t b = 0; b < c.B; b++)
        for (int64_t t = 0; t < c.T; t++) {
            const int32_t* row = &batch.tokens[b * c.T];
            const int64_t first = t % whole_pass == 0 || t == c.T - 1 ? 0 : t;
            model.next_logits(row + first, first, t + 1 - first, &all[(b * c.T + t) * c.V]);
        }
    return all;
}

// Logits, loss and gradients are HuggingFace's, within twice PyTorch's own error.
inline void check_golden(const Make& make, const std::string& name) {
    CAPTURE(name);
    const golden::Golden want = golden::load("test/golden/" + name + ".json");
    const golden::Config& c = want.config;
    const golden::Batch batch = golden::batch(c);
    std::unique_ptr<Transformer> model = made(make, c, c.B);

    const std::vector<float> all = logits(*model, c, batch);
    golden::Comparison compared = golden::compare("logits", c, want.logits, all.data(), all.size());
    CHECK_MESSAGE(compared.ok(), compared.said);

    step(*model, batch, c.B);
    double torch = sizeof(real) == 2 ? want.loss.bf16 : want.loss.fp32;
    double allowed = 2 * std::abs(torch - want.loss.fp64) + kRealEpsilon * want.loss.fp64 / 2;
    CHECK(std::abs(model->loss() - want.loss.fp64) <= allowed);
    for (size_t i = 0; i < want.gradients.size(); i++) {
        const Tensor& tensor = model->tensors().list[i];
        compared = golden::compare(tensor.name, c, want.gradients[i], gradient(tensor).data(), tensor.count);
        CHECK_MESSAGE(compared.ok(), compared.said);
    }
}

// Twenty steps follow HuggingFace with torch's AdamW.
inline void check_training(const Make& make, const std::string& name) {
    const golden::Training want = golden::load_training("test/golden/" + name + ".json");
    const golden::Config& c = want.config;
    std::unique_ptr<Transformer> model = made(make, c, c.B);
    // fp32: the bound. bf16: master weights keep the course; what is left is the rounding of one forward pass.
    double tolerance = sizeof(real) == 4 ? 1e-4 : kRealEpsilon;
    for (int64_t i = 0; i < want.optimizer.steps; i++) {
        CAPTURE(i);
        step(*model, golden::batch(c, i), c.B);
        model->measure_gradients(want.optimizer.clip);
        CHECK(std::abs(model->loss() / want.fp64.losses[i] - 1) <= tolerance);
        CHECK(std::abs(model->grad_norm() / want.fp64.grad_norms[i] - 1) <= 4 * tolerance);
        const auto& o = want.optimizer;
        model->update({float(o.lr), float(o.beta1), float(o.beta2), float(o.eps), float(o.weight_decay), i + 1});
    }
}

// The gradient is the derivative of the oracle's loss.
inline void check_derivative(const Make& make, const golden::Config& c) {
    std::unique_ptr<Transformer> model = made(make, c, c.B);
    step(*model, golden::batch(c), c.B);
    golden::Oracle<oracle::Complex> truth(c);
    const double h = 1e-30;
    auto derivative = [&] { return truth.loss().imag() / h; };

    // Every entry of a tensor takes part in the derivative along a random direction; single entries say where.
    std::mt19937_64 rng(5);
    for (size_t i = 0; i < model->tensors().list.size(); i++) {
        const Tensor& tensor = model->tensors().list[i];
        const std::vector<float> grad = gradient(tensor);
        std::vector<oracle::Complex>& x = *truth.tensors()[i];
        const int64_t live = golden::tensors(c)[i].live;
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

// Micro-batches add up to the batch, a step repeats bit for bit, and validation has the training's loss.
inline void check_repetition(const Make& make, const golden::Config& c) {
    const golden::Batch batch = golden::batch(c);
    const size_t N = batch.tokens.size();
    std::unique_ptr<Transformer> whole = made(make, c, c.B), parts = made(make, c, 1), again = made(make, c, c.B);
    step(*whole, batch, c.B);
    parts->begin_step(0);
    for (int64_t b = 0; b < c.B; b++)
        parts->accumulate(&batch.tokens[b * c.T], &batch.targets[b * c.T], 1, 1.0 / N, b + 1 == c.B);
    CHECK(std::abs(whole->loss() - parts->loss()) <= 4 * kRealEpsilon * whole->loss());
    step(*again, batch, c.B);
    CHECK(again->loss() == whole->loss());
    double tolerance = std::sqrt(double(N)) * kRealEpsilon; // another order of summation over the tokens
    for (size_t i = 0; i < whole->tensors().list.size(); i++) {
        const Tensor& tensor = whole->tensors().list[i];
        const std::vector<float> a = gradient(tensor), b = gradient(parts->tensors().list[i]);
        check_close(tensor.name.c_str(), b, to_double(a), tolerance);
        CHECK(check::same_bits(a, gradient(again->tensors().list[i])));
    }
    // The validation path is the training path without its gradient.
    double loss = whole->loss();
    whole->clear_loss();
    whole->evaluate(batch.tokens.data(), batch.targets.data(), c.B, 1.0 / N);
    CHECK(whole->loss() == loss);
    std::unique_ptr<Transformer> inference = made(make, c, c.B, false);
    inference->clear_loss();
    inference->evaluate(batch.tokens.data(), batch.targets.data(), c.B, 1.0 / N);
    // Without a backward pass the GELU is fused into the matmul, whose polynomial is oneDNN's.
    CHECK(std::abs(inference->loss() - loss) <= 4 * kRealEpsilon * loss);
}

// Gradients of layers that are kept in bf16 are the float ones, each micro-batch's added with rounding by chance; with
// the same step the same bits, with another step another noise.
inline void check_narrow_gradients(const Make& make, const golden::Config& c) {
    const golden::Batch batch = golden::batch(c);
    Setup narrow{c.B, c.T, true};
    narrow.weights.bf16_grads = true;
    // The gradients of `times` micro-batches, as if they were one batch.
    auto gradients = [&](Model& model, int64_t step, int times) {
        model.begin_step(step);
        for (int i = 0; i < times; i++)
            model.accumulate(batch.tokens.data(), batch.targets.data(), c.B, 1.0 / batch.tokens.size(), i + 1 == times);
        std::vector<std::vector<float>> all;
        for (const Tensor& tensor : model.tensors().list) {
            if (tensor.grad) {
                all.push_back(gradient(tensor));
                continue;
            }
            std::vector<bf16> host(tensor.count);
            download(device(), host.data(), tensor.grad_bf16, host.size() * sizeof(bf16));
            all.emplace_back();
            for (bf16 g : host) all.back().push_back(to_float(g));
        }
        return all;
    };
    std::unique_ptr<Transformer> wide = made(make, c, c.B), rounded = made(make, c, narrow);
    const auto want = gradients(*wide, 3, 1), got = gradients(*rounded, 3, 1), again = gradients(*rounded, 3, 1),
               other = gradients(*rounded, 4, 1);
    for (size_t i = 0; i < want.size(); i++) {
        const Tensor& tensor = rounded->tensors().list[i];
        CAPTURE(tensor.name);
        CHECK((tensor.grad == nullptr) == (tensor.layers > 0));
        CHECK(check::same_bits(got[i], again[i]));
        if (tensor.grad) {
            CHECK(check::same_bits(got[i], want[i]));
            continue;
        }
        for (size_t k = 0; k < got[i].size(); k++) // one of the two neighbours
            REQUIRE(std::abs(got[i][k] - want[i][k]) <= 0x1p-7 * std::abs(want[i][k]));
        CHECK_FALSE(check::same_bits(got[i], other[i]));
    }
    // The norm that clips takes both kinds.
    wide->measure_gradients(1), rounded->measure_gradients(1);
    CHECK(std::abs(rounded->grad_norm() / wide->grad_norm() - 1) < 0x1p-7);

    // Over many micro-batches errors of chance average out, as a random walk; with one noise for all of them, or
    // nearest rounding, sums would stop growing where a gradient is half a step, 2^-9 of the sum.
    if (check::kSimulated) return;
    constexpr int kTimes = 700;
    const auto sums = gradients(*rounded, 3, kTimes);
    for (size_t i = 0; i < want.size(); i++) {
        CAPTURE(rounded->tensors().list[i].name);
        double error = 0, norm = 0;
        for (size_t k = 0; k < want[i].size(); k++) {
            error += std::pow(sums[i][k] / kTimes - want[i][k], 2);
            norm += std::pow(want[i][k], 2);
        }
        // A step is at most 2^-7 of the sum, its variance a quarter of a step's square at most: sqrt(700/3)·2^-8 = 6%.
        CHECK(std::sqrt(error / norm) < 0.06);
    }
}

} // namespace trainer
