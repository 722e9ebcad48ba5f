// Where tokens come from: the tokenizer that made a shard's ids, as dataset.json beside it says, and what tells one
// shard from another. data/dataset.py is the same for Python, which writes the file (data/FORMATS.md).
#pragma once
#include <cstdint>
#include <map>
#include <optional>
#include <string>

#include <nlohmann/json.hpp>

#include "files.h"

// What is known of a tokenizer. Two with the same tokens have the same ids for the same text, or nearly so.
struct TokenizerId {
    int64_t tokens = 0;
    int64_t end_of_text = -1; // -1: unknown
    std::string hash;         // of the table of tokens (Tokenizer::hash()); empty: unknown

    // How `other` differs: "50257 tokens instead of 8192"; empty if nothing that both know does.
    std::string difference(const TokenizerId& other) const;
    nlohmann::json to_json() const;
    // Throws BadInput that begins with `where` for what is no such object.
    static TokenizerId from_json(const nlohmann::json& object, const std::string& where);
};

// A shard without its folder: the same file elsewhere is the same shard.
struct ShardId {
    std::string name;
    int64_t tokens;
    std::string hash; // shard_hash()

    bool operator==(const ShardId&) const = default;
    nlohmann::json to_json() const;
};

// dataset.json, what the trainer needs of it.
struct Dataset {
    std::string path;
    TokenizerId tokenizer;
    // By name; prepare.py wrote no other ids than the tokenizer's into them. None: written before shards were listed.
    std::optional<std::map<std::string, ShardId>> shards;
};

// The dataset.json of a folder, if prepare.py's is there; throws BadInput if it is damaged.
std::optional<Dataset> read_dataset(const std::string& folder);

// Sampled, so that gigabytes cost some reads: FNV-1a over the header and all ids, or, above 64 KiB of ids, 16 pieces of
// 4 KiB from the first id to the last at equal distances.
std::string shard_hash(const FileReader& file, int64_t tokens);

// FNV-1a, 64 bits: three lines in any language, and Python writes the same hashes.
class Fnv {
public:
    void add(const void* data, size_t bytes);
    std::string hex() const;

private:
    uint64_t state_ = 0xcbf29ce484222325;
};
