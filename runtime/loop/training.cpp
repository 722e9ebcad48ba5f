#include "training.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <filesystem>

#include "../base/errors.h"
#include "../base/signals.h"
#include "../ranks/share.h"

namespace fs = std::filesystem;
using nlohmann::json;

Run::Run(Options& options, const Device& device, Model& model, const Start& start)
    : options_(options), device_(device), comm_(device.comm), rank_(comm_ ? comm_->rank() : 0),
      ranks_(comm_ ? comm_->ranks() : 1), model_(model), lock_(start.lock), began_(steady_seconds()) {
    if (first()) text_.emplace(options, model);
    int64_t micro = options.batch * model.context();
    options.context = model.context();
    if (!options.tokens_per_step) options.tokens_per_step = micro * ranks_;
    if (!options.train.empty())
        loader_ = std::make_unique<Loader>(parse_sources(options.train), model.context(), model.vocab(), options.seed);
    as_given_ = options; // what is left open of the schedule is for this number of steps alone
    if (options.steps < 0) {
        options.steps = loader_->windows_per_epoch() / (options.tokens_per_step / model.context());
        if (!options.steps)
            throw BadInput("--train " + options.train + " has " + std::to_string(loader_->windows_per_epoch()) +
                           " windows of " + std::to_string(model.context()) + " tokens, fewer than one step of " +
                           std::to_string(options.tokens_per_step) + "; lower --tokens-per-step, or give --steps");
    }
    if (options.warmup < 0) options.warmup = options.steps / 100;
    if (options.decay_steps < 0) options.decay_steps = options.steps / 5;
    if (!options.val.empty()) validation_ = std::make_unique<Validation>(options, model, rank_, ranks_);
    const Checkpoint* from = start.resume.get();
    if (from) resume(*from); // may refuse, so before anything is written
    compare_data();
    compare_weights();
    if (first()) {
        open_folder();
        open_log(from != nullptr);
        write_options();
    }
    if (!from) return;
    if (validated_ && sampled_ && (due(options_.save_every) || step_ == options_.steps)) log_save();
    say("resumed " + from->path);
    warn_of_a_jump(*from);
}

// What the first rank says; without others what is said.
std::string Run::decided(const std::string& by_first) const {
    return comm_ ? comm_->control()->broadcast(by_first) : by_first;
}

void Run::enter(const char* phase) const {
    if (comm_) comm_->control()->enter(phase, step_);
}

void Run::log(const json& event) {
    if (log_) log_->write(event);
}

void Run::say(const std::string& line) {
    if (first()) progress_.say(line);
}

void Run::open_folder() {
    std::error_code error;
    fs::create_directories(options_.out, error);
    if (error) throw BadInput("--out " + options_.out + ": " + error.message() + "; choose another folder");
    if (lock_) return;
    lock_ = std::make_shared<RunLock>(options_.out, warn);
    // Another process may have begun since the options were looked at.
    if (holds_run(options_.out))
        throw BadInput("--out " + options_.out +
                       " holds a run that began just now: go on with it by --resume, or choose another folder");
}

// The log is a record and no state: what is whole of it goes on, and what is missing stays missing.
void Run::open_log(bool resumed) {
    const std::string path = options_.out + "/log.jsonl";
    const LogPart part = resumed ? log_until(options_.out, {step_, validated_, sampled_}) : LogPart();
    if (part.last_step < step_)
        warn(path + (part.bytes ? " ends at step " + std::to_string(part.last_step) : " is gone") +
             "; the run goes on from step " + std::to_string(step_) + " without a record of the steps before it");
    log_ = std::make_unique<RunLog>(path, part.bytes);
    if (part.bytes) return;
    const Planned& planned = options_.planned;
    log_->write({{"event", "plan"},
                 {"bytes", planned.bytes},
                 {"host_bytes", planned.host_bytes},
                 {"peak_phase", planned.peak_phase},
                 {"recompute", options_.recompute},
                 {"chunk", options_.chunk},
                 {"head_group", options_.head_group},
                 {"logits_rows", options_.logits_rows},
                 {"offload", options_.offload}});
}

void Run::write_options() const {
    write_file_whole(options_.out + "/options.toml", options_toml(as_given_, model_.family()));
}

