#include "shards.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <utility>

#include <nlohmann/json.hpp>

#include "../base/errors.h"
#include "../base/random.h"

static_assert(std::endian::native == std::endian::little, "shards are little-endian and read as they are");

namespace {

constexpr int32_t kShardMagic = 20240520, kShardVersion = 1;
constexpr int32_t kLlama3Magic = 20240801; // the same layout with uint32 tokens

// Tokens that are read at a time, 1 MiB; a thread's part of a scan; and from how many bytes on a scan is announced.
constexpr int64_t kPiece = int64_t(1) << 19, kScanPart = int64_t(1) << 23;
constexpr double kLongScan = 4e9;

// A checkpoint lists the shards, and reads no manifest above 16 MiB.
constexpr size_t kMostShards = 32768;

// Shares are integers, so that the choice of a source is exact: no rounding that a compiler's fused multiply-adds could
// change from one machine to the next. 53 bits keep all that a double knows of a weight.
constexpr double kWhole = 0x1p53;

// Separates the data order from whatever else is drawn from the run's seed.
constexpr uint64_t kOrderStream = 0x64617461'00000000; // "data"

// The token count of a shard whose header and size agree.
int64_t check_header(const FileReader& file) {
    int32_t header[3];
    file.read(0, header, sizeof header);
    if (header[0] == kLlama3Magic)
        throw BadInput(file.path() + " is a Llama-3 shard of 32-bit tokens; tokenise the text again with 16-bit ids");
    if (header[0] != kShardMagic)
        throw BadInput(file.path() + " is no token shard: magic " + std::to_string(header[0]) + ", not " +
                       std::to_string(kShardMagic) + "; make shards with data/prepare.py");
    if (header[1] != kShardVersion)
        throw BadInput(file.path() + " is a token shard of version " + std::to_string(header[1]) + ", not " +
                       std::to_string(kShardVersion) + "; make shards with data/prepare.py");
    int64_t tokens = header[2];
    if (tokens < 0)
        throw BadInput(file.path() + " has a negative token count in its header, " + std::to_string(tokens) +
                       "; make it again");
    uint64_t bytes = kHeaderBytes + sizeof(uint16_t) * static_cast<uint64_t>(tokens);
    if (file.size() != bytes)
        throw BadInput(file.path() + " has " + std::to_string(file.size()) + " bytes, but the " +
                       std::to_string(tokens) + " tokens of its header need " + std::to_string(bytes) +
                       "; it may be cut off, make or copy it again");
    return tokens;
}

// `text` as a number, whole; NaN and out-of-range count as numbers, to be refused by name.
bool parse_number(const std::string& text, double& value) {
    auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    if (error == std::errc::result_out_of_range) value = NAN;
    return error != std::errc::invalid_argument && end == text.data() + text.size();
}

} // namespace

std::vector<SourceSpec> parse_sources(const std::string& text) {
    std::vector<SourceSpec> sources;
    size_t begin = 0;
    for (;;) {
        size_t comma = text.find(',', begin);
        std::string item = text.substr(begin, comma - begin); // npos - begin: to the end
        SourceSpec source{item};
        size_t colon = item.rfind(':');
        double weight;
        if (colon != std::string::npos && parse_number(item.substr(colon + 1), weight)) {
            source = {item.substr(0, colon), weight};
            if (!(weight > 0) || std::isinf(weight))
                throw BadInput("the weight in '" + item + "' must be a positive number");
        }
        if (source.glob.empty())
            throw BadInput("empty item in the list of sources '" + text + "'; write GLOB[:WEIGHT],GLOB[:WEIGHT],…");
        sources.push_back(source);
        if (comma == std::string::npos) return sources;
        begin = comma + 1;
    }
}

// Runs body(i) for i below n on all threads, then throws what the lowest i threw.
template <class Body> static void for_all(int64_t n, const Body& body) {
    std::atomic<int64_t> failed = n;
    std::exception_ptr failure;
#pragma omp parallel for schedule(dynamic)
    for (int64_t i = 0; i < n; i++) {
        if (i > failed) continue;
        try {
            body(i);
        } catch (...) {
#pragma omp critical
            if (i < failed) failed = i, failure = std::current_exception();
        }
    }
    if (failure) std::rethrow_exception(failure);
}

