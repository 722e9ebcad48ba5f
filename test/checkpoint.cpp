// Checkpoints against everything that can happen to them: kills at any moment, full disks, harm to any byte, leftovers
// and foreign folders.
#include <doctest/doctest.h>

#include <algorithm>
#include <csignal>
#include <cstring>
#include <random>
#include <vector>

#include <sys/ptrace.h>
#include <sys/syscall.h>

#include "../runtime/base/errors.h"
#include "../runtime/files/checkpoint.h"
#include "scratch.h"

namespace fs = std::filesystem;
using nlohmann::json;

namespace {

// Content that step and version alone decide, so that a mixture of two saves cannot pass for one.
std::string content(const std::string& name, int64_t step, int version, size_t bytes) {
    std::mt19937_64 rng(static_cast<uint64_t>(step) * 1000 + version * 10 + name.size());
    std::string text(bytes, '\0');
    for (char& c : text) c = static_cast<char>(rng());
    return text;
}

constexpr size_t kModelBytes = 5000, kStateBytes = 700;

CheckpointPart part_of(const std::string& name, const std::string& text) {
    return {name, text.size(), [text](FileWriter& file) { file.write(text.data(), text.size()); }};
}

void save(const std::string& run, int64_t step, int64_t keep = 0, int version = 0) {
    save_checkpoint(run, step,
                    {part_of("model.bin", content("model.bin", step, version, kModelBytes)),
                     part_of("optimizer.bin", content("optimizer.bin", step, version, kStateBytes))},
                    {{"tokens", step * 1000}, {"version", version}, {"loss", 3.25}}, keep);
}

// Every part and the meta data are those of this step and of one version.
bool consistent(const Checkpoint& c) {
    int version = c.meta.at("version");
    return c.meta.at("tokens") == c.step * 1000 &&
           get_file(c.part("model.bin")) == content("model.bin", c.step, version, kModelBytes) &&
           get_file(c.part("optimizer.bin")) == content("optimizer.bin", c.step, version, kStateBytes);
}

std::optional<Checkpoint> newest(const std::string& run, std::vector<std::string>* warnings = nullptr) {
    return newest_checkpoint(run, [&](const std::string& line) {
        if (warnings) warnings->push_back(line);
    });
}

std::vector<std::string> names_in(const std::string& folder) {
    std::vector<std::string> names;
    for (auto& entry : fs::directory_iterator(folder)) names.push_back(entry.path().filename().string());
    std::sort(names.begin(), names.end());
    return names;
}

using Names = std::vector<std::string>;

// Most of this is as true in memory, where fsync costs nothing: a kill ends a process and not a machine.
std::string memory_folder() { return access("/dev/shm", W_OK) == 0 ? "/dev/shm" : fs::temp_directory_path().string(); }

} // namespace

TEST_CASE("what was saved is found again, newest first") {
    ScratchFolder run;
    CHECK(!newest(run.path()));
    CHECK(!newest(run / "absent"));
    for (int64_t step : {0, 100, 20, 100000000}) save(run.path(), step);
    CHECK(names_in(run.path()) == Names{"step_00000000", "step_00000020", "step_00000100", "step_100000000"});
    std::vector<std::string> warnings;
    auto found = newest(run.path(), &warnings);
    REQUIRE(found);
    CHECK(warnings.empty());
    CHECK(found->step == 100000000); // by number, though "step_00000100" is larger as text
    CHECK(found->path == run / "step_100000000");
    CHECK(consistent(*found));
    Checkpoint first = open_checkpoint(run / "step_00000000");
    CHECK(first.step == 0);
    CHECK(consistent(first));
    CHECK(first.part("model.bin") == run / "step_00000000/model.bin");
    CHECK(contains(message_of<BadInput>([&] { open_checkpoint(run / "step_00000001"); }), run / "step_00000001"));
    CHECK_THROWS_AS(open_checkpoint(run.path()), BadInput);
    // Under a name that says no step it opens as well: people rename the one they like.
    fs::rename(run / "step_00000020", run / "best");
    CHECK(open_checkpoint(run / "best").step == 20);
}

