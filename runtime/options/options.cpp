#include "options.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <limits>
#include <map>
#include <optional>
#include <tuple>

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include "../../kernels/types.h"
#include "../base/errors.h"
#include "../files/checkpoint.h"
#include "../files/files.h"
#include "../files/run_folder.h"
#include "option_table.h"
#include "toml.h"

namespace {

// ---------------------------------------------------------------------------------------------------------------------
// Values to text and back. `where` opens every message: "--batch" or "my.toml:3: batch".

std::string number_text(double x) {
    char text[40];
    auto end = std::to_chars(text, text + sizeof text, x).ptr; // the shortest that reads back as the same double
    return std::string(text, end);
}

std::string bounds_text(const OptionRange& range) {
    std::string low = (range.above ? "above " : "at least ") + number_text(range.low);
    if (!std::isfinite(range.high)) return low;
    // Bounds that only guard against nonsense are powers of two: printed in full.
    char high[40];
    snprintf(high, sizeof high, "%.0f", range.high);
    return low + (range.below ? " and below " : " and at most ") + high;
}

bool inside(double x, const OptionRange& range) {
    return (range.above ? x > range.low : x >= range.low) && (range.below ? x < range.high : x <= range.high);
}

// As a float a value may be Inf, a bound that the value itself keeps, or the 0 that stands for "off".
void check_as_float(double x, const std::string& text, const std::string& where, const OptionRange& range) {
    const float f = static_cast<float>(x);
    const bool in_range = inside(f, range);
    if (std::isfinite(f) && in_range && (f != 0 || x == 0)) return;
    const std::string bounds = !std::isfinite(f) ? "at most 3.4e38"
                               : in_range        ? "0 or at least 1e-45"
                                                 : bounds_text(range);
    throw BadInput(where + ": " + text + " is " + number_text(f) + " as a float, the type it is used in; it must be " +
                   bounds);
}

template <class T> T parse_number(const std::string& text, const std::string& where, const OptionRange& range) {
    T value{};
    auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    if (error == std::errc::result_out_of_range) throw BadInput(where + ": " + text + " is out of range");
    if (error != std::errc() || end != text.data() + text.size())
        throw BadInput(where + ": '" + text + "' is not a " + (std::is_floating_point_v<T> ? "" : "whole ") + "number");
    if constexpr (std::is_floating_point_v<T>)
        if (!std::isfinite(value)) throw BadInput(where + ": " + text + " is not a finite number");
    if (!inside(static_cast<double>(value), range))
        throw BadInput(where + ": " + text + " is out of range, it must be " + bounds_text(range));
    if constexpr (std::is_floating_point_v<T>)
        if (range.as_float) check_as_float(value, text, where, range);
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

void set_value(Options& o, const OptionRow& row, const std::string& text, const std::string& where) {
    if (auto m = std::get_if<std::string Options::*>(&row.member)) {
        if (!row.choices.empty() && std::find(row.choices.begin(), row.choices.end(), text) == row.choices.end() &&
            text != Options().**m)
            throw BadInput(where + ": '" + text + "' is not one of " + join(row.choices, ", "));
        if (row.check && text != Options().**m) row.check(text, where);
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
std::string value_text(const Options& o, const OptionRow& row) {
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

const OptionRow* find_row(const std::vector<OptionRow>& table, const std::string& name) {
    for (const OptionRow& row : table)
        if (name == row.name && row.member.index() != 0) return &row;
    return nullptr;
}

std::string one_line(std::string text) {
    std::replace(text.begin(), text.end(), '\n', ' ');
    return text;
}

Layer read_command_line(int argc, char** argv, const std::vector<OptionRow>& table) {
    CLI::App app;
    Layer layer;
    bool help = false;
    app.set_help_flag(); // ours is written from the table
    app.allow_extras();
    for (const OptionRow& row : table) {
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
    if (help) return {{"help", {"true", "--help"}}};
    if (std::vector<std::string> rest = app.remaining(); !rest.empty()) {
        std::string word = one_line(rest[0]);
        throw BadInput(word[0] == '-'
                           ? "unknown option " + word + " (see --help)"
                           : "unexpected argument " + word + ": quote a glob, so that the shell leaves it whole");
    }
    return layer;
}

constexpr size_t kConfigBytes = 1 << 26; // --prompt-tokens of a few million

Layer read_config(const std::string& path, const std::vector<OptionRow>& table, const Family& family) {
    Layer layer;
    for (const TomlItem& item : parse_toml(read_small_file(path, kConfigBytes), path)) {
        std::string where = path + ":" + std::to_string(item.line) + ": " + item.key;
        const OptionRow* row = find_row(table, item.key);
        if (!row) throw BadInput(where + ": " + family.program + " has no such option (see --help)");
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

void check_plan(const Options& o) {
    if (!o.plan && !o.plan_json) {
        if (!o.gpu.empty()) throw BadInput("--gpu " + o.gpu + " is for --plan: a run takes the GPU at hand");
        if (!o.plan_for.empty()) throw BadInput("--plan-for " + o.plan_for + " is for --plan: a run is of this build");
        return;
    }
    if (!o.eval.empty()) throw BadInput("--plan and --eval exclude each other: leave one out");
    if (!o.gpu.empty() && o.plan_for == "cpu")
        throw BadInput("--gpu " + o.gpu + " and --plan-for cpu exclude each other: leave one out");
}

// The update's factors (OptimizerFactors) at the first step, where the bias correction is largest.
void check_update(const Options& o) {
    const double correction = o.optimizer == "lion" ? 1 : 1 - double(float(o.beta1));
    const float step = float(double(float(o.lr)) / correction);
    const float keep = float(1 - double(float(o.lr)) * double(float(o.weight_decay)));
    if (!std::isfinite(step) || !std::isfinite(keep))
        throw BadInput("--lr " + number_text(o.lr) +
                       (std::isfinite(step) ? " times --weight-decay " + number_text(o.weight_decay)
                                            : " over 1 - --beta1 " + number_text(o.beta1)) +
                       " is more than a float holds: give a lower --lr");
}

// What the command line says without effect. A file may be another run's options.toml, whose values all are there
// whether they matter or not, so it is not asked.
void check_effect(const Options& o, const Target& target, const Layer& given, const std::vector<OptionRow>& table) {
    for (const OptionNeed& need : option_needs()) {
        const auto found = given.find(need.name);
        if (found == given.end() || found->second.where != std::string("--") + need.name || need.met(o, target))
            continue;
        const OptionRow& row = *find_row(table, need.name);
        if (row.unset && value_text(o, row) == value_text(Options(), row)) continue;
        const std::string line = found->second.where + " " + found->second.text + ": " + need.otherwise;
        if (need.refused) throw BadInput(line);
        warn(line);
    }
}

void check_together(const Options& o, const Target& target, const Family& family) {
    if (!o.model.empty() && !o.init.empty())
        throw BadInput("--model and --init are both given: weights to start from bring their own size, leave one out");
    if (o.model.empty() && o.init.empty())
        throw BadInput(o.eval.empty() ? "give --model NAME to train from scratch, or --init PATH to start from weights"
                                      : "--eval " + o.eval + " needs --init PATH: the weights to evaluate");
    if (!o.model.empty()) find_model_size(o.model, family);
    if (o.state != "int8" && (o.state_embeddings == "int8" || o.state_floor == "off"))
        throw BadInput(o.state_floor == "off" ? "--state-floor off is for --state int8 alone"
                                              : "--state-embeddings int8 is for --state int8 alone");
    if (o.state_floor == "off" && o.optimizer == "lion")
        throw BadInput("--state-floor off: Lion has no second moment to keep from 0");
    if (o.recompute == "none" && (o.head_group || waits_on_host(o, "residual")))
        throw BadInput(std::string("--recompute none excludes ") +
                       (o.head_group ? "--head-group" : "--offload residual") +
                       ": where all activations are kept they stay on the device, all heads together; leave one out");
    check_plan(o);
    if (o.eval.empty()) check_update(o);
    if (o.master == "none" && target.real_bytes == sizeof(float))
        throw BadInput("--master none: in an fp32 build there are no other weights to leave out; make PRECISION=bf16");
    if (!o.eval.empty()) {
        if (o.init.empty()) throw BadInput("--eval " + o.eval + " needs --init PATH: the weights to evaluate");
        if (o.eval == "loss" && o.val.empty())
            throw BadInput("--eval loss needs --val GLOB: the shards to evaluate on");
        if (o.eval == "logits" && o.prompt_tokens.empty())
            throw BadInput("--eval logits needs --prompt-tokens LIST: the text to run the model on");
        return;
    }
    if (o.plan || o.plan_json) return;
    if (o.out.empty()) throw BadInput("--out DIR is needed: the folder that the run writes to");
    if (o.train.empty() && o.steps != 0) throw BadInput("--train GLOB is needed: the token shards to train on");
    check_out(o.out);
    if (!o.resume && holds_run(o.out))
        throw BadInput("--out " + o.out +
                       " holds a run already: add --resume to go on with it, or choose another folder");
}

std::string model_names(const Family& family) {
    std::vector<std::string> names;
    for (const NamedSize& model : family.models) names.push_back(model.name);
    return join(names, ", ");
}

// A run's options hold what was chosen of its memory's, for its own limit and batch. With another limit, another batch,
// or another choice of the user's, what the user does not say is open again.
void reopen_memory(Options& options, const Options& own, const Layer& given) {
    auto memory = [](const Options& o) {
        return std::tie(o.batch, o.memory, o.host_memory, o.recompute, o.chunk, o.head_group, o.logits_rows, o.offload);
    };
    if (memory(options) == memory(own)) return;
    if (!given.count("recompute")) options.recompute.clear();
    if (!given.count("chunk")) options.chunk = 0;
    if (!given.count("head-group")) options.head_group = 0;
    if (!given.count("logits-rows")) options.logits_rows = 0;
    if (!given.count("offload")) options.offload.clear();
}

std::string shown(const std::string& value) { return value.empty() ? "nothing" : value; }

// Options of a run that its checkpoints record: neither paths nor what fits a run to a machine, but for what of that
// decides how sums are rounded.
bool recorded(const OptionRow& row) {
    static const char* const elsewhere[] = {"init",      "train",   "val",     "tokenizer", "threads",
                                            "max-hours", "timeout", "offload", "memory",    "host-memory"};
    return row.member.index() != 0 && row.scope != OptionScope::command &&
           std::none_of(std::begin(elsewhere), std::end(elsewhere), [&](auto name) { return !strcmp(name, row.name); });
}

// What a checkpoint recorded; empty for one of a program that recorded nothing.
std::map<std::string, std::string> record_of(const Checkpoint& checkpoint, const std::vector<OptionRow>& table) {
    std::map<std::string, std::string> record;
    if (!checkpoint.meta.is_object()) return record;
    const nlohmann::json options = checkpoint.meta.value("options", nlohmann::json::object());
    for (const auto& [name, value] : options.items())
        if (const OptionRow* row = find_row(table, name); row && recorded(*row) && value.is_string())
            record[name] = value.get<std::string>();
    return record;
}

// A run of the other program would be refused for the first option that this one does not have.
void check_family(const std::string& out, const Checkpoint& newest, const Family& family) {
    if (!newest.meta.is_object() || !newest.meta.contains("model") || !newest.meta["model"].is_string()) return;
    const std::string model = newest.meta["model"], name = model.substr(0, model.find(','));
    if (name != family.name)
        throw BadInput(out + ": a run of " + name + ", and " + family.program + " trains " + family.name);
}

// The run's own options, by options.toml and its newest checkpoint.
std::optional<Options> own_options(const std::string& out, const std::vector<OptionRow>& table, const Family& family) {
    const std::string stored = out + "/options.toml";
    const std::optional<Checkpoint> newest = newest_by_manifest(out);
    if (newest) check_family(out, *newest, family);
    const auto record = newest ? record_of(*newest, table) : std::map<std::string, std::string>();
    Options own;
    std::error_code error;
    if (std::filesystem::exists(stored, error)) {
        for (const auto& [name, value] : read_config(stored, table, family))
            if (const OptionRow* row = find_row(table, name); row->scope != OptionScope::command)
                set_value(own, *row, value.text, value.where);
        for (const auto& [name, value] : record) {
            const OptionRow& row = *find_row(table, name);
            if (std::string has = value_text(own, row); row.scope == OptionScope::fixed && has != value)
                throw BadInput(stored + " has " + name + " = " + shown(has) + ", but " + newest->path +
                               " was trained with " + shown(value) +
                               ": put it right, or remove the file and give the run's paths again");
        }
        return own;
    }
    if (record.empty()) return {};
    for (const auto& [name, value] : record)
        set_value(own, *find_row(table, name), value, newest->path + "/manifest.json: " + name);
    if (own.model.empty()) own.init = newest->path; // it had its weights from a file; they are in the checkpoint now
    warn(stored + " is gone; the run's options are those that " + newest->path +
         " recorded, but for paths (--train, --val, --tokenizer) and choices of memory");
    return own;
}

} // namespace

int64_t parse_size(const std::string& text, const std::string& where) {
    double number = 0;
    auto [rest, error] = std::from_chars(text.data(), text.data() + text.size(), number, std::chars_format::fixed);
    const std::string unit(rest, text.data() + text.size());
    const std::string letters = "KMGT";
    const size_t power = unit.empty() ? 0 : letters.find(unit[0]) + 1; // 0 for another letter too
    const std::string ending = unit.empty() ? "" : unit.substr(1);
    const bool known = unit.empty() || unit == "B" || (power && (ending.empty() || ending == "iB" || ending == "B"));
    const double bytes = number * std::pow(ending == "B" ? 1000.0 : 1024.0, double(power));
    if (error != std::errc() || !known || !(bytes >= 1) || bytes > 0x1p60)
        throw BadInput(where + ": '" + text + "' is not a size such as 16GiB, 512MiB, 16GB or 17179869184");
    return static_cast<int64_t>(bytes);
}

bool waits_on_host(const Options& options, const std::string& what) {
    return ("," + options.offload + ",").find("," + what + ",") != std::string::npos;
}

// Whether the run's checkpoint knows its shards by their hashes, so that it does not matter where they lie.
static bool knows_its_shards(const std::string& out) {
    const std::optional<Checkpoint> newest = newest_by_manifest(out);
    const nlohmann::json data = newest ? newest->meta.value("loader", nlohmann::json()) : nlohmann::json();
    return data.contains("sources") && data.contains("shares");
}

Options parse_options(int argc, char** argv, const Family& family, TargetOf target) {
    const std::vector<OptionRow> table = option_table(family);
    Layer given = read_command_line(argc, argv, table);
    if (given.count("help")) {
        fputs(options_help(family).c_str(), stdout);
        Options nothing;
        nothing.help = true;
        return nothing;
    }
    if (auto config = given.find("config"); config != given.end()) {
        std::string path = config->second.text;
        given.erase(config);
        given = merge(given, read_config(path, table, family));
    }

    Options asked; // what was given, over the defaults
    for (const auto& [name, value] : given) set_value(asked, *find_row(table, name), value.text, value.where);
    if (asked.resume && !asked.eval.empty()) throw BadInput("--resume and --eval exclude each other: leave one out");
    if (asked.resume && asked.out.empty()) throw BadInput("--resume needs --out DIR: the run to go on with");

    Options options = asked;
    std::optional<Options> own;
    if (asked.resume) own = own_options(asked.out, table, family);
    if (own) {
        options = *own;
        for (const auto& [name, value] : given) {
            const OptionRow& row = *find_row(table, name);
            std::string was = value_text(*own, row), now = value_text(asked, row);
            bool left_open = row.unset && now == value_text(Options(), row);
            // A run of --steps 0 may get its data now, and shards may have been moved.
            bool data = row.name == std::string("train") && (was.empty() || knows_its_shards(asked.out));
            if (row.scope == OptionScope::fixed && left_open) continue;
            if (row.scope == OptionScope::fixed && was != now && !data && holds_checkpoints(asked.out))
                throw BadInput(value.where + ": the run in " + asked.out + " has " + shown(was) +
                               " and cannot go on with " + now +
                               ": leave it out, or start another run with another --out");
            set_value(options, row, now, value.where);
        }
        reopen_memory(options, *own, given);
    }
    const Target meant = target(options);
    check_together(options, meant, family);
    check_effect(options, meant, given, table);
    return options;
}

std::map<std::string, std::string> recorded_options(const Options& options, const Family& family) {
    std::map<std::string, std::string> record;
    for (const OptionRow& row : option_table(family))
        if (recorded(row)) record[row.name] = value_text(options, row);
    return record;
}

std::string options_message(const Options& options, const Family& family) {
    nlohmann::json all;
    for (const OptionRow& row : option_table(family))
        if (row.member.index() != 0) all[row.name] = value_text(options, row);
    return nlohmann::json({{"options", all}, {"known_vocab", options.known_vocab}}).dump();
}

Options options_from_message(const std::string& message, const Family& family) {
    const std::vector<OptionRow> table = option_table(family);
    Options options;
    const nlohmann::json all = nlohmann::json::parse(message);
    for (const auto& [name, value] : all.at("options").items())
        set_value(options, *find_row(table, name), value.get<std::string>(), "--" + name);
    options.known_vocab = all.at("known_vocab");
    return options;
}

std::string options_toml(const Options& options, const Family& family) {
    std::string text;
    const char* group = "";
    for (const OptionRow& row : option_table(family)) {
        if (row.member.index() == 0 || row.scope == OptionScope::command) continue;
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
    for (const OptionRow& row : option_table(family)) {
        if (std::string(group) != row.group) text += std::string("\n") + row.group + ":\n";
        group = row.group;
        std::string left =
            std::string(row.scope == OptionScope::free ? "* " : "  ") + "--" + row.name + " " + row.value;
        std::string help = row.help;
        if (size_t at = help.find("{models}"); at != std::string::npos) help.replace(at, 8, model_names(family));
        if (size_t at = help.find("{gpus}"); at != std::string::npos) help.replace(at, 6, join(row.choices, ", "));
        std::string otherwise = row.unset ? row.unset : *row.value ? value_text(Options(), row) : "";
        if (!otherwise.empty() && otherwise != "none") help += " [" + otherwise + "]";
        left.resize(std::max(kColumn, left.size() + 1), ' ');
        text += left + wrapped(help, kColumn);
    }
    const std::string& p = family.program;
    text +=
        "\nExit codes: 0 done; 1 the run failed; 2 bad options or input; 3 more memory than there is; 4 stopped by a\n"
        "signal or --max-hours with a checkpoint to resume from. The signals are INT (Ctrl-C), TERM, HUP, USR1,\n"
        "USR2 and XCPU; INT, TERM, USR1 or USR2 again, more than a second later, ends the run at once, unsaved.\n"
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

ModelSize find_model_size(const std::string& model, const Family& family) {
    for (const NamedSize& named : family.models)
        if (model == named.name) return named.size;
    if (model == "tiny") return {2, 128, 2};
    if (model.find(',') == std::string::npos)
        throw BadInput("--model: '" + model + "' is none of " + model_names(family) +
                       ", tiny, nor sizes such as 6,384,6");
    return parse_model_size(model);
}
