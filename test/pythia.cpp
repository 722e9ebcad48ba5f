// The whole Pythia trainer: against HuggingFace (test/golden), against numeric differentiation of the oracle in double,
// and against itself where two ways must agree.
#include <doctest/doctest.h>

#define main trainer_main
#include "../train_pythia.cu"
#undef main

#include "memory_check.h"

static std::unique_ptr<Transformer> make(const golden::Config& c, const Setup& setup) {
    PythiaConfig config{{c.maxT, c.V, c.Vp, c.L, c.H, c.C}, c.parallel, c.gelu, c.rope};
    return std::make_unique<Pythia>(trainer::device(), config, setup);
}

// Two layers with two heads of 32 dimensions, eight of them rotated.
static golden::Config small(uint64_t seed, int64_t V, int64_t B, int64_t T) {
    golden::Config c{seed, 2, 64, 2, V, pad_vocab(V), T, B, T, golden::Family::pythia};
    c.gelu = Gelu::erf;
    c.rope = {RopeMode::none, 8, 2048};
    return c;
}

TEST_CASE("logits, loss and gradients are HuggingFace's: every head dim, residual form and GELU") {
    trainer::check_golden(make, "pythia_d80");
    if (!check::first_seed()) return; // what another order of threads may change shows in one
    for (const char* name : {"pythia_d32", "pythia_d64", "pythia_d128", "pythia_d256", "pythia_whole"})
        trainer::check_golden(make, name);
}

TEST_CASE("logits, loss and gradients are HuggingFace's: stretched positions" * doctest::skip(!check::first_seed())) {
    for (const char* name : {"pythia_linear", "pythia_dynamic", "pythia_yarn"}) trainer::check_golden(make, name);
}

TEST_CASE("logits, loss and gradients are HuggingFace's: past the 2048 positions of the published models" *
          doctest::test_suite(check::kSimulated ? "long" : "") * doctest::skip(!check::first_seed())) {
    trainer::check_golden(make, "pythia_long");
}

TEST_CASE("twenty steps follow HuggingFace with torch's AdamW" * doctest::skip(!check::first_seed())) {
    trainer::check_training(make, "pythia_training");
}

TEST_CASE("the gradient is the derivative of the oracle's loss") {
    golden::Config c = small(7, 29, 2, 9);
    trainer::check_derivative(make, c);
    c.parallel = false, c.gelu = Gelu::tanh;
    trainer::check_derivative(make, c);
}

// What transformers has no model of: NTK, and YaRN's temperature on all of a head.
TEST_CASE("the gradient is the derivative of the oracle's loss: rotary modes of our own") {
    golden::Config c = small(8, 29, 1, 9);
    c.L = 1;
    c.rope = {RopeMode::ntk, 8, 2048, 100, 3};
    trainer::check_derivative(make, c);
    c.rope = {RopeMode::yarn, 8, 64, 10, 4, true};
    trainer::check_derivative(make, c);
}

TEST_CASE("micro-batches add up to the batch, and a step repeats bit for bit") {
    golden::Config c = small(11, 50, 4, 300); // 1200 tokens: three classifier chunks, the last one ragged
    if (check::kSimulated) c.L = 1, c.C = 32, c.H = 1;
    if (!check::first_seed()) c.T = 150; // half will do
    trainer::check_repetition(make, c);
}

TEST_CASE("gradients in bf16") { trainer::check_narrow_gradients(make, small(7, 29, 2, 9)); }

TEST_CASE("memory options change memory, not the mathematics" * doctest::skip(!check::first_seed())) {
    golden::Config c = small(13, 29, 2, 11);
    c.L = 4, c.C = 96, c.H = 3;
    trainer::check_memory_options(make, c);
    if (check::kSimulated) return; // what is left is GPT-2's block
    c.parallel = false;
    trainer::check_memory_options(make, c);
}

TEST_CASE("updates of what waits on the host" * doctest::skip(!check::first_seed())) {
    trainer::check_host_updates(make, small(7, 29, 2, 9));
}

TEST_CASE("named sizes have the published parameter counts") {
    struct {
        const char* name;
        int64_t count;
    } published[] = {{"14m", 14067712},    {"31m", 30494720},   {"70m", 70426624},    {"160m", 162322944},
                     {"410m", 405334016},  {"1b", 1011781632},  {"1.4b", 1414647808}, {"2.8b", 2775208960},
                     {"6.9b", 6857302016}, {"12b", 11846072320}};
    for (auto [name, count] : published) {
        CAPTURE(name);
        Options options;
        options.model = name;
        PythiaConfig c = config_from_options(options);
        CHECK(pythia_tensors(c).count() - 2 * (c.Vp - c.V) * c.C == count);
        CHECK(c.rope.dims * 4 == c.D());
    }
}

TEST_CASE("weights from scratch are distributed as Pythia's") {
    PythiaConfig c;
    const int64_t C = 256;
    static_cast<ModelSizes&>(c) = {8, 61, 128, 3, 8, C};
    c.rope.dims = 8, c.rope.original = 8;
    Pythia model(trainer::device(), c, Setup{1, 8, false});
    model.allocate();
    model.init_weights(7);
    const double others = std::sqrt(2.0 / (5 * C)),
                 projections = 2 / (3 * std::sqrt(double(C))); // "small init", Wang's
    for (size_t i : {embedin, qkvw, attprojw, fcw, fcprojw, embedout, ln1w, ln2b, fcb}) {
        const Tensor& tensor = model.tensors().list[i];
        CAPTURE(tensor.name);
        const int64_t live = i == embedin || i == embedout ? c.V * C : tensor.count;
        std::vector<real> values(tensor.count);
        download(trainer::device(), values.data(), tensor.param, values.size() * sizeof(real));
        double sum = 0, squares = 0;
        for (int64_t k = 0; k < live; k++) sum += to_float(values[k]), squares += std::pow(to_float(values[k]), 2);
        for (int64_t k = live; k < tensor.count; k++) REQUIRE(to_float(values[k]) == 0);
        const double want = i == attprojw || i == fcprojw ? projections : others;
        if (i == ln1w || i == ln2b || i == fcb) {
            CHECK(sum == (i == ln1w ? live : 0));
        } else { // the deviation of a sample's is std/sqrt(2n), of its mean std/sqrt(n)
            CHECK(std::abs(std::sqrt(squares / live) - want) <= want * (5 / std::sqrt(2.0 * live) + kRealEpsilon / 4));
            CHECK(std::abs(sum / live) <= 5 * want / std::sqrt(double(live)));
        }
    }
    c.L = 2, c.C = 4096; // what 6.9b and 12b got
    CHECK(init_std(c).others == 0.02);
    CHECK(init_std(c).projections == doctest::Approx(0.01));
}
