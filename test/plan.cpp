// runtime/plan/plan.h: the contexts that the project promises, that a plan is the layout of a run, and what is chosen.
#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <random>
#include <set>

#include <unistd.h>

// What the trainers include, so that only their own parts land in these namespaces: both call them alike.
#include "../kernels/attention.h"
#include "../kernels/embedding.h"
#include "../kernels/layernorm.h"
#include "../kernels/matmul.h"
#include "../kernels/rotary.h"
#include "../runtime/base/errors.h"
#include "../runtime/base/random.h"
#include "../runtime/loop/loop.h"
#include "../runtime/loop/process.h"
#include "../runtime/model/rope.h"
#include "../runtime/model/transformer.h"
#include "../runtime/plan/plan.h"

#define main trainer_main
namespace gpt2 {
#include "../train_gpt2.cu"
}
namespace pythia {
#include "../train_pythia.cu"
}
#undef main

#include <nlohmann/json.hpp>

#include "scratch.h"

namespace {

using nlohmann::json;
using Words = std::vector<std::string>;

Words operator+(Words a, const Words& b) {
    a.insert(a.end(), b.begin(), b.end());
    return a;
}

struct Trainer {
    const Family& family;
    MakeModel make;
};
const Trainer kGpt2{gpt2::kGpt2Family, [](const Device& device, const Options& o) -> std::unique_ptr<Transformer> {
                        const gpt2::Gpt2Config config = gpt2::config_from_options(o);
                        const int64_t T = o.context ? o.context : std::max(config.maxT, config.tied);
                        return std::make_unique<gpt2::Gpt2>(device, config, make_setup(o, T));
                    }};
const Trainer kPythia{
    pythia::kPythiaFamily, [](const Device& device, const Options& o) -> std::unique_ptr<Transformer> {
        const pythia::PythiaConfig config = pythia::config_from_options(o);
        return std::make_unique<pythia::Pythia>(device, config, make_setup(o, o.context ? o.context : config.maxT));
    }};

Options parsed(const Trainer& trainer, Words words) {
    words.insert(words.begin(), trainer.family.program);
    std::vector<char*> argv;
    for (std::string& word : words) argv.push_back(word.data());
    return parse_options(static_cast<int>(argv.size()), argv.data(), trainer.family, plan_target);
}

struct Plan {
    Planner planner;
    Choice best;
    Plan(const Trainer& trainer, const Words& words)
        : planner(parsed(trainer, words + Words{"--plan"}), trainer.make), best(planner.choose()) {}

    std::unique_ptr<Transformer> model() const { return planner.model(best.options); }
    const Options& chosen() const { return best.options; }
    json report() const { return json::parse(plan_json(planner, best, planner.longest())); }
};

const Words k124M = {"--model", "124M", "--state", "int8", "--positions", "tied"};
const Words k14b = {"--model", "1.4b", "--state", "int8"}, kLean = {"--master", "none", "--grad", "bf16"};
const Words kAlone = {"--offload", "none"};

Words context(int64_t T) { return {"--context", std::to_string(T)}; }
Words memory(const std::string& size) { return {"--memory", size}; }
Words host(const std::string& size) { return {"--host-memory", size}; }

} // namespace

TEST_CASE("a plan for a GPU has master weights to leave out or to offload in any build") {
    auto refusal = [](const Words& words) {
        return message_of<BadInput>([&] { parsed(kGpt2, Words{"--model", "tiny", "--plan"} + words); });
    };
    CHECK(refusal({"--gpu", "h100", "--master", "none"}) == "");
    CHECK((refusal({"--plan-for", "cpu", "--master", "none"}) == "") == (sizeof(real) == 2));
    for (const char* list : {"master", "state,master"}) {
        CHECK(refusal({"--gpu", "h100", "--offload", list}) == "");
        CHECK(
            contains(refusal({"--gpu", "h100", "--master", "none", "--offload", list}), "there are no master weights"));
    }
}

