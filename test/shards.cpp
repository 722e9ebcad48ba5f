// Token shards and the loader: every window exactly once an epoch, in an order that resumes on the same shards alone;
// bad files refused by name and number, also those that become bad while a run reads them; files of 4 GiB; mixing by
// weight.
#include <doctest/doctest.h>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <chrono>
#include <climits>
#include <cmath>
#include <functional>
#include <map>
#include <random>
#include <set>
#include <utility>
#include <vector>

#include <fcntl.h>

#include "../runtime/base/errors.h"
#include "../runtime/files/shards.h"
#include "scratch.h"
#include "shard_files.h"

namespace {

std::string refusal(const std::string& glob, int64_t T, int64_t V = 65536) {
    return message_of<BadInput>([&] { Windows(glob, T, V); });
}

// The first inputs of `n` windows drawn one at a time.
std::vector<int32_t> draw(Loader& loader, int64_t T, int n) {
    std::vector<int32_t> first, inputs(T), targets(T);
    for (int i = 0; i < n; i++) {
        loader.next(inputs.data(), targets.data(), 1);
        first.push_back(inputs[0]);
    }
    return first;
}

} // namespace

TEST_CASE("windows cover each shard in steps of T, with targets moved on by one") {
    ScratchFolder folder;
    put_file(folder / "a.bin", shard_bytes(counting(31, 1000))); // 31 tokens: 3 windows of 10 and the last target
    put_file(folder / "b.bin", shard_bytes(counting(30, 2000))); // 30 tokens: 2 windows, 9 tokens over
    put_file(folder / "c.bin", shard_bytes(counting(11, 3000))); // exactly one window
    Windows windows(folder / "*.bin", 10, 65536);
    CHECK(windows.count() == 6);
    CHECK(windows.tokens() == 72);
    const int firsts[] = {1000, 1010, 1020, 2000, 2010, 3000};
    for (int w = 0; w < 6; w++) {
        std::vector<int32_t> inputs(10, -1), targets(10, -1);
        windows.read(w, inputs.data(), targets.data());
        for (int t = 0; t < 10; t++) {
            CHECK(inputs[t] == firsts[w] + t);
            CHECK(targets[t] == firsts[w] + t + 1);
        }
    }
    std::vector<int32_t> row(10);
    for (int64_t w : {int64_t(-1), int64_t(6), INT64_MAX, INT64_MIN})
        CHECK_THROWS_AS(windows.read(w, row.data(), row.data()), BadInput);
}

TEST_CASE("bad shards are refused with file and numbers") {
    ScratchFolder folder;
    std::string path = folder / "a.bin";
    std::vector<uint16_t> tokens = counting(100, 0);
    auto said_of = [&](const std::string& bytes, int64_t T = 10) {
        put_file(path, bytes);
        std::string said = refusal(path, T);
        CHECK(contains(said, path));
        return said;
    };
    CHECK(contains(said_of(shard_bytes(tokens, 20240521)), "magic 20240521, not 20240520"));
    CHECK(contains(said_of(shard_bytes(tokens, 20240801, 7)), "Llama-3"));
    CHECK(contains(said_of(shard_bytes(tokens, 20240520, 2)), "version 2"));
    std::string longer = said_of(shard_bytes(tokens) + "x");
    CHECK(contains(longer, "1225 bytes"));
    CHECK(contains(longer, "100 tokens"));
    CHECK(contains(longer, "1224"));
    CHECK(contains(said_of(shard_bytes(tokens).substr(0, 1223)), "1223 bytes"));
    CHECK(contains(said_of(shard_bytes(tokens, 20240520, 1, 99)), "99 tokens"));
    CHECK(contains(said_of(shard_bytes(tokens, 20240520, 1, INT_MAX)), "2147483647 tokens"));
    CHECK(contains(said_of(shard_bytes(tokens, 20240520, 1, UINT32_MAX)), "negative token count in its header, -1"));
    CHECK(contains(said_of(shard_bytes(tokens, 20240520, 1, 0x80000000)), "-2147483648"));
    CHECK(contains(said_of(shard_bytes({})), "0 tokens"));
    CHECK(contains(said_of(shard_bytes(tokens).substr(0, 1023)), "1023"));
    CHECK(contains(said_of(""), "0"));
    for (int64_t T : {int64_t(100), int64_t(101), INT64_MAX}) {
        std::string said = said_of(shard_bytes(tokens), T);
        CHECK(contains(said, "100 tokens"));
        CHECK(contains(said, std::to_string(T)));
    }
    CHECK(refusal(path, 0) != "");
    CHECK(refusal(path, -1) != "");
    put_file(path, shard_bytes(tokens));
    CHECK(refusal(path, 99) == "");
    CHECK(contains(refusal(folder / "absent*.bin", 10), "absent*.bin"));
    // One short shard among good ones is named; it is not skipped.
    put_file(folder / "b.bin", shard_bytes(counting(5, 0)));
    CHECK(contains(refusal(folder / "*.bin", 10), folder / "b.bin"));
}

