// runtime/files/tokenizer.h: all versions of the file, everything that can be wrong with one, and UTF-8 by the book.
#include <doctest/doctest.h>

#include <cstring>
#include <random>
#include <vector>

#include "../runtime/base/errors.h"
#include "../runtime/files/tokenizer.h"
#include "scratch.h"

namespace {

// Lengths are a byte in versions 1 and 2, four in version 3.
std::string file_of(const std::vector<std::string>& tokens, std::vector<int32_t> header) {
    header.resize(256);
    std::string bytes(reinterpret_cast<const char*>(header.data()), 1024);
    for (const std::string& token : tokens) {
        for (int i = 0; i < (header[1] == 3 ? 4 : 1); i++) bytes += char(token.size() >> 8 * i);
        bytes += token;
    }
    return bytes;
}

const std::vector<std::string> kTokens = {"a", "b\xC3",  "\xA9", std::string(255, 'x'), std::string("\0z", 2),
                                          "",  "<|end|>"};

std::string refusal(const std::string& path, const std::string& bytes) {
    put_file(path, bytes);
    std::string said = message_of<BadInput>([&] { Tokenizer tokenizer(path); });
    CHECK(contains(said, path));
    return said;
}

} // namespace

TEST_CASE("all versions are read and decoded") {
    ScratchFolder folder;
    std::string path = folder / "t.bin";
    put_file(path, file_of(kTokens, {20240328, 2, 7, 6}));
    Tokenizer tokenizer(path);
    CHECK(tokenizer.size() == 7);
    CHECK(tokenizer.end_of_text() == 6);
    CHECK(tokenizer.decode({0, 1, 2, 6}) == "ab\xC3\xA9<|end|>");
    CHECK(tokenizer.decode({3}) == std::string(255, 'x'));
    CHECK(tokenizer.decode({4, 5, 0}) == std::string("\0za", 3));
    CHECK(tokenizer.decode({7, -1, 0, 50303, 2147483647}) == "a"); // padding decodes to nothing
    CHECK(tokenizer.decode({}) == "");

    put_file(path, file_of(kTokens, {20240328, 1, 7, 99}));
    CHECK(Tokenizer(path).end_of_text() == -1);
    CHECK(Tokenizer(path).decode({1, 2}) == "b\xC3\xA9");

    // The first version was only written for GPT-2, whose last token it is.
    std::vector<std::string> gpt2(50257, "t");
    put_file(path, file_of(gpt2, {20240328, 1, 50257}));
    CHECK(Tokenizer(path).end_of_text() == 50256);

    // GPT-NeoX-20B's vocabulary has tokens of up to 512 bytes.
    std::vector<std::string> longer = kTokens;
    for (size_t length : {255, 256, 257, 512, 65535, 65536, 70000}) longer.emplace_back(length, char(length));
    put_file(path, file_of(longer, {20240328, 3, int32_t(longer.size()), 6}));
    Tokenizer any_length(path);
    CHECK(any_length.size() == int64_t(longer.size()));
    CHECK(any_length.end_of_text() == 6);
    for (size_t id = 0; id < longer.size(); id++) CHECK(any_length.decode({int32_t(id)}) == longer[id]);
}

TEST_CASE("the hash is of the tokens and not of the file") {
    ScratchFolder folder;
    auto hash_of = [&](const std::vector<std::string>& tokens, int32_t version) {
        put_file(folder / "t.bin", file_of(tokens, {20240328, version, int32_t(tokens.size()), 0}));
        return Tokenizer(folder / "t.bin").hash();
    };
    CHECK(hash_of({"a", "", "bc"}, 2) == "3f466c3d6a4b04ca"); // as data/test_dataset.py has it from Python
    CHECK(hash_of({"a", "", "bc"}, 1) == hash_of({"a", "", "bc"}, 2));
    CHECK(hash_of({"a", "b", "c"}, 2) != hash_of({"a", "", "bc"}, 2));
    CHECK(hash_of({"", "a", "bc"}, 2) != hash_of({"a", "", "bc"}, 2));
}

TEST_CASE("what is wrong with a file is said with its name and numbers") {
    ScratchFolder folder;
    std::string path = folder / "t.bin", good = file_of(kTokens, {20240328, 2, 7, 6});
    CHECK(contains(message_of<BadInput>([&] { Tokenizer tokenizer(path); }), path)); // not there
    refusal(path, "");
    refusal(path, good.substr(0, 1023));
    CHECK(contains(refusal(path, file_of(kTokens, {20240520, 2, 7, 6})), "its magic is 20240520, not 20240328"));
    CHECK(contains(refusal(path, file_of(kTokens, {20240328, 4, 7, 6})), "version 4"));
    CHECK(contains(refusal(path, file_of(kTokens, {20240328, 0, 7, 6})), "version 0"));
    CHECK(contains(refusal(path, file_of(kTokens, {20240328, 2, 0, 0})), "a table of 0 tokens"));
    CHECK(contains(refusal(path, file_of(kTokens, {20240328, 2, -7, 0})), "a table of -7 tokens"));
    CHECK(contains(refusal(path, file_of(kTokens, {20240328, 2, 2147483647, 6})), "a table of 2147483647 tokens"));
    CHECK(contains(refusal(path, file_of(kTokens, {20240328, 2, 7, 7})), "end of text is token 7 of 7"));
    CHECK(contains(refusal(path, file_of(kTokens, {20240328, 2, 7, -1})), "end of text is token -1 of 7"));
    CHECK(contains(refusal(path, good + "x"), "the file has " + std::to_string(good.size() + 1)));
    CHECK(contains(refusal(path, file_of(kTokens, {20240328, 2, 6, 5})), "its 6 tokens end at byte"));
    refusal(path, file_of(kTokens, {20240328, 2, 8, 6}));
    for (size_t n = 1024; n < good.size(); n++) refusal(path, good.substr(0, n)); // torn anywhere

    std::string four_bytes = file_of(kTokens, {20240328, 3, 7, 6});
    for (size_t n = 1024; n < four_bytes.size(); n++) refusal(path, four_bytes.substr(0, n));
    CHECK(contains(refusal(path, file_of(kTokens, {20240328, 3, 7, 7})), "end of text is token 7 of 7"));
    // 1024 + 285 bytes hold 71 lengths at most, and a token is no longer than the rest of its file.
    CHECK(contains(refusal(path, file_of(kTokens, {20240328, 3, 100, 6})), "a table of 100 tokens"));
    four_bytes.replace(1024, 4, "\xFF\xFF\xFF\xFF");
    refusal(path, four_bytes);
}