TEST_CASE("the contexts that the project promises fit the cards") {
    struct Row {
        const Trainer& trainer;
        Words words;
        const char *recompute, *offload; // null: whatever was chosen
        double host_gib;                 // at most
    };
    const int64_t k128 = 131072;
    for (const Row& row : std::vector<Row>{
             {kGpt2, k124M + context(2 * k128) + memory("16GiB") + kAlone, nullptr, "none", 0},
             {kPythia, k14b + kLean + context(k128) + memory("40GiB") + kAlone, nullptr, "none", 0},
             {kPythia, k14b + context(k128) + memory("40GiB") + kAlone + Words{"--recompute", "full"}, "full", "none",
              0},
             {kPythia, k14b + kLean + context(4 * k128) + memory("40GiB") + host("100GiB"), "block", "residual", 100},
             {kPythia, k14b + kLean + context(8 * k128) + memory("80GiB") + host("200GiB"), nullptr, nullptr, 200},
             // Moonshots.
             {kGpt2, k124M + context(8 * k128) + memory("16GiB"), nullptr, "residual", 40},
             {kPythia, k14b + kLean + context(8 * k128) + memory("40GiB") + host("100GiB"), "full", "residual", 100},
             {kPythia, k14b + kLean + context(16 * k128) + memory("80GiB") + host("400GiB"), nullptr, "residual",
              400}}) {
        const Plan plan(row.trainer, row.words);
        CAPTURE(row.words[1]);
        CAPTURE(plan.chosen().context);
        CHECK(plan.planner.target().cuda);
        CHECK(plan.best.lacking == 0);
        if (row.recompute) CHECK(plan.chosen().recompute == row.recompute);
        if (row.offload) CHECK(plan.chosen().offload == row.offload);
        CHECK(double(plan.best.host) <= row.host_gib * (1 << 30));
        const int64_t largest = plan.planner.longest().context;
        CHECK(largest >= plan.chosen().context);
        // Where memory is short it is the backward pass that is.
        Words longest = row.words;
        *(std::find(longest.begin(), longest.end(), "--context") + 1) = std::to_string(largest);
        const Plan last(row.trainer, longest);
        CHECK(last.best.lacking == 0);
        CHECK(contains(peak_phase(last.model()->arena()), "backward"));
    }
    // And on cards as they present themselves. What fits nowhere says so.
    CHECK(Plan(kPythia, k14b + kLean + context(k128) + Words{"--gpu", "a100-40"} + kAlone).best.lacking == 0);
    CHECK(Plan(kPythia, k14b + context(k128) + memory("24GiB") + kAlone).best.lacking > 0);
}

TEST_CASE("more memory is never slower, nor shorter") {
    for (const auto& [trainer, words] :
         {std::pair(&kGpt2, k124M + context(200000)), std::pair(&kPythia, k14b + kLean + context(65536))}) {
        double slowest = INFINITY;
        int64_t longest = 0;
        for (int gib : {8, 12, 16, 20, 24, 32, 40, 48, 64, 80, 120, 300, 2000}) {
            CAPTURE(gib);
            const Plan plan(*trainer, words + memory(std::to_string(gib) + "GiB"));
            const int64_t largest = plan.planner.longest().context;
            CHECK(largest >= longest);
            longest = largest;
            if (plan.best.lacking) continue;
            CHECK(plan.best.seconds <= 1.01 * slowest); // within a percent the simpler choice wins
            slowest = std::min(slowest, plan.best.seconds);
        }
        CHECK(std::isfinite(slowest));
        longest = 0;
        for (const char* size : {"3MiB", "1GiB", "10GiB", "50GiB", "100GiB"}) {
            const int64_t largest = Plan(*trainer, words + memory("16GiB") + host(size)).planner.longest().context;
            CHECK(largest >= longest);
            longest = largest;
        }
    }
}

TEST_CASE("with memory to spare nothing is recomputed, cut or moved") {
    for (const Trainer* trainer : {&kGpt2, &kPythia}) {
        const Plan plan(*trainer, {"--model", "tiny", "--context", "4096", "--batch", "3", "--memory", "64GiB"});
        CHECK(plan.chosen().recompute == "none");
        CHECK(plan.chosen().chunk == 3 * 4096);
        CHECK(plan.chosen().head_group == 0);
        CHECK(plan.chosen().offload == "none");
    }
}