TEST_CASE("a token of another vocabulary is named with its index, wherever it is in the window") {
    ScratchFolder folder;
    std::string path = folder / "a.bin";
    for (int at : {20, 21, 29, 30}) { // inputs of window 2 are 20 … 29, its last target is 30
        std::vector<uint16_t> tokens(41, 7);
        tokens[at] = 50257;
        put_file(path, shard_bytes(tokens));
        Windows windows(path, 10, 50257);
        std::vector<int32_t> inputs(10, -1), targets(10, -1);
        CHECK_NOTHROW(windows.read(0, inputs.data(), targets.data()));
        std::string said = message_of<BadInput>([&] { windows.read(2, inputs.data(), targets.data()); });
        CHECK(contains(said, path + ": token 50257 at index " + std::to_string(at) + " "));
        CHECK(contains(said, "size 50257"));
        CHECK_NOTHROW(Windows(path, 10, 50258).read(2, inputs.data(), targets.data()));
    }
    put_file(path, shard_bytes(std::vector<uint16_t>(41, 65535)));
    std::vector<int32_t> inputs(10), targets(10);
    Windows(path, 10, 65536).read(0, inputs.data(), targets.data());
    CHECK(inputs[0] == 65535); // unsigned
    CHECK_THROWS_AS(Windows(path, 10, 65535).read(0, inputs.data(), targets.data()), BadInput);
}

TEST_CASE("all ids are checked at the start, and the first bad one is named") {
    ScratchFolder folder;
    const size_t count = (size_t(1) << 23) + (1 << 19) + 100; // more than one part of a scan, and than one piece of it
    std::vector<uint16_t> tokens(count, 7);
    put_file(folder / "a.bin", shard_bytes(counting(100, 0)));
    for (size_t at : {count - 1, size_t(1) << 23, (size_t(1) << 19) - 1, size_t(99), size_t(0)}) {
        tokens[at] = 300;
        put_file(folder / "b.bin", shard_bytes(tokens));
        Windows windows(folder / "*.bin", 10, 300);
        std::string said = message_of<BadInput>([&] { windows.check_ids(); });
        CHECK(contains(said, (folder / "b.bin") + ": token 300 at index " + std::to_string(at) + " "));
        CHECK_NOTHROW(Windows(folder / "*.bin", 10, 301).check_ids());
    }
    tokens[5] = tokens[1 << 20] = 301;
    put_file(folder / "b.bin", shard_bytes(tokens));
    put_file(folder / "a.bin", shard_bytes(std::vector<uint16_t>(100, 302)));
    std::string said = message_of<BadInput>([&] { Windows(folder / "*.bin", 10, 300).check_ids(); });
    CHECK(contains(said, (folder / "a.bin") + ": token 302 at index 0 "));
    CHECK_NOTHROW(Windows(folder / "*.bin", 10, 65536).check_ids()); // no id can be too large
}

