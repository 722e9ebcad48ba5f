// Stopping in runtime/loop/training.h: whatever a run was doing when it was asked to stop, it saves, and the run that
// goes on from there leaves the same checkpoints and the same log as one that nothing befell.
#include <doctest/doctest.h>

#include <csignal>
#include <cstring>
#include <filesystem>
#include <functional>
#include <map>
#include <set>

#include <omp.h>
#include <unistd.h>

#include "../runtime/base/errors.h"
#include "../runtime/base/signals.h"
#include "../runtime/loop/training.h"
#include "scratch.h"

namespace {

constexpr int64_t kContext = 8, kVocab = 100, kSaveEvery = 3;

// Stands in for a model: its one weight is a sum over all that it was trained on, in order. At its `at`-th call
// something happens.
struct Recorder : Model {
    uint64_t weight = 1, step = 0;
    double sum = 0;
    int calls = 0, at;
    std::function<void()> happens;
    Tensors none;
    Family family_{"recorder", "Recorder", "", {}, false};

    Recorder(int at, std::function<void()> happens, const Checkpoint* from) : at(at), happens(std::move(happens)) {
        if (from)
            memcpy(&weight, SmallFile(from->part("model.bin"), sizeof weight).at(0, sizeof weight), sizeof weight);
    }
    void call() {
        if (++calls == at) happens();
    }
    static uint64_t mix(uint64_t a, uint64_t b) { return (a ^ b) * 0x9E3779B97F4A7C15 + (a >> 7); }

    void allocate() override {}
    void accumulate(const int32_t* tokens, const int32_t* targets, int64_t B, double, bool) override {
        call();
        for (int64_t i = 0; i < B * kContext; i++) step = mix(mix(step, tokens[i]), targets[i]);
        sum += double(step >> 40);
    }
    void evaluate(const int32_t* tokens, const int32_t*, int64_t B, double) override {
        call();
        for (int64_t i = 0; i < B * kContext; i++) sum += tokens[i] * double(weight >> 40);
    }
    void clear_loss() override { sum = 0; }
    void sum_loss() override {}
    void begin_step(int64_t number) override { clear_loss(), step = static_cast<uint64_t>(number); }
    void measure_gradients(double) override {}
    void update(const Optimizer&) override { weight = mix(weight, step); }
    double loss() override { return sum; }
    double grad_norm() override { return 1; }
    OptimizerCounts counts() override { return {}; }
    int64_t non_finite_gradients() override { return 0; }
    void next_logits(const int32_t* tokens, int64_t, int64_t n, float* logits) override {
        call();
        for (int64_t v = 0; v < kVocab; v++) logits[v] = float(mix(weight, uint64_t(v + tokens[n - 1])) >> 60);
    }
    int64_t cached_rows() const override { return kContext; }
    Cost step_cost(int64_t) const override { return {}; }
    int64_t vocab() const override { return kVocab; }
    int64_t context() const override { return kContext; }
    Tensors& tensors() override { return none; }
    uint64_t file_bytes() const override { return sizeof weight; }
    std::string write_file(FileWriter& file) override {
        file.write(&weight, sizeof weight);
        return "";
    }
    std::string describe() const override { return "a recorder"; }
    const Family& family() const override { return family_; }
};

void write_shard(const std::string& path, int64_t tokens) {
    std::string bytes(1024, '\0');
    int32_t header[3] = {20240520, 1, static_cast<int32_t>(tokens)};
    memcpy(bytes.data(), header, sizeof header);
    for (int64_t i = 0; i < tokens; i++) bytes += {char(i * i % 97), 0};
    put_file(path, bytes);
}

// Six steps of two micro-batches each. Every other one is validated; samples and saves fall on some of these and not on
// others.
Options options_of(const ScratchFolder& folder, const std::string& run) {
    Options o;
    o.train = folder / "train.bin", o.val = folder / "val.bin", o.out = folder / run;
    o.batch = 2, o.tokens_per_step = 4 * kContext, o.steps = 6;
    o.val_every = 2, o.val_tokens = 6 * kContext, o.sample_every = 3, o.sample_tokens = 3;
    o.save_every = kSaveEvery, o.keep = 0;
    return o;
}

void ask_to_stop() {
    kill(getpid(), SIGTERM);
    while (!stop_signal()) usleep(100);
}

// Starts the run, or goes on with it, in a child, where something happens at the `at`-th call; returns its exit code.
int run(const ScratchFolder& folder, const std::string& name, int at, int* calls = nullptr,
        const std::function<void()>& happens = ask_to_stop) {
    const std::string note = folder / "calls";
    int code = run_in_child([&] {
        freopen("/dev/null", "w", stdout), freopen("/dev/null", "w", stderr);
        omp_set_num_threads(1);
        block_signals();
        take_stop_signals();
        Options options = options_of(folder, name);
        options.resume = std::filesystem::exists(options.out);
        const Start start = find_start(options);
        Device device(this_target());
        Recorder model(at, happens, start.resume.get());
        try {
            Run(options, device, model, start).steps();
        } catch (const Failure& failure) {
            throw int(failure.exit_code);
        }
        put_file(note, std::to_string(model.calls));
    });
    if (calls) *calls = std::stoi(get_file(note));
    return code;
}

// Of each file of the run its bytes, of the log what does not depend on time; not the lock, which names its process.
std::map<std::string, std::string> contents(const std::string& run) {
    std::map<std::string, std::string> all;
    for (const auto& entry : std::filesystem::recursive_directory_iterator(run)) {
        if (!entry.is_regular_file() || entry.path().filename() == ".lock") continue;
        std::string name = entry.path().string().substr(run.size()), text = get_file(entry.path()), kept;
        if (name == "/log.jsonl") {
            for (size_t begin = 0, end; (end = text.find('\n', begin)) != std::string::npos; begin = end + 1) {
                auto event = nlohmann::json::parse(text.substr(begin, end - begin));
                for (const char* timing : {"ms", "tokens_per_second", "peak_percent"}) event.erase(timing);
                kept += event.dump() + "\n";
            }
            text = kept;
        }
        all[name] = text;
    }
    return all;
}

// But for checkpoints that only a stop has made.
std::map<std::string, std::string> due(std::map<std::string, std::string> all) {
    std::erase_if(all, [](auto& file) {
        size_t at = file.first.find("step_");
        if (at == std::string::npos) return false;
        int step = std::stoi(file.first.substr(at + 5));
        return step == 0 || step % kSaveEvery != 0;
    });
    return all;
}

// What makes two runs differ: a file of one alone, or one with other bytes. Empty if nothing does.
std::string difference(const std::string& run, const std::string& whole) {
    auto ours = due(contents(run)), theirs = due(contents(whole));
    for (auto& [name, text] : theirs)
        if (!ours.count(name)) return "no " + name;
    for (auto& [name, text] : ours)
        if (!theirs.count(name) || theirs[name] != text) return name + " has\n" + text + "instead of\n" + theirs[name];
    return "";
}

} // namespace

