#include "options.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <limits>
#include <map>
#include <variant>

#include <CLI/CLI.hpp>

#include "checkpoint.h"
#include "errors.h"
#include "files.h"
#include "toml.h"

namespace {

// What a resumed run may do to an option.
enum class Scope {
    fixed,  // part of the run's mathematics: a resume keeps it
    free,   // may change from one resume to the next
    command // of one command, never stored with a run
};

struct Range {
    double low = 0, high = INFINITY;   // every bound below is exact in a double
    bool above = false, below = false; // strictly
};

using Member = std::variant<std::monostate, std::string Options::*, bool Options::*, int64_t Options::*,
                            uint64_t Options::*, double Options::*, std::vector<int32_t> Options::*>;

struct Row {
    const char* group = "";
    const char* name = "";
    const char* value = ""; // what --help calls the value; empty for a flag
    const char* help = "";
    Member member = {}; // none: --config and --help, which parse_options handles itself
    Scope scope = Scope::fixed;
    Range range = {};
    const char* unset = nullptr; // what the default stands for, where it is not to be taken as a figure
    std::vector<std::string> choices = {};
};

// Checkpoint folders name steps with eight digits. With at most 2^36 tokens a step, counts of tokens fit 63 bits.
constexpr double kMostSteps = 99999999, kMostTokensPerStep = 0x1p36, kMany = 0x1p40;

std::vector<Row> option_table() {
    using O = Options;
    constexpr Scope fixed = Scope::fixed, free = Scope::free, command = Scope::command;
    const char *model = "Model", *data = "Data", *run = "Run", *batch = "Batch", *optimizer = "Optimizer",
               *habits = "Validation, samples and checkpoints";
    return {
        {model,
         "model",
         "NAME",
         "train this size from scratch: {models}, tiny, or layers,width,heads such as 6,384,6",
         &O::model,
         fixed,
         {},
         "none"},
        {model,
         "init",
         "PATH",
         "start from a weights file, a checkpoint or a run folder, in place of --model",
         &O::init,
         fixed,
         {},
         "none"},
        {model,
         "vocab",
         "V",
         "number of tokens the model knows",
         &O::vocab,
         fixed,
         {0, 0x1p24},
         "the tokenizer's size, else the family's own"},

        {data,
         "train",
         "GLOBS",
         "token shards to train on: GLOB[:WEIGHT],GLOB[:WEIGHT],...",
         &O::train,
         fixed,
         {},
         "none"},
        {data, "val", "GLOB", "token shards to validate on", &O::val, free, {}, "none"},
        {data,
         "tokenizer",
         "FILE",
         "tokenizer binary that decodes samples",
         &O::tokenizer,
         free,
         {},
         "samples are token numbers"},
        {data,
         "prompt-tokens",
         "LIST",
         "tokens that samples go on from, such as 464,2068,7586",
         &O::prompt_tokens,
         free,
         {0, 0x7fffffff},
         "end of text"},

        {run, "out", "DIR", "run folder: log, checkpoints, options.toml", &O::out, command, {}, "none"},
        {run, "resume", "",
         "go on from the newest whole checkpoint in --out with the run's own options, or start "
         "afresh if there is none",
         &O::resume, command},
        {run,
         "steps",
         "N",
         "optimizer steps; 0 writes the initial checkpoint only",
         &O::steps,
         free,
         {-1, kMostSteps},
         "one epoch"},
        {run,
         "max-hours",
         "HOURS",
         "save and stop with exit code 4 after this time; 0: no limit",
         &O::max_hours,
         free,
         {0, 1e6}},
        {run, "seed", "N", "of weights, shuffling and samples", &O::seed, fixed},
        {run,
         "threads",
         "N",
         "a resumed run repeats bit for bit only on the same number",
         &O::threads,
         free,
         {0, 4096},
         "all cores"},
        {run,
         "eval",
         "WHAT",
         "loss (of --init on --val) or sample (from --init): print it and exit",
         &O::eval,
         command,
         {},
         "train",
         {"loss", "sample"}},
        {run, "config", "FILE", "read options from a TOML file of lines such as batch = 4; the command line wins"},
        {run, "help", "", "print this and exit"},

        {batch, "context", "T", "tokens in a sequence", &O::context, fixed, {0, 0x1p31}, "the model's own"},
        {batch,
         "batch",
         "B",
         "sequences computed at once; memory grows with it, the result changes by rounding only",
         &O::batch,
         free,
         {1, 0x1p20}},
        {batch,
         "tokens-per-step",
         "N",
         "tokens in an optimizer step, a multiple of context x batch",
         &O::tokens_per_step,
         fixed,
         {0, kMostTokensPerStep},
         "context x batch"},

        {optimizer, "lr", "RATE", "peak learning rate of AdamW", &O::lr, free, {0, INFINITY, true}},
        {optimizer,
         "warmup",
         "STEPS",
         "steps over which the rate rises from 0",
         &O::warmup,
         free,
         {-1, kMostSteps},
         "a hundredth of the steps"},
        {optimizer,
         "schedule",
         "KIND",
         "cosine, wsd (constant, then linear decay), constant or linear",
         &O::schedule,
         free,
         {},
         nullptr,
         {"cosine", "wsd", "constant", "linear"}},
        {optimizer,
         "decay-steps",
         "STEPS",
         "length of the decay of wsd",
         &O::decay_steps,
         free,
         {-1, kMostSteps},
         "a fifth of the steps"},
        {optimizer, "final-lr", "PART", "the last rate, as a fraction of the peak", &O::final_lr, free, {0, 1}},
        {optimizer, "weight-decay", "X", "on matrices only", &O::weight_decay, fixed, {0, INFINITY}},
        {optimizer, "beta1", "X", "decay of the first moment", &O::beta1, fixed, {0, 1, false, true}},
        {optimizer, "beta2", "X", "decay of the second moment", &O::beta2, fixed, {0, 1, false, true}},
        {optimizer, "eps", "X", "added to the root of the second moment", &O::eps, fixed, {0, INFINITY, true}},
        {optimizer, "clip", "NORM", "scale gradients down to this norm; 0: off", &O::clip, fixed, {0, INFINITY}},
        {optimizer,
         "skip-z",
         "Z",
         "skip an update whose loss or gradient norm lies this many standard deviations "
         "above the last 128; 0: off",
         &O::skip_z,
         fixed,
         {0, INFINITY}},
        {optimizer,
         "max-skips",
         "N",
         "end the run after this many skipped updates in a row",
         &O::max_skips,
         free,
         {1, kMany}},

        {habits, "val-every", "STEPS", "0: never", &O::val_every, free, {0, kMany}},
        {habits, "val-tokens", "N", "validation tokens a time; 0: all", &O::val_tokens, free, {0, kMany}},
        {habits, "sample-every", "STEPS", "0: never", &O::sample_every, free, {0, kMany}},
        {habits, "sample-tokens", "N", "length of a sample", &O::sample_tokens, free, {0, kMany}},
        {habits, "temperature", "X", "of samples; 0 takes the likeliest token", &O::temperature, free, {0, INFINITY}},
        {habits, "top-k", "K", "sample from the K likeliest tokens; 0: from all", &O::top_k, free, {0, kMany}},
        {habits, "save-every", "STEPS", "0: at the end only", &O::save_every, free, {0, kMany}},
        {habits, "keep", "N", "checkpoints kept, the newest; 0: all", &O::keep, free, {0, kMany}},
    };
}

// ---------------------------------------------------------------------------------------------------------------------
// Values to text and back. `where` opens every message: "--batch" or "my.toml:3: batch".

std::string number_text(double x) {
    char text[40];
    auto end = std::to_chars(text, text + sizeof text, x).ptr; // the shortest that reads back as the same double
    return std::string(text, end);
}

std::string bounds_text(const Range& range) {
    std::string low = (range.above ? "above " : "at least ") + number_text(range.low);
    if (!std::isfinite(range.high)) return low;
    // Bounds that only guard against nonsense are powers of two: printed in full.
    char high[40];
    snprintf(high, sizeof high, "%.0f", range.high);
    return low + (range.below ? " and below " : " and at most ") + high;
}

template <class T> T parse_number(const std::string& text, const std::string& where, const Range& range) {
    T value{};
    auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    if (error == std::errc::result_out_of_range) throw BadInput(where + ": " + text + " is out of range");
    if (error != std::errc() || end != text.data() + text.size())
        throw BadInput(where + ": '" + text + "' is not a " + (std::is_floating_point_v<T> ? "" : "whole ") + "number");
    if constexpr (std::is_floating_point_v<T>)
        if (!std::isfinite(value)) throw BadInput(where + ": " + text + " is not a finite number");
    double x = static_cast<double>(value);
    bool inside = (range.above ? x > range.low : x >= range.low) && (range.below ? x < range.high : x <= range.high);
    if (!inside) throw BadInput(where + ": " + text + " is out of range, it must be " + bounds_text(range));
    return value;
}

std::vector<std::string> split(const std::string& text, char separator) {
    std::vector<std::string> parts(1);
    for (char c : text)
        if (c == separator)
            parts.emplace_back();
        else
            parts.back() += c;
    return parts;
}

std::string join(const std::vector<std::string>& parts, const char* separator) {
    std::string text;
    for (const std::string& part : parts) text += (text.empty() ? "" : separator) + part;
    return text;
}

void set_value(Options& o, const Row& row, const std::string& text, const std::string& where) {
    if (auto m = std::get_if<std::string Options::*>(&row.member)) {
        if (!row.choices.empty() && std::find(row.choices.begin(), row.choices.end(), text) == row.choices.end() &&
            text != Options().**m)
            throw BadInput(where + ": '" + text + "' is not one of " + join(row.choices, ", "));
        o.** m = text;
    } else if (auto m = std::get_if<bool Options::*>(&row.member)) {
        if (text != "true" && text != "false") throw BadInput(where + ": '" + text + "' is neither true nor false");
        o.** m = text == "true";
    } else if (auto m = std::get_if<int64_t Options::*>(&row.member)) {
        o.** m = parse_number<int64_t>(text, where, row.range);
    } else if (auto m = std::get_if<uint64_t Options::*>(&row.member)) {
        o.** m = parse_number<uint64_t>(text, where, row.range);
    } else if (auto m = std::get_if<double Options::*>(&row.member)) {
        o.** m = parse_number<double>(text, where, row.range);
    } else if (auto m = std::get_if<std::vector<int32_t> Options::*>(&row.member)) {
        std::vector<int32_t> list;
        if (!text.empty())
            for (const std::string& part : split(text, ','))
                list.push_back(parse_number<int32_t>(part, where, row.range));
        o.** m = std::move(list);
    }
}

// As the command line takes it.
std::string value_text(const Options& o, const Row& row) {
    if (auto m = std::get_if<std::string Options::*>(&row.member)) return o.**m;
    if (auto m = std::get_if<bool Options::*>(&row.member)) return o.**m ? "true" : "false";
    if (auto m = std::get_if<int64_t Options::*>(&row.member)) return std::to_string(o.**m);
    if (auto m = std::get_if<uint64_t Options::*>(&row.member)) return std::to_string(o.**m);
    if (auto m = std::get_if<double Options::*>(&row.member)) return number_text(o.**m);
    std::string text;
    if (auto m = std::get_if<std::vector<int32_t> Options::*>(&row.member))
        for (int32_t token : o.**m) text += (text.empty() ? "" : ",") + std::to_string(token);
    return text;
}

// ---------------------------------------------------------------------------------------------------------------------
// Layers: what the command line or a file says, by option, each with the place to name in a message.

struct Given {
    std::string text, where;
};
using Layer = std::map<std::string, Given>;

const Row* find_row(const std::vector<Row>& table, const std::string& name) {
    for (const Row& row : table)
        if (name == row.name && row.member.index() != 0) return &row;
    return nullptr;
}

std::string one_line(std::string text) {
    std::replace(text.begin(), text.end(), '\n', ' ');
    return text;
}

Layer read_command_line(int argc, char** argv, const Family& family, const std::vector<Row>& table) {
    CLI::App app;
    Layer layer;
    bool help = false;
    app.set_help_flag(); // ours is written from the table
    app.allow_extras();
    for (const Row& row : table) {
        std::string name = row.name, flag = "--" + name;
        if (name == "help") {
            app.add_flag("-h,--help", help);
        } else if (!*row.value) {
            app.add_flag_function(flag, [&layer, name, flag](int64_t count) {
                layer[name] = {count > 0 ? "true" : "false", flag};
            });
        } else {
            app.add_option_function<std::string>(flag,
                                                 [&layer, name, flag](const std::string& text) {
                                                     layer[name] = {text, flag};
                                                 })
                ->type_name(row.value);
        }
    }
    std::vector<std::string> words; // last first, as CLI11 takes them
    for (int i = argc - 1; i > 0; i--) {
        std::string word = argv[i];
        // "--val=" means an empty value; CLI11 would take the next word for it.
        if (word.size() > 3 && word.rfind("--", 0) == 0 && word.find('=') == word.size() - 1) {
            words.push_back("");
            word.pop_back();
        }
        words.push_back(word);
    }
    try {
        app.parse(words);
    } catch (const CLI::Error& error) {
        throw BadInput(one_line(error.what()) + " (see --help)");
    }
    if (help) {
        std::string text = options_help(family);
        fwrite(text.data(), 1, text.size(), stdout);
        fflush(stdout);
        std::exit(kDone);
    }
    if (std::vector<std::string> rest = app.remaining(); !rest.empty()) {
        std::string word = one_line(rest[0]);
        throw BadInput(word[0] == '-'
                           ? "unknown option " + word + " (see --help)"
                           : "unexpected argument " + word + ": quote a glob, so that the shell leaves it whole");
    }
    return layer;
}

constexpr size_t kConfigBytes = 1 << 20; // no list of options comes near it

Layer read_config(const std::string& path, const std::vector<Row>& table) {
    Layer layer;
    for (const TomlItem& item : parse_toml(read_small_file(path, kConfigBytes), path)) {
        std::string where = path + ":" + std::to_string(item.line) + ": " + item.key;
        const Row* row = find_row(table, item.key);
        if (!row) throw BadInput(where + ": no such option (see --help)");
        bool is_list = std::holds_alternative<std::vector<int32_t> Options::*>(row->member);
        bool is_string = std::holds_alternative<std::string Options::*>(row->member);
        if (item.array && !is_list) throw BadInput(where + ": takes one value, not an array");
        if (is_string && !item.string) throw BadInput(where + ": takes a string: put it in double quotes");
        if (!is_string && !is_list && item.string) throw BadInput(where + ": takes no quotes");
        layer[item.key] = {join(item.values, ","), where};
    }
    return layer;
}

// What `nearer` does not say, taken from `farther`. --model and --init exclude each other: the nearer one holds.
Layer merge(Layer nearer, const Layer& farther) {
    bool source = nearer.count("model") || nearer.count("init");
    for (const auto& [name, given] : farther)
        if (!source || (name != "model" && name != "init")) nearer.emplace(name, given);
    return nearer;
}

// ---------------------------------------------------------------------------------------------------------------------

bool holds_run(const std::string& folder) {
    std::error_code error;
    for (const auto& entry : std::filesystem::directory_iterator(folder, error)) {
        std::string name = entry.path().filename();
        if (name == "options.toml" || name == "log.jsonl" || name.rfind("step_", 0) == 0) return true;
    }
    return false;
}

void check_together(const Options& o, const Family& family) {
    if (!o.model.empty() && !o.init.empty())
        throw BadInput("--model and --init are both given: weights to start from bring their own size, leave one out");
    if (o.model.empty() && o.init.empty())
        throw BadInput(o.eval.empty() ? "give --model NAME to train from scratch, or --init PATH to start from weights"
                                      : "--eval " + o.eval + " needs --init PATH: the weights to evaluate");
    if (!o.model.empty() && o.model != "tiny" &&
        std::find(family.models.begin(), family.models.end(), o.model) == family.models.end()) {
        if (o.model.find(',') == std::string::npos)
            throw BadInput("--model: '" + o.model + "' is none of " + join(family.models, ", ") +
                           ", tiny, nor sizes such as 6,384,6");
        parse_model_size(o.model);
    }
    if (!o.eval.empty()) {
        if (o.init.empty()) throw BadInput("--eval " + o.eval + " needs --init PATH: the weights to evaluate");
        if (o.eval == "loss" && o.val.empty())
            throw BadInput("--eval loss needs --val GLOB: the shards to evaluate on");
        return;
    }
    if (o.out.empty()) throw BadInput("--out DIR is needed: the folder that the run writes to");
    if (o.train.empty() && o.steps != 0) throw BadInput("--train GLOB is needed: the token shards to train on");
    std::error_code error;
    if (std::filesystem::exists(o.out, error) && !std::filesystem::is_directory(o.out, error))
        throw BadInput("--out " + o.out + " is a file: give a folder");
    if (!o.resume && holds_run(o.out))
        throw BadInput("--out " + o.out +
                       " holds a run already: add --resume to go on with it, or choose another folder");
}

std::string shown(const std::string& value) { return value.empty() ? "nothing" : value; }

} // namespace

