// The whole GPT-2 trainer: against HuggingFace (test/golden), against numeric differentiation of the oracle in double,
// and against itself where two ways must agree.
#include <doctest/doctest.h>

#define main trainer_main
#include "../train_gpt2.cu"
#undef main

#include "memory_check.h"
#include "scratch.h"

static std::unique_ptr<Transformer> make(const golden::Config& c, const Setup& setup) {
    return std::make_unique<Gpt2>(trainer::device(), Gpt2Config{{c.maxT, c.V, c.Vp, c.L, c.H, c.C}}, setup);
}

TEST_CASE("logits, loss and gradients are HuggingFace's") {
    trainer::check_golden(make, "gpt2_d64");
    if (!check::first_seed()) return; // what another order of threads may change shows in one
    for (const char* name : {"gpt2_d32", "gpt2_d80"}) trainer::check_golden(make, name);
}

TEST_CASE("twenty steps follow HuggingFace with torch's AdamW" * doctest::skip(!check::first_seed())) {
    trainer::check_training(make, "gpt2_training");
}

TEST_CASE("the gradient is the derivative of the oracle's loss") {
    trainer::check_derivative(make, {7, 2, 64, 2, 29, 128, 11, 2, 9});
}

TEST_CASE("micro-batches add up to the batch, and a step repeats bit for bit") {
    golden::Config c{11, 2, 64, 2, 50, 128, 300, 4, 300}; // 1200 tokens: three classifier chunks, the last one ragged
    if (check::kSimulated) c.L = 1, c.C = 32, c.H = 1;
    if (!check::first_seed()) c.T = 150; // half will do
    trainer::check_repetition(make, c);
}

TEST_CASE("memory options change memory, not the mathematics" * doctest::skip(!check::first_seed())) {
    trainer::check_memory_options(make, {13, 4, 96, 3, 29, 128, 11, 2, 11});
}

TEST_CASE("updates of what waits on the host" * doctest::skip(!check::first_seed())) {
    trainer::check_host_updates(make, {7, 2, 64, 2, 29, 128, 11, 2, 9});
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

TEST_CASE("gradients in bf16") { trainer::check_narrow_gradients(make, {7, 2, 64, 2, 29, 128, 11, 2, 9}); }

TEST_CASE("bytes of the optimizer's states") {
    Options options;
    options.model = "124M";
    Gpt2Config c = config_from_options(options);
    Tensors t = gpt2_tensors(c);
    auto bytes_each = [&](Rule rule, StateType type, bool embeddings) {
        t.memory.rule = rule, t.memory.state = type, t.memory.int8_embeddings = embeddings;
        return double(t.states_bytes()) / t.count();
    };
    CHECK(bytes_each(Rule::adamw, StateType::fp32, false) == doctest::Approx(8).epsilon(1e-4));
    CHECK(bytes_each(Rule::adamw, StateType::bf16, false) == doctest::Approx(4).epsilon(1e-4));
    // 2 + 8/256, and vectors at 8.
    CHECK(bytes_each(Rule::adamw, StateType::int8, true) == doctest::Approx(2.036).epsilon(1e-3));
    CHECK(bytes_each(Rule::lion, StateType::int8, true) == doctest::Approx(1.018).epsilon(1e-3));
    const double tables = double(t.list[wte].count + t.list[wpe].count) / t.count();
    CHECK(bytes_each(Rule::adamw, StateType::int8, false) ==
          doctest::Approx(8 * tables + 2.036 * (1 - tables)).epsilon(1e-3));
    for (const Tensor& tensor : t.list)
        CHECK((t.state_type(tensor) == StateType::int8) == (tensor.kind == TensorKind::matrix));

    // What is planned is what a model has: parts of 256 bytes, one behind the other.
    Gpt2Config small{{16, 61, 128, 2, 2, 64}};
    Setup setup{1, 16, true};
    setup.weights.state = StateType::int8, setup.weights.bf16_grads = true;
    Gpt2 model(trainer::device(), small, setup);
    model.allocate();
    char* at = model.tensors().states;
    for (const Tensor& tensor : model.tensors().list) {
        const bool coded = tensor.states.type == StateType::int8;
        const int64_t each = (tensor.count * (coded ? 1 : 4) + 255) / 256 * 256;
        CHECK(tensor.states.m == at);
        CHECK(tensor.states.v == at + each);
        at += 2 * each;
        if (!coded) continue;
        CHECK(static_cast<void*>(tensor.states.m_absmax) == at);
        at += 2 * ((absmax_count(tensor.count) * 4 + 255) / 256 * 256);
    }
    CHECK(size_t(at - model.tensors().states) == model.tensors().states_bytes());

    // They go to a file and back into a model that keeps the same, and no other.
    ScratchFolder folder;
    {
        FileWriter file(folder / "optimizer.bin");
        write_state(trainer::device(), file, model.tensors());
        file.close();
    }
    auto read_into = [&](Rule rule, StateType type, bool embeddings) {
        Setup other{1, 16, true};
        other.weights.rule = rule, other.weights.state = type, other.weights.int8_embeddings = embeddings;
        Gpt2 reader(trainer::device(), small, other);
        reader.allocate();
        read_state(trainer::device(), FileReader(folder / "optimizer.bin"), reader.tensors());
    };
    read_into(Rule::adamw, StateType::int8, false);
    CHECK_THROWS_AS(read_into(Rule::adamw, StateType::int8, true), BadInput);
    CHECK_THROWS_AS(read_into(Rule::lion, StateType::int8, false), BadInput);
    CHECK_THROWS_AS(read_into(Rule::adamw, StateType::bf16, false), BadInput);
    std::string bytes = get_file(folder / "optimizer.bin");
    bytes[4] = 1;
    put_file(folder / "optimizer.bin", bytes);
    CHECK(contains(message_of<BadInput>([&] { read_into(Rule::adamw, StateType::int8, false); }),
                   "version 1 of the optimizer's state, 2 is read"));
}
