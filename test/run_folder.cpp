// runtime/files/run_folder.h and the health of checkpoints: what is kept, taken and marked; the lock; which part of a
// log a resume keeps; what a checkpoint records of a run's options.
#include <doctest/doctest.h>

#include <algorithm>
#include <csignal>
#include <optional>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "../kernels/types.h"
#include "../runtime/base/errors.h"
#include "../runtime/files/checkpoint.h"
#include "../runtime/files/run_folder.h"
#include "../runtime/options/options.h"
#include "scratch.h"

namespace fs = std::filesystem;
using nlohmann::json;

namespace {

using Words = std::vector<std::string>;

void save(const std::string& run, int64_t step, const std::string& fault = "", int64_t keep = 0) {
    save_checkpoint(run, step, {{"a.bin", 4, [](FileWriter& file) { file.write("text", 4); }}}, {{"skips", 0}}, keep,
                    [&] { return fault; });
}

Words checkpoints(const std::string& run) {
    Words names;
    for (auto& entry : fs::directory_iterator(run)) names.push_back(entry.path().filename().string());
    std::sort(names.begin(), names.end());
    return names;
}

struct Found {
    std::optional<Checkpoint> checkpoint;
    Words warnings;
};
Found newest(const std::string& run) {
    Found found;
    found.checkpoint = newest_checkpoint(run, [&](const std::string& line) { found.warnings.push_back(line); });
    return found;
}

void ignore(const std::string&) {}

const Family kFamily{"train_gpt2", "GPT-2", "Trains.", {{"124M", {12, 768, 12}}}, false};

Options parse(Words words) {
    words.insert(words.begin(), "train_gpt2");
    std::vector<char*> argv;
    for (std::string& word : words) argv.push_back(word.data());
    return parse_options(int(argv.size()), argv.data(), kFamily,
                         [](const Options&) { return Target{.cuda = false, .real_bytes = 4, .threads = 2}; });
}

} // namespace

TEST_CASE("the newest healthy checkpoint is taken before a newer one that is not") {
    ScratchFolder run;
    save(run.path(), 1), save(run.path(), 2), save(run.path(), 3, "2 updates skipped"), save(run.path(), 4, "NaN");
    Found found = newest(run.path());
    CHECK(found.checkpoint->step == 2);
    CHECK(found.checkpoint->fault == "");
    REQUIRE(found.warnings.size() == 1);
    CHECK(contains(found.warnings[0], "step_00000004 is not healthy (NaN)"));
    CHECK(contains(found.warnings[0], "step_00000002"));
    CHECK(newest_by_manifest(run.path())->step == 2);
    CHECK(open_checkpoint(run / "step_00000003").fault == "2 updates skipped");
    // A harmed one among the healthy is named and passed over as ever.
    put_file(run / "step_00000002/a.bin", "harm");
    found = newest(run.path());
    CHECK(found.checkpoint->step == 1);
    CHECK(found.warnings.size() == 2);
    // Without a healthy one the newest is better than none.
    fs::remove_all(run / "step_00000001"), fs::remove_all(run / "step_00000002");
    found = newest(run.path());
    CHECK(found.checkpoint->step == 4);
    CHECK(contains(found.warnings.at(0), "no other is"));
    CHECK(newest_by_manifest(run.path())->step == 4);
}

TEST_CASE("no limit on their number removes the newest healthy checkpoint") {
    ScratchFolder run;
    for (int64_t step : {1, 2}) save(run.path(), step);
    for (int64_t step : {3, 4, 5}) save(run.path(), step, "bad", 2);
    CHECK(checkpoints(run.path()) == Words{"step_00000002", "step_00000004", "step_00000005"});
    // Once a newer healthy one is there, it counts as the others do.
    save(run.path(), 6, "", 2);
    CHECK(checkpoints(run.path()) == Words{"step_00000005", "step_00000006"});

    SUBCASE("what is in doubt is no healthy one") {
        save(run.path(), 7);
        save(run.path(), 8);
        remove_old_checkpoints(run.path(), 8, 1, 7);
        CHECK(checkpoints(run.path()) == Words{"step_00000006", "step_00000008"});
    }
    SUBCASE("a resume went back: those it gave up go, once the run has saved a healthy one") {
        save(run.path(), 20, "bad");
        save(run.path(), 21, "bad");
        save(run.path(), 10, "bad", 3);
        CHECK(checkpoints(run.path()).size() == 5);
        save(run.path(), 11, "", 3);
        CHECK(checkpoints(run.path()) == Words{"step_00000006", "step_00000010", "step_00000011"});
    }
}