TEST_CASE("a shard that does not stay as it was fails at its next window, by name and without a signal") {
    ScratchFolder folder;
    const std::string path = folder / "a.bin", bytes = shard_bytes(counting(3000, 0));
    std::vector<int32_t> inputs(10), targets(10);
    auto failure = [&](const std::function<void()>& harm) {
        put_file(path, bytes);
        Windows windows(path, 10, 65536);
        windows.read(298, inputs.data(), targets.data());
        CHECK(inputs[0] == 2980);
        harm();
        std::string said = message_of<RunFailed>([&] { windows.read(298, inputs.data(), targets.data()); });
        CHECK(contains(said, path));
        CHECK(contains(said, "resume"));
        return said;
    };
    CHECK(contains(failure([&] { std::filesystem::resize_file(path, 1100); }), "cut from 7024 to 1100 bytes"));
    CHECK(contains(failure([&] { std::filesystem::resize_file(path, 0); }), "cut from 7024 to 0 bytes"));
    CHECK(contains(failure([&] { std::filesystem::resize_file(path, 8000); }), "was changed"));
    CHECK(contains(failure([&] { std::filesystem::remove(path); }), "No such file"));
    // Another file of the same size, a second later by its date.
    CHECK(contains(failure([&] {
                       put_file(path, shard_bytes(counting(3000, 1)));
                       std::filesystem::last_write_time(path, std::filesystem::last_write_time(path) +
                                                                  std::chrono::seconds(1));
                   }),
                   "was changed"));
}

TEST_CASE("a shard of 2^31 - 1 tokens, 4 GiB, is read to its last window") {
    ScratchFolder folder;
    std::string path = folder / "huge.bin";
    const int64_t tokens = INT_MAX, T = 1000, windows = (tokens - 1) / T;
    int fd = open(path.c_str(), O_RDWR | O_CREAT, 0600);
    REQUIRE(fd >= 0);
    auto put = [&](int64_t first, uint16_t value) { // T + 1 tokens from `first`
        std::vector<uint16_t> run = counting(T + 1, value);
        return pwrite(fd, run.data(), 2 * run.size(), 1024 + 2 * first) == 2 * static_cast<ssize_t>(run.size());
    };
    const int64_t past_2g = (int64_t(1) << 30) / T + 1; // its byte offset is past 2^31
    std::string header = shard_bytes({}, 20240520, 1, tokens);
    bool made = ftruncate(fd, 1024 + 2 * tokens) == 0 && pwrite(fd, header.data(), 1024, 0) == 1024 &&
                put(past_2g * T, 11111) && put((windows - 1) * T, 22222);
    close(fd);
    if (!made) {
        MESSAGE("skipped: this file system has no sparse files of 4 GiB");
        return;
    }
    Windows huge(path, T, 65536);
    CHECK(huge.tokens() == tokens);
    CHECK(huge.count() == windows);
    std::vector<int32_t> inputs(T), targets(T);
    for (auto [w, first] : {std::pair{past_2g, 11111}, {windows - 1, 22222}}) {
        huge.read(w, inputs.data(), targets.data());
        CHECK(inputs[0] == first);
        CHECK(inputs[T - 1] == first + T - 1);
        CHECK(targets[T - 1] == first + T);
    }
    huge.read(0, inputs.data(), targets.data());
    CHECK(inputs[T - 1] == 0);
    // Two of them: the single index over all shards goes on.
    std::filesystem::create_symlink(path, folder / "huge_again.bin");
    Windows both(folder / "*.bin", T, 65536);
    CHECK(both.count() == 2 * windows);
    both.read(2 * windows - 1, inputs.data(), targets.data());
    CHECK(inputs[0] == 22222);
    // One window of more than 2^31 bytes of tokens is one window.
    CHECK(Windows(path, tokens - 1, 65536).count() == 1);
    CHECK(contains(refusal(path, tokens), "2147483647"));
}

