// GPT-2 beyond the position table that it was trained with: how the table grows, that the first window stays what it
// was, and what the weights file carries.
#include <doctest/doctest.h>

#define main trainer_main
#include "../train_gpt2.cu"
#undef main

#include "asynchronous.h"
#include "check.h"
#include "golden.h"
#include "scratch.h"

namespace {

constexpr int64_t kTable = 16, kLong = 53; // not a multiple

Device& device() {
    static Device one(0);
    return one;
}

Options options_for(const std::string& positions, int64_t context) {
    Options options;
    options.positions = positions;
    options.context = context;
    return options;
}

// A model from a file, as run_gpt2 makes it.
std::unique_ptr<Gpt2> open(const std::string& path, const Options& options, int64_t B = 1) {
    FileReader file(path);
    Gpt2Config from;
    FileType type = read_config(file, from);
    int64_t T = options.context;
    auto model = std::make_unique<Gpt2>(device(), stretch(from, options, T, path), Setup{B, T, true, T});
    model->allocate();
    model->read_file(file, type, from, options);
    return model;
}

void save(Gpt2& model, const std::string& path) {
    std::filesystem::remove(path);
    FileWriter writer(path);
    model.write_file(writer);
    writer.close();
}

// A model whose every weight is random, with a table of kTable rows, as a file.
std::string short_model(const ScratchFolder& folder) {
    Gpt2Config config{{kTable, 61, 128, 2, 2, 64}};
    Gpt2 model(device(), config, Setup{1, kTable, true});
    model.allocate();
    golden::Config c{23, 2, 64, 2, 61, 128, kTable, 1, kTable};
    std::vector<std::vector<float>> weights = golden::weights(c);
    for (size_t i = 0; i < weights.size(); i++)
        fill_weights(device(), model.tensors().list[i], [&](int64_t k) { return weights[i][k]; });
    std::string path = folder / "short.bin";
    save(model, path);
    return path;
}

std::vector<float> host(const Tensor& tensor, bool gradient) {
    std::vector<float> values(tensor.count);
    if (gradient) {
        download(device(), values.data(), tensor.grad, values.size() * sizeof(float));
    } else {
        std::vector<real> rounded(tensor.count);
        download(device(), rounded.data(), tensor.param, rounded.size() * sizeof(real));
        for (size_t i = 0; i < values.size(); i++) values[i] = to_float(rounded[i]);
    }
    return values;
}

std::vector<int32_t> random_tokens(int64_t count) {
    std::vector<int32_t> tokens;
    for (int64_t i = 0; i < count; i++) tokens.push_back(int32_t(golden::hash(3, 1, i) % 61));
    return tokens;
}

double loss_of(Gpt2& model, int64_t T) {
    std::vector<int32_t> tokens = random_tokens(T + 1);
    model.begin_step(0);
    model.accumulate(tokens.data(), tokens.data() + 1, 1, 1.0 / T, true);
    return model.loss();
}

} // namespace

TEST_CASE("the table grows by its rows, by their mean, by fresh ones, or not at all") {
    ScratchFolder folder;
    std::string path = short_model(folder);
    std::vector<float> table = host(open(path, options_for("", kTable))->tensors().list[wpe], false);
    const int64_t C = 64;
    for (std::string how : {"tile", "interpolate", "fresh", "tied"}) {
        CAPTURE(how);
        std::vector<float> grown = host(open(path, options_for(how, kLong))->tensors().list[wpe], false);
        REQUIRE(int64_t(grown.size()) == (how == "tied" ? kTable : kLong) * C);
        double square = 0;
        for (int64_t i = 0; i < int64_t(grown.size()); i++) {
            int64_t row = i / C, c = i % C;
            if (how == "interpolate") {
                double x = row * 15.0 / 52.0;
                int64_t low = std::min<int64_t>(row * 15 / 52, 14);
                double want = table[low * C + c] + (x - low) * (table[(low + 1) * C + c] - table[low * C + c]);
                CHECK(std::abs(grown[i] - want) <= kRealEpsilon * std::abs(want) + 1e-8);
            } else if (how == "fresh" && row >= kTable) {
                square += double(grown[i]) * grown[i];
            } else {
                CHECK(grown[i] == table[row % kTable * C + c]);
            }
        }
        double rows = kLong - kTable;
        if (how == "fresh") CHECK(std::abs(std::sqrt(square / (rows * C)) - 0.02) < 0.02 * 5 / std::sqrt(2 * rows * C));
    }
}

TEST_CASE("with tiled, tied or fresh positions the first window is what it was") {
    ScratchFolder folder;
    std::string path = short_model(folder);
    auto untouched = open(path, options_for("", kTable));
    std::vector<int32_t> tokens = random_tokens(kLong + 1);
    std::vector<float> want(61), got(61);
    double loss = loss_of(*untouched, kTable);
    for (std::string how : {"tile", "tied", "fresh"}) {
        CAPTURE(how);
        auto model = open(path, options_for(how, kLong));
        for (int64_t n : {int64_t(1), int64_t(7), kTable}) {
            untouched->next_logits(tokens.data(), 0, n, want.data());
            model->next_logits(tokens.data(), 0, n, got.data());
            for (int v = 0; v < 61; v++)
                CHECK(std::abs(got[v] - want[v]) <= 4 * kRealEpsilon * std::abs(want[v]) + 1e-6);
        }
        // The same through the weights file, at the short context again.
        save(*model, folder / "long.bin");
        double again = loss_of(*open(folder / "long.bin", options_for("", kTable)), kTable);
        CHECK(std::abs(again - loss) <= 2 * kRealEpsilon * loss);
    }
    // Stretched positions are others, so this test can fail.
    auto stretched = open(path, options_for("interpolate", kLong));
    stretched->next_logits(tokens.data(), 0, kTable, got.data());
    untouched->next_logits(tokens.data(), 0, kTable, want.data());
    double difference = 0;
    for (int v = 0; v < 61; v++) difference = std::max(difference, double(std::abs(got[v] - want[v])));
    CHECK(difference > 1e-3);
}

