// The tokenizer binary (data/FORMATS.md), llm.c's two versions and ours: enough to decode. Encoding is Python's
// (data/prepare.py, generate.py).
#pragma once
#include <cstdint>
#include <string>
#include <vector>

class Tokenizer {
public:
    explicit Tokenizer(const std::string& path); // throws BadInput: magic, version, size
    int64_t size() const { return static_cast<int64_t>(tokens_.size()); }
    int32_t end_of_text() const { return end_of_text_; } // -1: the file does not say, nor is it GPT-2's
    // Bytes of the tokens; ids beyond the table (a model's padding) decode to nothing.
    std::string decode(const std::vector<int32_t>& ids) const;
    // What the shards of this tokenizer say in dataset.json: FNV-1a over each token's length (4 bytes) and bytes, so
    // that it does not depend on the version of the file.
    std::string hash() const;

private:
    std::vector<std::string> tokens_;
    int32_t end_of_text_ = -1;
};

// The text with every byte that is not valid UTF-8 replaced by U+FFFD, so that it can stand in JSON and on a terminal.
std::string valid_utf8(const std::string& bytes);
