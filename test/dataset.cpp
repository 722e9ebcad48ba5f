// dataset.json beside shards: what it vouches for, what is refused of it, and the hashes that Python writes too.
#include <doctest/doctest.h>

#include <algorithm>
#include <filesystem>
#include <string>
#include <vector>

#include "../runtime/base/errors.h"
#include "../runtime/files/shards.h"
#include "scratch.h"
#include "shard_files.h"

TEST_CASE("the hash of a shard is of its header and of pieces from the first token to the last") {
    ScratchFolder folder;
    auto hash_of = [&](const std::string& bytes) {
        put_file(folder / "a.bin", bytes);
        return shard_hash(FileReader(folder / "a.bin"), static_cast<int64_t>(bytes.size() - 1024) / 2);
    };
    for (size_t count : {size_t(0), size_t(10), size_t(32768), size_t(32769), size_t(1) << 20}) {
        const std::string good = shard_bytes(counting(count, 0));
        const std::string hash = hash_of(good);
        CHECK(hash.size() == 16);
        CHECK(hash_of(good) == hash);
        std::vector<size_t> places = {0, 8, 1023};
        for (size_t i = 0; i < 16 && count; i++) {
            const size_t piece = 2 * count <= 65536 ? 0 : i * (2 * count - 4096) / 15;
            places.push_back(1024 + std::min(piece, 2 * count - 1));
            places.push_back(1024 + std::min(piece + 4095, 2 * count - 1));
        }
        for (size_t place : places) {
            std::string bad = good;
            bad[place] ^= 1;
            CHECK(hash_of(bad) != hash);
        }
        // A token more at the front moves all others.
        if (count) CHECK(hash_of(shard_bytes(counting(count, 1))) != hash);
    }
    // As data/test_dataset.py has it from Python.
    CHECK(hash_of(shard_bytes(counting(100, 0))) == "7746a78fbe0813cb");
    CHECK(hash_of(shard_bytes(counting(100000, 0))) == "e0ef125ca6f33a98");
}

namespace {

// A dataset.json as data/prepare.py writes it, `tokenizer` being what it says of one.
nlohmann::json dataset_of(const std::vector<std::string>& paths, const nlohmann::json& tokenizer) {
    nlohmann::json files = nlohmann::json::array();
    for (const std::string& path : paths) files.push_back(Windows(path, 1, 65536).shards()[0]);
    return {{"version", 2},
            {"tokenizer", tokenizer},
            {"train", {{"files", files}}},
            {"val", {{"files", nlohmann::json::array()}}}};
}

} // namespace

TEST_CASE("dataset.json vouches for the shards that it lists, and its vocabulary must fit") {
    ScratchFolder folder;
    const std::string a = folder / "a.bin", b = folder / "b.bin", summary = folder / "dataset.json";
    put_file(a, shard_bytes(std::vector<uint16_t>(100, 7)));
    put_file(b, shard_bytes(std::vector<uint16_t>(100, 400)));
    const nlohmann::json tokenizer = {{"tokens", 300}, {"end_of_text", 0}, {"hash", "00"}};
    auto open = [&](const nlohmann::json& dataset, int64_t V) {
        put_file(summary, dataset.dump());
        return Windows(folder / "*.bin", 10, V);
    };
    auto refused = [&](const nlohmann::json& dataset, int64_t V) {
        return message_of<BadInput>([&] { open(dataset, V).check_ids(); });
    };
    const nlohmann::json first = dataset_of({a}, tokenizer), both = dataset_of({a, b}, tokenizer);
    CHECK(open(first, 300).dataset()->tokenizer.tokens == 300);
    CHECK(open(first, 300).dataset()->path == summary);
    CHECK(contains(refused(both, 299), summary + ": a tokenizer of 300 tokens, but the model has only 299"));
    CHECK(contains(refused(first, 300), b + ": token 400 at index 0 ")); // not listed: looked at
    CHECK(refused(both, 300) == "");                                     // listed: trusted
    nlohmann::json earlier = {{"tokenizer", {{"tokens", 300}, {"end_of_text", 0}}}, {"train", {{"tokens", 200}}}};
    CHECK(contains(refused(earlier, 300), b + ": token 400 "));
    CHECK(contains(refused(earlier, 299), "has only 299"));
    CHECK(open({{"features", {}}}, 500).dataset() == std::nullopt); // another program's file

    put_file(b, shard_bytes(std::vector<uint16_t>(100, 200)));
    CHECK(contains(refused(both, 300), b + " is not the shard that " + summary + " describes"));
    std::filesystem::remove(summary);
    CHECK_NOTHROW(Windows(folder / "*.bin", 10, 300).check_ids());

    for (const char* bad :
         {"", "3", "[]", "{\"tokenizer\":3}", "{\"tokenizer\":{}}", "{\"tokenizer\":{\"tokens\":-1}}",
          "{\"tokenizer\":{\"tokens\":\"300\"}}", "{\"tokenizer\":{\"tokens\":18446744073709551615}}",
          "{\"tokenizer\":{\"tokens\":3},\"version\":2}", "{\"tokenizer\":{\"tokens\":3},\"version\":null}",
          "{\"tokenizer\":{\"tokens\":3,\"hash\":4}}", "{\"tokenizer\":{\"tokens\":3,\"end_of_text\":-4}}",
          "{\"tokenizer\":{\"tokens\":3},\"version\":2,\"train\":{\"files\":[3]}}",
          "{\"tokenizer\":{\"tokens\":3},\"version\":2,\"train\":{\"files\":[{\"name\":\"a\"}]}}"}) {
        CAPTURE(bad);
        put_file(summary, bad);
        CHECK(contains(message_of<BadInput>([&] { Windows(a, 10, 300); }), summary + " is damaged"));
    }
    put_file(summary, "{\"tokenizer\":{\"tokens\":3},\"version\":3}");
    CHECK(contains(message_of<BadInput>([&] { Windows(a, 10, 300); }), "version 3"));
}

TEST_CASE("shards of two tokenizers are no source") {
    ScratchFolder folder;
    nlohmann::json tokenizers[2] = {{{"tokens", 300}, {"end_of_text", 0}, {"hash", "aa"}}, {}};
    auto said = [&](const nlohmann::json& other) {
        tokenizers[1] = other;
        for (int i : {0, 1}) {
            const std::string sub = folder / std::to_string(i);
            std::filesystem::create_directories(sub);
            std::filesystem::remove(sub + "/dataset.json");
            put_file(sub + "/a.bin", shard_bytes(counting(100, 0)));
            put_file(sub + "/dataset.json", dataset_of({sub + "/a.bin"}, tokenizers[i]).dump());
        }
        return message_of<BadInput>([&] { Windows(folder / "*/a.bin", 10, 65536); });
    };
    CHECK(said(tokenizers[0]) == "");
    CHECK(contains(said({{"tokens", 301}, {"end_of_text", 0}, {"hash", "aa"}}), "301 tokens instead of 300"));
    CHECK(contains(said({{"tokens", 300}, {"end_of_text", 299}, {"hash", "aa"}}), "end of text 299 instead of 0"));
    CHECK(contains(said({{"tokens", 300}, {"end_of_text", 0}, {"hash", "ab"}}), "other tokens, although 300 too"));
    CHECK(said({{"tokens", 300}}) == ""); // unknown is no difference
}