TEST_CASE("meta data of every kind come back as they were") {
    ScratchFolder run;
    json meta = {{"seed", UINT64_MAX}, {"small", INT64_MIN},   {"third", 1.0 / 3}, {"huge", 1e300},
                 {"minus", -0.0},      {"text", "\u00fc\n\""}, {"list", {1, 2.5}}, {"nothing", json::array()}};
    save_checkpoint(run.path(), 1, {}, meta, 0);
    CHECK(newest(run.path())->meta == meta);
    // What JSON has no word for must not keep a run from saving: NaN becomes null, broken UTF-8 a replacement mark.
    save_checkpoint(run.path(), 2, {}, {{"loss", NAN}, {"path", "b\xe4r"}}, 0);
    auto found = newest(run.path());
    REQUIRE(found);
    CHECK(found->step == 2);
    CHECK(found->meta == json({{"loss", nullptr}, {"path", "b\ufffdr"}}));
}

TEST_CASE("keep removes the oldest whole ones and nothing else") {
    ScratchFolder run;
    for (int64_t step : {1, 2, 3, 4}) save(run.path(), step);
    CHECK(names_in(run.path()).size() == 4);
    save(run.path(), 5, 3);
    CHECK(names_in(run.path()) == Names{"step_00000003", "step_00000004", "step_00000005"});
    save(run.path(), 6, 1);
    CHECK(names_in(run.path()) == Names{"step_00000006"});
    CHECK_THROWS_AS(save(run.path(), 7, -1), BadInput);

    SUBCASE("foreign and unverified folders stay") {
        fs::create_directory(run / "step_00000001"); // ours by name alone
        fs::create_directory(run / "step_2");
        fs::create_directory(run / "step_00000003.bak");
        put_file(run / "step_00000004", "a file");
        put_file(run / "log.jsonl", "{}\n");
        fs::create_directory(run / "step_00000005");
        put_file(run / "step_00000005/manifest.json", "{\"step\":5}");
        save(run.path(), 7, 1);
        CHECK(names_in(run.path()) == Names{"log.jsonl", "step_00000001", "step_00000003.bak", "step_00000004",
                                            "step_00000005", "step_00000007", "step_2"});
        CHECK(newest(run.path())->step == 7);
    }
    SUBCASE("a harmed one does not count as kept") {
        save(run.path(), 7);
        save(run.path(), 8);
        std::string model = get_file(run / "step_00000008/model.bin");
        model[1000] ^= 1;
        put_file(run / "step_00000008/model.bin", model);
        save(run.path(), 9, 2);
        CHECK(names_in(run.path()) == Names{"step_00000007", "step_00000008", "step_00000009"});
        fs::remove_all(run / "step_00000009");
        CHECK(newest(run.path())->step == 7);
    }
    SUBCASE("after a resume from an older one, the harmed newer one never pushes out what is saved now") {
        save(run.path(), 20);
        fs::resize_file(run / "step_00000020/model.bin", 10);
        save(run.path(), 10, 1);
        CHECK(names_in(run.path()) == Names{"step_00000010", "step_00000020"});
        CHECK(newest(run.path())->step == 10);
    }
}

TEST_CASE("saving a step again replaces it whole, harmed or not") {
    ScratchFolder run;
    save(run.path(), 1, 0, 1);
    save(run.path(), 1, 0, 2);
    CHECK(names_in(run.path()) == Names{"step_00000001"});
    CHECK(newest(run.path())->meta.at("version") == 2);
    CHECK(consistent(*newest(run.path())));
    fs::remove(run / "step_00000001/model.bin");
    put_file(run / "step_00000001/other", "x");
    save(run.path(), 1, 0, 3);
    CHECK(newest(run.path())->meta.at("version") == 3);
    CHECK(names_in(run / "step_00000001") == Names{"manifest.json", "model.bin", "optimizer.bin"});

    put_file(run / "step_00000002", "a file of somebody else");
    std::string said = message_of<RunFailed>([&] { save(run.path(), 2); });
    CHECK(contains(said, run / "step_00000002"));
    CHECK(get_file(run / "step_00000002") == "a file of somebody else");
    CHECK(names_in(run.path()) == Names{"step_00000001", "step_00000002"});
}