Options parse_options(int argc, char** argv, const Family& family) {
    const std::vector<Row> table = option_table();
    Layer given = read_command_line(argc, argv, family, table);
    if (auto config = given.find("config"); config != given.end()) {
        std::string path = config->second.text;
        given.erase(config);
        given = merge(given, read_config(path, table));
    }

    Options asked; // what was given, over the defaults
    for (const auto& [name, value] : given) set_value(asked, *find_row(table, name), value.text, value.where);
    if (asked.resume && !asked.eval.empty()) throw BadInput("--resume and --eval exclude each other: leave one out");
    if (asked.resume && asked.out.empty()) throw BadInput("--resume needs --out DIR: the run to go on with");

    Options options = asked;
    std::string stored = asked.out + "/options.toml";
    std::error_code error;
    if (asked.resume && std::filesystem::exists(stored, error)) {
        Options own;
        for (const auto& [name, value] : read_config(stored, table))
            if (const Row* row = find_row(table, name); row->scope != Scope::command)
                set_value(own, *row, value.text, value.where);
        options = own;
        for (const auto& [name, value] : given) {
            const Row& row = *find_row(table, name);
            std::string was = value_text(own, row), now = value_text(asked, row);
            bool left_open = row.unset && now == value_text(Options(), row);
            bool first_data =
                row.name == std::string("train") && was.empty(); // a run of --steps 0 may get its data now
            if (row.scope == Scope::fixed && left_open) continue;
            if (row.scope == Scope::fixed && was != now && !first_data && holds_checkpoints(asked.out))
                throw BadInput(value.where + ": the run in " + asked.out + " has " + shown(was) +
                               " and cannot go on with " + now +
                               ": leave it out, or start another run with another --out");
            set_value(options, row, now, value.where);
        }
    }
    check_together(options, family);
    return options;
}

