// Token and learned-position embedding (GPT-2: wte, wpe). A model without learned positions passes wpe = null.
//
//   out[b,t,:] = wte[tokens[b,t],:] + wpe[p(b,t),:]       p(b,t) = positions ? positions[b,t] : position0 + t
//
// The sum is done in float and rounded once. Tokens and positions must be in range; loaders check them (shards.h).
#pragma once
#include <cstddef>

#include "types.h"

struct EmbeddingShape {
    int64_t B, T, C;
    int64_t position0 = 0;              // position of t = 0, for decoding with a KV cache
    const int32_t* positions = nullptr; // (B,T) or null; restarts at document boundaries need it
};

// out (B,T,C) `=`. tokens (B,T). wte (Vp,C). wpe (maxT,C) or null.
void embedding_forward(Stream stream, real* out, const int32_t* tokens, const real* wte, const real* wpe,
                       const EmbeddingShape& shape);

// dwte (Vp,C) `+=`, dwpe (maxT,C) `+=` or null. dout (B,T,C). Deterministic: rows that repeat are summed in token
// order, on a GPU beyond 256 of them in pieces that are added in order. scratch: embedding_backward_scratch(shape)
// bytes, 64-byte aligned.
void embedding_backward(Stream stream, float* dwte, float* dwpe, const real* dout, const int32_t* tokens, void* scratch,
                        const EmbeddingShape& shape);
size_t embedding_backward_scratch(const EmbeddingShape& shape, const Target& target = this_target());

inline Cost embedding_forward_cost(const EmbeddingShape& s, bool with_positions) {
    double n = double(s.B) * s.T, row = double(s.C) * sizeof(real);
    return {n * (row * (with_positions ? 2 : 1) + sizeof(int32_t)), n * row, n * s.C * (with_positions ? 1 : 0)};
}

// At worst every token is another row: for each table, in an order of its own, one row of dout read, and one float row
// of the table read and written.
inline Cost embedding_backward_cost(const EmbeddingShape& s, bool with_positions) {
    double n = double(s.B) * s.T, tables = with_positions ? 2 : 1;
    return {n * s.C * tables * (sizeof(real) + sizeof(float)), n * s.C * tables * sizeof(float), n * s.C * tables};
}