TEST_CASE("leftovers of a kill go from a run that has nothing more to save") {
    ScratchFolder run;
    save(run.path(), 3);
    fs::create_directory(run / ".step_00000004.tmp");
    fs::copy(run / "step_00000003", run / ".step_00000003.old");
    remove_leftovers(run.path());
    CHECK(names_in(run.path()) == Names{"step_00000003"});

    // But not the one set aside where the one in its place is harmed or missing.
    fs::copy(run / "step_00000003", run / ".step_00000003.old");
    put_file(run / "step_00000003/model.bin", std::string(kModelBytes, 'x'));
    remove_leftovers(run.path());
    CHECK(names_in(run.path()) == Names{".step_00000003.old", "step_00000003"});
    fs::remove_all(run / "step_00000003");
    remove_leftovers(run.path());
    CHECK(names_in(run.path()) == Names{"step_00000003"});
    CHECK(consistent(open_checkpoint(run / "step_00000003")));
}

TEST_CASE("leftovers of a kill are never read and go with the next save") {
    ScratchFolder run;
    save(run.path(), 1);
    save(run.path(), 9);
    fs::rename(run / "step_00000009", run / ".step_00000009.tmp"); // even one that looks whole
    fs::create_directory(run / ".step_00000002.tmp");
    put_file(run / ".step_00000002.tmp/model.bin", "half");
    put_file(run / ".step_mine.tmp", "not ours");
    std::vector<std::string> warnings;
    CHECK(newest(run.path(), &warnings)->step == 1);
    CHECK(warnings.empty());
    save(run.path(), 2);
    CHECK(names_in(run.path()) == Names{".step_mine.tmp", "step_00000001", "step_00000002"});

    // Killed between the two renames of a replacement: the one set aside counts, and comes back.
    fs::rename(run / "step_00000002", run / ".step_00000002.old");
    auto found = newest(run.path(), &warnings);
    REQUIRE(found);
    CHECK(found->step == 2);
    CHECK(consistent(*found));
    CHECK(warnings.empty());
    save(run.path(), 3);
    CHECK(names_in(run.path()) == Names{".step_mine.tmp", "step_00000001", "step_00000002", "step_00000003"});
    CHECK(consistent(open_checkpoint(run / "step_00000002")));
    // Killed after them: the new one counts, and the old one goes.
    fs::copy(run / "step_00000003", run / ".step_00000003.old");
    save(run.path(), 3, 0, 1);
    CHECK(newest(run.path())->meta.at("version") == 1);
    CHECK(names_in(run.path()) == Names{".step_mine.tmp", "step_00000001", "step_00000002", "step_00000003"});
}

TEST_CASE("harm to any file is seen, named, and the checkpoint before is used") {
    ScratchFolder run(memory_folder());
    save(run.path(), 1);
    save(run.path(), 2);
    std::mt19937_64 rng(5);
    int tried = 0;
    // newest_checkpoint() must fall back to step 1 with one warning that names the folder and the file.
    auto must_fall_back = [&](const std::string& file) {
        std::vector<std::string> warnings;
        auto found = newest(run.path(), &warnings);
        bool right = found && found->step == 1 && warnings.size() == 1 && contains(warnings[0], "step_00000002") &&
                     contains(warnings[0], file) && !contains(warnings[0], "\n");
        if (!right) CAPTURE(warnings.empty() ? "no warning" : warnings[0]);
        tried++;
        return right;
    };
    for (const char* name : {"manifest.json", "optimizer.bin", "model.bin"}) {
        std::string path = run / "step_00000002/" + name, whole = get_file(path);
        bool all_seen = true;
        // Each byte of the manifest and the state, every 13th of the model.
        size_t stride = whole.size() > 1000 ? 13 : 1;
        for (size_t at = 0; at < whole.size(); at += stride) {
            std::string bytes = whole;
            bytes[at] = static_cast<char>(bytes[at] ^ (1u << rng() % 8));
            put_file(path, bytes);
            all_seen = all_seen && must_fall_back(name);
        }
        for (size_t cut = 0; cut < whole.size(); cut += 1 + stride * 7) {
            put_file(path, whole.substr(0, cut));
            all_seen = all_seen && must_fall_back(name);
        }
        put_file(path, whole + "x");
        all_seen = all_seen && must_fall_back(name);
        put_file(path, whole + std::string(1, '\0'));
        all_seen = all_seen && must_fall_back(name);
        fs::remove(path);
        all_seen = all_seen && must_fall_back(name);
        fs::create_directory(path);
        all_seen = all_seen && must_fall_back(name);
        fs::remove(path);
        CHECK_MESSAGE(all_seen, name);
        put_file(path, whole);
        CHECK(newest(run.path())->step == 2);
    }
    CHECK(tried > 1500);

    // A wrong size is told in numbers, before anything is hashed.
    std::string state = run / "step_00000002/optimizer.bin";
    for (size_t wrong : {kStateBytes - 1, kStateBytes + 1}) {
        std::string text = content("optimizer.bin", 2, 0, kStateBytes);
        text.resize(wrong);
        put_file(state, text);
        std::string said = message_of<BadInput>([&] { open_checkpoint(run / "step_00000002"); });
        CHECK(contains(said, "optimizer.bin has " + std::to_string(wrong) + " bytes, its manifest says 700"));
    }
    put_file(state, content("optimizer.bin", 2, 0, kStateBytes));

    // Parts swapped between two checkpoints are whole files, of the right size, in the wrong place.
    std::string model = run / "step_00000002/model.bin", whole = get_file(model);
    put_file(model, get_file(run / "step_00000001/model.bin"));
    CHECK(must_fall_back("model.bin"));
    put_file(model, whole);
    // So is a whole checkpoint under another step's name.
    fs::copy(run / "step_00000001", run / "step_00000077");
    std::vector<std::string> warnings;
    CHECK(newest(run.path(), &warnings)->step == 2);
    REQUIRE(warnings.size() == 1);
    CHECK(contains(warnings[0], "it holds step 1"));
    fs::remove_all(run / "step_00000077");

    // All harmed: none is found, each is named, none is touched.
    fs::resize_file(run / "step_00000001/model.bin", 0);
    fs::resize_file(run / "step_00000002/manifest.json", 0);
    warnings.clear();
    CHECK(!newest(run.path(), &warnings));
    CHECK(warnings.size() == 2);
    CHECK(names_in(run.path()) == Names{"step_00000001", "step_00000002"});
}