// A schedule of another length, or of another kind, can be elsewhere at this step than the one that led here.
void Run::warn_of_a_jump(const Checkpoint& from) const {
    if (!first() || !from.meta.contains("lr") || step_ >= options_.steps) return;
    const double before = from.meta.at("lr"), peak = from.meta.at("peak_lr");
    const double after = learning_rate(schedule(), step_);
    // In parts of the peak: another --lr is no surprise. Between two steps of one schedule little changes after warmup.
    const double then = before / peak, now = learning_rate(schedule(), step_ - 1) / options_.lr;
    constexpr double kMuch = 1.5;
    if (std::max(then, now) <= kMuch * std::min(then, now)) return;
    char line[160];
    snprintf(line, sizeof line, "the learning rate goes from %.2e at step %lld to %.2e at the next", before,
             static_cast<long long>(step_), after);
    const bool decayed = options_.schedule == "wsd" && now > then;
    warn(std::string(line) + ", as the " + options_.schedule + " schedule of " + std::to_string(options_.steps) +
         " steps is elsewhere than the one that led here" +
         (decayed ? "; to go on without a jump, begin with a checkpoint from before the decay" : ""));
}

void Run::resume(const Checkpoint& from) {
    const json& meta = from.meta;
    if (meta.at("precision") != kPrecision)
        throw BadInput(from.path + ": from a " + meta.at("precision").get<std::string>() + " build, this one is " +
                       kPrecision + "; resume with the other, or start a new run with --init " + from.path);
    step_ = saved_ = from.step;
    remove_old_ = true;
    updates_ = meta.at("updates");
    skips_ = meta.at("skips");
    losses_.restore(meta.at("losses"));
    norms_.restore(meta.at("norms"));
    validated_ = meta.value("validated", true);
    sampled_ = meta.value("sampled", true);
    if (loader_ && meta.contains("loader")) loader_->restore(meta.at("loader")); // a run of no steps had no data
    std::optional<FileReader> file;
    if (first()) file.emplace(from.part("optimizer.bin"));
    if (comm_) file = share_reader(*comm_->control(), std::move(file));
    read_state(device_, *file, model_.tensors());
}

void Run::log_save() { log({{"event", "save"}, {"step", step_}, {"path", checkpoint_name(step_)}}); }

// What keeps a checkpoint of this moment from being healthy. One unusual step may be the data's; a second, or a loss
// that is no number, may be the weights'.
std::string Run::fault(const std::string& not_finite) const {
    if (!not_finite.empty()) return "its weights are not finite, those of " + not_finite + " first";
    if (val_loss_ && !std::isfinite(*val_loss_)) return "its validation loss is not finite";
    if (skips_ > 1 || (skips_ == 1 && !skipped_outlier_))
        return std::to_string(skips_) + " update" + (skips_ > 1 ? "s in a row were" : " was") + " skipped before it";
    return "";
}

void Run::save() {
    if (!unsaved()) {
        if (first() && lock_->in_place()) remove_leftovers(options_.out);
        return;
    }
    enter("save");
    compare_weights();
    if (first()) write_checkpoint();
    decided(""); // it is written
    saved_ = step_;
    logged_ = false;
    remove_old_ = true;
    if (skips_ || (val_loss_ && std::isfinite(*val_loss_))) remove_old();
}

// What this rank has of something that all must have alike goes to the first, which names who differs and in what.
void Run::compare(const json& own, const std::function<std::string(const json& theirs)>& difference) const {
    if (!comm_) return;
    const std::vector<std::string> all = comm_->control()->gather(own.dump());
    for (size_t rank = 1; rank < all.size(); rank++) // only rank 0 has them
        if (const json theirs = json::parse(all[rank]); theirs != own)
            throw RunFailed("rank " + std::to_string(rank) + " on " + comm_->control()->hellos()[rank].host + " has " +
                            difference(theirs));
    decided("");
}

// Shards by their names, sizes and hashes: each machine may have its own copies.
void Run::compare_data() const {
    if (!comm_) return;
    json own = {{"--train", loader_ ? loader_->state()["sources"] : json()},
                {"--val", validation_ ? validation_->shards() : json()}};
    compare(own, [&](const json& theirs) {
        for (const auto& [option, shards] : own.items())
            if (theirs.at(option) != shards) return "other shards for " + option + " than rank 0: copy them anew";
        return std::string();
    });
}

// All ranks start from the same weights and make the same updates, and so have the same to the bit.
void Run::compare_weights() const {
    if (!comm_) return;
    const json own = tensor_hashes(device_, model_.tensors());
    compare(own, [&](const json& theirs) {
        size_t i = 0;
        while (theirs.at(i) == own[i]) i++;
        return "other weights or optimizer states of " + model_.tensors().list[i].name + " than rank 0 at step " +
               std::to_string(step_) +
               (saved_ < 0 && !step_ ? ": give all the same --init and the same build"
                                     : ", after the same updates: look at its machine's memory and GPU; the last whole "
                                       "checkpoint is from before");
    });
}

