#include "evaluation.h"

#include <algorithm>
#include <cmath>
#include <cstdio>

#include "../base/errors.h"
#include "../base/random.h"
#include "../base/signals.h"
#include "sampler.h"

// Random streams of a run, apart from the weights' (the tensor's number): one for each use and step.
constexpr uint64_t kSampleStream = uint64_t(1) << 40;

Text::Text(const Options& options, const Model& model) {
    const int64_t V = model.vocab();
    first_ = model.family().end_of_text_first ? 0 : static_cast<int32_t>(V - 1);
    for (int32_t id : options.prompt_tokens)
        if (id < 0 || id >= V)
            throw BadInput("--prompt-tokens: " + std::to_string(id) + " is not below the vocabulary of " +
                           std::to_string(V));
    if (options.tokenizer.empty()) return;
    tokenizer_ = std::make_unique<Tokenizer>(options.tokenizer);
    if (tokenizer_->size() > V)
        throw BadInput(options.tokenizer + ": " + std::to_string(tokenizer_->size()) +
                       " tokens, but the model has only " + std::to_string(V));
    if (tokenizer_->end_of_text() >= 0) first_ = tokenizer_->end_of_text();
}

std::string Text::decode(const std::vector<int32_t>& ids) const {
    if (tokenizer_) return valid_utf8(tokenizer_->decode(ids));
    std::string text;
    for (int32_t id : ids) {
        if (!text.empty()) text += ' ';
        text += std::to_string(id);
    }
    return text;
}

static void check_finite(const Options& options, const std::vector<float>& logits) {
    if (!std::all_of(logits.begin(), logits.end(), [](float x) { return std::isfinite(x); }))
        throw RunFailed("the logits of " + options.init +
                        " are not finite: its weights are too large to compute with; use an earlier checkpoint");
}

std::string generate(const Options& options, Model& model, const Text& text, int64_t step, const Pause& pause) {
    int64_t V = model.vocab(), T = model.cached_rows();
    std::vector<int32_t> ids = options.prompt_tokens;
    bool prompted = !ids.empty();
    if (!prompted) ids = {text.first_token()};
    std::vector<float> logits(V);
    int64_t window = 0, cached = 0;                                  // rows of ids[window…] that the model has seen
    if (int64_t size = static_cast<int64_t>(ids.size()); size > T) { // what leaves room for the sample, at least half
        const int64_t kept = std::max((T + 1) / 2, T + 1 - options.sample_tokens);
        window = size - kept;
        warn("the prompt has " + std::to_string(size) + " tokens, more than the context of " + std::to_string(T) +
             ": its last " + std::to_string(kept) + " are used");
    }
    for (int64_t i = 0; i < options.sample_tokens; i++) {
        pause();
        int64_t size = static_cast<int64_t>(ids.size());
        if (size - window > T) window = size - (T + 1) / 2, cached = 0; // full: go on from the newest half
        model.next_logits(&ids[window + cached], cached, size - window - cached, logits.data());
        if (!options.eval.empty()) check_finite(options, logits); // training looks at its losses
        cached = size - window;
        double u = random_uniform(options.seed, kSampleStream + step, i);
        ids.push_back(sample_token(logits.data(), V, options.temperature, options.top_k, u));
    }
    if (!prompted) ids.erase(ids.begin());
    return text.decode(ids);
}

Validation::Validation(const Options& options, const Model& model, int rank, int ranks)
    : windows_(options.val, model.context(), model.vocab()), T_(model.context()), B_(options.batch), rank_(rank),
      ranks_(ranks) {
    count_ = windows_.count();
    if (options.val_tokens) count_ = std::min(count_, std::max<int64_t>(1, options.val_tokens / T_));
    tokens_.resize(B_ * T_);
    targets_.resize(B_ * T_);
}

double Validation::mean_loss(Model& model, const Pause& pause) {
    model.clear_loss();
    for (int64_t turn = 0; turn < count_; turn += B_ * ranks_) {
        pause();
        const int64_t first = turn + B_ * rank_, B = std::min(B_, count_ - first);
        if (B <= 0) continue;
        for (int64_t b = 0; b < B; b++) windows_.read(first + b, &tokens_[b * T_], &targets_[b * T_]);
        model.evaluate(tokens_.data(), targets_.data(), B, 1.0 / (double(count_) * T_));
    }
    model.sum_loss();
    return model.loss();
}

// A line of V numbers for each token of the prompt.
static void print_logits(const Options& options, Model& model) {
    std::vector<float> logits(model.vocab());
    int64_t size = static_cast<int64_t>(options.prompt_tokens.size());
    if (size > model.context())
        throw BadInput("--prompt-tokens has " + std::to_string(size) + " tokens, more than the context of " +
                       std::to_string(model.context()));
    for (int64_t t = 0; t < size; t++) {
        pass_on_signals();
        model.next_logits(&options.prompt_tokens[t], t, 1, logits.data());
        check_finite(options, logits);
        for (int64_t v = 0; v < model.vocab(); v++) printf(v ? " %.9g" : "%.9g", logits[v]);
        printf("\n");
        if (ferror(stdout)) return; // its reader has gone, or the disk is full
    }
}

void evaluate(const Options& options, Model& model) {
    if (options.eval == "loss") {
        const double loss = Validation(options, model).mean_loss(model, pass_on_signals);
        if (!std::isfinite(loss))
            throw RunFailed("the loss of " + options.init + " on " + options.val +
                            " is not finite: its weights are too large to compute with; use an earlier checkpoint");
        printf("val_loss %.6f\n", loss);
        return;
    }
    Text text(options, model); // refuses tokens that the model does not know
    if (options.eval == "logits")
        print_logits(options, model);
    else
        printf("%s\n", generate(options, model, text, 0, pass_on_signals).c_str());
}
