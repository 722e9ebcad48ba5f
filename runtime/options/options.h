// The trainers' options: one table from which parsing, --help, options.toml and the rules of a resume all come.
#pragma once
#include <cstdint>
#include <map>
#include <string>
#include <vector>

// What plan_memory() found out for a run.
struct Planned {
    int64_t bytes = 0, host_bytes = 0; // of the device's and the host's memory
    std::string peak_phase;            // that needs most of the device's
    std::string note;                  // what was chosen and why; empty if nothing that the user does not expect

    bool operator==(const Planned&) const = default;
};

struct Options {
    // model
    std::string model, init;
    int64_t vocab = 0;            // 0: the tokenizer's size, else the family's own
    std::string positions;        // GPT-2: tile, tied, interpolate, fresh, or empty
    std::string gelu;             // Pythia: erf, tanh, or empty: the weights file's own, else erf
    std::string rope;             // Pythia: none, linear, ntk, dynamic, yarn, or empty: the weights file's own
    double rope_scale = 0;        // 0: with rope context / trained context, else the file's own
    double rope_base = 0;         // 0: the weights file's own, else 10000
    std::string rope_temperature; // rotary, softmax, or empty: the weights file's own
    // data
    std::string train, val, tokenizer;
    std::vector<int32_t> prompt_tokens;
    // run
    std::string out;
    bool resume = false;
    int64_t steps = -1; // -1: one epoch
    uint64_t seed = 1337;
    int64_t threads = 0;   // 0: all cores
    int64_t timeout = 600; // seconds
    // No options: ranks that share this machine; the V of a model from scratch where another rank has looked it up.
    int64_t ranks_here = 1, known_vocab = 0;
    // batch
    int64_t context = 0, batch = 1, tokens_per_step = 0; // context 0: the model's own; tokens_per_step 0: batch·context
    // optimizer
    double lr = 6e-4;
    int64_t warmup = -1; // -1: a hundredth of the steps
    std::string schedule = "cosine";
    int64_t decay_steps = -1; // wsd; -1: a fifth of the steps
    double final_lr = 0.1, weight_decay = 0.1, beta1 = 0.9, beta2 = 0.95, eps = 1e-8, clip = 1;
    double skip_z = 0;      // 0: off
    int64_t max_skips = 10; // skipped updates in a row that end the run
    std::string optimizer = "adamw", state = "fp32", state_embeddings = "fp32", state_floor = "on";
    std::string master = "fp32", grad = "fp32";
    std::string deterministic = "on";
    // memory; what is left open is chosen to fit (runtime/plan/plan.h)
    std::string recompute;           // none, block, full, or empty
    int64_t chunk = 0;               // 0: chosen
    int64_t head_group = 0;          // 0: chosen
    int64_t logits_rows = 0;         // 0: chosen
    std::string offload;             // none, some of residual,state,master, or empty
    std::string memory, host_memory; // sizes such as 16GiB, or empty
    bool plan = false, plan_json = false;
    std::string plan_for, gpu; // cpu, cuda; a name of the table of GPUs; or empty
    // habits; 0 turns each off
    int64_t val_every = 250, val_tokens = 1 << 17; // val_tokens 0: all
    int64_t sample_every = 500, sample_tokens = 128;
    double temperature = 0.8;
    int64_t top_k = 40; // 0: all
    int64_t save_every = 500, keep = 2;
    double max_hours = 0;
    std::string eval;  // loss, sample, or empty
    bool help = false; // printed, and nothing is left to do

    Planned planned; // no option

    bool operator==(const Options&) const = default;
};

struct ModelSize {
    int64_t L, C, H;
};
struct NamedSize {
    std::string name;
    ModelSize size;
};

// What differs between the trainers' tables.
struct Family {
    std::string program;           // "train_gpt2"
    std::string name;              // "GPT-2"
    std::string description;       // first paragraph of --help
    std::vector<NamedSize> models; // "tiny" and "L,C,H" are always there
    bool end_of_text_first;        // its tokenizers' end of text is token 0, not the last one
};

// What a command's options are for: another build's weights, with --plan, may be of another type.
using TargetOf = struct Target (*)(const Options&);

// Parses the command line over --config FILE over, with --resume, OUT/options.toml or, if that is gone, what the newest
// checkpoint recorded of it; checks every value and what they need of each other; throws BadInput, before anything is
// written. --help is printed, and nothing else looked at. With --resume, an option given (on the command line or in
// --config) that differs from the run's own and is not marked free throws BadInput naming the option and both values;
// one given as its own "choose for me" value keeps the run's. So does an options.toml that differs from what its
// checkpoints recorded. A memory option or --batch given as another than the run's opens again what was chosen of the
// others. --resume without a run folder starts afresh. Of --model and --init one comes back empty: the one said nearer
// to the command line holds.
Options parse_options(int argc, char** argv, const Family& family, TargetOf target);

// The table as TOML, every option of a run with its value: written to OUT/options.toml. What is left open of the
// schedule stays so. out, resume and eval belong to a command, not to a run, and are left out. parse_options reads
// every value back as it was, to the last bit.
std::string options_toml(const Options& options, const Family& family);

// What a checkpoint keeps of a run's options, names and values as the command line takes them: all but those that name
// a path or fit the run to a machine, so that the same run says the same anywhere.
std::map<std::string, std::string> recorded_options(const Options& options, const Family& family);

// All options of a command with their values, for other processes of the same program, and back.
std::string options_message(const Options& options, const Family& family);
Options options_from_message(const std::string& message, const Family& family);

// A size such as 16GiB, 16G (the same), 16GB (10^9), 512MiB or plain bytes, in bytes; throws BadInput that begins with
// `where` for anything else, and for 0.
int64_t parse_size(const std::string& text, const std::string& where);
// Whether --offload names `what`.
bool waits_on_host(const Options& options, const std::string& what);

// What --help prints: the table, then exit codes and examples.
std::string options_help(const Family& family);

// "L,C,H" → sizes; throws BadInput unless all are positive and H divides C.
ModelSize parse_model_size(const std::string& text);
// The sizes of --model: a name of the family's, tiny, or "L,C,H".
ModelSize find_model_size(const std::string& model, const Family& family);
