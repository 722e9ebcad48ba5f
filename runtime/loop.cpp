#include "loop.h"

#include <cstdio>
#include <filesystem>
#include <optional>
#include <utility>

#include <unistd.h>

#include "checkpoint.h"
#include "errors.h"
#include "evaluation.h"
#include "log.h"
#include "tokenizer.h"
#include "training.h"

namespace fs = std::filesystem;

static void warn(const std::string& line) { fprintf(stderr, "warning: %s\n", line.c_str()); }

Start find_start(const Options& options) {
    Start start;
    if (options.resume)
        if (std::optional<Checkpoint> newest = newest_checkpoint(options.out, warn))
            start.resume = std::make_shared<Checkpoint>(std::move(*newest));
    // To start afresh would cut the log of a run whose checkpoints perhaps only could not be read just now.
    if (options.resume && !start.resume && holds_checkpoints(options.out))
        throw BadInput(options.out + ": none of its checkpoints is whole (each is named above); restore one, or start "
                                     "another run with another --out");
    if (start.resume) {
        start.weights = start.resume->part("model.bin");
    } else if (fs::is_directory(options.init)) {
        bool is_checkpoint = fs::exists(options.init + "/manifest.json");
        std::optional<Checkpoint> found =
            is_checkpoint ? open_checkpoint(options.init) : newest_checkpoint(options.init, warn);
        if (!found && fs::exists(options.init + "/config.json"))
            throw BadInput("--init " + options.init + " is a HuggingFace directory; make a weights file of it: " +
                           "scripts/convert_hf.py " + options.init + " --to FILE.bin");
        if (!found) throw BadInput(options.init + ": no whole checkpoint in this folder");
        start.weights = found->part("model.bin");
    } else {
        start.weights = options.init;
    }
    return start;
}

int64_t choose_vocab(const Options& options, int64_t family_vocab) {
    if (options.vocab) return options.vocab;
    return options.tokenizer.empty() ? family_vocab : Tokenizer(options.tokenizer).size();
}

static void train(Options& options, const Device& device, Model& model, const Start& start) {
    const std::string& note = options.planned.note;
    print(STDOUT_FILENO, device_line(device) + "\n" + model.describe() + "\n" + (note.empty() ? "" : note + "\n"));
    Run(options, device, model, start.resume.get()).steps();
}

void run(Options& options, const Device& device, Model& model, const Start& start) {
    if (options.eval.empty())
        train(options, device, model, start);
    else
        evaluate(options, model);
}

void check_vocab(const Options& options, int64_t V, const std::string& path) {
    if (options.vocab && options.vocab != V)
        throw BadInput("--vocab " + std::to_string(options.vocab) + ", but " + path + " has " + std::to_string(V));
}
