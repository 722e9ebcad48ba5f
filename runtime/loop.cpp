#include "loop.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <memory>

#include <sys/stat.h>

#include "errors.h"
#include "log.h"
#include "outliers.h"
#include "random.h"
#include "sampler.h"
#include "schedule.h"
#include "shards.h"
#include "signals.h"
#include "tokenizer.h"

namespace fs = std::filesystem;
using nlohmann::json;

static double seconds() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

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

// Decodes where there is a tokenizer, else writes the ids. Refuses a tokenizer or a prompt that the model does not
// know.
class Text {
public:
    Text(const Options& options, const Model& model) {
        const int64_t V = model.vocab();
        first_ = model.family().end_of_text_first ? 0 : static_cast<int32_t>(V - 1);
        for (int32_t id : options.prompt_tokens)
            if (id < 0 || id >= V)
                throw BadInput("--prompt-tokens: " + std::to_string(id) + " is not below the vocabulary of " +
                               std::to_string(V));
        if (options.tokenizer.empty()) return;
        tokenizer_ = std::make_unique<Tokenizer>(options.tokenizer);
        if (tokenizer_->size() > V)
            throw BadInput(options.tokenizer + ": " + std::to_string(tokenizer_->size()) +
                           " tokens, but the model has only " + std::to_string(V));
        if (tokenizer_->end_of_text() >= 0) first_ = tokenizer_->end_of_text();
    }
    std::string decode(const std::vector<int32_t>& ids) const {
        if (tokenizer_) return valid_utf8(tokenizer_->decode(ids));
        std::string text;
        for (int32_t id : ids) {
            if (!text.empty()) text += ' ';
            text += std::to_string(id);
        }
        return text;
    }
    // What a sample without a prompt starts from: end of text, which stands before every document.
    int32_t first_token() const { return first_; }

private:
    std::unique_ptr<Tokenizer> tokenizer_;
    int32_t first_;
};

static std::string generate(const Options& options, Model& model, const Text& text, uint64_t stream) {
    int64_t V = model.vocab(), T = model.cached_rows();
    std::vector<int32_t> ids = options.prompt_tokens;
    bool prompted = !ids.empty();
    if (!prompted) ids = {text.first_token()};
    std::vector<float> logits(V);
    int64_t window = 0, cached = 0; // rows of ids[window…] that the model has seen
    for (int64_t i = 0; i < options.sample_tokens; i++) {
        int64_t size = static_cast<int64_t>(ids.size());
        if (size - window > T) window = size - (T + 1) / 2, cached = 0; // full: go on from the newest half
        model.next_logits(&ids[window + cached], cached, size - window - cached, logits.data());
        cached = size - window;
        double u = random_uniform(options.seed, stream, i);
        ids.push_back(sample_token(logits.data(), V, options.temperature, options.top_k, u));
    }
    if (!prompted) ids.erase(ids.begin());
    return text.decode(ids);
}

// Random streams of a run, apart from the weights' (the tensor's number): one for each use and step.
constexpr uint64_t kSampleStream = uint64_t(1) << 40;

// Mean loss over the first windows of the validation set, always the same ones.
class Validation {
public:
    Validation(const Options& options, const Model& model)
        : windows_(options.val, model.context(), model.vocab()), T_(model.context()), B_(options.batch) {
        count_ = windows_.count();
        if (options.val_tokens) count_ = std::min(count_, std::max<int64_t>(1, options.val_tokens / T_));
        tokens_.resize(B_ * T_);
        targets_.resize(B_ * T_);
    }
    double mean_loss(Model& model) {
        model.clear_loss();
        for (int64_t first = 0; first < count_; first += B_) {
            int64_t B = std::min(B_, count_ - first);
            for (int64_t b = 0; b < B; b++) windows_.read(first + b, &tokens_[b * T_], &targets_[b * T_]);
            model.evaluate(tokens_.data(), targets_.data(), B, 1.0 / (double(count_) * T_));
        }
        return model.loss();
    }

private:
    Windows windows_;
    int64_t T_, B_, count_;
    std::vector<int32_t> tokens_, targets_;
};

