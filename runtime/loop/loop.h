// What both trainers do around their model: where its weights come from, and the modes that train (training.h) or
// evaluate (evaluation.h). The model itself is all in its trainer.
#pragma once
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>

#include "../device/device.h"
#include "../files/files.h"
#include "../model/model.h"
#include "../options/options.h"
#include "../ranks/ranks.h"

struct Checkpoint;
class RunLock;

// Where a run's weights come from, as rank 0 finds it: the checkpoint that --resume found, the file that --init names
// (in a run folder its newest whole checkpoint), or neither: from scratch.
struct Start {
    std::shared_ptr<const Checkpoint> resume; // or null
    std::shared_ptr<const Checkpoint> origin; // that the weights are of, or null
    std::string weights;                      // path of a model.bin, or empty
    // The same file, open, so that it can be read to its end though a run removes the checkpoint meanwhile.
    std::optional<FileReader> file;
    std::shared_ptr<RunLock> lock; // of --out, if it was there already
};
// A resumed run's folder is locked before anything in it is read.
Start find_start(const Options& options);
// The same on all ranks: rank 0 finds it, and reads its file for the others.
Start find_start(const Options& options, Ranks& ranks);

// Parses the command line and runs body() as one of the ranks that the environment names, or alone. All ranks must have
// the same command line, which rank 0 alone parses: the others have no options until share_options().
void run_ranks(int argc, char** argv, const Family& family, TargetOf target,
               const std::function<void(Options&, Ranks&)>& body);
void share_options(Options& options, const Family& family, Ranks& ranks); // rank 0's

// Trains as the options say, or evaluates and returns; throws Failure otherwise. Training reads the optimizer's state
// and the data position from start.resume.
void run(Options& options, const Device& device, Model& model, const Start& start);

// Opens all data that the options name and refuses what does not fit the model, or what else is known of its tokenizer:
// by dataset.json beside the shards, by --tokenizer, and by the run that the weights come from. To be asked before the
// weights are read, which takes long.
void check_data(const Options& options, const Model& model, const Start& start);

// The vocabulary for a new model: --vocab, else the tokenizer's size, by --tokenizer or by dataset.json beside the
// shards, else the family's own.
int64_t choose_vocab(const Options& options, int64_t family_vocab);
// Refuses a --vocab that is not the weights file's V.
void check_vocab(const Options& options, int64_t V, const std::string& path);

// What a run starts from, Config being the trainer's: a weights file, which is read once the model is there, or
// nothing.
template <class Config> struct Origin {
    Start start;
    Config config; // the file's
    std::optional<FileReader> file;
    FileType type = FileType::fp32;

    Origin(const Options& options, Ranks& ranks) : start(find_start(options, ranks)) {
        if (from_scratch()) return;
        type = read_config(file.emplace(std::move(*start.file)), config);
        if (ranks.first()) check_vocab(options, config.V, start.weights);
    }
    bool from_scratch() const { return start.weights.empty(); }
};

// The model that make() makes for its device and options, filled by fill(), and then run() as above, as one of the
// ranks.
template <class Make, class Fill>
void run(Options& options, Ranks& ranks, const Start& start, const Make& make, const Fill& fill) {
    Device device(options.threads ? options.threads : ranks.threads());
    decltype(make(device, options)) model; // outlives the ranks' communication
    ranks.communicate(device, [&] {
        model = make(device, options);
        if (ranks.first()) check_data(options, *model, start);
        model->allocate();
        fill(*model);
        run(options, device, *model, start);
    });
}
