// runtime/options/options.h: numbers judged as the kernels will have them, and options that do nothing without another.
#include <doctest/doctest.h>

#include <cmath>
#include <cstdio>
#include <set>
#include <sstream>

#include "../kernels/types.h"
#include "../runtime/base/errors.h"
#include "../runtime/options/option_table.h"
#include "scratch.h"

namespace {

using Words = std::vector<std::string>;

const Family kFamilies[] = {{"train_gpt2", "GPT-2", "Trains GPT-2.", {}, false},
                            {"train_pythia", "Pythia", "Trains Pythia.", {}, true}};

Target fp32_target(const Options&) { return {.cuda = false, .real_bytes = 4, .threads = 2}; }
Target bf16_target(const Options&) { return {.cuda = false, .real_bytes = 2, .threads = 2}; }

Options parse(Words words, const Family& family = kFamilies[0], TargetOf target = fp32_target) {
    words.insert(words.begin(), family.program);
    std::vector<char*> argv;
    for (std::string& word : words) argv.push_back(word.data());
    return parse_options(static_cast<int>(argv.size()), argv.data(), family, target);
}

Words operator+(Words a, const Words& b) {
    a.insert(a.end(), b.begin(), b.end());
    return a;
}

const Words kRun = {"--model", "tiny", "--train", "x.bin", "--out", "/nonexistent/run"};

std::string refusal(const std::string& line, const Family& family = kFamilies[0], const Words& before = kRun,
                    TargetOf target = fp32_target) {
    std::istringstream stream(line);
    const Words words(std::istream_iterator<std::string>(stream), {});
    return message_of<BadInput>([&] { parse(before + words, family, target); });
}

// What is said on stderr where nothing is refused.
std::string warning(const std::string& line, const Words& before = kRun) {
    ScratchFolder folder;
    const std::string path = folder / "stderr.txt";
    CHECK(run_in_child([&] {
              demand(freopen(path.c_str(), "w", stderr) != nullptr, "stderr opens");
              demand(refusal(line, kFamilies[0], before) == "", "nothing is refused");
              fflush(stderr);
          }) == 0);
    return get_file(path);
}

} // namespace

TEST_CASE("every number that a kernel takes as a float is judged as one") {
    // What is used as a double; a new option belongs here, or is marked in the table.
    const std::set<std::string> doubles = {"final-lr", "skip-z", "temperature", "max-hours", "rope-scale", "rope-base"};
    for (const Family& family : kFamilies)
        for (const OptionRow& row : option_table(family)) {
            if (!std::holds_alternative<double Options::*>(row.member)) continue;
            CAPTURE(row.name);
            CHECK(row.range.as_float != (doubles.count(row.name) == 1));
            if (!row.range.as_float) continue;
            for (const char* text : {"1e39", "1e-46", "1e-60", "0.99999999", "0.999999999999", "0.9999", "1e-44"}) {
                CAPTURE(text);
                const double x = std::stod(text);
                const float f = float(x);
                auto inside = [&](double value) {
                    return (row.range.above ? value > row.range.low : value >= row.range.low) &&
                           (row.range.below ? value < row.range.high : value <= row.range.high);
                };
                const std::string said = refusal(std::string("--") + row.name + " " + text, family);
                CAPTURE(said);
                if (inside(x)) CHECK((said == "") == (std::isfinite(f) && inside(f) && f != 0));
                if (inside(x) && said != "") CHECK(contains(said, std::string("--") + row.name + ": " + text + " is "));
            }
            if (!row.range.above) CHECK(refusal(std::string("--") + row.name + " 0", family) == "");
        }
    CHECK(refusal("--eps 1e-50") == "--eps: 1e-50 is 0 as a float, the type it is used in; it must be above 0");
    CHECK(refusal("--beta2 0.99999999999") ==
          "--beta2: 0.99999999999 is 1 as a float, the type it is used in; it must be at least 0 and below 1");
    CHECK(refusal("--weight-decay 1e39") ==
          "--weight-decay: 1e39 is inf as a float, the type it is used in; it must be at most 3.4e38");
    CHECK(refusal("--clip 1e-50") == // which would turn it off
          "--clip: 1e-50 is 0 as a float, the type it is used in; it must be 0 or at least 1e-45");

    ScratchFolder folder;
    put_file(folder / "c.toml", "steps = 3\neps = 1e-50\n");
    CHECK(contains(refusal("--config " + (folder / "c.toml")), "c.toml:2: eps: 1e-50 is 0 as a float"));
}

