// What a micro-batch and an update ask of a machine, by the costs of their layers: for the plan and the step line.
#pragma once
#include <cstdint>

#include "../../kernels/attention.h"
#include "../../kernels/types.h"
#include "setup.h"
#include "tensors.h"

// What a micro-batch asks of a machine, recomputation and all.
struct Work {
    Cost matmul, attention, other;
    double copied = 0; // bytes between device and host
};

// Attention of T tokens over their own and the `start` tokens before them, for H of the heads.
AttentionShape attention_shape(const ModelSizes& sizes, const Setup& setup, int64_t B, int64_t start, int64_t T,
                               int64_t H);

// A matrix (out, in) on N tokens, forward and backward.
Cost linear_cost(int64_t N, int64_t in, int64_t out);
// FLOPs and bytes of the unembedding with its loss and gradients, for N tokens.
Cost unembedding_cost(const ModelSizes& sizes, int64_t N);

// Of all but the embeddings, for B sequences; the costs of rotary are those of all heads. Parallel: the MLP reads the
// block's input, as attention does.
Work blocks_work(const ModelSizes& sizes, const Setup& setup, bool parallel, int64_t B, Cost rotary_forward,
                 Cost rotary_backward);
Work update_work(const Tensors& tensors);