TEST_CASE("thousands of shards open, and opening copies nothing") {
    ScratchFolder folder;
    std::string bytes = shard_bytes(counting(100, 0));
    for (int i = 0; i < 3000; i++) put_file(folder / (std::to_string(10000 + i) + ".bin"), bytes);
    Windows windows(folder / "*.bin", 33, 65536);
    CHECK(windows.count() == 9000);
    std::vector<int32_t> inputs(33), targets(33);
    windows.read(8999, inputs.data(), targets.data());
    CHECK(inputs[0] == 66);
    // Not limited by open files.
    int open_files = 0;
    for (auto& entry : std::filesystem::directory_iterator("/proc/self/fd")) open_files += !entry.path().empty();
    CHECK(open_files < 100);
}

TEST_CASE("permute_index is a bijection for every n, and its order depends on the key") {
    for (uint64_t n : {1, 2, 3, 4, 5, 15, 16, 17, 255, 256, 257, 1000, 4096, 65537}) {
        std::vector<bool> hit(n);
        bool inside = true;
        for (uint64_t i = 0; i < n; i++) {
            uint64_t p = permute_index(i, n, 99);
            inside = inside && p < n;
            if (p < n) hit[p] = true;
        }
        CHECK(inside);
        CHECK(std::count(hit.begin(), hit.end(), true) == static_cast<int64_t>(n));
    }
    for (uint64_t n : {uint64_t(1) << 40, (uint64_t(1) << 62) + 12345, UINT64_MAX}) {
        std::set<uint64_t> seen;
        for (uint64_t i = 0; i < 1000; i++) seen.insert(permute_index(i * (n / 1000), n, 5));
        CHECK(seen.size() == 1000);
        CHECK(*seen.rbegin() < n);
        CHECK(*seen.rbegin() > n / 2);
    }
    int moved = 0;
    for (uint64_t i = 0; i < 1000; i++) moved += permute_index(i, 1000, 1) != permute_index(i, 1000, 2);
    CHECK(moved > 900);
}

// Chi-square over keys: all 24 orders of 4 elements, and the place of each of 1000 or 500 elements in tenths. The
// bounds are the means plus six standard deviations, sqrt(2·freedom) each.
TEST_CASE("permute_index shuffles evenly") {
    const int keys = 24000;
    std::map<std::vector<uint64_t>, int> orders;
    for (int key = 0; key < keys; key++) {
        std::vector<uint64_t> order;
        for (uint64_t i = 0; i < 4; i++) order.push_back(permute_index(i, 4, key));
        orders[order]++;
    }
    CHECK(orders.size() == 24);
    double chi = 0;
    for (auto& [order, count] : orders) chi += (count - 1000.0) * (count - 1000.0) / 1000;
    CHECK(chi < 23 + 6 * std::sqrt(2 * 23.0));

    for (uint64_t n : {1000, 500}) {     // 500 lies just below twice a power of four
        std::vector<int> tenths(100, 0); // [tenth of the index][tenth of the value]
        for (int key = 0; key < 100; key++)
            for (uint64_t i = 0; i < n; i++) tenths[i * 10 / n * 10 + permute_index(i, n, key) * 10 / n]++;
        chi = 0;
        for (int count : tenths) chi += (count - double(n)) * (count - double(n)) / double(n);
        CHECK(chi < 81 + 6 * std::sqrt(2 * 81.0));
    }

    // Neighbours do not stay neighbours: in a random order of 1000 about two in 1000 do.
    int together = 0;
    for (uint64_t key = 0; key < 100; key++)
        for (uint64_t i = 0; i + 1 < 1000; i++)
            together += permute_index(i + 1, 1000, key) == permute_index(i, 1000, key) + 1;
    CHECK(together > 40);
    CHECK(together < 160);
}