namespace {

// One run: its position, which a checkpoint holds, and what the habits need.
class Run {
public:
    Run(Options& options, const Device& device, Model& model, const Start& start);
    void steps();

private:
    Options& options_;
    const Device& device_;
    Model& model_;
    Text text_;
    std::unique_ptr<Loader> loader_;
    std::unique_ptr<Validation> validation_;
    std::unique_ptr<RunLog> log_;
    Progress progress_;
    double began_ = seconds();

    // The position.
    int64_t step_ = 0, updates_ = 0, skips_ = 0, saved_ = -1;
    OutlierWindow losses_, norms_;

    bool due(int64_t every) const { return every > 0 && step_ % every == 0; }
    void resume(const Checkpoint& from);
    void one_step();
    std::string reason_to_skip(double loss, double norm, double& z) const;
    void validate();
    void sample();
    void save();
    void log_save();
    void stop_if_asked();
    int64_t tokens() const { return step_ * options_.tokens_per_step; }
    Schedule schedule() const {
        return {options_.schedule, options_.lr,     options_.final_lr,
                options_.steps,    options_.warmup, options_.decay_steps};
    }
};

Run::Run(Options& options, const Device& device, Model& model, const Start& start)
    : options_(options), device_(device), model_(model), text_(options, model) {
    int64_t micro = options.batch * model.context();
    options.context = model.context();
    if (!options.tokens_per_step) options.tokens_per_step = micro;
    if (options.tokens_per_step % micro)
        throw BadInput("--tokens-per-step " + std::to_string(options.tokens_per_step) +
                       " is not a multiple of batch x context, " + std::to_string(micro));
    if (!options.train.empty())
        loader_ = std::make_unique<Loader>(parse_sources(options.train), model.context(), model.vocab(), options.seed);
    if (options.steps < 0) {
        options.steps = loader_->windows_per_epoch() / (options.tokens_per_step / model.context());
        if (!options.steps)
            throw BadInput("--train " + options.train + " has " + std::to_string(loader_->windows_per_epoch()) +
                           " windows of " + std::to_string(model.context()) + " tokens, fewer than one step of " +
                           std::to_string(options.tokens_per_step) + "; lower --tokens-per-step, or give --steps");
    }
    // A run of no steps leaves them open for the one that goes on from it.
    if (options.warmup < 0 && options.steps) options.warmup = options.steps / 100;
    if (options.decay_steps < 0 && options.steps) options.decay_steps = options.steps / 5;
    if (!options.val.empty()) validation_ = std::make_unique<Validation>(options, model);
    if (start.resume) resume(*start.resume); // may refuse, so before anything is written

    std::error_code error;
    fs::create_directories(options.out, error);
    if (error) throw BadInput("--out " + options.out + ": " + error.message());
    write_file_whole(options.out + "/options.toml", options_toml(options, model.family()));
    int64_t keep_bytes = start.resume ? start.resume->meta.at("log_bytes").get<int64_t>() : 0;
    log_ = std::make_unique<RunLog>(options.out + "/log.jsonl", keep_bytes);
    if (!start.resume) {
        const Planned& planned = options.planned;
        log_->write({{"event", "plan"},
                     {"bytes", planned.bytes},
                     {"host_bytes", planned.host_bytes},
                     {"peak_phase", planned.peak_phase},
                     {"recompute", options.recompute},
                     {"chunk", options.chunk},
                     {"head_group", options.head_group},
                     {"offload", options.offload}});
        return;
    }
    if (due(options_.save_every) || step_ == options_.steps) log_save();
    progress_.say("resumed " + start.resume->path);
}

void Run::resume(const Checkpoint& from) {
    const json& meta = from.meta;
    if (meta.at("precision") != kPrecision)
        throw BadInput(from.path + ": from a " + meta.at("precision").get<std::string>() + " build, this one is " +
                       kPrecision + "; resume with the other, or start a new run with --init " + from.path);
    step_ = saved_ = from.step;
    updates_ = meta.at("updates");
    skips_ = meta.at("skips");
    losses_.restore(meta.at("losses"));
    norms_.restore(meta.at("norms"));
    if (loader_ && meta.contains("loader")) loader_->restore(meta.at("loader")); // a run of no steps had no data
    read_state(device_, MappedFile(from.part("optimizer.bin")), model_.tensors());
}

void Run::log_save() { log_->write({{"event", "save"}, {"step", step_}, {"path", checkpoint_name(step_)}}); }

void Run::save() {
    if (saved_ == step_) return;
    log_->sync();
    json meta = {{"log_bytes", log_->bytes()}, {"updates", updates_},     {"skips", skips_},
                 {"losses", losses_.state()},  {"norms", norms_.state()}, {"precision", kPrecision},
                 {"model", model_.describe()}};
    if (loader_) meta["loader"] = loader_->state();
    Tensors& tensors = model_.tensors();
    std::vector<CheckpointPart> parts = {
        {"model.bin", model_.file_bytes(), [&](FileWriter& file) { model_.write_file(file); }},
        {"optimizer.bin", state_bytes(tensors), [&](FileWriter& file) { write_state(device_, file, tensors); }}};
    save_checkpoint(options_.out, step_, parts, meta, options_.keep);
    saved_ = step_;
    log_save();
}

void Run::validate() {
    if (!validation_) return;
    double loss = validation_->mean_loss(model_);
    log_->write({{"event", "val"}, {"step", step_}, {"loss", loss}, {"tokens", tokens()}});
    char line[64];
    snprintf(line, sizeof line, "step %lld: val loss %.4f", static_cast<long long>(step_), loss);
    progress_.say(line);
}

void Run::sample() {
    std::string text = generate(options_, model_, text_, kSampleStream + step_);
    log_->write({{"event", "sample"}, {"step", step_}, {"text", text}});
    progress_.say("step " + std::to_string(step_) + " sample:\n" + text);
}

void Run::stop_if_asked() {
    std::string why;
    if (int signal = stop_signal()) why = std::string("signal ") + strsignal(signal);
    if (options_.max_hours > 0 && seconds() - began_ > options_.max_hours * 3600) why = "--max-hours";
    if (why.empty() || step_ >= options_.steps) return;
    save();
    log_->write({{"event", "end"}, {"step", step_}, {"reason", why}});
    progress_.finish();
    throw Failure(kStopped, "stopped at step " + std::to_string(step_) + " (" + why + "); go on with: --out " +
                                options_.out + " --resume");
}

std::string Run::reason_to_skip(double loss, double norm, double& z) const {
    if (!std::isfinite(loss)) return "non-finite loss";
    if (!std::isfinite(norm)) return "non-finite gradient";
    z = std::max(losses_.score(loss), norms_.score(norm));
    if (options_.skip_z > 0 && z > options_.skip_z) return "outlier";
    return "";
}

void Run::one_step() {
    double start = seconds();
    int64_t B = options_.batch, T = options_.context, micro_steps = options_.tokens_per_step / (B * T);
    std::vector<int32_t> tokens(B * T), targets(B * T);
    model_.begin_step(step_);
    for (int64_t i = 0; i < micro_steps; i++) {
        loader_->next(tokens.data(), targets.data(), B);
        model_.accumulate(tokens.data(), targets.data(), B, 1.0 / options_.tokens_per_step);
    }
    model_.measure_gradients(options_.clip);
    double loss = model_.loss(), norm = model_.grad_norm(), z = 0;
    double lr = learning_rate(schedule(), step_);
    std::string skip = reason_to_skip(loss, norm, z);
    step_++;
    if (skip.empty()) {
        updates_++;
        skips_ = 0;
        losses_.accept(loss);
        norms_.accept(norm);
        Optimizer optimizer{float(lr),           float(options_.beta1),        float(options_.beta2),
                            float(options_.eps), float(options_.weight_decay), updates_,
                            options_.seed};
        optimizer.floor_v = options_.state_floor == "on";
        model_.update(optimizer);
        OptimizerCounts counts = model_.counts(); // waits for the update
        double took = seconds() - start;
        double flops = model_.step_cost(B).flops * micro_steps;
        double rate = options_.tokens_per_step / took, percent = 100 * flops / took / device_.peak_flops;
        json event = {{"event", "step"},
                      {"step", step_},
                      {"loss", loss},
                      {"lr", lr},
                      {"grad_norm", norm},
                      {"tokens", this->tokens()},
                      {"tokens_per_second", rate},
                      {"ms", took * 1e3},
                      {"peak_percent", percent}};
        if (options_.state == "int8") event.update({{"vanished", counts.vanished}, {"saturated", counts.saturated}});
        if (options_.state == "int8" || counts.non_finite) event["non_finite"] = counts.non_finite;
        log_->write(event);
        progress_.step({step_, options_.steps, loss, lr, norm, rate, percent, took * double(options_.steps - step_)});
    } else {
        skips_++;
        log_->write({{"event", "skip"},
                     {"step", step_},
                     {"reason", skip},
                     {"loss", loss},
                     {"grad_norm", norm},
                     {"z", z},
                     {"non_finite", std::isfinite(norm) ? 0 : model_.non_finite_gradients()}});
        progress_.say("step " + std::to_string(step_) + ": update skipped, " + skip);
        if (skips_ >= options_.max_skips)
            throw RunFailed(
                std::to_string(skips_) + " updates in a row were skipped (" + skip + "), the last at step " +
                std::to_string(step_) + "; " +
                (saved_ >= 0 ? "the newest checkpoint is " + checkpoint_name(saved_) : "there is no checkpoint yet") +
                "; try a lower --lr");
    }
}

void Run::steps() {
    if (saved_ < 0 && step_ < options_.steps && options_.val_every > 0) validate();
    while (step_ < options_.steps) {
        one_step();
        bool last = step_ == options_.steps;
        if (due(options_.val_every) || (last && options_.val_every > 0)) validate();
        if (due(options_.sample_every)) sample();
        if (due(options_.save_every)) save();
        stop_if_asked();
    }
    save();
    log_->write({{"event", "end"}, {"step", step_}, {"reason", "done"}});
    progress_.finish();
    printf("done: %lld steps, %s, peak memory %.2f GiB, checkpoint %s/%s\n", static_cast<long long>(step_),
           format_duration(seconds() - began_).c_str(), double(peak_resident_bytes()) / (1 << 30), options_.out.c_str(),
           checkpoint_name(step_).c_str());
}

} // namespace

