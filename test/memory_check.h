// Memory options change memory, not mathematics: the same gradients, losses, logits and updates whatever is kept,
// recomputed, cut in chunks or groups, or waits on the host. For both trainers.
#pragma once
#include <cstring>

#include "scratch.h"
#include "trainer_check.h"

namespace trainer {

struct Outcome {
    double loss, validation;
    std::vector<std::vector<float>> gradients;
    std::vector<float> logits; // of the last tokens, through the cache
};

// As each phase of a step begins, all memory but what lasts from the one before becomes NaN, and what the phase does
// not have loses its address, so that nothing is right by the luck of a layout. Only where the host may write there.
inline void spoil_between_phases(Transformer& model) {
    if (!device_is_host()) return;
    constexpr size_t kUnit = 256; // of the arena's places
    Arena& arena = model.arena();
    const Arena::Item first = arena.items()[0];
    char* memory = static_cast<char*>(*first.pointer) - first.offset;
    model.watch = [&arena, memory, before = kUpdate](Phases phase) mutable {
        std::vector<char> lasts(arena.bytes() / kUnit);
        for (const Arena::Item& item : arena.items()) {
            if (item.phases & before && item.phases & phase) memset(&lasts[item.offset / kUnit], 1, item.bytes / kUnit);
            *item.pointer = item.phases & phase ? memory + item.offset : nullptr;
        }
        for (size_t i = 0; i < lasts.size(); i++)
            if (!lasts[i]) memset(memory + i * kUnit, 0xff, kUnit);
        before = phase;
    };
}

// Two micro-batches, so that the second finds what the first left behind; then validation and a sample in between, and
// two more, whose gradients must be those of the first two.
inline Outcome outcome(const Make& make, const golden::Config& c, const Setup& setup) {
    const golden::Batch batch = golden::batch(c);
    const int32_t *tokens = batch.tokens.data(), *targets = batch.targets.data();
    const double factor = 1.0 / (c.B * c.T);
    std::unique_ptr<Transformer> model = made(make, c, setup);
    spoil_between_phases(*model);
    auto gradients = [&] {
        model->begin_step(0);
        model->accumulate(tokens, targets, c.B, factor / 2, false);
        model->accumulate(tokens, targets, 1, factor, true); // fewer sequences than there is room for
        std::vector<std::vector<float>> all;
        for (const Tensor& tensor : model->tensors().list) all.push_back(gradient(tensor));
        model->measure_gradients(1);
        return all;
    };
    Outcome out;
    out.gradients = gradients();
    out.loss = model->loss();
    model->clear_loss();
    model->evaluate(tokens, targets, c.B, factor);
    out.validation = model->loss();
    out.logits.resize(c.V);
    model->next_logits(tokens, 0, c.T - 2, out.logits.data());
    model->next_logits(tokens + c.T - 2, c.T - 2, 2, out.logits.data());
    const auto again = gradients();
    for (size_t i = 0; i < again.size(); i++) CHECK(check::same_bits(again[i], out.gradients[i]));
    return out;
}

inline void check_same(const Outcome& a, const Outcome& b) {
    CHECK(a.loss == b.loss);
    CHECK(a.validation == b.validation);
    CHECK(check::same_bits(a.logits, b.logits));
    for (size_t i = 0; i < a.gradients.size(); i++) CHECK(check::same_bits(a.gradients[i], b.gradients[i]));
}

// Another order of sums, or another cut of a product: within the error of a backward pass, as check_derivative() has
// it.
inline void check_close(const Outcome& a, const Outcome& b) {
    CHECK(std::abs(a.loss - b.loss) <= 4 * kRealEpsilon * b.loss);
    CHECK(std::abs(a.validation - b.validation) <= 4 * kRealEpsilon * b.validation);
    auto close = [](const std::vector<float>& got, const std::vector<float>& want) {
        double error = 0, norm = 0;
        for (size_t k = 0; k < want.size(); k++)
            error += std::pow(double(got[k]) - want[k], 2), norm += std::pow(double(want[k]), 2);
        CHECK(std::sqrt(error / norm) <= (sizeof(real) == 4 ? 30 : 3) * kRealEpsilon);
    };
    close(a.logits, b.logits);
    for (size_t i = 0; i < a.gradients.size(); i++) {
        CAPTURE(i);
        close(a.gradients[i], b.gradients[i]);
    }
}

inline void check_memory_options_of(const Make& make, const golden::Config& c) {
    CAPTURE(c.L);
    Setup setup{c.B, c.T, true, c.T};
    const Outcome whole = outcome(make, c, setup);
    std::vector<int64_t> chunks = {0, 7, c.T * c.B - 1}, groups = {0, 1, 2};
    if (check::kSimulated) chunks = {0, 7}, groups = {0, 1};
    for (int64_t chunk : chunks)
        for (int64_t group : groups) {
            // Of one chunk and group size all must agree to the bit.
            std::unique_ptr<Outcome> first;
            for (Recompute recompute : {Recompute::none, Recompute::block, Recompute::full})
                for (bool offload : {false, true}) {
                    if (recompute == Recompute::none && (offload || group)) continue;
                    if (check::kSimulated && offload != (recompute == Recompute::full)) continue;
                    CAPTURE(chunk);
                    CAPTURE(group);
                    CAPTURE(int(recompute));
                    CAPTURE(offload);
                    setup.activations = {recompute, chunk, group, offload};
                    const Outcome got = outcome(make, c, setup);
                    if (first) {
                        check_same(got, *first);
                        continue;
                    }
                    first = std::make_unique<Outcome>(got);
                    if (chunk || group)
                        check_close(got, whole);
                    else
                        check_same(got, whole);
                }
        }
    setup.activations = {};
    setup.activations.logits_rows = 3;
    check_close(outcome(make, c, setup), whole);
    setup.activations = {Recompute::none, 0, 1};
    CHECK_THROWS_AS(make(c, setup), BadInput);
    setup.activations = {Recompute::none, 0, 0, true};
    CHECK_THROWS_AS(make(c, setup), BadInput);
}

// c has three heads and four layers, so that a group of two is ragged and two layers wait on the host; and as many
// layers as take turns on the device, one more, and one less. dev/simt, which takes its time, has two heads and three
// layers.
inline void check_memory_options(const Make& make, golden::Config c) {
    if (check::kSimulated) c.L = 3, c.C = 64, c.H = 2, c.T = c.maxT = 5;
    for (const int64_t most = c.L; c.L > 0 && (c.L == most || !check::kSimulated); c.L--)
        check_memory_options_of(make, c);
}

// Weights and states after three updates do not depend on where states and master weights wait.
inline void check_host_updates(const Make& make, const golden::Config& c) {
    const golden::Batch batch = golden::batch(c);
    auto updated = [&](TrainingMemory memory) {
        Setup setup{c.B, c.T, true};
        setup.weights = memory;
        std::unique_ptr<Transformer> model = made(make, c, setup);
        for (int64_t t = 1; t <= 3; t++) {
            step(*model, batch, c.B);
            model->measure_gradients(1);
            Optimizer options{1e-3f};
            options.t = t;
            model->update(options);
        }
        ScratchFolder folder;
        auto file = [&](auto write) {
            FileWriter writer(folder / "file");
            write(writer);
            writer.close();
            std::string bytes = get_file(folder / "file");
            std::filesystem::remove(folder / "file");
            return bytes;
        };
        return file([&](FileWriter& f) { model->write_file(f); }) +
               file([&](FileWriter& f) { write_state(device(), f, model->tensors()); });
    };
    for (Rule rule : {Rule::adamw, Rule::lion})
        for (StateType type : {StateType::fp32, StateType::bf16, StateType::int8})
            for (bool master : {true, false}) {
                if (check::kSimulated && (rule == Rule::lion || type == StateType::bf16)) continue;
                TrainingMemory memory;
                memory.rule = rule, memory.state = type, memory.master = master;
                const std::string want = updated(memory);
                for (int where = 1; where < 4; where++) {
                    CAPTURE(int(type));
                    CAPTURE(where);
                    memory.host_states = where & 1, memory.host_master = where & 2;
                    CHECK(updated(memory) == want);
                }
            }
}

} // namespace trainer