TEST_CASE("what room a GPU has left goes to more rows of logits at a time") {
    const Words words = Words{"--model", "1,64,1", "--context", "8192"} + kAlone;
    auto bytes = [&](const char* rows) {
        const Plan plan(kGpt2, words + memory("16GiB") + Words{"--logits-rows", rows});
        CHECK(plan.chosen().logits_rows == atoi(rows));
        return plan.best.arena + plan.planner.limits().device_overhead;
    };
    auto chosen = [&](const Words& more) { return Plan(kGpt2, words + more).chosen().logits_rows; };
    CHECK(bytes("1024") > bytes("700"));
    CHECK(chosen(memory("16GiB")) == 4096);
    CHECK(chosen(memory(std::to_string(bytes("4096")))) == 4096);
    CHECK(chosen(memory(std::to_string(bytes("4096") - 1))) == 2048);
    CHECK(chosen(memory(std::to_string(bytes("1024")))) == 1024);
    CHECK(chosen(memory(std::to_string(bytes("1024") - 1))) == 512);
    CHECK(chosen(memory("16GiB") + Words{"--chunk", "1500"}) == 1024); // no more than there are at a time
    CHECK(chosen({"--plan-for", "cpu"}) == 512);
}

TEST_CASE("what dQ in any order is summed in is planned for") {
    auto arena = [](const char* model, const char* deterministic) {
        const Words words{"--model", model, "--context", "8192", "--vocab", "256", "--deterministic", deterministic};
        return Plan(kGpt2, words + kAlone + memory("16GiB")).best.arena;
    };
    CHECK(arena("1,128,2", "off") > arena("1,128,2", "on"));
    CHECK(arena("1,128,4", "off") == arena("1,128,4", "on")); // heads of 32
}

TEST_CASE("copies count where they take longer than the work beside them") {
    const Words narrow = {"--model", "24,64,1", "--vocab",  "100",   "--context",   "256",
                          "--batch", "64",      "--memory", "16GiB", "--recompute", "block"};
    const Choice here = Plan(kGpt2, narrow + kAlone).best;
    const Choice moved = Plan(kGpt2, narrow + Words{"--offload", "residual"}).best;
    CHECK(here.transfer == 0);
    CHECK(moved.compute == here.compute);
    CHECK(moved.transfer > moved.compute);
    CHECK(moved.seconds == moved.transfer + moved.update);
    CHECK(here.seconds == here.compute + here.update);
    CHECK(Plan(kGpt2, narrow).chosen().offload == "none");
}

TEST_CASE("what the user says is kept") {
    const Words tight = k124M + context(100000) + memory("16GiB");
    CHECK(Plan(kGpt2, tight + Words{"--recompute", "full"}).chosen().recompute == "full");
    CHECK(Plan(kGpt2, tight + Words{"--chunk", "3000"}).chosen().chunk == 3000);
    CHECK(Plan(kGpt2, tight + Words{"--chunk", "300000"}).chosen().chunk == 100000);
    const Plan grouped(kGpt2, tight + Words{"--head-group", "5"});
    CHECK(grouped.chosen().head_group == 5);
    CHECK(grouped.chosen().recompute != "none");
    const Plan moved(kGpt2, tight + Words{"--offload", "state,residual"});
    CHECK(moved.chosen().offload == "state,residual");
    CHECK(moved.chosen().recompute != "none");
    CHECK(moved.best.host > 0);
    const Plan all_kept(kGpt2, tight + Words{"--recompute", "none"});
    CHECK(all_kept.best.lacking > 0);
    // Only the user's word changes the mathematics.
    for (const Plan* plan : {&grouped, &moved, &all_kept}) {
        CHECK(plan->chosen().state == "int8");
        CHECK(plan->chosen().master == "fp32");
        CHECK(plan->chosen().grad == "fp32");
    }
}

