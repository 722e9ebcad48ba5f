// What runs a model forward alone: validation loss, samples, logits. Training does the first two between its steps;
// --eval does one of them and exits.
#pragma once
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "../files/shards.h"
#include "../files/tokenizer.h"
#include "../model/model.h"
#include "../options/options.h"

// Decodes where there is a tokenizer, else writes the ids. Refuses a tokenizer or a prompt that the model does not
// know.
class Text {
public:
    Text(const Options& options, const Model& model);
    std::string decode(const std::vector<int32_t>& ids) const;
    // What a sample without a prompt starts from: end of text, which stands before every document.
    int32_t first_token() const { return first_; }

private:
    std::unique_ptr<Tokenizer> tokenizer_;
    int32_t first_;
};

// Called before each batch of a validation, on all ranks alike, and each token of a sample; may throw.
using Pause = std::function<void()>;

// --sample-tokens tokens that go on from --prompt-tokens, drawn from the sample stream of this step.
std::string generate(const Options& options, Model& model, const Text& text, int64_t step, const Pause& pause);

// Mean loss over the first windows of the validation set, always the same ones, which are dealt to the ranks.
class Validation {
public:
    Validation(const Options& options, const Model& model, int rank = 0, int ranks = 1);
    double mean_loss(Model& model, const Pause& pause);
    nlohmann::json shards() const { return windows_.shards(); }

private:
    Windows windows_;
    int64_t T_, B_, count_, rank_, ranks_;
    std::vector<int32_t> tokens_, targets_;
};

// What --eval asks for, on standard output.
void evaluate(const Options& options, Model& model);