TEST_CASE("names that are not ours are passed over") {
    ScratchFolder run;
    save(run.path(), 3);
    for (const char* name : {"step_", "step_4", "step_000000004", "step_0000000x", "step_-0000004", "step_+0000004",
                             "step_99999999999999999999", "step_00000004.tmp", ".step_00000004", "Step_00000004",
                             "step_00000004 ", ".step_4.old", "xstep_00000004"})
        fs::copy(run / "step_00000003", run / name);
    std::vector<std::string> warnings;
    auto found = newest(run.path(), &warnings);
    REQUIRE(found);
    CHECK(found->step == 3);
    CHECK(warnings.empty());
    CHECK(checkpoint_name(100) == "step_00000100");
    CHECK(checkpoint_name(123456789012) == "step_123456789012");
    CHECK(checkpoint_name(INT64_MAX) == "step_9223372036854775807");
}

TEST_CASE("a failed save says so, leaves nothing of its own and all of the others'") {
    ScratchFolder run;
    save(run.path(), 1, 0, 1);
    auto unchanged = [&] {
        auto found = newest(run.path());
        return names_in(run.path()) == Names{"step_00000001"} && found && found->step == 1 && consistent(*found) &&
               found->meta.at("version") == 1;
    };
    for (int64_t step : {1, 2}) {
        CHECK_THROWS_AS(
            save_checkpoint(run.path(), step,
                            {part_of("a.bin", "text"), {"b.bin", 4, [](FileWriter&) { throw RunFailed("device"); }}},
                            {}, 1),
            RunFailed);
        CHECK(unchanged());
        CHECK_THROWS_AS(
            save_checkpoint(run.path(), step, {{"b.bin", 4, [](FileWriter&) { throw std::bad_alloc(); }}}, {}, 1),
            std::bad_alloc);
        CHECK(unchanged());
        for (uint64_t announced : {3, 5}) {
            std::string said = message_of<RunFailed>([&] {
                save_checkpoint(run.path(), step, {{"b.bin", announced, [](FileWriter& f) { f.write("text", 4); }}}, {},
                                1);
            });
            CHECK(contains(said, "b.bin"));
            CHECK(contains(said, "4 bytes where " + std::to_string(announced)));
            CHECK(unchanged());
        }
        for (uint64_t bytes : {uint64_t(1) << 62, UINT64_MAX}) {
            std::string said = message_of<RunFailed>([&] {
                save_checkpoint(run.path(), step, {part_of("a.bin", "x"), {"b.bin", bytes, [](FileWriter&) {}}}, {}, 1);
            });
            CHECK(contains(said, "needs " + std::string(bytes == UINT64_MAX ? "18446744073709.6" : "4611686018444.2")));
            CHECK(contains(said, run.path()));
            CHECK(contains(said, "free some space"));
            CHECK(unchanged());
        }
        for (const char* name : {"", ".", "..", "a/b", "../x", "manifest.json"}) {
            CHECK_THROWS_AS(save_checkpoint(run.path(), step, {part_of(name, "x")}, {}, 1), BadInput);
            CHECK(unchanged());
        }
        CHECK_THROWS_AS(save_checkpoint(run.path(), step, {part_of("a", "x"), part_of("a", "x")}, {}, 1), BadInput);
        CHECK(unchanged());
    }
    CHECK_THROWS_AS(save(run.path(), -1), BadInput);
    put_file(run / "file", "x");
    CHECK_THROWS_AS(save(run / "file/run", 1), RunFailed);
    save(run / "new/run", 5);
    CHECK(newest(run / "new/run")->step == 5);
}