TEST_CASE("a plan is the layout of the run") {
    ScratchFolder folder;
    Device device(0);
    for (const Trainer* trainer : {&kGpt2, &kPythia})
        for (const char* recompute : {"none", "block", "full"})
            for (const char* chunk : {"0", "96"})
                for (const char* group : {"0", "1"})
                    for (const char* offload :
                         {"none", "residual", device.target.real_bytes == 2 ? "state,master" : "state"}) {
                        const bool keeps = recompute == std::string("none");
                        if (keeps && (*group == '1' || offload == std::string("residual"))) continue;
                        const Plan plan(*trainer,
                                        {"--model", "3,64,2", "--vocab", "500", "--context", "200", "--batch", "2",
                                         "--plan-for", device.target.cuda ? "cuda" : "cpu", "--recompute", recompute,
                                         "--chunk", chunk, "--head-group", group, "--offload", offload});
                        CAPTURE(recompute);
                        CAPTURE(offload);
                        Options o = plan.chosen();
                        o.out = folder.path();
                        const std::unique_ptr<Transformer> model = trainer->make(device, o);
                        model->allocate();
                        Arena& arena = model->arena();
                        CHECK(arena.bytes() == size_t(plan.best.arena));
                        CHECK(model->host_bytes() == size_t(plan.best.host));
                        CHECK((model->host_bytes() > 0) == (offload != std::string("none")));
                        const char* memory = nullptr; // where the arena is
                        for (const Arena::Item& a : arena.items()) {
                            const char* at = static_cast<char*>(*a.pointer) - a.offset;
                            if (!memory) memory = at;
                            CHECK(at == memory);
                            CHECK(a.offset + a.bytes <= arena.bytes());
                            for (const Arena::Item& b : arena.items()) {
                                const bool apart = a.offset + a.bytes <= b.offset || b.offset + b.bytes <= a.offset;
                                CHECK((&a == &b || apart || !(a.phases & b.phases)));
                            }
                        }
                        for (Phases phase : kEachPhase) CHECK(arena.bytes_in(phase) <= arena.bytes());
                    }
}

TEST_CASE("a report's parts add up") {
    for (const Words& words :
         {k14b + context(300000) + memory("40GiB"), k14b + kLean + context(20000) + memory("80GiB"),
          k14b + context(4000000) + memory("24GiB") + host("64GiB")}) {
        const Plan plan(kPythia, words);
        const json all = plan.report();
        for (const char* where : {"device", "host"}) {
            int64_t sum = 0;
            for (const auto& [key, bytes] : all.at(where).items())
                if (key != "total") sum += bytes.get<int64_t>();
            CHECK(sum == all.at(where).at("total"));
        }
        CHECK(all.at("device").at("total") == plan.best.arena + plan.planner.limits().device_overhead);
        CHECK(all.at("fits") == (plan.best.lacking == 0));
        int64_t peak = 0;
        std::string name;
        for (const json& phase : all.at("phases")) {
            CHECK(phase.at("work_space") <= all.at("device").at("work_space"));
            if (phase.at("bytes") > peak) peak = phase.at("bytes"), name = phase.at("name");
        }
        CHECK(all.at("peak_phase") == name);
        const json& time = all.at("time");
        const double overlapped = std::max(time.at("compute").get<double>(), time.at("transfer").get<double>());
        CHECK(time.at("step").get<double>() == doctest::Approx(overlapped + time.at("update").get<double>()));
        CHECK(time.at("peak_percent") > 1);
        CHECK(time.at("peak_percent") < 100);

        // Each word saves what it is said to save.
        for (const json& saving : all.at("savings")) {
            const std::string option = saving.at("option");
            const size_t space = option.find(' ');
            Options o = plan.chosen();
            const std::string value = option.substr(space + 1);
            (option.find("state") != std::string::npos    ? o.state
             : option.find("master") != std::string::npos ? o.master
                                                          : o.grad) = value;
            CHECK(plan.planner.weigh(o).arena == plan.best.arena - saving.at("bytes").get<int64_t>());
            CHECK(saving.at("bytes") > 0);
        }
        CHECK(all.at("savings").size() == (plan.chosen().master == "none" ? 0 : 2));
    }
}