void Run::write_checkpoint() {
    if (!lock_->in_place()) make_folder_again();
    log_->sync();
    json meta = {{"updates", updates_},
                 {"skips", skips_},
                 {"losses", losses_.state()},
                 {"norms", norms_.state()},
                 {"precision", kPrecision},
                 {"model", model_.describe()},
                 {"validated", validated_},
                 {"sampled", sampled_},
                 {"options", recorded_options(as_given_, model_.family())}};
    if (loader_) meta["loader"] = data_;
    if (step_) meta["lr"] = learning_rate(schedule(), step_ - 1), meta["peak_lr"] = options_.lr;
    Tensors& tensors = model_.tensors();
    std::string not_finite;
    std::vector<CheckpointPart> parts = {
        {"model.bin", model_.file_bytes(), [&](FileWriter& file) { not_finite = model_.write_file(file); }},
        {"optimizer.bin", state_bytes(tensors), [&](FileWriter& file) { write_state(device_, file, tensors); }}};
    save_checkpoint(options_.out, step_, parts, meta, 0, [&] { return fault_ = fault(not_finite); });
    log_save();
}

// While updates are skipped, what was saved since the last one is in doubt, and so is what that one made.
void Run::remove_old() {
    if (first()) remove_old_checkpoints(options_.out, saved_, options_.keep, skips_ ? step_ - skips_ : INT64_MAX);
    remove_old_ = false;
}

// Somebody removed or renamed the run's folder. The state is here and nowhere else, so it is saved where it was to be.
void Run::make_folder_again() {
    warn(options_.out + " was removed or renamed while the run was going; it is made again, with a new log");
    lock_.reset();
    try {
        open_folder();
    } catch (const BadInput& e) {
        throw RunFailed(e.what());
    }
    open_log(false);
    write_options();
}

// The weights of every checkpoint since the last update are those with which these updates were skipped.
void Run::give_up(const std::string& why) {
    const std::string said = std::to_string(skips_) + " updates in a row were skipped (" + why + ")";
    if (!first()) { // which says more
        decided("");
        throw RunFailed(said);
    }
    try {
        mark_checkpoints(options_.out, step_ - skips_, said + " after it");
    } catch (const Failure& e) {
        warn(e.what());
    }
    const std::optional<Checkpoint> healthy = newest_by_manifest(options_.out);
    throw RunFailed(said + ", the last at step " + std::to_string(step_) + "; " +
                    (healthy && healthy->fault.empty()
                         ? "the newest healthy checkpoint is " + checkpoint_name(healthy->step) +
                               ": go on from it with --resume and a lower --lr"
                         : "there is no healthy checkpoint: start again with a lower --lr and another --out"));
}

void Run::validate() {
    enter("validation");
    double loss = 0;
    or_save_first([&] { loss = validation_->mean_loss(model_, [&] { stop_if_asked(); }); });
    logged_ = true;
    val_loss_ = loss;
    log({{"event", "val"}, {"step", step_}, {"loss", loss}, {"tokens", tokens()}});
    char line[64];
    snprintf(line, sizeof line, "step %lld: val loss %.4f", static_cast<long long>(step_), loss);
    say(line);
}

void Run::sample() {
    enter("sample");
    struct Stopped {};
    std::string text, why;
    try {
        auto pause = [&] {
            pass_on_signals();
            if (why = reason_to_stop(); !why.empty()) throw Stopped();
        };
        if (first()) text = generate(options_, model_, *text_, step_, pause);
    } catch (const Stopped&) {
    }
    stop_if(decided(why));
    logged_ = true;
    log({{"event", "sample"}, {"step", step_}, {"text", text}});
    say("step " + std::to_string(step_) + " sample:\n" + text);
}

std::string Run::reason_to_stop() const {
    if (step_ >= options_.steps && validated_ && sampled_) return ""; // done
    const int own = stop_signal(), signal = own || !comm_ ? own : comm_->control()->stop_requested();
    if (signal) return std::string("signal ") + strsignal(signal);
    return options_.max_hours > 0 && steady_seconds() - began_ > options_.max_hours * 3600 ? "--max-hours" : "";
}

void Run::stop_if_asked() {
    pass_on_signals();
    if (comm_ && stop_signal()) comm_->control()->request_stop(stop_signal());
    stop_if(decided(first() ? reason_to_stop() : ""));
}

void Run::stop_if(const std::string& why) {
    if (why.empty()) return;
    save();
    log({{"event", "end"}, {"step", step_}, {"reason", why}});
    progress_.finish();
    throw Failure(kStopped, "stopped at step " + std::to_string(step_) + " (" + why + "); go on with: --out " +
                                options_.out + " --resume");
}