TEST_CASE("what the update makes of its options must be floats, too") {
    CHECK(contains(refusal("--lr 1e38"), "--lr 1e+38 over 1 - --beta1 0.9 is more than a float holds"));
    CHECK(contains(refusal("--lr 1e20 --weight-decay 1e20"), "--lr 1e+20 times --weight-decay 1e+20 is more"));
    CHECK(refusal("--lr 1e38 --optimizer lion --weight-decay 0") == ""); // Lion has no bias correction
    CHECK(refusal("--lr 1e12") == "");
}

TEST_CASE("options that contradict another are refused") {
    CHECK(refusal("--decay-steps 4") == "--decay-steps 4: only --schedule wsd decays for so many steps; leave it out");
    CHECK(refusal("--decay-steps 4 --schedule wsd") == "");
    CHECK(refusal("--decay-steps -1") == ""); // leaves it open
    CHECK(contains(refusal("--final-lr 0.5 --schedule constant"), "--schedule constant stays at --lr"));
    CHECK(contains(refusal("--eps 1e-6 --optimizer lion"), "--optimizer lion has no eps"));
    for (const char* given : {"--val-every 5", "--val-tokens 512"}) {
        CHECK(contains(refusal(given), "there is nothing to validate on; give --val GLOB"));
        CHECK(refusal(std::string(given) + " --val v.bin") == "");
        CHECK(refusal(std::string(given) + " --plan") == ""); // a plan needs no data
    }
    CHECK(refusal("--val-every 0") == "");
    for (const char* list : {"master", "state,master"}) {
        const std::string offload = std::string("--offload ") + list;
        CHECK(contains(refusal(offload), "there are no master weights"));
        CHECK(refusal(offload, kFamilies[0], kRun, bf16_target) == "");
        CHECK(contains(refusal(offload + " --master none", kFamilies[0], kRun, bf16_target),
                       "there are no master weights"));
    }
}

TEST_CASE("options without effect are warned of") {
    CHECK(warning("--host-memory 1GiB --offload none") ==
          "warning: --host-memory 1GiB: nothing is taken of it with --offload none\n");
    CHECK(warning("--host-memory 1GiB") == "");
    CHECK(contains(warning("--steps 5 --warmup 10"), "warning: --warmup 10: the run ends before its rate has risen"));
    CHECK(warning("--steps 10 --warmup 10") == "");
    for (const char* given : {"--sample-tokens 9", "--temperature 0.5", "--top-k 3"}) {
        CHECK(contains(warning(std::string(given) + " --sample-every 0"), "--sample-every 0 makes no samples"));
        CHECK(warning(given) == "");
    }
}

TEST_CASE("a run's own options and those of a file are not said to be without effect") {
    ScratchFolder folder;
    const std::string out = folder / "run";
    Options o = parse(kRun);
    o.decay_steps = 4, o.steps = 5, o.warmup = 100, o.offload = "none", o.host_memory = "1GiB", o.sample_every = 0;
    o.val_every = 7, o.top_k = 3;
    std::filesystem::create_directories(out + "/step_00000001");
    put_file(out + "/options.toml", options_toml(o, kFamilies[0]));
    CHECK(warning("--resume --out " + out, {}) == "");
    CHECK(warning("--config " + out + "/options.toml --out " + (folder / "other"), {}) == "");
    CHECK(contains(refusal("--resume --decay-steps 3 --out " + out, kFamilies[0], {}), "only --schedule wsd"));
}
