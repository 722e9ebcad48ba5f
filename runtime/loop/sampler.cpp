#include "sampler.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <string>

#include "../base/errors.h"

int32_t sample_token(const float* logits, int64_t V, double temperature, int64_t top_k, double u) {
    int64_t best = -1;
    for (int64_t i = 0; i < V; i++) {
        if (std::isnan(logits[i]) || logits[i] == INFINITY)
            throw RunFailed("cannot sample: the logit of token " + std::to_string(i) + " is " +
                            std::to_string(logits[i]) + ", the model has diverged");
        if (logits[i] > -INFINITY && (best < 0 || logits[i] > logits[best])) best = i;
    }
    if (best < 0) throw RunFailed("cannot sample: no token has a finite logit");
    if (temperature == 0 || top_k == 1) return static_cast<int32_t>(best);

    std::vector<int32_t> tokens(static_cast<size_t>(V));
    std::iota(tokens.begin(), tokens.end(), 0);
    if (top_k > 0 && top_k < V) {
        std::nth_element(tokens.begin(), tokens.begin() + top_k, tokens.end(),
                         [&](int32_t a, int32_t b) { return logits[a] != logits[b] ? logits[a] > logits[b] : a < b; });
        tokens.resize(static_cast<size_t>(top_k));
        std::sort(tokens.begin(), tokens.end()); // nth_element's own order is the library's affair
    }

    std::vector<double> weights(tokens.size());
    double sum = 0;
    for (size_t i = 0; i < tokens.size(); i++) {
        weights[i] = std::exp((static_cast<double>(logits[tokens[i]]) - logits[best]) / temperature);
        sum += weights[i];
    }
    double left = u * sum;
    int32_t last = static_cast<int32_t>(best); // where rounding lets u·sum pass the end
    for (size_t i = 0; i < tokens.size(); i++) {
        if (weights[i] == 0) continue;
        if (left < weights[i]) return tokens[i];
        left -= weights[i];
        last = tokens[i];
    }
    return last;
}
