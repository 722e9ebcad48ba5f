#include "plan.h"

#include <algorithm>
#include <cmath>
#include <cstdio>

#include "../../kernels/matmul.h"
#include "../base/errors.h"
#include "../device/host_memory.h"
#include "../options/gpus.h"

// Beside the arena and cuBLASLt's work space a GPU holds the CUDA context with its kernels, the step's graph and what
// the driver keeps. Uploads go through pinned memory (device_cuda.cpp).
constexpr int64_t kContextBytes = int64_t(1) << 30, kStagingBytes = 2 << 20;

// Beside the arena the cpu build has resident: the program with its libraries (14 MiB), oneDNN's kernels, made for each
// shape of a product, and what they pack their operands in, the pieces that weights and checkpoints pass through, and
// the threads' stacks and tiles. Measured of runs of 200 MiB to 2.6 GiB on two threads: 32 to 39 MiB in all; runs of a
// few MiB have half of it.
constexpr int64_t kProgramBytes = int64_t(32) << 20, kThreadBytes = 2 << 20;

// A chunk smaller than this leaves no matmul its rate, and what it would save is small beside the residual stream.
constexpr int64_t kSmallestChunk = 1024;
// On a GPU every part of the logits adds the unembedding's whole gradient in memory once more; beyond so many tokens
// that is small beside the product itself. On a CPU the product takes a hundred times as long, and caches like few
// rows.
constexpr int64_t kMostLogitsRows = 4096;
// Estimates are not better than this: within it the simpler choice wins.
constexpr double kSameTime = 1.01;
// Pinned host memory, or a disk, is taken of others: only where that saves a tenth of the time.
constexpr double kHostPrice = 1.1;

Target plan_target(const Options& options) {
    Target target = this_target();
    if (options.threads > 0) target.threads = options.threads;
    if (!options.plan && !options.plan_json) return target;
    const bool wants_gpu = !options.gpu.empty() || !options.memory.empty();
    const bool cuda = options.plan_for.empty() ? wants_gpu || target.cuda : options.plan_for == "cuda";
    if (cuda && !target.cuda) target.real_bytes = 2;
    if (!cuda && target.cuda) target.real_bytes = sizeof(real);
    target.cuda = cuda;
    return target;
}

static Machine plan_machine(const Options& options, const Target& target) {
    if (target.cuda) {
        const Gpu* gpu = find_gpu(options.gpu.empty() ? "a100-40" : options.gpu.c_str());
        return {gpu->title, gpu->flops, gpu->bandwidth, gpu->copies, gpu->matmul, gpu->attention, 0.85};
    }
    // Of a thread: oneDNN on AVX-512, twice that with bf16 products; what such machines copy, two channels of memory; a
    // disk that writes back behind the page cache. Attention comes to half of the matmul rate (dev/LOG.md).
    const double rate = 150e9 * (target.real_bytes == 2 ? 2 : 1);
    return {"CPU", rate * double(target.threads), 20e9, 0.5e9, 0.80, 0.45, 0.60};
}

static Limits plan_limits(const Options& options, const Target& target) {
    Limits limits{};
    const Gpu* gpu = find_gpu(options.gpu.c_str());
    const size_t workspace = gpu ? matmul_workspace(target, gpu->capability) : matmul_workspace(target);
    limits.device_overhead =
        static_cast<int64_t>(workspace) + (target.cuda ? kContextBytes : kProgramBytes + target.threads * kThreadBytes);
    limits.host_overhead = target.cuda ? kStagingBytes : 0;
    if (!options.host_memory.empty()) limits.host = parse_size(options.host_memory, "--host-memory");
    if (!options.memory.empty())
        limits.device = parse_size(options.memory, "--memory");
    else if (gpu)
        limits.device = static_cast<int64_t>(gpu->memory);
    else if (target.cuda == this_target().cuda) { // this machine
        limits.device = static_cast<int64_t>(available_bytes(target.threads)) / (target.cuda ? 1 : options.ranks_here);
        if (target.cuda && !limits.host)
            limits.host = static_cast<int64_t>(host_available_bytes(target.threads)) / options.ranks_here;
    }
    return limits;
}

Planner::Planner(const Options& options, const MakeModel& make)
    : options_(options), make_(make), device_(plan_target(options)), limits_(plan_limits(options, device_.target)),
      machine_(plan_machine(options, device_.target)) {
    Options any = options_; // way to lay it out that goes with all else
    if (any.recompute.empty()) any.recompute = "block";
    const std::unique_ptr<Transformer> model = make_(device_, any);
    heads_ = model->heads();
    options_.context = model->context();
    if (!options_.model.empty()) options_.vocab = model->vocab(); // else each model would read the tokenizer again
}