TEST_CASE("a full disk or a size limit ends a save and harms nothing") {
    ScratchFolder run;
    auto body = [&](const std::string& reason, size_t too_much) {
        save(run.path(), 1, 0, 1);
        for (int64_t step : {1, 2}) {
            // Announces little and writes much: as if another process filled the disk after the check.
            std::string block(size_t(1) << 20, 'x'),
                said = message_of<RunFailed>([&] {
                    save_checkpoint(run.path(), step,
                                    {part_of("a.bin", "text"),
                                     {"big.bin", 4,
                                      [&](FileWriter& file) {
                                          for (size_t n = 0; n < too_much; n += block.size())
                                              file.write(block.data(), block.size());
                                      }}},
                                    {}, 1);
                });
            demand(contains(said, reason) && contains(said, "big.bin"), "the message tells the cause: " + said);
            demand(names_in(run.path()) == Names{"step_00000001"}, "nothing is left of the failed save");
            auto found = newest(run.path());
            demand(found && found->meta.at("version") == 1 && consistent(*found), "the old one is whole");
        }
        save(run.path(), 2, 1); // with room again it works
        demand(names_in(run.path()) == Names{"step_00000002"}, "the next save works");
    };
    SUBCASE("full disk") {
        int status = run_in_child([&] {
            enter_small_disk(run.path(), size_t(20) << 20);
            body("No space left on device", size_t(32) << 20);
            std::string said = message_of<RunFailed>([&] {
                save_checkpoint(run.path(), 3, {{"big.bin", uint64_t(10) << 20, [](FileWriter&) {}}}, {}, 1);
            });
            demand(contains(said, "step 3") && contains(said, "needs 27.3 MB") && contains(said, " MB left"), said);
        });
        if (status == kChildSkipped) MESSAGE("skipped: no tmpfs can be mounted here");
        CHECK((status == 0 || status == kChildSkipped));
    }
    SUBCASE("size limit") {
        CHECK(run_in_child([&] {
                  limit_file_size(100000);
                  body("File too large", size_t(2) << 20);
              }) == 0);
    }
}

namespace {

// What must hold whenever a saving process was killed: the newest is whole and of one piece, at least `step`, and a
// later save works and leaves no leftovers.
void check_survivor(const std::string& run, int64_t step) {
    std::vector<std::string> warnings;
    auto found = newest(run, &warnings);
    REQUIRE(found);
    CHECK(warnings.empty()); // a kill harms nothing, so there is nothing to warn of
    CHECK(found->step >= step);
    CHECK(consistent(*found));
    save(run, 1000, 2);
    Names names = names_in(run);
    CHECK(names.size() == 2);
    for (const std::string& name : names) {
        CHECK(name[0] != '.');
        CHECK(consistent(open_checkpoint(run + "/" + name)));
    }
}

} // namespace

TEST_CASE("kill -9 at random moments") {
    std::mt19937_64 rng(11);
    for (int round = 0; round < 20; round++) {
        ScratchFolder run(memory_folder());
        save(run.path(), 1, 2);
        std::fflush(nullptr);
        pid_t child = fork();
        REQUIRE(child >= 0);
        if (child == 0)
            for (int64_t n = 2;; n++) save(run.path(), 1 + n / 2, 2, static_cast<int>(n % 2)); // each step twice
        usleep(static_cast<useconds_t>(rng() % 25000));
        kill(child, SIGKILL);
        waitpid(child, nullptr, 0);
        check_survivor(run.path(), 1);
    }
}

