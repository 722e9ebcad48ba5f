// Choosing the next token: softmax(logits / temperature) over the top_k largest, drawn with one uniform number:
// the tokens, in their own order, share [0, 1) out among themselves, and u falls to one.
#pragma once
#include <cstdint>
#include <vector>

// logits (V). temperature 0 takes the largest; top_k 0 keeps all; u in [0, 1). Ties go to the lower token.
// Throws RunFailed if a logit is NaN or +Inf, or none is finite.
int32_t sample_token(const float* logits, int64_t V, double temperature, int64_t top_k, double u);