// What cannot be read ends the run, but not without a checkpoint of what it has learned.
void Run::or_save_first(const std::function<void()>& read) {
    try {
        read();
    } catch (const Failure& failure) {
        if (failure.exit_code == kStopped || step_ == 0 || !first()) throw;
        if (comm_) comm_->abandon(), comm_->control()->hold(true); // whoever has failed
        try {
            if (unsaved()) write_checkpoint();
            if (comm_) comm_->control()->hold(false);
        } catch (const std::exception& error) {
            throw Failure(failure.exit_code, std::string(failure.what()) + " (nor could step " + std::to_string(step_) +
                                                 " be saved: " + error.what() + ")");
        }
        throw;
    }
}

std::string Run::reason_to_skip(double loss, double norm, double& z) const {
    if (!std::isfinite(loss)) return "non-finite loss";
    if (!std::isfinite(norm)) return "non-finite gradient";
    z = std::max(losses_.score(loss), norms_.score(norm));
    if (options_.skip_z > 0 && z > options_.skip_z) return "outlier";
    return "";
}

void Run::one_step() {
    enter("training");
    double start = steady_seconds();
    int64_t B = options_.batch, T = options_.context, micro_steps = options_.tokens_per_step / (B * T);
    std::vector<int32_t> tokens(B * T), targets(B * T);
    model_.begin_step(step_);
    // Dealt in order. Where the ranks do not divide them, some compute in the last turn what weighs nothing.
    for (int64_t turn = 0; turn < micro_steps; turn += ranks_) {
        stop_if_asked();
        const int64_t left = std::min<int64_t>(ranks_, micro_steps - turn);
        or_save_first([&] {
            loader_->skip(std::min<int64_t>(rank_, left) * B);
            if (rank_ < left) loader_->next(tokens.data(), targets.data(), B);
            loader_->skip(std::max<int64_t>(left - rank_ - 1, 0) * B);
        });
        model_.accumulate(tokens.data(), targets.data(), B, rank_ < left ? 1.0 / options_.tokens_per_step : 0,
                          turn + ranks_ >= micro_steps);
    }
    model_.measure_gradients(options_.clip);
    double loss = model_.loss(), norm = model_.grad_norm(), z = 0;
    double lr = learning_rate(schedule(), step_);
    const std::string skip = decided(reason_to_skip(loss, norm, z));
    step_++;
    data_["drawn"] = loader_->drawn(); // the rest lists all shards
    validated_ = sampled_ = false;
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
        if (remove_old_) remove_old(); // a finite loss has proven what was saved last
        val_loss_.reset();
        OptimizerCounts counts = model_.counts(); // waits for the update
        double took = steady_seconds() - start;
        double flops = model_.step_cost(B).flops * micro_steps / ranks_;
        double rate = options_.tokens_per_step / took, percent = peak_percent(device_, flops / took);
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
        log(event);
        if (first())
            progress_.step(
                {step_, options_.steps, loss, lr, norm, rate, percent, took * double(options_.steps - step_)});
    } else {
        skips_++;
        skipped_outlier_ = skip == "outlier";
        log({{"event", "skip"},
             {"step", step_},
             {"reason", skip},
             {"loss", loss},
             {"grad_norm", norm},
             {"z", z},
             {"non_finite", std::isfinite(norm) ? 0 : model_.non_finite_gradients()}});
        say("step " + std::to_string(step_) + ": update skipped, " + skip);
        if (skips_ >= options_.max_skips) give_up(skip);
    }
}

// What is due at this position. A stop in the middle leaves the rest to the resumed run.
void Run::finish_step() {
    const bool first_or_last = step_ == 0 ? options_.steps > 0 : step_ == options_.steps;
    if (!validated_ && validation_ && options_.val_every > 0 && (due(options_.val_every) || first_or_last)) validate();
    validated_ = true;
    if (!sampled_ && due(options_.sample_every)) sample();
    sampled_ = true;
    if (due(options_.save_every)) save();
    stop_if_asked();
}

void Run::steps() {
    save_when_stopped();
    if (loader_) data_ = loader_->state();
    finish_step();
    while (step_ < options_.steps) {
        one_step();
        finish_step();
    }
    save();
    log({{"event", "end"}, {"step", step_}, {"reason", "done"}});
    progress_.finish();
    char memory[32];
    snprintf(memory, sizeof memory, "%.2f GiB", double(peak_resident_bytes()) / (1 << 30));
    say("done: " + std::to_string(step_) + " steps, " + format_duration(steady_seconds() - began_) + ", peak memory " +
        memory + ", checkpoint " + options_.out + "/" + checkpoint_name(step_));
    if (first() && !fault_.empty()) warn(checkpoint_name(step_) + " is not healthy: " + fault_);
}