Windows::Windows(const std::string& glob, int64_t T, int64_t V) : T_(T), V_(V) {
    if (T < 1) throw BadInput("a window of " + std::to_string(T) + " tokens is too short; it needs at least 1");
    const std::vector<std::string> paths = expand_glob(glob);
    if (paths.size() > kMostShards)
        throw BadInput(glob + " matches " + std::to_string(paths.size()) + " shards, more than " +
                       std::to_string(kMostShards) + "; make longer ones (data/prepare.py --shard-tokens)");
    shards_.resize(paths.size());
    for_all(static_cast<int64_t>(paths.size()), [&](int64_t i) {
        FileReader file(paths[i]);
        int64_t tokens = check_header(file);
        if (tokens - 1 < T) // T + 1 could overflow
            throw BadInput(paths[i] + " has " + std::to_string(tokens) + " tokens, fewer than one window of " +
                           std::to_string(T) + " and its last target; shorten the context or use longer shards");
        ShardId id{std::filesystem::path(paths[i]).filename().string(), tokens, shard_hash(file, tokens)};
        shards_[i] = {paths[i], file.size(), file.modified(), 0, id, false};
    });
    for (Shard& shard : shards_) {
        shard.first_window = count_;
        count_ += (shard.id.tokens - 1) / T;
        tokens_ += shard.id.tokens;
    }
    look_up(glob);
}

// What dataset.json says of the shards, of each folder that they are in.
void Windows::look_up(const std::string& glob) {
    std::map<std::string, std::optional<Dataset>> folders;
    for (Shard& shard : shards_) {
        const std::string folder = std::filesystem::path(shard.path).parent_path().string();
        auto known = folders.find(folder);
        if (known == folders.end()) known = folders.emplace(folder, read_dataset(folder)).first;
        const std::optional<Dataset>& dataset = known->second;
        if (!dataset) continue;
        if (dataset->shards) {
            auto listed = dataset->shards->find(shard.id.name);
            if (listed == dataset->shards->end()) continue; // of somebody else's making
            if (listed->second != shard.id)
                throw BadInput(shard.path + " is not the shard that " + dataset->path +
                               " describes; make the shards again, or remove dataset.json if you changed this one");
            shard.vouched = true;
        }
        const TokenizerId& tokenizer = dataset->tokenizer;
        if (tokenizer.tokens > V_)
            throw BadInput(dataset->path + ": a tokenizer of " + std::to_string(tokenizer.tokens) +
                           " tokens, but the model has only " + std::to_string(V_) + "; give a new model --vocab " +
                           std::to_string(tokenizer.tokens) +
                           ", or tokenise the text again with the model's tokenizer (data/prepare.py --tokenizer)");
        if (!dataset_) dataset_ = dataset;
        if (std::string other = dataset_->tokenizer.difference(tokenizer); !other.empty())
            throw BadInput("the shards of '" + glob + "' are of two tokenizers: " + dataset->path + " has " + other +
                           " in " + dataset_->path + "; use shards of one tokenizer");
    }
}

nlohmann::json Windows::shards() const {
    nlohmann::json list = nlohmann::json::array();
    for (const Shard& shard : shards_) list.push_back(shard.id.to_json());
    return list;
}

// Opened for each window: thousands of shards are more than a process may keep open.
FileReader Windows::open(const Shard& shard) const {
    const std::string advice = "; put it back as it was and resume";
    try {
        FileReader file(shard.path);
        if (file.size() < shard.bytes)
            throw RunFailed(shard.path + " was cut from " + std::to_string(shard.bytes) + " to " +
                            std::to_string(file.size()) + " bytes while the run used it" + advice);
        if (file.size() != shard.bytes || file.modified() != shard.modified)
            throw RunFailed(shard.path + " was changed while the run used it" + advice);
        return file;
    } catch (const BadInput& gone) { // it was good when the run began
        throw RunFailed(std::string(gone.what()) + advice);
    }
}

// Refuses the first of `count` ids, the shard's from `first` on, that is not below V.
void Windows::check(const Shard& shard, const uint16_t* tokens, int64_t first, int64_t count) const {
    uint16_t largest = 0;
    for (int64_t t = 0; t < count; t++) largest = std::max(largest, tokens[t]);
    if (largest < V_) return;
    const uint16_t* bad = std::find_if(tokens, tokens + count, [&](uint16_t token) { return token >= V_; });
    throw BadInput(shard.path + ": token " + std::to_string(*bad) + " at index " +
                   std::to_string(first + (bad - tokens)) + " is not below the vocabulary size " + std::to_string(V_) +
                   "; the shard was made with another tokenizer");
}

// use(tokens, first, count) for the ids of a shard from `first` on, a piece at a time, checked.
template <class Use>
void Windows::read_ids(const FileReader& file, const Shard& shard, int64_t first, int64_t count, const Use& use) const {
    std::vector<uint16_t> piece(std::min(kPiece, count));
    for (const int64_t end = first + count; first < end; first += kPiece) {
        const int64_t n = std::min(kPiece, end - first);
        file.read(kHeaderBytes + sizeof(uint16_t) * first, piece.data(), sizeof(uint16_t) * n);
        check(shard, piece.data(), first, n);
        use(piece.data(), first, n);
    }
}

