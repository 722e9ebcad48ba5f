// What both trainers do around their model: where its weights come from, the modes that train (training.h) or evaluate
// (evaluation.h), and what becomes of an error. The model itself is all in its trainer.
#pragma once
#include <cstdint>
#include <functional>
#include <optional>
#include <string>

#include "checkpoint.h"
#include "device.h"
#include "model.h"
#include "options.h"

// Where a run's weights come from: the checkpoint that --resume found, the file that --init names (in a run folder its
// newest whole checkpoint), or neither: from scratch.
struct Start {
    std::optional<Checkpoint> resume;
    std::string weights; // path of a model.bin, or empty
    nlohmann::json data; // the data position of the checkpoint that the weights are of; null if they are of none
};
Start find_start(const Options& options);

// Trains as the options say, or evaluates and returns; throws Failure otherwise. Training reads the optimizer's state
// and the data position from start.resume.
void run(Options& options, const Device& device, Model& model, const Start& start);

// Opens all data that the options name and refuses what does not fit the model, or what else is known of its tokenizer:
// by dataset.json beside the shards, by --tokenizer, and by the run that the weights come from. To be asked before the
// weights are read, which takes long.
void check_data(const Options& options, const Model& model, const Start& start);

// Runs a trainer's body and turns what it throws into one line on stderr and the exit code.
int run_program(const char* name, const std::function<void()>& body);

// The vocabulary for a new model: --vocab, else the tokenizer's size, by --tokenizer or by dataset.json beside the
// shards, else the family's own.
int64_t choose_vocab(const Options& options, int64_t family_vocab);
// Refuses a --vocab that is not the weights file's V.
void check_vocab(const Options& options, int64_t V, const std::string& path);
