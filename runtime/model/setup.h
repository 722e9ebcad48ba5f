// What a model's memory and work depend on: its sizes, as a weights file's header has them, and what the options say.
#pragma once
#include <algorithm>
#include <cstdint>
#include <string>

#include "../options/options.h"
#include "activations.h"
#include "tensors.h"

struct ModelSizes {
    int64_t maxT, V, Vp, L, H, C; // entries 2 to 7 of a weights file's header, not in this order
    int64_t D() const { return C / H; }
};

// Rows of the token tables, a multiple of 128 as in llm.c, so that the logits' matmul has no ragged edge.
inline int64_t pad_vocab(int64_t V) { return (V + 127) / 128 * 128; }

// Refuses a head dim without kernels and a vocabulary that shards cannot hold; `where` opens the message.
void check_sizes(const ModelSizes& sizes, const std::string& where);

// Both families' headers begin alike: magic, version and the sizes. read_sizes() refuses another magic, `family` being
// what the file is not, and sizes that cannot be; it fills `header` for the entries that follow.
ModelSizes read_sizes(const FileReader& file, int32_t magic, const char* family, Header& header);
Header make_header(int32_t magic, const ModelSizes& sizes, FileType type);

// All that a model's memory depends on beside its sizes.
struct Setup {
    int64_t B, T; // largest batch, context
    bool training;
    int64_t cached_rows = 0; // tokens of a sequence that next_logits() can go through
    TrainingMemory weights = {};
    ActivationMemory activations = {};
    std::string folder = "."; // where the cpu build keeps what is offloaded
    bool deterministic = true;

    // Tokens of a chunk, heads of a group, rows of logits at a time.
    int64_t chunk() const { return activations.chunk ? std::min(B * T, activations.chunk) : B * T; }
    int64_t head_group(int64_t H) const { return activations.head_group ? std::min(H, activations.head_group) : H; }
    int64_t logits_rows() const { return std::min(chunk(), activations.logits_rows); }
};
Setup make_setup(const Options& options, int64_t T);
