// test/oracle.h's model of either family, carrying the weights and the batch of a golden configuration.
#pragma once
#include <variant>
#include <vector>

#include "golden.h"
#include "oracle.h"

namespace golden {

inline oracle::Gpt2Config gpt2_of(const Config& c) { return {c.maxT, c.V, c.Vp, c.L, c.H, c.C}; }

inline oracle::PythiaConfig pythia_of(const Config& c) {
    const Rope& r = c.rope;
    return {c.V,
            c.Vp,
            c.L,
            c.H,
            c.C,
            c.parallel,
            c.gelu == Gelu::tanh,
            {oracle::Stretch(r.mode), r.dims, r.original, r.base, r.scale, r.softmax_temperature}};
}

template <class N> struct Oracle {
    Config config;
    Batch batch;
    std::variant<oracle::Gpt2Weights<N>, oracle::PythiaWeights<N>> model;

    explicit Oracle(const Config& c) : config(c), batch(golden::batch(c)), model(oracle::Gpt2Weights<N>(gpt2_of(c))) {
        if (c.family == Family::pythia) model = oracle::PythiaWeights<N>(pythia_of(c));
        auto values = weights<double>(c);
        auto all = tensors();
        if (all.size() != values.size()) throw std::logic_error("the oracle has other tensors");
        for (size_t t = 0; t < all.size(); t++) {
            if (all[t]->size() != values[t].size()) throw std::logic_error("the oracle's tensors have other sizes");
            std::copy(values[t].begin(), values[t].end(), all[t]->begin());
        }
    }
    std::vector<std::vector<N>*> tensors() {
        return std::visit([](auto& w) { return w.tensors(); }, model);
    }
    std::vector<N> logits() const {
        return std::visit([&](auto& w) { return oracle::logits_of(w, batch.tokens, config.B, config.T); }, model);
    }
    N loss() const {
        return std::visit([&](auto& w) { return oracle::loss_of(w, batch.tokens, batch.targets, config.B, config.T); },
                          model);
    }
};

} // namespace golden
