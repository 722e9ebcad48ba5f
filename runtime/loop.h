// What both trainers do around their model: where its weights come from, and the modes that train (training.h) or
// evaluate (evaluation.h). The model itself is all in its trainer.
#pragma once
#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "device.h"
#include "files.h"
#include "model.h"
#include "options.h"

struct Checkpoint;
class RunLock;

// Where a run's weights come from: the checkpoint that --resume found, the file that --init names (in a run folder its
// newest whole checkpoint), or neither: from scratch.
struct Start {
    std::shared_ptr<const Checkpoint> resume; // or null
    std::string weights;                      // path of a model.bin, or empty
    // The same file, open, so that it can be read to its end though a run removes the checkpoint meanwhile.
    std::optional<MappedFile> file;
    std::shared_ptr<RunLock> lock; // of --out, if it was there already
};
// A resumed run's folder is locked before anything in it is read.
Start find_start(const Options& options);

// Trains as the options say, or evaluates and returns; throws Failure otherwise. Training reads the optimizer's state
// and the data position from start.resume.
void run(Options& options, const Device& device, Model& model, const Start& start);

// The vocabulary for a new model: --vocab, else the tokenizer's size, else the family's own.
int64_t choose_vocab(const Options& options, int64_t family_vocab);
// Refuses a --vocab that is not the weights file's V.
void check_vocab(const Options& options, int64_t V, const std::string& path);