static void train(Options& options, const Device& device, Model& model, const Start& start) {
    catch_stop_signals();
    printf("%s\n%s\n", device_line(device).c_str(), model.describe().c_str());
    if (!options.planned.note.empty()) printf("%s\n", options.planned.note.c_str());
    Run(options, device, model, start).steps();
}

// A line of V numbers for each token of the prompt.
static void print_logits(const Options& options, Model& model) {
    std::vector<float> logits(model.vocab());
    int64_t size = static_cast<int64_t>(options.prompt_tokens.size());
    if (size > model.context())
        throw BadInput("--prompt-tokens has " + std::to_string(size) + " tokens, more than the context of " +
                       std::to_string(model.context()));
    for (int64_t t = 0; t < size; t++) {
        model.next_logits(&options.prompt_tokens[t], t, 1, logits.data());
        for (int64_t v = 0; v < model.vocab(); v++) printf(v ? " %.9g" : "%.9g", logits[v]);
        printf("\n");
    }
}

static void evaluate(const Options& options, Model& model) {
    if (options.eval == "loss") {
        printf("val_loss %.6f\n", Validation(options, model).mean_loss(model));
        return;
    }
    Text text(options, model); // refuses tokens that the model does not know
    if (options.eval == "logits")
        print_logits(options, model);
    else
        printf("%s\n", generate(options, model, text, kSampleStream).c_str());
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
    } catch (const std::exception& error) {
        print_failure(name, error.what());
        return kRunFailed;
    }
}