void Windows::read(int64_t index, int32_t* inputs, int32_t* targets) const {
    if (index < 0 || index >= count_)
        throw BadInput("window " + std::to_string(index) + " of " + std::to_string(count_) + " does not exist");
    auto after = std::upper_bound(shards_.begin(), shards_.end(), index,
                                  [](int64_t i, const Shard& shard) { return i < shard.first_window; });
    const Shard& shard = after[-1];
    const int64_t start = (index - shard.first_window) * T_;
    const FileReader file = open(shard);
    file.expect_random_reads();
    read_ids(file, shard, start, T_ + 1, [&](const uint16_t* tokens, int64_t first, int64_t count) {
        const int64_t t = first - start;
        for (int64_t i = 0; i < std::min(count, T_ - t); i++) inputs[t + i] = tokens[i];
        for (int64_t i = t > 0 ? 0 : 1; i < count; i++) targets[t + i - 1] = tokens[i];
    });
}

void Windows::check_ids() const {
    if (V_ > UINT16_MAX) return;
    struct Part {
        const Shard* shard;
        int64_t first;
    };
    std::vector<Part> parts;
    double bytes = 0;
    for (const Shard& shard : shards_) {
        if (shard.vouched) continue;
        for (int64_t first = 0; first < shard.id.tokens; first += kScanPart) parts.push_back({&shard, first});
        bytes += double(shard.bytes);
    }
    if (bytes >= kLongScan)
        fprintf(stderr, "reading %.0f GB of shards to check their tokens, as no dataset.json vouches for them\n",
                bytes * 1e-9);
    for_all(static_cast<int64_t>(parts.size()), [&](int64_t i) {
        const Shard& shard = *parts[i].shard;
        const FileReader file = open(shard);
        read_ids(file, shard, parts[i].first, std::min(kScanPart, shard.id.tokens - parts[i].first),
                 [](const uint16_t*, int64_t, int64_t) {});
    });
}

Loader::Loader(const std::vector<SourceSpec>& sources, int64_t T, int64_t V, uint64_t seed) : T_(T), seed_(seed) {
    if (sources.empty()) throw BadInput("no training data; name token shards");
    double total = 0;
    for (const SourceSpec& source : sources) {
        if (!(source.weight > 0)) throw BadInput("the weight of '" + source.glob + "' must be a positive number");
        total += source.weight;
    }
    if (std::isinf(total)) throw BadInput("the weights of the sources are too large to be summed; scale them down");
    size_t shards = 0;
    for (const SourceSpec& source : sources) {
        sources_.emplace_back(source.glob, T, V);
        if ((shards += sources_.back().shards().size()) > kMostShards)
            throw BadInput("the sources have more than " + std::to_string(kMostShards) +
                           " shards together; make longer ones (data/prepare.py --shard-tokens)");
        shares_.push_back(std::llround(source.weight / total * kWhole));
        drawn_.push_back(0);
    }
}

size_t Loader::furthest_behind() const {
    __int128 n = 1; // windows drawn once the next one is
    for (int64_t drawn : drawn_) n += drawn;
    size_t best = 0;
    __int128 most = 0;
    for (size_t s = 0; s < sources_.size(); s++) {
        __int128 behind = shares_[s] * n - (static_cast<__int128>(drawn_[s]) << 53);
        if (s == 0 || behind > most) best = s, most = behind;
    }
    return best;
}

void Loader::next(int32_t* inputs, int32_t* targets, int64_t B) {
    for (int64_t b = 0; b < B; b++) {
        size_t s = furthest_behind();
        uint64_t count = static_cast<uint64_t>(sources_[s].count()), drawn = static_cast<uint64_t>(drawn_[s]);
        Philox key = philox(seed_, kOrderStream + s, drawn / count);
        uint64_t window = permute_index(drawn % count, count, uint64_t(key.word[0]) << 32 | key.word[1]);
        sources_[s].read(static_cast<int64_t>(window), inputs + b * T_, targets + b * T_);
        drawn_[s]++;
    }
}

void Loader::skip(int64_t windows) {
    for (int64_t i = 0; i < windows; i++) drawn_[furthest_behind()]++;
}

int64_t Loader::windows_per_epoch() const {
    int64_t windows = 0;
    for (const Windows& source : sources_) windows += source.count();
    return windows;
}

std::vector<int64_t> Loader::windows() const {
    std::vector<int64_t> counts;
    for (const Windows& source : sources_) counts.push_back(source.count());
    return counts;
}