std::string options_toml(const Options& options) {
    std::string text;
    const char* group = "";
    for (const Row& row : option_table()) {
        if (row.member.index() == 0 || row.scope == Scope::command) continue;
        if (std::string(group) != row.group) {
            text += std::string(text.empty() ? "# " : "\n# ") + row.group + "\n";
            group = row.group;
        }
        std::string value = value_text(options, row);
        if (std::holds_alternative<std::string Options::*>(row.member))
            value = toml_string(value);
        else if (std::holds_alternative<std::vector<int32_t> Options::*>(row.member))
            value = "[" + join(split(value, ','), ", ") + "]";
        else if (std::holds_alternative<double Options::*>(row.member) &&
                 value.find_first_of(".en") == std::string::npos)
            value += ".0"; // so that other readers of TOML see a float too
        text += std::string(row.name) + " = " + value + "\n";
    }
    return text;
}

namespace {

// `text` in lines of at most 110 columns, from column `indent` on.
std::string wrapped(const std::string& text, size_t indent) {
    std::string out, line;
    for (const std::string& word : split(text, ' ')) {
        if (!line.empty() && indent + line.size() + 1 + word.size() > 110) {
            out += line + "\n" + std::string(indent, ' ');
            line.clear();
        }
        line += (line.empty() ? "" : " ") + word;
    }
    return out + line + "\n";
}

} // namespace