TEST_CASE("stopped anywhere and resumed, a run is the one that nothing befell") {
    ScratchFolder folder;
    write_shard(folder / "train.bin", 400);
    write_shard(folder / "val.bin", 100);
    int calls = 0;
    REQUIRE(run(folder, "whole", 0, &calls) == kDone);
    // Micro-batches, validation batches before step 1 and after steps 2, 4 and 6, tokens of samples after 3 and 6.
    CHECK(calls == 6 * 2 + 4 * 3 + 2 * 3);
    for (int at = 1; at <= calls; at++) {
        INFO("stopped in call " << at);
        const std::string name = "run_" + std::to_string(at);
        // The last call of all is followed by nothing that could be given up.
        CHECK(run(folder, name, at) == (at < calls ? kStopped : kDone));
        if (at < calls) {
            CHECK(contains(get_file(folder / (name + "/log.jsonl")), "\"reason\":\"signal Terminated\""));
            CHECK(run(folder, name, 0) == kDone);
        }
        CHECK(difference(folder / name, folder / "whole") == "");
    }
}

TEST_CASE("stopped over and over") {
    ScratchFolder folder;
    write_shard(folder / "train.bin", 400);
    write_shard(folder / "val.bin", 100);
    REQUIRE(run(folder, "whole", 0) == kDone);
    int rounds = 0;
    while (run(folder, "run", 5) == kStopped) REQUIRE(++rounds < 20);
    CHECK(rounds > 3);
    CHECK(difference(folder / "run", folder / "whole") == "");
}

TEST_CASE("data that cannot be read ends a run, but not before its last update is saved") {
    ScratchFolder folder;
    const std::map<std::string, int64_t> shards = {{"train", 400}, {"val", 100}};
    for (auto& [name, tokens] : shards) write_shard(folder / (name + ".bin"), tokens);
    REQUIRE(run(folder, "whole", 0) == kDone);
    for (auto& [name, tokens] : shards) {
        const std::string shard = folder / (name + ".bin");
        auto cut = [&] { std::filesystem::resize_file(shard, 1024); };
        std::set<std::string> saved;
        for (int at = 1; at <= 30; at += 3) {
            INFO(name << " cut in call " << at);
            const std::string out = name + "_" + std::to_string(at);
            int code = run(folder, out, at, nullptr, cut);
            write_shard(shard, tokens);
            auto left = newest_checkpoint(folder / out, [](const std::string&) {});
            saved.insert(left ? checkpoint_name(left->step) : "none");
            if (code == kDone) continue; // all was read before
            CHECK(code == kRunFailed);
            CHECK(run(folder, out, 0) == kDone);
            CHECK(difference(folder / out, folder / "whole") == "");
        }
        CHECK(saved.size() >= 3); // at several positions
    }
}