nlohmann::json Loader::shards() const {
    nlohmann::json list = nlohmann::json::array();
    for (const Windows& source : sources_) list.push_back(source.shards());
    return list;
}

nlohmann::json Loader::state() const {
    nlohmann::json state = {{"drawn", drawn_}, {"shares", shares_}, {"windows", windows()}, {"sources", shards()}};
    for (const Windows& source : sources_)
        if (source.dataset()) state["tokenizer"] = source.dataset()->tokenizer.to_json();
    return state;
}

// The first difference between the shards of a checkpoint and those here, in words.
static std::string shard_difference(const nlohmann::json& then, const nlohmann::json& now) {
    for (size_t s = 0; s < now.size(); s++) {
        const std::string where = now.size() > 1 ? " in source " + std::to_string(s + 1) : "";
        for (size_t i = 0; i < std::max(then.at(s).size(), now[s].size()); i++) {
            const std::string number = "shard " + std::to_string(i + 1) + where;
            if (i >= now[s].size()) return number + ", " + then.at(s).at(i).at("name").dump() + ", is missing";
            const nlohmann::json& shard = now[s][i];
            if (i >= then.at(s).size()) return number + ", " + shard.at("name").dump() + ", is new";
            const nlohmann::json& old = then.at(s).at(i);
            if (shard == old) continue;
            if (shard.at("name") != old.at("name"))
                return number + " is " + shard.at("name").dump() + " and was " + old.at("name").dump();
            if (shard.at("tokens") != old.at("tokens"))
                return number + ", " + shard.at("name").dump() + ", has " + shard.at("tokens").dump() +
                       " tokens and had " + old.at("tokens").dump();
            return number + ", " + shard.at("name").dump() + ", holds other tokens than it did";
        }
    }
    return "";
}

void Loader::restore(const nlohmann::json& state) {
    auto drawn = state.is_object() ? state.find("drawn") : state.end();
    if (drawn == state.end() || !drawn->is_array())
        throw BadInput("the data position in the checkpoint holds no list 'drawn'; use another checkpoint");
    if (drawn->size() != sources_.size())
        throw BadInput("the checkpoint's data position is for " + std::to_string(drawn->size()) +
                       " sources, but the run has " + std::to_string(sources_.size()) +
                       "; resume with the sources it was started with");
    // 2^60 windows would take longer than any machine lasts, and leave sums of counts far from overflow.
    std::vector<int64_t> counts;
    for (const nlohmann::json& count : *drawn) {
        bool fits = count.is_number_unsigned()  ? count.get<uint64_t>() <= uint64_t(1) << 60
                    : count.is_number_integer() ? count.get<int64_t>() >= 0 && count.get<int64_t>() <= int64_t(1) << 60
                                                : false;
        if (!fits)
            throw BadInput("the checkpoint's data position holds " + count.dump() +
                           " where a count of windows belongs; use another checkpoint");
        counts.push_back(count.get<int64_t>());
    }
    // Other shards would be another order: some windows seen twice, some never.
    const std::string advice = "; put back what the run was started with, or go on with this as a new run: --init with "
                               "this one's folder, and another --out";
    if (auto then = state.find("sources"); then != state.end()) {
        std::string difference;
        try {
            difference = shard_difference(*then, shards());
        } catch (const nlohmann::json::exception&) {
            throw BadInput("the data position in the checkpoint lists its shards in no way that this program writes; "
                           "use another checkpoint");
        }
        if (!difference.empty()) throw BadInput("--train: " + difference + advice);
    }
    if (auto then = state.find("shares"); then != state.end() && *then != nlohmann::json(shares_))
        throw BadInput("--train: the sources have other weights than the run was started with" + advice);
    if (auto then = state.find("windows"); then != state.end() && *then != nlohmann::json(windows()))
        throw BadInput("the sources have " + nlohmann::json(windows()).dump() +
                       " windows, but the checkpoint was made with " + then->dump() + advice);
    drawn_ = counts;
}

uint64_t permute_index(uint64_t index, uint64_t n, uint64_t key) {
    // A network over fewer than 8 bits reaches too few of the permutations; walking from 256 to a smaller n is still
    // cheap.
    int half = 4; // bits of each half
    while (half < 32 && (uint64_t(1) << (2 * half)) < n) half++;
    uint64_t mask = (uint64_t(1) << half) - 1;
    do {
        uint64_t left = index >> half, right = index & mask;
        for (uint64_t round = 0; round < 4; round++)
            left = std::exchange(right, left ^ (philox(key, round, right).word[0] & mask));
        index = left << half | right;
    } while (index >= n);
    return index;
}
