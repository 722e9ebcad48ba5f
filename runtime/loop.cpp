#include "loop.h"

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <new>

#include "errors.h"
#include "evaluation.h"
#include "signals.h"
#include "tokenizer.h"
#include "training.h"

namespace fs = std::filesystem;

static void warn(const std::string& line) { fprintf(stderr, "warning: %s\n", line.c_str()); }

Start find_start(const Options& options) {
    Start start;
    if (options.resume) start.resume = newest_checkpoint(options.out, warn);
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
    catch_stop_signals();
    printf("%s\n%s\n", device_line(device).c_str(), model.describe().c_str());
    if (!options.planned.note.empty()) printf("%s\n", options.planned.note.c_str());
    Run(options, device, model, start.resume ? &*start.resume : nullptr).steps();
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

// One line, whatever a value quoted in the message holds.
static void print_failure(const char* name, std::string what) {
    std::replace(what.begin(), what.end(), '\n', ' ');
    fprintf(stderr, "%s: %s\n", name, what.c_str());
}

int run_program(const char* name, const std::function<void()>& body) {
    try {
        body();
        return kDone;
    } catch (const Failure& failure) {
        print_failure(name, failure.what());
        return failure.exit_code;
    } catch (const std::bad_alloc&) {
        print_failure(name,
                      "out of memory: the system, or a limit of this process (ulimit -v, -d), refuses more; lower "
                      "--context, --batch or --memory");
        return kRunFailed;
    } catch (const std::exception& error) {
        print_failure(name, error.what());
        return kRunFailed;
    }
}
