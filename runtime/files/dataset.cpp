#include "dataset.h"

#include <cstdio>
#include <filesystem>
#include <vector>

#include "../base/errors.h"
#include "tokenizer.h"

using nlohmann::json;

namespace {

// The first that was numbered; before it there was neither a hash nor a list of shards.
constexpr int64_t kDatasetVersion = 2;
constexpr size_t kLargestDataset = size_t(256) << 20; // a shard takes about 100 bytes
constexpr size_t kPieceBytes = 4096, kPieces = 16;

// The member `name` of an object, as an integer from `least` on or as a text; throws BadInput that begins with `where`.
int64_t integer(const json& object, const char* name, int64_t least, const std::string& where) {
    auto found = object.find(name);
    if (found == object.end() || !found->is_number_integer() || found->get<int64_t>() < least)
        throw BadInput(where + ": \"" + name + "\" is no number from " + std::to_string(least) + " on");
    return found->get<int64_t>();
}
std::string text(const json& object, const char* name, const std::string& where) {
    auto found = object.find(name);
    if (found == object.end() || !found->is_string()) throw BadInput(where + ": \"" + name + "\" is no text");
    return found->get<std::string>();
}

} // namespace

std::string TokenizerId::difference(const TokenizerId& other) const {
    if (tokens != other.tokens) return std::to_string(other.tokens) + " tokens instead of " + std::to_string(tokens);
    if (end_of_text >= 0 && other.end_of_text >= 0 && end_of_text != other.end_of_text)
        return "end of text " + std::to_string(other.end_of_text) + " instead of " + std::to_string(end_of_text);
    if (!hash.empty() && !other.hash.empty() && hash != other.hash)
        return "other tokens, although " + std::to_string(tokens) + " too";
    return "";
}

json TokenizerId::to_json() const {
    json object = {{"tokens", tokens}};
    if (end_of_text >= 0) object["end_of_text"] = end_of_text;
    if (!hash.empty()) object["hash"] = hash;
    return object;
}

TokenizerId TokenizerId::from_json(const json& object, const std::string& where) {
    if (!object.is_object()) throw BadInput(where + ": the tokenizer is no object");
    TokenizerId id;
    id.tokens = integer(object, "tokens", 1, where);
    if (object.contains("end_of_text")) id.end_of_text = integer(object, "end_of_text", 0, where);
    if (object.contains("hash")) id.hash = text(object, "hash", where);
    return id;
}

json ShardId::to_json() const { return {{"name", valid_utf8(name)}, {"tokens", tokens}, {"hash", hash}}; }

std::optional<Dataset> read_dataset(const std::string& folder) {
    const std::string path = (std::filesystem::path(folder) / "dataset.json").string();
    std::error_code ignored;
    if (!std::filesystem::exists(path, ignored)) return {};
    const json read = json::parse(read_small_file(path, kLargestDataset), nullptr, false);
    if (read.is_object() && !read.contains("tokenizer")) return {}; // another program's
    const std::string where = path + " is damaged (make the shards again, or remove it to have ids checked alone)";
    if (!read.is_object()) throw BadInput(where + ": no JSON object");
    if (read.contains("version") && integer(read, "version", 1, where) > kDatasetVersion)
        throw BadInput(path + ": version " + read["version"].dump() + ", this program reads up to " +
                       std::to_string(kDatasetVersion) + "; use the program that belongs to these shards");

    Dataset dataset{path, TokenizerId::from_json(read["tokenizer"], where), {}};
    if (!read.contains("version")) return dataset;
    dataset.shards.emplace();
    for (const char* side : {"train", "val"}) {
        if (!read.contains(side) || !read[side].is_object() || !read[side].contains("files") ||
            !read[side]["files"].is_array())
            throw BadInput(where + ": no list of the shards of \"" + side + "\"");
        for (const json& file : read[side]["files"]) {
            if (!file.is_object()) throw BadInput(where + ": a shard of \"" + side + "\" is no object");
            ShardId shard{text(file, "name", where), integer(file, "tokens", 0, where), text(file, "hash", where)};
            dataset.shards->emplace(shard.name, shard);
        }
    }
    return dataset;
}

std::string shard_hash(const FileReader& file, int64_t tokens) {
    Fnv hash;
    std::vector<unsigned char> buffer(kPieces * kPieceBytes);
    auto add = [&](size_t offset, size_t bytes) {
        file.read(offset, buffer.data(), bytes);
        hash.add(buffer.data(), bytes);
    };
    const size_t bytes = sizeof(uint16_t) * static_cast<size_t>(tokens);
    add(0, kHeaderBytes);
    if (bytes <= buffer.size())
        add(kHeaderBytes, bytes);
    else
        for (size_t i = 0; i < kPieces; i++) add(kHeaderBytes + i * (bytes - kPieceBytes) / (kPieces - 1), kPieceBytes);
    return hash.hex();
}

void Fnv::add(const void* data, size_t bytes) {
    for (size_t i = 0; i < bytes; i++) state_ = (state_ ^ static_cast<const unsigned char*>(data)[i]) * 0x100000001b3;
}

std::string Fnv::hex() const {
    char digits[17];
    snprintf(digits, sizeof digits, "%016llx", static_cast<unsigned long long>(state_));
    return digits;
}
