#include "loop.h"

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <utility>

#include <unistd.h>

#include "../base/errors.h"
#include "../files/checkpoint.h"
#include "../files/dataset.h"
#include "../files/log.h"
#include "../files/run_folder.h"
#include "../files/shards.h"
#include "../files/tokenizer.h"
#include "../ranks/comm.h"
#include "../ranks/share.h"
#include "evaluation.h"
#include "process.h"
#include "training.h"

namespace fs = std::filesystem;
using nlohmann::json;

// Opened, so that a run that removes the checkpoint no longer matters; until then it does, and the next newest is
// taken.
static void open_newest(const std::string& run, Start& start) {
    constexpr int kTries = 20;
    for (int i = 0;; i++) {
        std::optional<Checkpoint> found = newest_checkpoint(run, warn);
        if (!found && fs::exists(run + "/config.json"))
            throw BadInput("--init " + run + " is a HuggingFace directory; make a weights file of it: " +
                           "scripts/convert_hf.py " + run + " --to FILE.bin");
        if (!found) throw BadInput(run + ": no whole checkpoint in this folder");
        try {
            start.file.emplace(start.weights = found->part("model.bin"));
            start.origin = std::make_shared<Checkpoint>(std::move(*found));
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
        start.resume = start.origin = std::make_shared<Checkpoint>(std::move(*newest));
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
    start.weights = options.init;
    if (fs::is_directory(options.init, error)) {
        start.origin = std::make_shared<Checkpoint>(open_checkpoint(options.init));
        start.weights = start.origin->part("model.bin");
    }
    start.file.emplace(start.weights);
    return start;
}

Start find_start(const Options& options, Ranks& ranks) {
    Start start;
    if (ranks.first()) start = find_start(options);
    if (!ranks.control()) return start;
    json found;
    if (ranks.first()) {
        found = {{"weights", start.weights}, {"resume", start.resume != nullptr}, {"file", start.file.has_value()}};
        if (const Checkpoint* origin = start.origin.get())
            found["origin"] = {origin->path, origin->step, origin->meta, origin->fault};
    }
    found = json::parse(ranks.control()->broadcast(found.dump()));
    if (!ranks.first()) {
        start.weights = found.at("weights");
        if (found.contains("origin")) {
            const json& origin = found["origin"];
            start.origin = std::make_shared<Checkpoint>(Checkpoint{origin[0], origin[1], origin[2], origin[3]});
        }
        if (found.at("resume")) start.resume = start.origin;
    }
    if (found.at("file")) start.file = share_reader(*ranks.control(), std::move(start.file));
    return start;
}

// The globs of the shards that a run or an evaluation reads.
static std::vector<std::string> data_globs(const Options& options) {
    std::vector<std::string> globs;
    if (options.eval.empty() && !options.train.empty())
        for (const SourceSpec& source : parse_sources(options.train)) globs.push_back(source.glob);
    if ((options.eval.empty() || options.eval == "loss") && !options.val.empty()) globs.push_back(options.val);
    return globs;
}

// The files of a glob; none where a run would refuse it: a plan needs no shards.
static std::vector<std::string> matches(const std::string& glob) {
    try {
        return expand_glob(glob);
    } catch (const BadInput&) {
        return {};
    }
}

int64_t choose_vocab(const Options& options, int64_t family_vocab) {
    if (options.vocab || options.known_vocab) return options.vocab ? options.vocab : options.known_vocab;
    if (!options.tokenizer.empty()) return Tokenizer(options.tokenizer).size();
    for (const std::string& glob : data_globs(options))
        for (const std::string& shard : matches(glob))
            if (std::optional<Dataset> dataset = read_dataset(fs::path(shard).parent_path().string()))
                return dataset->tokenizer.tokens;
    return family_vocab;
}

// A tokenizer that something of a run is known to have been made with.
struct Known {
    std::string by;
    TokenizerId id;
};

static TokenizerId tokenizer_id(const Tokenizer& tokenizer) {
    return {tokenizer.size(), tokenizer.end_of_text(), tokenizer.hash()};
}

// Weights that name no tokenizer are held against the data by their numbers. A published model's V is its tokenizer's
// size, rounded up for some: by at most 411 (Pythia 6.9b's 50,688 for 50,277). The end of a text tells the two
// families' tokenizers apart, which are nearly of a size.
static void check_pretrained(const Model& model, const Start& start, const Known& data) {
    constexpr int64_t kMostPadding = 511, kPublishedVocab = 50257;
    const int64_t V = model.vocab(), end_of_text = model.family().end_of_text_first ? 0 : kPublishedVocab - 1;
    const bool published = V >= kPublishedVocab && V <= kPublishedVocab + kMostPadding;
    std::string why;
    if (V - data.id.tokens > kMostPadding)
        why = "has " + std::to_string(data.id.tokens) + " tokens";
    else if (published && data.id.end_of_text >= 0 && data.id.end_of_text != end_of_text)
        why = "ends a text with token " + std::to_string(data.id.end_of_text) + ", where the published models have " +
              std::to_string(end_of_text);
    if (!why.empty())
        throw BadInput(data.by + ": its tokenizer " + why + ", and the weights of " + start.weights + " know " +
                       std::to_string(V) + ": they were trained with another, and to them these ids are noise; " +
                       "tokenise the text with the model's own (data/prepare.py --tokenizer), or say that it is meant "
                       "with --vocab " +
                       std::to_string(V));
}

void check_data(const Options& options, const Model& model, const Start& start) {
    std::vector<Known> known;
    const json data = start.origin ? start.origin->meta.value("loader", json()) : json();
    if (data.is_object() && data.contains("tokenizer")) {
        const std::string by = "the run of " + start.weights;
        known.push_back({by, TokenizerId::from_json(data["tokenizer"], by)});
    }
    // Weights of no run, and nobody said that they are meant for other tokens.
    const bool pretrained = known.empty() && !start.weights.empty() && !start.resume && !options.vocab;
    auto learn = [&](const std::string& by, const TokenizerId& id) {
        known.push_back({by, id});
        if (pretrained) check_pretrained(model, start, known.back());
    };
    if (!options.tokenizer.empty()) learn(options.tokenizer, tokenizer_id(Tokenizer(options.tokenizer)));
    const json then = start.resume && data.is_object() ? data.value("sources", json::array()) : json::array();
    for (const std::string& glob : data_globs(options)) {
        const Windows windows(glob, model.context(), model.vocab());
        // A resumed run looked at its shards when it began.
        if (std::find(then.begin(), then.end(), windows.shards()) == then.end()) windows.check_ids();
        if (windows.dataset()) learn(windows.dataset()->path, windows.dataset()->tokenizer);
    }
    for (size_t i = 0; i < known.size(); i++)
        for (size_t j = 0; j < i; j++)
            if (std::string other = known[j].id.difference(known[i].id); !other.empty())
                throw BadInput(known[i].by + " is of another tokenizer than " + known[j].by + ": " + other +
                               "; use shards, --tokenizer and weights of one tokenizer");
}

// --timeout of the command line, before anything is parsed: ranks may be lost while rank 0 does that.
static double first_timeout(int argc, char** argv) {
    const std::string name = "--timeout";
    double seconds = double(Options().timeout);
    for (int i = 1; i < argc; i++) {
        const std::string word = argv[i];
        if (word == name && i + 1 < argc) seconds = std::atof(argv[i + 1]);
        if (word.rfind(name + "=", 0) == 0) seconds = std::atof(word.c_str() + name.size() + 1);
    }
    return seconds >= 1 ? seconds : double(Options().timeout);
}

void run_ranks(int argc, char** argv, const Family& family, TargetOf target,
               const std::function<void(Options&, Ranks&)>& body) {
    std::string same = std::string(this_target().cuda ? "cuda " : "cpu ") + kPrecision;
    for (int i = 1; i < argc; i++) same += std::string(1, '\0') + argv[i];
    auto tell = [&](const std::string& line) { print_failure(family.program, line); };
    Ranks::run(same, first_timeout(argc, argv), tell, [&](Ranks& ranks) {
        Options options;
        if (ranks.first()) options = parse_options(argc, argv, family, target);
        if (ranks.control()) options.help = ranks.control()->broadcast(options.help ? "help" : "") == "help";
        if (options.help) return;
        if (ranks.count() > 1 && (options.plan || options.plan_json || !options.eval.empty()))
            throw BadInput("--plan and --eval are for one process; this is one of " + std::to_string(ranks.count()) +
                           " that were started together");
        options.ranks_here = ranks.on_this_machine();
        body(options, ranks);
    });
}

void share_options(Options& options, const Family& family, Ranks& ranks) {
    if (!ranks.control()) return;
    const std::string message = ranks.control()->broadcast(ranks.first() ? options_message(options, family) : "");
    if (!ranks.first()) options = options_from_message(message, family);
    ranks.control()->set_timeout(double(options.timeout));
}

static void train(Options& options, const Device& device, Model& model, const Start& start) {
    const std::string& note = options.planned.note;
    if (!device.comm || device.comm->rank() == 0)
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
