// What --plan and --plan-json print: both are made from one JSON object.
#include "plan.h"

#include <algorithm>
#include <cstdio>
#include <map>

#include <nlohmann/json.hpp>

using nlohmann::ordered_json;

std::string gib(double bytes) {
    char text[32];
    if (bytes < 0.1 * (1 << 30))
        snprintf(text, sizeof text, "%.1f MiB", bytes / (1 << 20));
    else
        snprintf(text, sizeof text, "%.2f GiB", bytes / (1 << 30));
    return text;
}

const char* peak_phase(const Arena& arena) {
    Phases peak = kForward;
    for (Phases phase : kEachPhase)
        if (arena.bytes_in(phase) > arena.bytes_in(peak)) peak = phase;
    return phase_name(peak);
}

namespace {

// Sections that are not the phases' work space, in the order of a table.
constexpr const char* kSections[] = {"parameters",   "gradients",           "master weights",  "optimizer states",
                                     "layer inputs", "attention O and LSE", "kept activations"};
constexpr const char* kWorkSpace = "work space";

int64_t section_bytes(const Arena& arena, const std::string& section) {
    int64_t sum = 0;
    for (const Arena::Item& item : arena.items())
        if (item.section == section) sum += item.bytes;
    return sum;
}

// Largest first, items of one name together.
ordered_json largest_work(const Arena& arena, Phases phase) {
    std::map<std::string, int64_t> by_name;
    for (const Arena::Item& item : arena.items())
        if (item.section == kWorkSpace && item.phases & phase) by_name[item.name] += item.bytes;
    std::vector<std::pair<std::string, int64_t>> items(by_name.begin(), by_name.end());
    std::stable_sort(items.begin(), items.end(), [](auto& a, auto& b) { return a.second > b.second; });
    ordered_json list = ordered_json::array();
    for (size_t i = 0; i < std::min<size_t>(items.size(), 3); i++)
        list.push_back({{"name", items[i].first}, {"bytes", items[i].second}});
    return list;
}

ordered_json phases_of(const Arena& arena) {
    int64_t kept = 0; // in all phases
    for (const char* section : kSections) kept += section_bytes(arena, section);
    ordered_json list = ordered_json::array();
    for (Phases phase : kEachPhase) {
        const int64_t bytes = static_cast<int64_t>(arena.bytes_in(phase));
        list.push_back({{"name", phase_name(phase)},
                        {"work_space", bytes - kept},
                        {"bytes", bytes},
                        {"largest", largest_work(arena, phase)}});
    }
    return list;
}

// What the device would need less by a word of the user's.
ordered_json savings(const Planner& planner, const Choice& best) {
    ordered_json list = ordered_json::array();
    auto add = [&](const char* word, std::string Options::*member, const char* value) {
        Options other = best.options;
        if (other.*member == value) return;
        other.*member = value;
        const Choice saved = planner.weigh(other);
        if (saved.arena + saved.host < best.arena + best.host)
            list.push_back(
                {{"option", word}, {"bytes", best.arena - saved.arena}, {"host_bytes", best.host - saved.host}});
    };
    add("--state int8", &Options::state, "int8");
    add("--master none", &Options::master, "none");
    add("--grad bf16", &Options::grad, "bf16");
    return list;
}

ordered_json device_rows(Transformer& model, const Planner& planner, const Choice& best) {
    const Arena& arena = model.arena();
    ordered_json rows;
    int64_t work = best.arena;
    for (const char* section : kSections) {
        const int64_t bytes = section_bytes(arena, section);
        std::string key = section;
        std::replace(key.begin(), key.end(), ' ', '_');
        rows[key] = bytes;
        work -= bytes;
    }
    rows["work_space"] = work;
    rows["communication"] = 0; // one rank
    rows["overhead"] = planner.limits().device_overhead;
    rows["total"] = best.arena + planner.limits().device_overhead;
    return rows;
}

ordered_json host_rows(Transformer& model, const Planner& planner, const Choice& best) {
    const Tensors& tensors = model.tensors();
    return {{"residual", best.host - int64_t(tensors.host_bytes())},
            {"optimizer_states", tensors.host_states_bytes},
            {"master_weights", tensors.host_masters_bytes},
            {"overhead", planner.limits().host_overhead},
            {"total", best.host + planner.limits().host_overhead}};
}

ordered_json report(const Planner& planner, const Choice& best, const Longest& longest) {
    const std::unique_ptr<Transformer> model = planner.model(best.options);
    const Options& o = best.options;
    const Machine& m = planner.machine();
    const Limits& limits = planner.limits();
    const int64_t N = o.batch * model->context();
    const int64_t tokens = o.tokens_per_step ? o.tokens_per_step : N;
    const Target& target = planner.target();
    ordered_json all;
    all["model"] = model->describe();
    all["build"] = std::string(target.cuda ? "cuda " : "cpu ") + (target.real_bytes == 2 ? "bf16" : "fp32");
    all["parameters"] = model->tensors().count();
    all["context"] = model->context(), all["batch"] = o.batch, all["tokens_per_step"] = tokens, all["ranks"] = 1;
    all["options"] = {{"recompute", o.recompute},
                      {"chunk", o.chunk},
                      {"head_group", o.head_group ? o.head_group : model->heads()},
                      {"logits_rows", o.logits_rows},
                      {"offload", o.offload},
                      {"optimizer", o.optimizer},
                      {"state", o.state},
                      {"master", o.master},
                      {"grad", o.grad}};
    all["device"] = device_rows(*model, planner, best);
    all["phases"] = phases_of(model->arena());
    all["peak_phase"] = peak_phase(model->arena());
    all["host"] = host_rows(*model, planner, best);
    all["memory"] = limits.device, all["host_memory"] = limits.host;
    all["savings"] = savings(planner, best);
    all["time"] = {{"machine", m.name},
                   {"flops", m.flops},
                   {"bandwidth", m.bandwidth},
                   {"copies", m.copies},
                   {"assumed_matmul", m.matmul},
                   {"assumed_attention", m.attention},
                   {"assumed_bandwidth", m.other},
                   {"compute", best.compute},
                   {"transfer", best.transfer},
                   {"update", best.update},
                   {"step", best.seconds},
                   {"tokens_per_second", double(tokens) / best.seconds},
                   {"peak_percent", 100 * best.useful / best.seconds / m.flops}};
    all["lacking"] = best.lacking;
    all["fits"] = best.lacking == 0;
    all["largest_context"] = longest.context, all["largest_context_host"] = longest.host;
    all["largest_context_options"] = {{"recompute", longest.recompute}, {"offload", longest.offload}};
    return all;
}

constexpr size_t kColumns = 100;

// `more` is cut at the last comma that leaves it within the width.
void row(const std::string& name, double bytes, std::string more = "") {
    constexpr size_t kTaken = 2 + 26 + 1 + 10 + 3;
    while (kTaken + more.size() > kColumns && more.rfind(',') != std::string::npos) more.resize(more.rfind(','));
    printf("  %-26s %10s%s%s\n", name.c_str(), gib(bytes).c_str(), more.empty() ? "" : "   ", more.c_str());
}

std::string words(std::string key) {
    std::replace(key.begin(), key.end(), '_', ' ');
    return key;
}

std::string duration(double seconds) {
    char text[32];
    snprintf(text, sizeof text,
             seconds < 1     ? "%.0f ms"
             : seconds < 100 ? "%.1f s"
                             : "%.0f s",
             seconds < 1 ? 1e3 * seconds : seconds);
    return text;
}

void print_table(const ordered_json& all, const Limits& limits) {
    auto text = [](const ordered_json& value) { return value.get<std::string>(); };
    const ordered_json &o = all["options"], &time = all["time"];
    printf("%s\n%s, batch %lld, %lld tokens a step, one rank\n", text(all["model"]).c_str(), text(all["build"]).c_str(),
           all["batch"].get<long long>(), all["tokens_per_step"].get<long long>());
    printf("--recompute %s --chunk %lld --head-group %lld --logits-rows %lld --offload %s\n",
           text(o["recompute"]).c_str(), o["chunk"].get<long long>(), o["head_group"].get<long long>(),
           o["logits_rows"].get<long long>(), text(o["offload"]).c_str());
    printf("--optimizer %s --state %s --master %s --grad %s\n\n", text(o["optimizer"]).c_str(),
           text(o["state"]).c_str(), text(o["master"]).c_str(), text(o["grad"]).c_str());

    printf("device\n");
    for (const auto& [key, bytes] : all["device"].items()) {
        if (key == "overhead")
            row(key, bytes,
                all["build"].get<std::string>()[1] == 'u' ? "CUDA context, kernels, graph, cuBLASLt"
                                                          : "program, libraries, threads");
        else if (key == "total")
            row(key, bytes, limits.device ? "of " + gib(double(limits.device)) : "");
        else if (bytes != 0 || key == "communication")
            row(words(key), bytes);
    }
    printf("work space by phase; the peak is the %s\n", text(all["peak_phase"]).c_str());
    for (const ordered_json& phase : all["phases"]) {
        std::string items;
        for (const ordered_json& item : phase["largest"])
            items += (items.empty() ? "" : ", ") + text(item["name"]) + " " + gib(item["bytes"]);
        for (size_t at; (at = items.find(" GiB")) != std::string::npos;) items.erase(at, 4);
        row(phase["name"], phase["work_space"], items);
    }
    printf("host\n");
    for (const auto& [key, bytes] : all["host"].items())
        if (key == "overhead" && bytes != 0)
            row(key, bytes, "pinned, for uploads");
        else if (key == "total")
            row(key, bytes, limits.host ? "of " + gib(double(limits.host)) : "");
        else if (bytes != 0)
            row(words(key), bytes);
    if (!all["savings"].empty()) printf("could save more, at less precision\n");
    for (const ordered_json& saving : all["savings"])
        row(saving["option"], saving["bytes"],
            saving["host_bytes"] != 0 ? "and " + gib(saving["host_bytes"]) + " of the host's" : "");

    printf("step, estimated: %s = %s of work", duration(time["step"]).c_str(), duration(time["compute"]).c_str());
    if (time["transfer"] > 0) printf(" beside %s of copies", duration(time["transfer"]).c_str());
    printf(" + %s of update; %.0f tokens/s, %.0f%% of peak\n", duration(time["update"]).c_str(),
           time["tokens_per_second"].get<double>(), time["peak_percent"].get<double>());
    printf("assumed of %s: matmul %.0f%%, attention %.0f%% of %.3g TFLOP/s; %.0f%% of %.0f GB/s; copies %.1f GB/s\n",
           text(time["machine"]).c_str(), 100 * time["assumed_matmul"].get<double>(),
           100 * time["assumed_attention"].get<double>(), time["flops"].get<double>() / 1e12,
           100 * time["assumed_bandwidth"].get<double>(), time["bandwidth"].get<double>() / 1e9,
           time["copies"].get<double>() / 1e9);
    printf("largest context that fits: %lld\n", all["largest_context"].get<long long>());
    if (all["largest_context_host"] != 0)
        printf("  with --recompute %s --offload %s and %s of %s\n",
               text(all["largest_context_options"]["recompute"]).c_str(),
               text(all["largest_context_options"]["offload"]).c_str(), gib(all["largest_context_host"]).c_str(),
               all["build"].get<std::string>()[1] == 'u' ? "host memory" : "disk");
    if (all["fits"])
        printf("fits: yes\n");
    else
        printf("fits: no, %s lack in the %s\n", gib(all["lacking"]).c_str(),
               limits.device && all["device"]["total"] > limits.device ? text(all["peak_phase"]).c_str() : "host");
}

} // namespace

std::string plan_json(const Planner& planner, const Choice& best, const Longest& longest) {
    return report(planner, best, longest).dump(2);
}

void print_plan(const Planner& planner, const Choice& best, const Longest& longest) {
    if (planner.options().plan_json)
        printf("%s\n", plan_json(planner, best, longest).c_str());
    else
        print_table(report(planner, best, longest), planner.limits());
    fflush(stdout);
}