TEST_CASE("a checkpoint whose weights turn out to be bad is marked, and stays whole") {
    ScratchFolder run;
    for (int64_t step : {1, 2, 3}) save(run.path(), step);
    save(run.path(), 4, "first");
    mark_checkpoints(run.path(), 2, "after");
    CHECK(open_checkpoint(run / "step_00000001").fault == "");
    CHECK(open_checkpoint(run / "step_00000002").fault == "after");
    CHECK(open_checkpoint(run / "step_00000003").fault == "after");
    CHECK(open_checkpoint(run / "step_00000004").fault == "first");
}

// As an earlier program wrote it: no "fault", no options, log_bytes among the meta data.
TEST_CASE("manifests of earlier programs are read; skipped updates are their fault") {
    ScratchFolder run;
    auto write = [&](int64_t step, int64_t skips) {
        save(run.path(), step);
        const std::string path = run / checkpoint_name(step) + "/manifest.json";
        json body = json::parse(get_file(path));
        body.erase("fault"), body.erase("checksum");
        body["meta"] = {{"skips", skips}, {"log_bytes", 1234}};
        const std::string canonical = body.dump();
        char sum[17];
        snprintf(sum, sizeof sum, "%016llx", (unsigned long long)bytes_hash(canonical.data(), canonical.size()));
        body["checksum"] = sum;
        put_file(path, body.dump(2) + "\n");
    };
    write(1, 0), write(2, 3);
    Found found = newest(run.path());
    CHECK(found.checkpoint->step == 1);
    REQUIRE(found.warnings.size() == 1);
    CHECK(contains(found.warnings[0], "3 updates in a row were skipped"));
}

TEST_CASE("a run's folder is locked by one, until its process ends") {
    ScratchFolder run;
    {
        RunLock lock(run.path(), ignore);
        const std::string said = message_of<BadInput>([&] { RunLock(run.path(), ignore); });
        CHECK(contains(said, "in use by process " + std::to_string(getpid()) + " on "));
        const std::string before = get_file(run / ".lock");
        CHECK(run_in_child([&] {
                  const std::string other = message_of<BadInput>([&] { RunLock(run.path(), ignore); });
                  demand(contains(other, "in use by process"), other);
              }) == 0);
        CHECK(get_file(run / ".lock") == before);
    }
    RunLock again(run.path(), ignore);
    CHECK(again.in_place());

    SUBCASE("a kill leaves none") {
        ScratchFolder other;
        std::fflush(nullptr);
        const pid_t child = fork();
        REQUIRE(child >= 0);
        if (child == 0) {
            RunLock held(other.path(), ignore);
            put_file(other / "held", "");
            for (;;) pause();
        }
        while (!fs::exists(other / "held")) usleep(1000);
        CHECK_THROWS_AS(RunLock(other.path(), ignore), BadInput);
        kill(child, SIGKILL);
        waitpid(child, nullptr, 0);
        CHECK(RunLock(other.path(), ignore).in_place());
    }
    SUBCASE("another folder of the same name is not the one that was locked") {
        fs::remove(run / ".lock"); // which says nothing of the folder
        CHECK(again.in_place());
        fs::remove_all(run.path());
        CHECK(!again.in_place());
        fs::create_directory(run.path());
        CHECK(!again.in_place());
    }
    SUBCASE("a folder that cannot be written to") {
        CHECK(contains(message_of<BadInput>([&] { RunLock(run / "absent", ignore); }), run / "absent"));
    }
}