std::string options_help(const Family& family) {
    constexpr size_t kColumn = 30;
    std::string text = wrapped(family.description, 0) + "\nUsage: " + family.program +
                       " --model NAME --train GLOB --out DIR [options]\n" + "       " + family.program +
                       " --resume --out DIR\n" + "\nOptions marked * may change when a run is resumed.\n";
    const char* group = "";
    for (const Row& row : option_table()) {
        if (std::string(group) != row.group) text += std::string("\n") + row.group + ":\n";
        group = row.group;
        std::string left = std::string(row.scope == Scope::free ? "* " : "  ") + "--" + row.name + " " + row.value;
        std::string help = row.help;
        if (size_t at = help.find("{models}"); at != std::string::npos) help.replace(at, 8, join(family.models, ", "));
        std::string otherwise = row.unset ? row.unset : *row.value ? value_text(Options(), row) : "";
        if (!otherwise.empty() && otherwise != "none") help += " [" + otherwise + "]";
        left.resize(std::max(kColumn, left.size() + 1), ' ');
        text += left + wrapped(help, kColumn);
    }
    const std::string& p = family.program;
    text +=
        "\nExit codes: 0 done; 1 the run failed; 2 bad options or input; 4 stopped by a signal or --max-hours with a\n"
        "checkpoint to resume from.\n"
        "\nExamples:\n"
        "  " +
        p +
        " --model tiny --train 'data/train_*.bin' --val 'data/val_*.bin' --context 256 --out runs/first\n"
        "  " +
        p +
        " --resume --out runs/first --steps 20000\n"
        "  " +
        p + " --eval loss --init runs/first --val 'data/val_*.bin'\n";
    return text;
}

ModelSize parse_model_size(const std::string& text) {
    std::vector<std::string> parts = split(text, ',');
    if (parts.size() != 3) throw BadInput("--model: '" + text + "' is not layers,width,heads such as 6,384,6");
    int64_t sizes[3];
    for (int i = 0; i < 3; i++) sizes[i] = parse_number<int64_t>(parts[size_t(i)], "--model " + text, {1, 0x1p20});
    auto [L, C, H] = sizes;
    if (C % H != 0)
        throw BadInput("--model " + text + ": the width " + parts[1] + " is not a multiple of the " + parts[2] +
                       " heads");
    return {L, C, H};
}
