#include "loop.h"

#include <cstdio>
#include <filesystem>
#include <utility>

#include <unistd.h>

#include "checkpoint.h"
#include "errors.h"
#include "evaluation.h"
#include "log.h"
#include "run_folder.h"
#include "tokenizer.h"
#include "training.h"

namespace fs = std::filesystem;

static void warn(const std::string& line) { fprintf(stderr, "warning: %s\n", line.c_str()); }

// Opened, so that a run that removes the checkpoint no longer matters; until then it does, and the next newest is
// taken.
static void open_newest(const std::string& run, Start& start) {
    constexpr int kTries = 20;
    for (int i = 0;; i++) {
        const std::optional<Checkpoint> found = newest_checkpoint(run, warn);
        if (!found && fs::exists(run + "/config.json"))
            throw BadInput("--init " + run + " is a HuggingFace directory; make a weights file of it: " +
                           "scripts/convert_hf.py " + run + " --to FILE.bin");
        if (!found) throw BadInput(run + ": no whole checkpoint in this folder");
        try {
            start.file.emplace(start.weights = found->part("model.bin"));
            return;
        } catch (const BadInput&) {
            std::error_code error;
            if (i == kTries || fs::exists(found->path, error)) throw;
        }
    }
}

static void find_resumed(const Options& options, Start& start) {
    std::error_code error;
    const bool planned = options.plan || options.plan_json; // writes nothing
    if (!planned && fs::exists(options.out, error)) start.lock = std::make_shared<RunLock>(options.out, warn);
    if (std::optional<Checkpoint> newest = newest_checkpoint(options.out, warn)) {
        start.file.emplace(start.weights = newest->part("model.bin"));
        start.resume = std::make_shared<Checkpoint>(std::move(*newest));
        return;
    }
    // To start afresh would cut the log of a run whose checkpoints perhaps only could not be read just now, or are
    // elsewhere.
    if (holds_checkpoints(options.out))
        throw BadInput(options.out + ": none of its checkpoints is whole (each is named above); restore one, or start "
                                     "another run with another --out");
    if (const std::string saved = log_until(options.out, {}).checkpoint; !saved.empty())
        throw BadInput(options.out + ": by its log the run saved " + saved +
                       ", but no checkpoint is there; bring it back, or start another run with another --out");
}

Start find_start(const Options& options) {
    Start start;
    std::error_code error;
    if (options.resume) find_resumed(options, start);
    if (start.resume || options.init.empty()) return start;
    if (fs::is_directory(options.init, error) && !fs::exists(options.init + "/manifest.json", error)) {
        open_newest(options.init, start);
        return start;
    }
    start.weights =
        fs::is_directory(options.init, error) ? open_checkpoint(options.init).part("model.bin") : options.init;
    start.file.emplace(start.weights);
    return start;
}

int64_t choose_vocab(const Options& options, int64_t family_vocab) {
    if (options.vocab) return options.vocab;
    return options.tokenizer.empty() ? family_vocab : Tokenizer(options.tokenizer).size();
}

static void train(Options& options, const Device& device, Model& model, const Start& start) {
    const std::string& note = options.planned.note;
    print(STDOUT_FILENO, device_line(device) + "\n" + model.describe() + "\n" + (note.empty() ? "" : note + "\n"));
    Run(options, device, model, start).steps();
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
