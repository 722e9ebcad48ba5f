// The memory plan: what a run needs where, whether it fits, how long a step would take, and the choice of what the user
// left open.
//
// A plan is the model's own layout (arena.h) for a target, so a run's bytes equal it. Chosen is among all of
//   --recompute none, block, full;  --chunk all tokens, then powers of two down to 1024;
//   --head-group all heads, half of them, … one;  --offload nothing or any of residual, state, master
// what fits and takes the least time by the model's costs and a machine's ceilings; of what takes nearly the same time,
// the simplest: nothing on the host before anything, everything kept before recomputing, one piece before many. Host
// memory, or a disk, is taken only where that saves a tenth of the time. What room is left on a GPU goes to more rows
// of logits at a time.
#pragma once
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "../model/transformer.h"
#include "../options/options.h"

// The model that options describe, on a device that may be a Device(target): then it is a plan.
using MakeModel = std::function<std::unique_ptr<Transformer>(const Device&, const Options&)>;

// What options plan for: with --plan and --gpu or --memory a cuda build, --plan-for as it says, else this build.
Target plan_target(const Options& options);

// Fills in what `options` leaves open of --recompute, --chunk, --head-group, --logits-rows and --offload, and
// options.planned. With --plan or --plan-json prints the plan and returns true: there is nothing more to do. Throws
// Failure(kPlanDoesNotFit) where nothing fits, which names the largest context that would. Evaluation keeps
// nothing, and leaves chunks and head groups to choose.
bool plan_memory(Options& options, const MakeModel& make);

// How fast things go, and how much of it a step is assumed to get.
struct Machine {
    std::string name;
    double flops, bandwidth, copies; // a second; bytes a second of memory, and between device and host
    double matmul, attention, other; // parts of flops, flops, bandwidth
};

// Bytes, of the device and of the host. A limit of 0 is none; overhead is what lies beside the arena and the host
// store.
struct Limits {
    int64_t device, host, device_overhead, host_overhead;
};

// A way to lay out a run.
struct Choice {
    Options options;          // nothing left open
    int64_t arena, host;      // bytes of the arena and of the host store
    int64_t lacking;          // bytes over the limits; 0: it fits
    double seconds;           // of a step
    double compute, transfer; // parts of it that overlap: what the device works, and what copies to the host take
    double update;            // of the seconds
    double useful;            // FLOPs of the mathematics, without recomputation
};

// The largest context for which there is a way to lay it out that fits; 0: none.
struct Longest {
    int64_t context = 0;
    int64_t host = 0;               // bytes of the host's memory that it needs
    std::string recompute, offload; // how
};

class Planner {
public:
    // Throws BadInput for options that describe no model.
    Planner(const Options& options, const MakeModel& make);

    Choice choose() const; // the best that fits, else what lacks least
    Choice weigh(const Options& chosen) const;
    Options simplest() const {
        return candidates(options_.context, false).front();
    }                        // of all ways, whether it fits or not
    Longest longest() const; // to within half a percent
    std::unique_ptr<Transformer> model(const Options& chosen) const { return make_(device_, chosen); }

    const Target& target() const { return device_.target; }
    const Options& options() const { return options_; }
    const Limits& limits() const { return limits_; }
    const Machine& machine() const { return machine_; }
    void set_machine(const Machine& machine) { machine_ = machine; }

private:
    Options options_; // with the context and the vocabulary resolved
    const MakeModel& make_;
    const Device device_;
    Limits limits_;
    Machine machine_;
    int64_t heads_;

    std::vector<Options> candidates(int64_t T, bool extremes) const;
    Choice with_more_logits(const Choice& best) const; // as many as fit beside all else
    std::optional<Choice> leanest(int64_t T) const;    // that fits, with the host only if it must
};

// --plan and --plan-json, on stdout (plan_report.cpp). `best` need not fit.
void print_plan(const Planner& planner, const Choice& best, const Longest& longest);
std::string plan_json(const Planner& planner, const Choice& best, const Longest& longest);
const char* peak_phase(const Arena& arena);
std::string gib(double bytes); // "12.34 GiB", or MiB where that says more