TEST_CASE("a run takes what fits, or says what would") {
    const Words run = {"--model", "4,256,4", "--vocab", "500",   "--context",
                       "4096",    "--train", "x.bin",   "--out", "/nowhere/run"};
    auto planned = [&](const Words& words) {
        Options o = parsed(kGpt2, run + words);
        CHECK_FALSE(plan_memory(o, kGpt2.make));
        return o;
    };
    const Options plain = planned(memory("8GiB"));
    CHECK(plain.recompute == "none");
    CHECK(plain.planned.note == "");
    const int64_t less = plain.planned.bytes * 2 / 3;
    const Options tight = planned(memory(std::to_string(less)));
    CHECK(tight.planned.bytes <= less);
    CHECK(tight.recompute != "none");
    CHECK(contains(tight.planned.note, "--recompute " + tight.recompute));
    CHECK(contains(tight.planned.note, "with everything kept it would be"));
    // What was chosen is a choice as good as the user's own, and fits exactly.
    Options again = tight;
    CHECK_FALSE(plan_memory(again, kGpt2.make));
    CHECK(again.planned.bytes == tight.planned.bytes);
    CHECK(again.chunk == tight.chunk);
    CHECK(planned(memory(std::to_string(tight.planned.bytes))).planned.bytes <= tight.planned.bytes);

    Options small = parsed(kGpt2, run + memory("100MiB") + kAlone);
    ExitCode code = kDone;
    std::string said;
    try {
        plan_memory(small, kGpt2.make);
    } catch (const Failure& failure) {
        code = failure.exit_code, said = failure.what();
    }
    CHECK(code == kPlanDoesNotFit);
    CAPTURE(said);
    CHECK(contains(said, "context 4096 does not fit: the "));
    const size_t at = said.find("the largest context that fits is ");
    REQUIRE(at != std::string::npos);
    const int64_t largest = std::stoll(said.substr(at + 33));
    CHECK(largest > 0);
    auto fits = [&](int64_t T) {
        Options o = parsed(kGpt2, run + memory("100MiB") + kAlone);
        o.context = T;
        return Planner(o, kGpt2.make).choose().lacking == 0;
    };
    CHECK(fits(largest));
    CHECK_FALSE(fits(largest + largest / 100 + 1));

    Options none = parsed(kGpt2, run + memory("1MiB"));
    CHECK(contains(message_of<Failure>([&] { plan_memory(none, kGpt2.make); }), "no context fits"));
}

namespace {

// What each of some options may be; "" leaves it out.
using Factors = std::vector<std::pair<std::string, Words>>;

// Choices, one for each factor, such that any two choices of two factors come together at least once.
std::vector<std::vector<size_t>> pairwise(const Factors& factors, uint64_t seed) {
    std::mt19937_64 random(seed);
    std::set<std::array<size_t, 4>> missing; // factor, choice, factor, choice
    for (size_t a = 0; a < factors.size(); a++)
        for (size_t b = 0; b < a; b++)
            for (size_t i = 0; i < factors[a].second.size(); i++)
                for (size_t j = 0; j < factors[b].second.size(); j++) missing.insert({a, i, b, j});
    auto news = [&](const std::vector<size_t>& row) {
        std::vector<std::array<size_t, 4>> found;
        for (size_t a = 0; a < row.size(); a++)
            for (size_t b = 0; b < a; b++)
                if (missing.count({a, row[a], b, row[b]})) found.push_back({a, row[a], b, row[b]});
        return found;
    };
    std::vector<std::vector<size_t>> rows;
    while (!missing.empty()) {
        std::vector<size_t> best(factors.size());
        for (int i = 0; i < 50; i++) {
            std::vector<size_t> row;
            for (const auto& factor : factors) row.push_back(random() % factor.second.size());
            const auto& [a, choice, b, other] = *missing.begin();
            row[a] = choice, row[b] = other;
            if (i == 0 || news(row).size() > news(best).size()) best = row;
        }
        for (const auto& pair : news(best)) missing.erase(pair);
        rows.push_back(best);
    }
    return rows;
}

// The exit code of what a trainer does with these words, up to its first step.
int outcome(const Trainer& trainer, const Words& words) {
    try {
        Options o = parsed(trainer, words);
        if (plan_memory(o, trainer.make)) return kDone;
        const Device device(plan_target(o));
        CHECK(int64_t(trainer.make(device, o)->arena().bytes()) < o.planned.bytes);
        return kDone;
    } catch (const Failure& failure) {
        return failure.exit_code;
    }
}

} // namespace

