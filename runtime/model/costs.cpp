#include "costs.h"

#include "../../kernels/classifier.h"
#include "../../kernels/gelu.h"
#include "../../kernels/global_norm.h"
#include "../../kernels/layernorm.h"
#include "../../kernels/matmul.h"
#include "../../kernels/optimizer.h"

AttentionShape attention_shape(const ModelSizes& sizes, const Setup& setup, int64_t B, int64_t start, int64_t T,
                               int64_t H) {
    AttentionShape shape{};
    shape.B = B, shape.Tq = T, shape.Tk = start + T, shape.H = H, shape.D = sizes.D();
    shape.q_offset = start;
    shape.lse_batch = sizes.H * T;
    shape.deterministic = setup.deterministic;
    return shape;
}

Cost linear_cost(int64_t N, int64_t in, int64_t out) {
    return matmul_forward_cost(N, in, out) + matmul_backward_input_cost(N, in, out) +
           matmul_backward_weight_cost(N, in, out);
}

Work blocks_work(const ModelSizes& sizes, const Setup& setup, bool parallel, int64_t B, Cost rotary_forward,
                 Cost rotary_backward) {
    const int64_t C = sizes.C, H = sizes.H, V = sizes.V, Vp = sizes.Vp;
    const int64_t N = B * setup.T, most = setup.B * setup.T, chunk = setup.chunk(), group = setup.head_group(H);
    const Recompute recompute = setup.activations.recompute;
    // `of`(K) for every chunk, of(G) for every group of heads.
    auto in_parts = [](int64_t n, int64_t part, auto of) {
        Cost sum = double(n / part) * of(part);
        return n % part ? sum + of(n % part) : sum;
    };
    auto chunks = [&](auto of) { return in_parts(N, chunk, of); };
    auto groups = [&](auto of) { return in_parts(H, group, of); };
    auto forward = [&](int64_t in, int64_t out) {
        return chunks([&](int64_t K) { return matmul_forward_cost(K, in, out); });
    };
    auto backward = [&](int64_t in, int64_t out) {
        return chunks([&](int64_t K) {
            return matmul_backward_input_cost(K, in, out) + matmul_backward_weight_cost(K, in, out);
        });
    };
    const int64_t qkv_width = 3 * (C / H);
    const Cost norm = layernorm_forward_cost(N, C), norm_of_sum = residual_layernorm_forward_cost(N, C),
               norm_back = layernorm_backward_cost(N, C), gelu = gelu_forward_cost(N * 4 * C);
    const Cost qkv = groups([&](int64_t G) { return forward(C, G * qkv_width); });
    const Cost qkv_back = groups([&](int64_t G) { return backward(C, G * qkv_width); });
    const Cost scores =
        groups([&](int64_t G) { return attention_forward_cost(attention_shape(sizes, setup, B, 0, setup.T, G)); });
    const Cost scores_back =
        groups([&](int64_t G) { return attention_backward_cost(attention_shape(sizes, setup, B, 0, setup.T, G)); });
    const double groups_of_heads = double((H + group - 1) / group);
    const Cost first_norms =
        (chunk < most ? groups_of_heads : 0) * norm; // beside the one at the end of the block before
    const Cost attproj = forward(C, C), fc = forward(C, 4 * C), fcproj = forward(4 * C, C);

    Work block;
    block.matmul = qkv + attproj + fc + fcproj;
    block.attention = scores;
    block.other = rotary_forward + first_norms + 2 * norm_of_sum + gelu;
    if (setup.training) {
        block.matmul = block.matmul + qkv_back + backward(C, C) + backward(C, 4 * C) + backward(4 * C, C);
        block.attention = block.attention + scores_back;
        block.other = block.other + rotary_backward + 2 * norm_back + gelu_backward_cost(N * 4 * C);
        if (recompute != Recompute::none) {
            block.matmul = block.matmul + qkv + fc + (parallel ? Cost{} : attproj);
            block.other = block.other + rotary_forward + (chunk < most ? 2 * first_norms : norm) +
                          (parallel ? norm : norm_of_sum) + gelu;
        }
        if (recompute == Recompute::full) {
            block.matmul = block.matmul + qkv;
            block.attention = block.attention + scores;
            block.other = block.other + rotary_forward + (chunk < most ? first_norms : norm);
        }
    }
    Work all{double(sizes.L) * block.matmul, double(sizes.L) * block.attention, double(sizes.L) * block.other};
    auto logits = [&](int64_t K) { return setup.training ? linear_cost(K, C, Vp) : matmul_forward_cost(K, C, Vp); };
    all.matmul = all.matmul + in_parts(N, setup.logits_rows(), logits);
    all.other =
        all.other + norm +
        (setup.training ? norm_back + classifier_forward_backward_cost(N, V, Vp) : classifier_forward_cost(N, V));
    return all;
}

Cost unembedding_cost(const ModelSizes& sizes, int64_t N) {
    return linear_cost(N, sizes.C, sizes.Vp) + classifier_forward_backward_cost(N, sizes.V, sizes.Vp);
}

Work update_work(const Tensors& tensors) {
    Work work;
    for (const Tensor& t : tensors.list)
        work.other = work.other + optimizer_cost(t.count, tensors.memory.rule, tensors.state_type(t),
                                                 tensors.memory.bf16_grads && t.layers, tensors.memory.master);
    work.other = work.other + global_norm_cost(tensors.padded);
    work.copied = 2.0 * tensors.host_bytes();
    return work;
}