TEST_CASE("an epoch draws every window once, each epoch and seed in its own order") {
    ScratchFolder folder;
    put_file(folder / "a.bin", shard_bytes(counting(501, 0)));
    put_file(folder / "b.bin", shard_bytes(counting(501, 10000)));
    const int T = 10, epoch = 100;
    std::vector<SourceSpec> sources = {{folder / "*.bin"}};
    Loader loader(sources, T, 65536, 42);
    REQUIRE(loader.windows_per_epoch() == epoch);
    std::vector<int32_t> first = draw(loader, T, epoch), second = draw(loader, T, epoch);
    CHECK(std::set<int32_t>(first.begin(), first.end()).size() == epoch);
    CHECK(std::set<int32_t>(second.begin(), second.end()).size() == epoch);
    CHECK(first != second);
    CHECK(!std::is_sorted(first.begin(), first.end()));

    Loader same(sources, T, 65536, 42), other(sources, T, 65536, 43);
    CHECK(draw(same, T, epoch) == first);
    CHECK(draw(other, T, epoch) != first);

    // A batch is the same stream in rows.
    Loader batched(sources, T, 65536, 42);
    std::vector<int32_t> inputs(4 * T), targets(4 * T), rows;
    for (int i = 0; i < epoch / 4; i++) {
        batched.next(inputs.data(), targets.data(), 4);
        for (int b = 0; b < 4; b++) rows.push_back(inputs[b * T]);
        for (int n = 0; n < 4 * T; n++) CHECK(targets[n] == inputs[n] + 1);
    }
    CHECK(rows == first);
}

TEST_CASE("two sources of the same shards are in different orders") {
    ScratchFolder folder;
    put_file(folder / "a.bin", shard_bytes(counting(1001, 0)));
    Loader loader({{folder / "a.bin"}, {folder / "a.bin"}}, 10, 65536, 1);
    std::vector<int32_t> both = draw(loader, 10, 200), one, two;
    for (size_t i = 0; i < both.size(); i++) (i % 2 ? two : one).push_back(both[i]);
    CHECK(one != two);
    std::sort(one.begin(), one.end());
    std::sort(two.begin(), two.end());
    CHECK(one == two); // equal weights, ties to the first: they take turns
}

TEST_CASE("sources mix by weight, at every moment within one window of their share") {
    ScratchFolder folder;
    put_file(folder / "a.bin", shard_bytes(counting(301, 0)));
    put_file(folder / "b.bin", shard_bytes(counting(71, 10000)));
    put_file(folder / "c.bin", shard_bytes(counting(41, 20000)));
    std::vector<SourceSpec> sources = parse_sources((folder / "a.bin") + ":6," + (folder / "b.bin") + ":3," +
                                                    (folder / "c.bin")); // weights 6, 3 and 1
    Loader loader(sources, 10, 65536, 7);
    CHECK(loader.windows_per_epoch() == 30 + 7 + 4);
    std::vector<int32_t> stream = draw(loader, 10, 1000);
    const double shares[] = {0.6, 0.3, 0.1};
    int drawn[3] = {0, 0, 0};
    double worst = 0;
    for (size_t n = 0; n < stream.size(); n++) {
        drawn[stream[n] / 10000]++;
        for (int s = 0; s < 3; s++) worst = std::max(worst, std::abs(drawn[s] - shares[s] * double(n + 1)));
    }
    CHECK(worst < 1);
    CHECK(loader.state().at("drawn") == nlohmann::json({600, 300, 100}));
    CHECK(stream[0] < 10000);

    // Only the ratio of weights counts, and a weight too small to be drawn does no harm.
    for (SourceSpec& source : sources) source.weight *= 1e200;
    Loader scaled(sources, 10, 65536, 7);
    CHECK(draw(scaled, 10, 1000) == stream);
    sources[2].weight = 1e-300;
    Loader tiny(sources, 10, 65536, 7);
    draw(tiny, 10, 300);
    CHECK(tiny.state().at("drawn") == nlohmann::json({200, 100, 0}));
}

