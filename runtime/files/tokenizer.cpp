#include "tokenizer.h"

#include <cstring>

#include "../base/errors.h"
#include "dataset.h"
#include "files.h"

namespace {

constexpr size_t kLargestTokenizer = size_t(1) << 30; // real ones have less than 1 MiB
constexpr int32_t kTokenizerMagic = 20240328;
constexpr int32_t kGpt2Tokens = 50257; // the only table that was ever written before the file named its end of text

} // namespace

Tokenizer::Tokenizer(const std::string& path) {
    SmallFile file(path, kLargestTokenizer);
    int32_t header[4]; // magic, version, V, end of text
    memcpy(header, file.at(0, kHeaderBytes), sizeof header);
    auto [magic, version, V, end_of_text] = header;
    if (magic != kTokenizerMagic)
        throw BadInput(path + " is not a tokenizer binary: its magic is " + std::to_string(magic) + ", not " +
                       std::to_string(kTokenizerMagic));
    if (version < 1 || version > 3)
        throw BadInput(path + ": tokenizer version " + std::to_string(version) + ", this program reads 1 to 3");
    const size_t length_bytes = version == 3 ? sizeof(uint32_t) : 1;
    // Every token takes its length at least, so a table longer than its file is refused before memory is taken for it.
    if (V < 1 || static_cast<size_t>(V) > (file.size() - kHeaderBytes) / length_bytes)
        throw BadInput(path + ": a table of " + std::to_string(V) + " tokens cannot be in a file of " +
                       std::to_string(file.size()) + " bytes");
    if (version != 1) {
        if (end_of_text < 0 || end_of_text >= V)
            throw BadInput(path + ": end of text is token " + std::to_string(end_of_text) + " of " + std::to_string(V));
        end_of_text_ = end_of_text;
    } else if (V == kGpt2Tokens) {
        end_of_text_ = kGpt2Tokens - 1;
    }

    size_t at = kHeaderBytes;
    tokens_.reserve(static_cast<size_t>(V));
    for (int32_t i = 0; i < V; i++) {
        uint32_t length = 0; // little-endian, as this machine is
        memcpy(&length, file.at(at, length_bytes), length_bytes);
        at += length_bytes;
        tokens_.emplace_back(reinterpret_cast<const char*>(file.at(at, length)), length);
        at += length;
    }
    if (at != file.size())
        throw BadInput(path + ": its " + std::to_string(V) + " tokens end at byte " + std::to_string(at) +
                       ", the file has " + std::to_string(file.size()));
}

std::string Tokenizer::hash() const {
    Fnv hash;
    for (const std::string& token : tokens_) {
        const uint32_t length = static_cast<uint32_t>(token.size());
        hash.add(&length, sizeof length);
        hash.add(token.data(), length);
    }
    return hash.hex();
}

std::string Tokenizer::decode(const std::vector<int32_t>& ids) const {
    std::string text;
    for (int32_t id : ids)
        if (id >= 0 && id < size()) text += tokens_[static_cast<size_t>(id)];
    return text;
}

namespace {

// Bytes of the well-formed UTF-8 sequence at s, 0 if there is none. Table 3-7 of the Unicode standard: the ranges of
// the second byte keep out overlong forms (E0, F0), surrogates (ED) and what lies past U+10FFFF (F4).
size_t utf8_length(const unsigned char* s, size_t left) {
    unsigned char c = s[0];
    if (c < 0x80) return 1;
    size_t length = c >= 0xC2 && c <= 0xDF ? 2 : (c & 0xF0) == 0xE0 ? 3 : c >= 0xF0 && c <= 0xF4 ? 4 : 0;
    if (length == 0 || length > left) return 0;
    unsigned char low = c == 0xE0 ? 0xA0 : c == 0xF0 ? 0x90 : 0x80, high = c == 0xED ? 0x9F : c == 0xF4 ? 0x8F : 0xBF;
    if (s[1] < low || s[1] > high) return 0;
    for (size_t i = 2; i < length; i++)
        if ((s[i] & 0xC0) != 0x80) return 0;
    return length;
}

} // namespace

std::string valid_utf8(const std::string& bytes) {
    std::string text;
    text.reserve(bytes.size());
    for (size_t i = 0; i < bytes.size();) {
        size_t length = utf8_length(reinterpret_cast<const unsigned char*>(bytes.data()) + i, bytes.size() - i);
        if (length > 0)
            text.append(bytes, i, length);
        else
            text += "\xEF\xBF\xBD";
        i += length > 0 ? length : 1;
    }
    return text;
}