TEST_CASE("a flipped byte never does more than change a token") {
    ScratchFolder folder;
    std::string path = folder / "t.bin", good = file_of(kTokens, {20240328, 2, 7, 6});
    std::mt19937_64 random(1);
    for (int i = 0; i < 2000; i++) {
        std::string bytes = good;
        size_t at = random() % 3 ? 1024 + random() % (bytes.size() - 1024) : random() % 16;
        bytes[at] = char(bytes[at] ^ char(1 + random() % 255));
        put_file(path, bytes);
        std::string said = message_of<BadInput>([&] {
            Tokenizer tokenizer(path);
            CHECK(tokenizer.size() == 7);
            CHECK(tokenizer.decode({0, 1, 2, 3, 4, 5, 6}).size() == good.size() - 1024 - 7);
        });
        if (at < 12) CHECK(said != "");
    }
}

TEST_CASE("valid UTF-8 is left as it is") {
    for (const char* text : {"", "plain", "é", "漢字", "🙂", "\x7f", "\xC2\x80", "\xDF\xBF", "\xE0\xA0\x80",
                             "\xED\x9F\xBF", "\xEE\x80\x80", "\xEF\xBF\xBF", "\xF0\x90\x80\x80", "\xF4\x8F\xBF\xBF"})
        CHECK(valid_utf8(text) == text);
    CHECK(valid_utf8(std::string("a\0b", 3)) == std::string("a\0b", 3));
}

TEST_CASE("every byte that is no UTF-8 becomes one replacement character") {
    const std::string r = "\xEF\xBF\xBD";
    struct Case {
        std::string bytes, want;
    };
    for (const Case& c : std::vector<Case>{{"\x80", r},
                                           {"a\xBFz", "a" + r + "z"},
                                           {"\xC3", r}, // cut short
                                           {"\xE2\x82", r + r},
                                           {"\xF0\x9F\x99", r + r + r},
                                           {"\xE2\x82z", r + r + "z"},
                                           {"\xC3\xC3\xA9", r + "é"},
                                           {"\xC0\x80", r + r}, // overlong
                                           {"\xC1\xBF", r + r},
                                           {"\xE0\x9F\xBF", r + r + r},
                                           {"\xF0\x8F\xBF\xBF", r + r + r + r},
                                           {"\xED\xA0\x80", r + r + r}, // surrogates
                                           {"\xED\xBF\xBF", r + r + r},
                                           {"\xF4\x90\x80\x80", r + r + r + r}, // past U+10FFFF
                                           {"\xF5\x80\x80\x80", r + r + r + r},
                                           {"\xFE\xFF", r + r}})
        CHECK(valid_utf8(c.bytes) == c.want);
}

// The definition: one character is valid if its shortest encoding gives it back, a text if it falls into such
// characters. Checked on all pairs of bytes, and on longer strings of bytes from the edges of the ranges.
TEST_CASE("valid UTF-8 is what decodes and encodes to itself") {
    auto is_character = [](const std::string& s) {
        auto byte = [&](size_t i) { return uint32_t(static_cast<unsigned char>(s[i])); };
        if (s.size() == 1) return byte(0) < 0x80;
        uint32_t code = byte(0) & (0x7Fu >> s.size());
        for (size_t i = 1; i < s.size(); i++) {
            if (byte(i) >> 6 != 2) return false;
            code = code << 6 | (byte(i) & 0x3F);
        }
        static const uint32_t least[] = {0, 0, 0x80, 0x800, 0x10000}, mark[] = {0, 0, 6, 14, 30};
        return byte(0) >> (7 - s.size()) == mark[s.size()] && code >= least[s.size()] && code <= 0x10FFFF &&
               !(code >= 0xD800 && code < 0xE000);
    };
    std::function<bool(const std::string&)> is_text = [&](const std::string& s) {
        for (size_t n = 1; n <= std::min(s.size(), size_t(4)); n++)
            if (is_character(s.substr(0, n)) && is_text(s.substr(n))) return true;
        return s.empty();
    };
    const std::string edges = "\x7F\x80\x8F\x90\x9F\xA0\xBF\xC0\xFF";
    int64_t valid = 0, wrong = 0;
    auto check = [&](const std::string& s) {
        bool want = is_text(s);
        valid += want;
        wrong += (valid_utf8(s) == s) != want;
    };
    for (int first = 0x80; first < 256; first++) {
        for (int second = 0; second < 256; second++) check({char(first), char(second)});
        for (char second : edges)
            for (char third : edges) {
                check({char(first), second, third});
                for (char fourth : edges) check({char(first), second, third, fourth});
            }
    }
    CHECK(wrong == 0);
    CHECK(valid > 30 * 64);
}