TEST_CASE("the part of a log that belongs to the first steps") {
    ScratchFolder run;
    const Words lines = {R"({"event":"plan"})",
                         R"({"event":"val","step":0})",
                         R"({"event":"step","step":1})",
                         "somebody's note",
                         R"({"event":"skip","step":2})",
                         R"({"event":"val","step":2})",
                         R"({"event":"save","path":"step_00000002","step":2})",
                         R"({"event":"step","step":3})",
                         R"({"event":"save","path":"step_00000003","step":3})",
                         R"({"event":"end","step":3})"};
    auto part_at = [&](size_t count, LogPosition position, const std::string& torn = "") {
        std::string text;
        for (size_t i = 0; i < count; i++) text += lines[i] + "\n";
        put_file(run / "log.jsonl", text + torn);
        return log_until(run.path(), position);
    };
    auto part = [&](size_t count, int64_t step, const std::string& torn) {
        return part_at(count, {step, true, true}, torn);
    };
    auto bytes = [&](size_t count) {
        int64_t sum = 0;
        for (size_t i = 0; i < count; i++) sum += int64_t(lines[i].size()) + 1;
        return sum;
    };
    CHECK(log_until(run.path(), {5}).bytes == 0);
    for (const std::string torn : {"", "{\"event\":\"st", "{}"}) {
        CHECK(part(10, 0, torn).bytes == bytes(2));
        CHECK(part(10, 1, torn).bytes == bytes(4));
        CHECK(part(10, 2, torn).bytes == bytes(6)); // its save is written again
        CHECK(part(10, 3, torn).bytes == bytes(8));
        CHECK(part(10, 3, torn).last_step == 3);
        CHECK(part(10, 9, torn).bytes == bytes(10));
        CHECK(part(4, 3, torn).bytes == bytes(4));
        CHECK(part(4, 3, torn).last_step == 1);
        CHECK(part(6, 3, torn).checkpoint == "");
        CHECK(part(10, 0, torn).checkpoint == "step_00000003");
    }
    // What was due at the last step and is still to be done is written again.
    CHECK(part_at(10, {0, false, true}).bytes == bytes(1));
    CHECK(part_at(10, {2, false, true}).bytes == bytes(5));
    CHECK(part_at(10, {2, true, false}).bytes == bytes(6));
    const std::string sampled = lines[2] + "\n" + R"({"event":"sample","step":1})" + "\n";
    put_file(run / "log.jsonl", sampled);
    CHECK(log_until(run.path(), {1, true, true}).bytes == int64_t(sampled.size()));
    CHECK(log_until(run.path(), {1, true, false}).bytes == int64_t(lines[2].size()) + 1);
}

TEST_CASE("a checkpoint records all options but paths and a machine's") {
    Options options = parse({"--model", "tiny", "--train", "x.bin", "--out", "/nowhere/run", "--lr", "0.1"});
    const auto record = recorded_options(options, kFamily);
    CHECK(record.at("lr") == "0.1");
    CHECK(record.at("warmup") == "-1");
    const std::string toml = "\n" + options_toml(options, kFamily);
    size_t others = 0; // of those in options.toml
    for (const char* name : {"init", "train", "val", "tokenizer", "out", "resume", "eval", "threads", "max-hours",
                             "timeout", "offload", "memory", "host-memory"}) {
        CHECK(record.count(name) == 0);
        others += toml.find(std::string("\n") + name + " =") != std::string::npos;
    }
    CHECK(record.size() == size_t(std::count(toml.begin(), toml.end(), '=')) - others);
    options.train = "/elsewhere/x.bin", options.threads = 3, options.memory = "1GiB";
    CHECK(recorded_options(options, kFamily) == record);

    // They stand in for an options.toml that is gone, and catch one that is of another run.
    ScratchFolder folder;
    const std::string run = folder.path();
    options.beta1 = 0.8, options.steps = 7, options.chunk = 64; // which rounds in an order of its own
    save_checkpoint(run, 3, {}, {{"options", recorded_options(options, kFamily)}}, 0);
    Options resumed = parse({"--resume", "--out", run, "--train", "y.bin"});
    CHECK(resumed.beta1 == 0.8);
    CHECK(resumed.steps == 7);
    CHECK(resumed.model == "tiny");
    CHECK(resumed.chunk == 64);
    CHECK(resumed.memory == "");
    CHECK(resumed.train == "y.bin");
    put_file(run + "/options.toml", options_toml(options, kFamily));
    CHECK(parse({"--resume", "--out", run}).train == "/elsewhere/x.bin");
    options.beta1 = 0.7;
    put_file(run + "/options.toml", options_toml(options, kFamily));
    CHECK(contains(message_of<BadInput>([&] { parse({"--resume", "--out", run}); }), "beta1 = 0.7"));
}
