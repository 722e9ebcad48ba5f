// A training run: the steps and their habits (validation, samples, checkpoints, skipped updates, stopping).
#pragma once
#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "../device/device.h"
#include "../files/checkpoint.h"
#include "../files/log.h"
#include "../files/run_folder.h"
#include "../files/shards.h"
#include "../model/model.h"
#include "../options/options.h"
#include "../ranks/comm.h"
#include "evaluation.h"
#include "loop.h"
#include "outliers.h"
#include "schedule.h"

// One run: its position, which a checkpoint holds, and what the habits need. Every rank has one; the first alone reads
// and writes --out, draws samples, prints, and decides what depends on clocks, files or signals.
class Run {
public:
    Run(Options& options, const Device& device, Model& model, const Start& start);
    void steps();

private:
    Options& options_;
    const Device& device_;
    Comm* const comm_; // null for one rank
    const int rank_, ranks_;
    Model& model_;
    std::optional<Text> text_;
    Options as_given_; // the run's, with what is left open of its schedule left so
    std::shared_ptr<RunLock> lock_;
    std::unique_ptr<Loader> loader_;
    std::unique_ptr<Validation> validation_;
    std::unique_ptr<RunLog> log_; // of the first rank, as text_ and lock_ are
    Progress progress_;
    double began_;

    // The position.
    int64_t step_ = 0, updates_ = 0, skips_ = 0, saved_ = -1;
    OutlierWindow losses_, norms_;
    nlohmann::json data_;                      // the loader's, before the step that may have begun
    bool validated_ = false, sampled_ = false; // if due at this step
    bool logged_ = false;                      // validated or sampled since the checkpoint of this step

    bool skipped_outlier_ = false;   // the last of skips_ had a loss and a norm, if unusual ones
    bool remove_old_ = false;        // old checkpoints stay until a finite loss proves the one just saved
    std::optional<double> val_loss_; // of these weights
    std::string fault_;              // of the checkpoint saved last

    bool first() const { return rank_ == 0; }
    std::string decided(const std::string& by_first) const;
    void log(const nlohmann::json& event);
    void enter(const char* phase) const; // for those who wait for this rank
    void say(const std::string& line);
    bool unsaved() const { return saved_ != step_ || logged_; }
    bool due(int64_t every) const { return every > 0 && step_ > 0 && step_ % every == 0; }
    void resume(const Checkpoint& from);
    void open_folder();
    void open_log(bool resumed);
    void write_options() const;
    void warn_of_a_jump(const Checkpoint& from) const;
    void one_step();
    void finish_step();
    std::string reason_to_skip(double loss, double norm, double& z) const;
    void validate();
    void sample();
    void save();
    void compare(const nlohmann::json& own,
                 const std::function<std::string(const nlohmann::json& theirs)>& difference) const;
    void compare_data() const;
    void compare_weights() const;
    void write_checkpoint();
    void remove_old();
    void make_folder_again();
    std::string fault(const std::string& not_finite) const;
    [[noreturn]] void give_up(const std::string& why);
    void log_save();
    std::string reason_to_stop() const;
    void stop_if_asked();
    void stop_if(const std::string& why); // there is one
    void or_save_first(const std::function<void()>& read);
    int64_t tokens() const { return step_ * options_.tokens_per_step; }
    Schedule schedule() const {
        return {options_.schedule, options_.lr,     options_.final_lr,
                options_.steps,    options_.warmup, options_.decay_steps};
    }
};