// All ways that the user leaves open, the simplest first; with `extremes` those alone that take least memory, one for
// each way to recompute and to offload.
std::vector<Options> Planner::candidates(int64_t T, bool extremes) const {
    const int64_t N = options_.batch * T;
    std::vector<int64_t> chunks = {N}, groups = {heads_};
    int64_t power = kSmallestChunk;
    while (2 * power < N) power *= 2;
    for (; power >= kSmallestChunk && power < N; power /= 2) chunks.push_back(power);
    while (groups.back() > 1) groups.push_back(groups.back() / 2);
    if (extremes) chunks = {chunks.back()}, groups = {groups.back()};
    if (options_.chunk) chunks = {std::min(options_.chunk, N)};
    if (options_.head_group) groups = {std::min(options_.head_group, heads_)};
    std::vector<std::string> ways = {"none", "block", "full"}, offloads = {"none", "residual", "state"};
    if (options_.master == "fp32" && target().real_bytes < int64_t(sizeof(float)))
        for (const char* more :
             {"master", "residual,state", "residual,master", "state,master", "residual,state,master"})
            offloads.push_back(more);
    else
        offloads.push_back("residual,state");
    if (!options_.recompute.empty()) ways = {options_.recompute};
    if (!options_.offload.empty()) offloads = {options_.offload};
    const bool training = options_.eval.empty();
    if (!training) ways = {"none"}, offloads = {"none"}; // of nothing that is kept

    std::vector<Options> all;
    Options o = options_;
    o.context = T;
    if (!o.logits_rows) o.logits_rows = ActivationMemory::kLogitsRows;
    for (const std::string& offload : offloads)
        for (const std::string& recompute : ways)
            for (int64_t group : groups)
                for (int64_t chunk : chunks) {
                    o.offload = offload, o.recompute = recompute, o.chunk = chunk;
                    const bool keeps_all = training && recompute == "none";
                    o.head_group = keeps_all ? 0 : group;
                    if (keeps_all && (waits_on_host(o, "residual") || options_.head_group)) continue;
                    if (keeps_all && group != groups[0]) continue;
                    all.push_back(o);
                }
    return all;
}

Choice Planner::weigh(const Options& chosen) const {
    const std::unique_ptr<Transformer> model = this->model(chosen);
    Choice choice{};
    choice.options = chosen;
    choice.arena = static_cast<int64_t>(model->arena().bytes());
    choice.host = static_cast<int64_t>(model->host_bytes());
    auto over = [](int64_t bytes, int64_t limit) { return limit ? std::max<int64_t>(bytes - limit, 0) : 0; };
    choice.lacking = over(choice.arena + limits_.device_overhead, limits_.device) +
                     over(choice.host + limits_.host_overhead, limits_.host);

    const Machine& m = machine_;
    // The layers' costs are of this build's type. Statistics, losses and weight gradients, which are float in all
    // builds, are scaled with the activations here, some percent of the bytes of a layer.
    const double scale = double(target().real_bytes) / sizeof(real), bandwidth = m.bandwidth * m.other;
    const Work work = model->work(chosen.batch), update = update_work(model->tensors());
    auto limited = [&](const Cost& cost, double part) {
        return std::max(cost.flops / (m.flops * part), cost.bytes() * scale / bandwidth);
    };
    const double N = double(chosen.batch) * double(model->context());
    const double micro_batches = chosen.tokens_per_step ? double(chosen.tokens_per_step) / N : 1;
    choice.compute = micro_batches * (limited(work.matmul, m.matmul) + limited(work.attention, m.attention) +
                                      work.other.bytes() * scale / bandwidth);
    choice.transfer = micro_batches * work.copied / m.copies;
    choice.update = std::max(update.other.bytes() / bandwidth, update.copied / m.copies);
    choice.seconds = std::max(choice.compute, choice.transfer) + choice.update;
    choice.useful = micro_batches * model->step_cost(chosen.batch).flops;
    return choice;
}

Choice Planner::choose() const {
    std::vector<Choice> fitting;
    Choice nearest{};
    nearest.lacking = -1;
    for (const Options& candidate : candidates(options_.context, false)) {
        const Choice choice = weigh(candidate);
        if (!choice.lacking)
            fitting.push_back(choice);
        else if (nearest.lacking < 0 || choice.lacking < nearest.lacking)
            nearest = choice;
    }
    if (fitting.empty()) return nearest;
    auto seconds = [](const Choice& choice) { return choice.seconds * (choice.host ? kHostPrice : 1); };
    double least = INFINITY;
    for (const Choice& choice : fitting) least = std::min(least, seconds(choice));
    return with_more_logits(*std::find_if(fitting.begin(), fitting.end(),
                                          [&](const Choice& choice) { return seconds(choice) <= kSameTime * least; }));
}

Choice Planner::with_more_logits(const Choice& best) const {
    if (options_.logits_rows || !target().cuda || !options_.eval.empty()) return best;
    Options o = best.options;
    for (o.logits_rows = kMostLogitsRows; o.logits_rows > best.options.logits_rows; o.logits_rows /= 2)
        if (o.logits_rows <= o.chunk)
            if (const Choice more = weigh(o); !more.lacking) return more;
    return best;
}

std::optional<Choice> Planner::leanest(int64_t T) const {
    try {
        for (const Options& candidate : candidates(T, true))
            if (const Choice choice = weigh(candidate); !choice.lacking) return choice;
    } catch (const BadInput&) { // the model itself cannot be so long
    }
    return std::nullopt;
}

