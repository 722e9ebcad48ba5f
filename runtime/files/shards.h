// Pre-tokenised data: llm.c's token shards, read where they are, cut into windows of T+1 tokens.
//
// A shard is 256 int32 (magic 20240520, version 1, token count, zeros) and the tokens as uint16, little-endian. Its
// window w holds tokens [w·T, w·T + T]: T inputs and the same moved on by one as targets. Windows never cross shards.
// An epoch of a source visits each of its windows once, in an order that a keyed permutation of (seed, epoch) gives
// without a table, so that the whole state of a loader is a few counters.
//
// Refused, naming file and numbers: a wrong magic or version, a size that does not match the count in the header, a
// token >= V, a glob that matches nothing, a shard shorter than one window; and, where dataset.json is beside a shard,
// a tokenizer with more tokens than V, a shard that is not the one described there, shards of several tokenizers.
//
// A shard must stay as it is while a run reads it. One that is cut, written to or removed is RunFailed at the next
// window from it, as is a disk that fails.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include <nlohmann/json_fwd.hpp>

#include "dataset.h"

// "GLOB[:WEIGHT],GLOB[:WEIGHT],…": weights default to 1 and need not sum to 1. Only a number after the last ':' is a
// weight, so paths may hold ':'.
struct SourceSpec {
    std::string glob;
    double weight = 1;
};
std::vector<SourceSpec> parse_sources(const std::string& text);

// The windows of one glob, addressed by a single index over all its shards. Opening reads the headers and the samples
// of shard_hash().
class Windows {
public:
    Windows(const std::string& glob, int64_t T, int64_t V);
    int64_t count() const { return count_; } // windows
    int64_t tokens() const { return tokens_; }
    // inputs (T) and targets (T) of window `index`; checks every token against V.
    void read(int64_t index, int32_t* inputs, int32_t* targets) const;

    // Reads every id of the shards that no dataset.json vouches for, on all threads: a run need not come to its 200th
    // window to learn that it holds a token >= V. Takes a second a gigabyte or less where the disk can.
    void check_ids() const;

    nlohmann::json shards() const; // a ShardId each, in order
    // The dataset.json that names the shards' tokenizer, if one does.
    const std::optional<Dataset>& dataset() const { return dataset_; }

private:
    struct Shard {
        std::string path;
        size_t bytes;
        int64_t modified, first_window;
        ShardId id;
        bool vouched; // its ids are below V, by dataset.json
    };
    std::vector<Shard> shards_;
    std::optional<Dataset> dataset_;
    int64_t T_, V_, count_ = 0, tokens_ = 0;

    FileReader open(const Shard& shard) const;
    void look_up(const std::string& glob);
    void check(const Shard& shard, const uint16_t* tokens, int64_t first, int64_t count) const;
    template <class Use>
    void read_ids(const FileReader& file, const Shard& shard, int64_t first, int64_t count, const Use& use) const;
};

// An endless shuffled stream of windows, mixed from its sources by weight. Which source the n-th window comes from
// depends on the weights and n alone: the one furthest behind its share, the first of those in a tie.
class Loader {
public:
    Loader(const std::vector<SourceSpec>& sources, int64_t T, int64_t V, uint64_t seed);
    // inputs (B,T) and targets (B,T).
    void next(int32_t* inputs, int32_t* targets, int64_t B);
    void skip(int64_t windows);        // as if they had been read
    int64_t windows_per_epoch() const; // all sources together
    const std::vector<Windows>& sources() const { return sources_; }

    // The data position, for checkpoints: {"drawn": [windows taken from each source], "shares": [of 2^53 each],
    // "windows": [how many each has], "sources": [its shards], "tokenizer": what dataset.json says, if it is there}. It
    // depends on the shards alone and not on where they are. restore() refuses a state of another shape, of other data
    // or weights, or with counts that no run can have reached; one without sources, as earlier programs wrote, is
    // judged by its numbers.
    nlohmann::json state() const;
    const std::vector<int64_t>& drawn() const { return drawn_; } // all of state() that next() changes
    void restore(const nlohmann::json& state);

private:
    std::vector<Windows> sources_;
    std::vector<int64_t> shares_; // of 2^53
    std::vector<int64_t> drawn_;
    int64_t T_;
    uint64_t seed_;
    std::vector<int64_t> windows() const; // of each source
    nlohmann::json shards() const;        // of each source

    size_t furthest_behind() const;
};

// Bijection of [0, n) onto itself, chosen by key: a Feistel network over the next power of four (at least 256), walked
// until the value falls inside.
uint64_t permute_index(uint64_t index, uint64_t n, uint64_t key);
