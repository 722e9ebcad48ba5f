#include "shards.h"

#include <algorithm>
#include <bit>
#include <charconv>
#include <cmath>
#include <cstring>
#include <utility>

#include <nlohmann/json.hpp>

#include "errors.h"
#include "random.h"

static_assert(std::endian::native == std::endian::little, "shards are little-endian and read in place");

namespace {

constexpr int32_t kMagic = 20240520, kVersion = 1;
constexpr int32_t kLlama3Magic = 20240801; // the same layout with uint32 tokens
constexpr size_t kHeaderBytes = 256 * sizeof(int32_t);

// Shares are integers, so that the choice of a source is exact: no rounding that a compiler's fused multiply-adds could
// change from one machine to the next. 53 bits keep all that a double knows of a weight.
constexpr double kWhole = 0x1p53;

// Separates the data order from whatever else is drawn from the run's seed.
constexpr uint64_t kOrderStream = 0x64617461'00000000; // "data"

// The token count of a shard whose header and size agree.
int64_t check_header(const MappedFile& file) {
    int32_t header[3];
    std::memcpy(header, file.at(0, kHeaderBytes), sizeof header);
    if (header[0] == kLlama3Magic)
        throw BadInput(file.path() + " is a Llama-3 shard of 32-bit tokens; tokenise the text again with 16-bit ids");
    if (header[0] != kMagic)
        throw BadInput(file.path() + " is no token shard: magic " + std::to_string(header[0]) + ", not " +
                       std::to_string(kMagic) + "; make shards with data/prepare.py");
    if (header[1] != kVersion)
        throw BadInput(file.path() + " is a token shard of version " + std::to_string(header[1]) + ", not " +
                       std::to_string(kVersion) + "; make shards with data/prepare.py");
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

Windows::Windows(const std::string& glob, int64_t T, int64_t V) : T_(T), V_(V) {
    if (T < 1) throw BadInput("a window of " + std::to_string(T) + " tokens is too short; it needs at least 1");
    for (const std::string& path : expand_glob(glob)) {
        MappedFile file(path);
        int64_t tokens = check_header(file);
        if (tokens - 1 < T) // T + 1 could overflow
            throw BadInput(path + " has " + std::to_string(tokens) + " tokens, fewer than one window of " +
                           std::to_string(T) + " and its last target; shorten the context or use longer shards");
        file.expect_random_reads();
        shards_.push_back({std::move(file), tokens, count_});
        count_ += (tokens - 1) / T;
        tokens_ += tokens;
    }
}

void Windows::read(int64_t index, int32_t* inputs, int32_t* targets) const {
    if (index < 0 || index >= count_)
        throw BadInput("window " + std::to_string(index) + " of " + std::to_string(count_) + " does not exist");
    auto after = std::upper_bound(shards_.begin(), shards_.end(), index,
                                  [](int64_t i, const Shard& shard) { return i < shard.first_window; });
    const Shard& shard = after[-1];
    int64_t first = (index - shard.first_window) * T_;
    size_t offset = kHeaderBytes + sizeof(uint16_t) * static_cast<size_t>(first);
    size_t bytes = sizeof(uint16_t) * static_cast<size_t>(T_ + 1);
    shard.file.will_read(offset, bytes);
    const auto* tokens = reinterpret_cast<const uint16_t*>(shard.file.at(offset, bytes)); // (T+1)

    uint16_t largest = 0;
    for (int64_t t = 0; t <= T_; t++) largest = std::max(largest, tokens[t]);
    if (largest >= V_) {
        int64_t t = std::find_if(tokens, tokens + T_ + 1, [&](uint16_t token) { return token >= V_; }) - tokens;
        throw BadInput(shard.file.path() + ": token " + std::to_string(tokens[t]) + " at index " +
                       std::to_string(first + t) + " is not below the vocabulary size " + std::to_string(V_) +
                       "; the shard was made with another tokenizer");
    }
    for (int64_t t = 0; t < T_; t++) inputs[t] = tokens[t];
    for (int64_t t = 0; t < T_; t++) targets[t] = tokens[t + 1];
    shard.file.done_with(offset, bytes);
}

Loader::Loader(const std::vector<SourceSpec>& sources, int64_t T, int64_t V, uint64_t seed) : T_(T), seed_(seed) {
    if (sources.empty()) throw BadInput("no training data; name token shards");
    double total = 0;
    for (const SourceSpec& source : sources) {
        if (!(source.weight > 0)) throw BadInput("the weight of '" + source.glob + "' must be a positive number");
        total += source.weight;
    }
    if (std::isinf(total)) throw BadInput("the weights of the sources are too large to be summed; scale them down");
    for (const SourceSpec& source : sources) {
        sources_.emplace_back(source.glob, T, V);
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

nlohmann::json Loader::state() const { return {{"drawn", drawn_}, {"windows", windows()}}; }

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
    // Other windows would be another order: some seen twice, some never.
    if (auto then = state.find("windows"); then != state.end() && *then != nlohmann::json(windows()))
        throw BadInput("the sources have " + nlohmann::json(windows()).dump() +
                       " windows, but the checkpoint was made with " + then->dump() +
                       "; put back the shards that the run was started with");
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