Longest Planner::longest() const {
    constexpr int64_t kLongest = 0x7fffffff;
    Longest found;
    auto fits = [&](int64_t T) {
        const std::optional<Choice> choice = leanest(T);
        if (choice)
            found = {T, choice->host ? choice->host + limits_.host_overhead : 0, choice->options.recompute,
                     choice->options.offload};
        return choice.has_value();
    };
    int64_t high = std::max<int64_t>(options_.context, 1);
    while (high <= kLongest && fits(high)) high *= 2;
    while (!found.context && high > 1)
        if (fits(high / 2))
            break;
        else
            high /= 2;
    if (!found.context) return found;
    int64_t unit = 1, low = found.context;
    while (512 * unit < high) unit *= 2;
    low = low / unit * unit, high = high / unit * unit;
    while (high - low > unit) {
        const int64_t middle = (low + high) / 2 / unit * unit;
        (fits(middle) ? low : high) = middle;
    }
    return found;
}

// What a user reads when it does not fit, in one line.
static std::string refusal(const Planner& planner, const Choice& best, const Longest& longest) {
    const Limits& limits = planner.limits();
    const std::unique_ptr<Transformer> model = planner.model(best.options);
    const int64_t device = best.arena + limits.device_overhead, host = best.host + limits.host_overhead;
    const bool device_lacks = limits.device && device > limits.device;
    std::string line = "context " + std::to_string(planner.options().context) + " does not fit: ";
    if (device_lacks)
        line += std::string("the ") + peak_phase(model->arena()) + " phase needs " + gib(double(device)) + ", " +
                gib(double(device - limits.device)) + " more than the " + gib(double(limits.device)) + " there are";
    else
        line += "what is offloaded takes " + gib(double(host)) + ", " + gib(double(host - limits.host)) +
                " more than " + (planner.options().host_memory.empty() ? "is available there" : "--host-memory");
    return line + "; " +
           (longest.context ? "the largest context that fits is " + std::to_string(longest.context)
                            : std::string("no context fits: what does not grow with it is too large already")) +
           (longest.host ? ", with --offload " + longest.offload + " and " + gib(double(longest.host)) +
                               (planner.target().cuda ? " of host memory" : " of disk")
                         : "");
}

// For a run that is not as simple as it could be.
static std::string note(const Planner& planner, const Choice& chosen) {
    const Options& o = chosen.options;
    Options simplest = planner.simplest();
    simplest.logits_rows = o.logits_rows;
    if (o == simplest) return "";
    std::string line = "memory: chosen are --recompute " + o.recompute + " --chunk " + std::to_string(o.chunk);
    if (o.head_group) line += " --head-group " + std::to_string(o.head_group);
    if (o.logits_rows != ActivationMemory::kLogitsRows) line += " --logits-rows " + std::to_string(o.logits_rows);
    line += " --offload " + o.offload + ", " + gib(double(chosen.arena + planner.limits().device_overhead));
    const int64_t device = planner.weigh(simplest).arena + planner.limits().device_overhead;
    if (planner.limits().device && device > planner.limits().device)
        line +=
            std::string("; with ") +
            (simplest.recompute == "none" ? "everything kept" : "--recompute " + simplest.recompute + " in one piece") +
            " it would be " + gib(double(device)) + " of the " + gib(double(planner.limits().device)) + " there are";
    return line;
}

// `options` have their context.
static void check_batches(const Options& options) {
    const int64_t micro = options.batch * options.context;
    if (options.eval.empty() && options.tokens_per_step % micro)
        throw BadInput("--tokens-per-step " + std::to_string(options.tokens_per_step) +
                       " is not a multiple of batch x context, " + std::to_string(micro));
}

bool plan_memory(Options& options, const MakeModel& make) {
    Planner planner(options, make);
    check_batches(planner.options());
    Choice best = planner.choose();
    const bool report = options.plan || options.plan_json;
    if (report && !best.lacking && !planner.target().cuda && device_is_host() &&
        planner.target().real_bytes == sizeof(real)) {
        // The choice is a run's, which is made before anything is measured; the estimate may be better.
        const Device device(options.threads);
        Machine machine = planner.machine();
        machine.name = "this CPU, measured", machine.flops = device.peak_flops;
        planner.set_machine(machine);
        best = planner.weigh(best.options);
    }
    const Longest longest = report || best.lacking ? planner.longest() : Longest{};
    const std::string note =
        best.lacking ? "" : ::note(planner, best); // before the report: what a run says, a plan can
    if (report) print_plan(planner, best, longest);
    if (best.lacking) throw Failure(kPlanDoesNotFit, refusal(planner, best, longest));
    if (report) return true;
    options.recompute = best.options.recompute, options.offload = best.options.offload;
    options.chunk = best.options.chunk, options.head_group = best.options.head_group;
    options.logits_rows = best.options.logits_rows;
    options.planned = {best.arena + planner.limits().device_overhead, best.host + planner.limits().host_overhead,
                       peak_phase(planner.model(best.options)->arena()), note};
    return false;
}
