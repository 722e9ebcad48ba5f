// Token shards made on the spot.
#pragma once
#include <cstdint>
#include <numeric>
#include <string>
#include <vector>

inline std::string shard_bytes(const std::vector<uint16_t>& tokens, int32_t magic = 20240520, int32_t version = 1,
                               int64_t count = -1) {
    std::vector<int32_t> header(256, 0);
    header[0] = magic, header[1] = version;
    header[2] = static_cast<int32_t>(count < 0 ? static_cast<int64_t>(tokens.size()) : count);
    std::string bytes(reinterpret_cast<const char*>(header.data()), 1024);
    return bytes.append(reinterpret_cast<const char*>(tokens.data()), 2 * tokens.size());
}

// Tokens first, first+1, …, so that a window tells where it came from.
inline std::vector<uint16_t> counting(size_t n, uint16_t first) {
    std::vector<uint16_t> tokens(n);
    std::iota(tokens.begin(), tokens.end(), first);
    return tokens;
}
