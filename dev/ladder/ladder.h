// The ladder: causal attention's forward pass from the first use of tensor cores to the product's kernel, each step
// with one idea more than the one before. README.md tells what each idea brings; test/simt_ladder.cpp proves every step
// and counts it, dev/bench/ladder.cpp times them on a GPU.
#pragma once
#include "../../kernels/attention_flash.h"

namespace ladder {

// o (B,T,H,64) `=`, lse (B,H,T) `=`, from q, k, v (B,T,H,64): attention.h's forward pass with Tq = Tk = T, head dim 64
// and no offsets or documents. Rows at multiples of 16 bytes, scale > 0, T < 2^30.
using Forward = void(Stream stream, Heads<bf16> o, float* lse, Heads<const bf16> q, Heads<const bf16> k,
                     Heads<const bf16> v, float scale, const AttentionShape& shape);

Forward tensor_cores, registers, swizzle, async_copies, lean_softmax;

struct Step {
    const char* name;
    Forward* forward;
};
constexpr Step kSteps[] = {{"1 tensor cores", tensor_cores}, {"2 S and P in registers", registers},
                           {"3 swizzled tiles", swizzle},    {"4 asynchronous copies", async_copies},
                           {"5 lean softmax", lean_softmax}, {"6 the product", flash::forward<bf16>}};

} // namespace ladder