TEST_CASE("tied positions are a tiled table whose copies share their gradient") {
    ScratchFolder folder;
    std::string path = short_model(folder);
    auto tiled = open(path, options_for("tile", kLong)), tied = open(path, options_for("tied", kLong));
    double loss = loss_of(*tiled, kLong);
    CHECK(std::abs(loss_of(*tied, kLong) - loss) <= 2 * kRealEpsilon * loss);
    std::vector<float> long_gradient = host(tiled->tensors().list[wpe], true);
    std::vector<double> sum(kTable * 64);
    for (size_t i = 0; i < long_gradient.size(); i++) sum[i % sum.size()] += long_gradient[i];
    check_close("dwpe", host(tied->tensors().list[wpe], true), sum, 8 * 1.2e-7);

    // The same positions for every sequence of a batch.
    std::vector<int32_t> rows = random_tokens(3 * kLong + 1);
    double losses[2];
    for (bool tie : {false, true}) {
        auto model = open(path, options_for(tie ? "tied" : "tile", kLong), 3);
        model->clear_loss();
        model->evaluate(rows.data(), rows.data() + 1, 3, 1.0 / (3 * kLong));
        losses[tie] = model->loss();
    }
    CHECK(std::abs(losses[0] - losses[1]) <= 2 * kRealEpsilon * losses[0]);

    // Token by token, past the end of the table, the cache finds the same positions.
    std::vector<int32_t> tokens = random_tokens(kLong);
    std::vector<float> whole(61), stepwise(61);
    tied->next_logits(tokens.data(), 0, kLong, whole.data());
    for (int64_t t = 0; t < kLong; t++) tied->next_logits(&tokens[t], t, 1, stepwise.data());
    // Sums in another order: an error relative to all logits, since it is one of the hidden state that they share.
    // Three times what AVX2 shows.
    double error = 0, norm = 0;
    for (int v = 0; v < 61; v++)
        error += std::pow(double(stepwise[v]) - whole[v], 2), norm += std::pow(double(whole[v]), 2);
    CHECK(std::sqrt(error) <= 12 * kRealEpsilon * std::sqrt(norm));
}

TEST_CASE("the weights file carries the longer table, or the short one and its rule") {
    ScratchFolder folder;
    std::string path = short_model(folder);
    Header header = read_header(FileReader(path));
    CHECK(header[8] == 0);
    for (std::string how : {"tile", "tied"}) {
        auto model = open(path, options_for(how, kLong));
        save(*model, folder / "long.bin");
        header = read_header(FileReader(folder / "long.bin"));
        CHECK(header[2] == (how == "tied" ? kTable : kLong));
        CHECK(header[8] == (how == "tied"));
        CHECK(header[9] == (how == "tied" ? kLong : 0));
        // Read again, at the same context and without a word on positions, it is the same model and the same file.
        auto again = open(folder / "long.bin", options_for("", kLong));
        CHECK(loss_of(*again, kLong) == loss_of(*model, kLong));
        save(*again, folder / "again.bin");
        CHECK(get_file(folder / "again.bin") == get_file(folder / "long.bin"));
    }
    // A rule holds at any context; a table only as far as it reaches.
    save(*open(path, options_for("tied", kLong)), folder / "tied.bin");
    CHECK(std::isfinite(loss_of(*open(folder / "tied.bin", options_for("", 2 * kLong)), 2 * kLong)));
    // A tied model may get a table of its own.
    auto tiled = open(folder / "tied.bin", options_for("tile", kLong));
    CHECK(tiled->tensors().list[wpe].count == kLong * 64);
    CHECK(loss_of(*tiled, kLong) == loss_of(*open(path, options_for("tile", kLong)), kLong));
}

TEST_CASE("a context beyond the table is refused until it is said how") {
    ScratchFolder folder;
    std::string path = short_model(folder);
    std::string said = message_of<BadInput>([&] { open(path, options_for("", kTable + 1)); });
    CHECK(said.find("--context 17 is longer than the position table of " + path + ", 16 rows") == 0);
    CHECK(said.find("--positions tile, tied, interpolate or fresh") != std::string::npos);

    Options scratch = options_for("tile", kLong);
    scratch.model = "tiny";
    said = message_of<BadInput>([&] { config_from_options(scratch); });
    CHECK(said == "--positions tile stretches trained positions: it needs --init");
    // From scratch, tied positions are those of GPT-2's own table.
    scratch.positions = "tied", scratch.context = 5000;
    CHECK(config_from_options(scratch).maxT == 1024);
    CHECK(config_from_options(scratch).tied == 5000);
    scratch.positions = "fresh";
    CHECK(config_from_options(scratch).maxT == 5000);

    std::string bytes = get_file(path);
    for (auto [rule, length] : {std::pair{2, 64}, {-1, 64}, {1, -5}}) {
        int32_t header[2] = {rule, length};
        std::string lying = bytes;
        lying.replace(32, 8, reinterpret_cast<char*>(header), 8);
        put_file(folder / "lying.bin", lying);
        CHECK(message_of<BadInput>([&] { open(folder / "lying.bin", options_for("", 8)); }).find("no position rule") !=
              std::string::npos);
    }
}