TEST_CASE("a restored loader goes on with the identical stream") {
    ScratchFolder folder;
    put_file(folder / "a.bin", shard_bytes(counting(301, 0)));
    put_file(folder / "b.bin", shard_bytes(counting(71, 10000)));
    std::vector<SourceSpec> sources = {{folder / "a.bin", 0.7}, {folder / "b.bin", 0.3}};
    for (int before : {0, 1, 29, 30, 31, 100, 257}) {
        Loader straight(sources, 10, 65536, 3);
        draw(straight, 10, before);
        // Through text, as in a checkpoint.
        nlohmann::json state = nlohmann::json::parse(straight.state().dump());
        Loader resumed(sources, 10, 65536, 3);
        draw(resumed, 10, 13); // whatever it did before
        resumed.restore(state);
        CHECK(draw(resumed, 10, 150) == draw(straight, 10, 150));
        CHECK(resumed.state() == straight.state());
    }
}

TEST_CASE("impossible data positions are refused and change nothing") {
    ScratchFolder folder;
    put_file(folder / "a.bin", shard_bytes(counting(301, 0)));
    Loader loader({{folder / "a.bin", 0.7}, {folder / "a.bin", 0.3}}, 10, 65536, 3);
    draw(loader, 10, 10);
    nlohmann::json good = loader.state();
    for (const char* bad : {"null", "3", "[]", "[1,2]", "{}", "{\"drawn\":3}", "{\"drawn\":{\"a\":1,\"b\":2}}",
                            "{\"drawn\":[]}", "{\"drawn\":[1]}", "{\"drawn\":[1,2,3]}", "{\"drawn\":[1,-1]}",
                            "{\"drawn\":[1,2.5]}", "{\"drawn\":[1,\"2\"]}", "{\"drawn\":[1,null]}",
                            "{\"drawn\":[1,true]}", "{\"drawn\":[1,18446744073709551615]}",
                            "{\"drawn\":[1,9223372036854775807]}", "{\"drawn\":[-9223372036854775808,1]}"}) {
        CAPTURE(bad);
        CHECK_THROWS_AS(loader.restore(nlohmann::json::parse(bad)), BadInput);
        CHECK(loader.state() == good);
    }
    Loader otherwise({{folder / "a.bin", 0.6}, {folder / "a.bin", 0.4}}, 10, 65536, 3);
    CHECK(contains(message_of<BadInput>([&] { otherwise.restore(good); }), "other weights"));
    loader.restore(nlohmann::json({{"drawn", {int64_t(1) << 60, int64_t(1) << 60}}}));
    draw(loader, 10, 10); // far away, still in order
}