TEST_CASE("a plan and its run agree, whatever memory options they are given") {
    if (!device_is_host()) return; // --memory then plans for another build than a run's
    const Factors factors = {{"--recompute", {"", "none", "block", "full"}},
                             {"--offload", {"", "none", "residual", "state", "residual,state", "master"}},
                             {"--head-group", {"", "1", "9"}},
                             {"--chunk", {"", "16", "100000"}},
                             {"--memory", {"", "38MiB", "1MiB"}},
                             {"--host-memory", {"", "1KiB", "1GiB"}},
                             {"--master", {"", "none"}},
                             {"--batch", {"", "3"}},
                             {"--tokens-per-step", {"", "768", "1000"}}};
    std::set<int> outcomes;
    const int stdout_copy = dup(STDOUT_FILENO);
    int row_number = 0;
    for (const std::vector<size_t>& row : pairwise(factors, 11)) {
        Words words = {"--model", "2,64,2", "--vocab", "500", "--context", "256", "--threads", "1"};
        std::string line;
        for (size_t i = 0; i < row.size(); i++)
            if (const std::string& value = factors[i].second[row[i]]; !value.empty())
                words = words + Words{factors[i].first, value}, line += factors[i].first + " " + value + " ";
        CAPTURE(line);
        const Trainer& trainer = row_number++ % 2 ? kPythia : kGpt2;
        fflush(stdout);
        demand(freopen("/dev/null", "w", stdout) != nullptr, "stdout can be sent away");
        const int plan = outcome(trainer, words + Words{"--plan", "--plan-for", "cpu"});
        fflush(stdout);
        dup2(stdout_copy, STDOUT_FILENO);
        const int run = outcome(trainer, words + Words{"--train", "x.bin", "--out", "/nowhere/run"});
        CHECK(plan == run);
        outcomes.insert(run);
    }
    close(stdout_copy);
    CHECK(outcomes == std::set<int>{kDone, kBadInput, kPlanDoesNotFit});
}

TEST_CASE("the largest context says what it needs of the host") {
    const Words words = k124M + context(4096) + memory("8GiB");
    const Longest alone = Plan(kGpt2, words + kAlone).planner.longest(), longest = Plan(kGpt2, words).planner.longest();
    CHECK(alone.host == 0);
    CHECK(alone.offload == "none");
    CHECK(longest.context > alone.context);
    CHECK(longest.offload != "none");
    const Plan that(kGpt2, k124M + context(longest.context) + memory("8GiB") + Words{"--offload", longest.offload} +
                               Words{"--recompute", longest.recompute});
    CHECK(that.best.lacking == 0);
    CHECK(that.best.host + that.planner.limits().host_overhead == longest.host);
    const json report = Plan(kGpt2, words).report();
    CHECK(report.at("largest_context_host") == longest.host);
    CHECK(report.at("largest_context_options").at("offload") == longest.offload);
}

TEST_CASE("a rate beyond the peak shows that it was measured too low") {
    const Device device(1);
    device.peak_flops = 2; // as on a machine that others keep from its work
    CHECK(peak_percent(device, 1) == 50);
    CHECK(peak_percent(device, 1e6) <= 100);
    if (device_is_host()) CHECK(device.peak_flops > 1e7); // measured again
    CHECK(peak_percent(device, 1e30) == 100);
    CHECK(peak_percent(device, 5e29) == 50);
}