namespace {

// f and r for each fsync and rename that `body` makes, u for unlinks in a row, in order, or "not traced".
std::string disk_order_of(const std::function<void()>& body) {
    std::fflush(nullptr);
    pid_t child = fork();
    REQUIRE(child >= 0);
    if (child == 0) {
        if (ptrace(PTRACE_TRACEME, 0, nullptr, nullptr) != 0) _exit(kChildSkipped);
        raise(SIGSTOP);
        body();
        _exit(0);
    }
    std::string order;
    int status = 0;
    waitpid(child, &status, 0);
    if (WIFEXITED(status)) return "not traced";
    ptrace(PTRACE_SETOPTIONS, child, nullptr, PTRACE_O_TRACESYSGOOD); // tells system calls from signals
    while (WIFSTOPPED(status)) {
        __ptrace_syscall_info call{};
        if (ptrace(PTRACE_GET_SYSCALL_INFO, child, sizeof call, &call) > 0 && call.op == PTRACE_SYSCALL_INFO_ENTRY) {
            switch (call.entry.nr) {
            case SYS_fsync:
                order += 'f';
                break;
#ifdef SYS_rename
            case SYS_rename:
#endif
            case SYS_renameat:
            case SYS_renameat2:
                order += 'r';
                break;
#ifdef SYS_unlink
            case SYS_unlink:
            case SYS_rmdir:
#endif
            case SYS_unlinkat:
                if (!order.ends_with('u')) order += 'u';
                break;
            }
        }
        ptrace(PTRACE_SYSCALL, child, nullptr, nullptr);
        waitpid(child, &status, 0);
    }
    CHECK(WIFEXITED(status));
    CHECK(WEXITSTATUS(status) == 0);
    return order;
}

} // namespace

// A power cut cannot be played here, but what outlives one is known: what was fsynced. Two parts, the manifest and
// their folder come before the rename, the run folder after it and before anything is removed.
TEST_CASE("the disk has everything before a name changes, and the name before anything goes") {
    ScratchFolder run(memory_folder());
    std::string first = disk_order_of([&] { save(run.path(), 1); });
    if (first == "not traced") {
        MESSAGE("skipped: ptrace is not allowed here");
        return;
    }
    CHECK(first == "ffffrf");
    CHECK(disk_order_of([&] { save(run.path(), 1, 0, 1); }) == "ffffrrfu"); // replaced: aside, in, gone
    save(run.path(), 2);
    CHECK(disk_order_of([&] { save(run.path(), 3, 2); }) == "ffffrfrfu"); // step 1 leaves by way of .tmp
    CHECK(disk_order_of([&] { write_file_whole(run / "options.toml", "text"); }) == "frf");
}

// A save is a sequence of system calls, and between two of them a kill changes nothing on the disk: so one round for
// each system call, killed at its entry, is every kill there is.
TEST_CASE("kill -9 before each system call of a replacement and a removal") {
    int stops = 0;
    for (bool finished = false; !finished; stops++) {
        ScratchFolder run(memory_folder());
        save(run.path(), 1);
        save(run.path(), 2, 0, 0);
        std::fflush(nullptr);
        pid_t child = fork();
        REQUIRE(child >= 0);
        if (child == 0) {
            if (ptrace(PTRACE_TRACEME, 0, nullptr, nullptr) != 0) _exit(kChildSkipped);
            raise(SIGSTOP);
            save(run.path(), 2, 2, 1); // replaces
            save(run.path(), 3, 2, 0); // removes step 1
            _exit(0);
        }
        int status = 0;
        waitpid(child, &status, 0);
        if (WIFEXITED(status)) {
            MESSAGE("skipped: ptrace is not allowed here");
            return;
        }
        // Two stops a system call, at entry and exit; one entry further each round.
        bool alive = true;
        for (int stop = 0; alive && stop <= 2 * stops; stop++) {
            ptrace(PTRACE_SYSCALL, child, nullptr, nullptr);
            waitpid(child, &status, 0);
            alive = WIFSTOPPED(status);
        }
        if (alive) {
            kill(child, SIGKILL);
            waitpid(child, &status, 0);
        } else {
            REQUIRE(WIFEXITED(status));
            CHECK(WEXITSTATUS(status) == 0);
            finished = true;
            CHECK(newest(run.path())->step == 3);
            CHECK(names_in(run.path()) == Names{"step_00000002", "step_00000003"});
        }
        check_survivor(run.path(), 2);
    }
    CHECK(stops > 40);
}