TEST_CASE("a data position knows its shards: the same elsewhere go on, others are named") {
    ScratchFolder folder;
    std::filesystem::create_directories(folder / "here");
    std::filesystem::create_directories(folder / "there");
    auto put = [&](const std::string& name, size_t count, uint16_t first) {
        put_file(folder / name, shard_bytes(counting(count, first)));
    };
    put("here/a.bin", 301, 0), put("here/b.bin", 301, 1000), put("here/c.bin", 301, 2000);
    auto sources = [&](const std::string& in) {
        return std::vector<SourceSpec>{{folder / (in + "/[ab].bin"), 1}, {folder / (in + "/c.bin"), 1}};
    };
    Loader here(sources("here"), 10, 65536, 3);
    draw(here, 10, 7);
    const std::string text = here.state().dump();
    CHECK(!contains(text, folder.path()));
    const nlohmann::json state = nlohmann::json::parse(text);
    CHECK(state.at("sources")[0].size() == 2);
    CHECK(state.at("sources")[0][1].at("name") == "b.bin");
    CHECK(state.at("sources")[0][1].at("tokens") == 301);

    std::vector<int32_t> next = draw(here, 10, 20);
    auto refusal = [&] {
        std::string said;
        try {
            Loader there(sources("there"), 10, 65536, 3);
            there.restore(state);
            CHECK(draw(there, 10, 20) == next);
            CHECK(there.state() == here.state());
        } catch (const BadInput& refused) {
            said = refused.what();
            CHECK(contains(said, "--init"));
        }
        return said;
    };
    auto put_all = [&] { put("there/a.bin", 301, 0), put("there/b.bin", 301, 1000), put("there/c.bin", 301, 2000); };
    put_all();
    CHECK(refusal() == "");
    put("there/b.bin", 301, 1001); // as long
    CHECK(contains(refusal(), "shard 2 in source 1, \"b.bin\", holds other tokens"));
    put("there/a.bin", 301, 1000), put("there/b.bin", 301, 0); // names exchanged
    CHECK(contains(refusal(), "shard 1 in source 1, \"a.bin\", holds other tokens"));
    put_all();
    put("there/c.bin", 302, 2000); // no window more
    CHECK(contains(refusal(), "shard 1 in source 2, \"c.bin\", has 302 tokens and had 301"));
    put_all();
    std::filesystem::rename(folder / "there/b.bin", folder / "there/B.bin");
    CHECK(contains(refusal(), "shard 2 in source 1, \"b.bin\", is missing"));
    put("there/b.bin", 301, 1000), put("there/a0.bin", 301, 0);
    Loader more({{folder / "there/[ab]*.bin", 1}, {folder / "there/c.bin", 1}}, 10, 65536, 3);
    std::string said = message_of<BadInput>([&] { more.restore(state); });
    CHECK(contains(said, "shard 2 in source 1 is \"a0.bin\" and was \"b.bin\""));

    // A checkpoint of an earlier program has numbers alone.
    nlohmann::json old = state;
    old.erase("sources");
    put_all();
    Loader there(sources("there"), 10, 65536, 3);
    there.restore(old);
    CHECK(draw(there, 10, 20) == next);
    for (const char* bad : {"null", "3", "[]", "[[],3]", "[[{}],[{}]]", "[[3,4],[5]]", "{\"0\":[]}",
                            "[[{\"name\":3,\"tokens\":3},{}],[{}]]"}) {
        old["sources"] = nlohmann::json::parse(bad);
        CHECK_THROWS_AS(there.restore(old), BadInput);
    }
}

TEST_CASE("the list of sources") {
    auto parsed = [](const std::string& text) {
        std::vector<std::pair<std::string, double>> list;
        for (const SourceSpec& source : parse_sources(text)) list.emplace_back(source.glob, source.weight);
        return list;
    };
    using List = std::vector<std::pair<std::string, double>>;
    CHECK(parsed("a*.bin:0.7,b*.bin:0.3") == List{{"a*.bin", 0.7}, {"b*.bin", 0.3}});
    CHECK(parsed("a.bin") == List{{"a.bin", 1}});
    CHECK(parsed("a.bin:2,b.bin") == List{{"a.bin", 2}, {"b.bin", 1}});
    CHECK(parsed("/mnt/host:8080/a.bin") == List{{"/mnt/host:8080/a.bin", 1}});
    CHECK(parsed("/mnt/host:8080/a.bin:1e-3") == List{{"/mnt/host:8080/a.bin", 1e-3}});
    CHECK(parsed("x:y:z:.5") == List{{"x:y:z", 0.5}});
    CHECK(parsed("a:1.5x") == List{{"a:1.5x", 1}});
    CHECK(parsed("a:") == List{{"a:", 1}});
    for (const char* bad : {"a:0", "a:-1", "a:nan", "a:inf", "a:-inf", "a:1e999", "a:1e-999", "b,a:0", "", ",", "a,",
                            ",a", "a,,b", ":0.5", "a,:1"}) {
        CAPTURE(bad);
        CHECK(message_of<BadInput>([&] { parse_sources(bad); }) != "");
    }
    CHECK(contains(message_of<BadInput>([] { parse_sources("good.bin,bad.bin:-1"); }), "'bad.bin:-1'"));
    CHECK_THROWS_AS(Loader({}, 10, 100, 1), BadInput);
    CHECK_THROWS_AS(Loader({{"a.bin", NAN}}, 10, 100, 1), BadInput);
    ScratchFolder folder;
    put_file(folder / "a.bin", shard_bytes(counting(301, 0)));
    CHECK_THROWS_AS(Loader({{folder / "a.bin", 1e308}, {folder / "a.bin", 1e308}}, 10, 65536, 1), BadInput);
}
