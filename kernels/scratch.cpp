// The scratch of every layer for any target, in every build: a plan for a GPU may be asked of a build that has none.
#include "scratch.h"

#include "attention_flash.h"
#include "attention_plain.h"
#include "embedding.h"
#include "global_norm.h"
#include "layernorm.h"

size_t attention_forward_scratch(const AttentionShape& shape, const Target& target) {
    require_head_dim(shape.D);
    return target.cuda ? 0 : target.threads * scratch::attention::forward_floats(shape.D) * sizeof(float);
}

size_t attention_backward_scratch(const AttentionShape& shape, const Target& target) {
    require_head_dim(shape.D);
    if (target.cuda) {
        // Which kernels it will be depends on pointers and strides too, so there is room for either.
        const bool flash = target.real_bytes == sizeof(bf16) && flash::has_tiles(shape);
        return std::max(plain::backward_scratch(shape), flash ? flash::backward_scratch(shape) : 0);
    }
    using namespace scratch::attention;
    // Threads that share these heads may take one each of fewer: of a smaller batch, or of the last group.
    bool share = true;
    AttentionShape fewer = shape;
    fewer.B = 1;
    for (fewer.H = 1; fewer.H <= std::min(shape.B * shape.H, target.threads); fewer.H++)
        share &= threads_share_heads(fewer, target.threads);
    const int64_t heads = share ? 1 : target.threads;
    return (target.threads * backward_floats(shape.D) + heads * head_floats(shape)) * sizeof(float);
}

size_t layernorm_backward_scratch(int64_t N, int64_t C, const Target& target) {
    using namespace scratch::layernorm;
    return (target.cuda ? backward_blocks(N) : target.threads) * 2 * part_stride(C) * sizeof(float);
}

size_t embedding_backward_scratch(const EmbeddingShape& shape, const Target& target) {
    return target.cuda ? scratch::embedding::Scratch(nullptr, shape.B * shape.T, shape.C).bytes : 0;
}

// On a GPU bf16 has as many blocks or fewer: its runs are whole rounds of twice as many elements.
size_t global_norm_scratch(int64_t n, const Target& target) {
    using namespace scratch::global_norm;
    return (target.cuda ? blocks_of<float>(n) : blocks_of(n)) * sizeof(double);
}
