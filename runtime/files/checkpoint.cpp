#include "checkpoint.h"

#include <algorithm>
#include <charconv>
#include <cstdio>
#include <filesystem>
#include <system_error>

#include "../base/errors.h"

namespace fs = std::filesystem;
using nlohmann::json;

namespace {

constexpr const char* kFormat = "longhand checkpoint";
constexpr const char* kManifest = "manifest.json";
constexpr size_t kLargestManifest = size_t(16) << 20; // meta data are a few KiB
constexpr int kDeepestManifest = 64;                  // nesting; dumping is recursive and has a stack to lose
constexpr uint64_t kDiskReserve = uint64_t(16) << 20; // for the log, samples, and the file system's own needs

std::string hex(uint64_t value) {
    char text[17];
    std::snprintf(text, sizeof text, "%016llx", static_cast<unsigned long long>(value));
    return text;
}

std::string megabytes(uint64_t bytes) {
    char text[32];
    std::snprintf(text, sizeof text, "%.1f MB", double(bytes) * 1e-6);
    return text;
}

// Invalid UTF-8 (a path in another encoding) is replaced and not an error: it must not keep a run from saving.
std::string dump(const json& value, int indent = -1) {
    return value.dump(indent, ' ', false, json::error_handler_t::replace);
}

// `body` with its checksum: the hash of its compact dump, in which keys are sorted and numbers have one form.
std::string manifest_text(json body) {
    std::string canonical = dump(body);
    body["checksum"] = hex(bytes_hash(canonical.data(), canonical.size()));
    return dump(body, 2) + "\n";
}

std::string tmp_path(const std::string& run, int64_t step) { return run + "/." + checkpoint_name(step) + ".tmp"; }
std::string old_path(const std::string& run, int64_t step) { return run + "/." + checkpoint_name(step) + ".old"; }
std::string final_path(const std::string& run, int64_t step) { return run + "/" + checkpoint_name(step); }

// A part is a file of its own in the checkpoint's folder, whatever a manifest may say.
bool good_part_name(const std::string& name) {
    return !name.empty() && name != "." && name != ".." && name != kManifest && name.find('/') == std::string::npos &&
           name.find('\0') == std::string::npos;
}

// The step of "PREFIXstep_00000100SUFFIX" if that is exactly how we would write it.
std::optional<int64_t> step_of(const std::string& name, const std::string& prefix, const std::string& suffix) {
    std::string before = prefix + "step_";
    if (name.size() < before.size() + suffix.size() || name.compare(0, before.size(), before) != 0) return {};
    const char* begin = name.data() + before.size();
    const char* end = name.data() + name.size() - suffix.size();
    int64_t step;
    if (auto [stop, error] = std::from_chars(begin, end, step); error != std::errc() || stop != end || step < 0)
        return {};
    if (prefix + checkpoint_name(step) + suffix != name) return {};
    return step;
}

// Steps of the run folder's entries with this prefix and suffix, newest first; none if there is no such folder.
std::vector<int64_t> steps_in(const std::string& run, const std::string& prefix, const std::string& suffix) {
    std::vector<int64_t> steps;
    std::error_code error;
    fs::directory_iterator entry(run, error), end;
    for (; !error && entry != end; entry.increment(error))
        if (auto step = step_of(entry->path().filename().string(), prefix, suffix)) steps.push_back(*step);
    if (error && error != std::errc::no_such_file_or_directory)
        throw BadInput("cannot read the run folder " + run + ": " + error.message() + "; check the path");
    std::sort(steps.rbegin(), steps.rend());
    return steps;
}

[[noreturn]] void harmed(const std::string& path, const std::string& what) {
    throw BadInput("checkpoint " + path + " is harmed: " + what + "; use another checkpoint");
}

// The manifest, its own checksum and form proven; nothing of the parts is looked at.
json read_manifest(const std::string& path) {
    std::string text;
    try {
        text = read_small_file(path + "/" + kManifest, kLargestManifest);
    } catch (const BadInput& e) {
        harmed(path, e.what());
    }
    auto shallow = [&](int depth, json::parse_event_t, json&) {
        if (depth > kDeepestManifest) harmed(path, std::string(kManifest) + " is nested too deep");
        return true;
    };
    try {
        json body = json::parse(text, shallow);
        std::string checksum = body.at("checksum").get<std::string>();
        body.erase("checksum");
        // Written out again it must be the same bytes: a flipped blank is harm as well, if only as a sign of more.
        if (manifest_text(body) != text)
            harmed(path, std::string(kManifest) + " does not match its checksum " + checksum);
        if (body.at("format") != kFormat) harmed(path, std::string(kManifest) + " is of another program");
        if (!body.at("step").is_number_integer() || body.at("step").get<int64_t>() < 0 || !body.contains("meta"))
            harmed(path, std::string(kManifest) + " holds no step or no meta data");
        for (const json& part : body.at("parts"))
            if (!good_part_name(part.at("name").get<std::string>()) || !part.at("bytes").is_number_unsigned() ||
                !part.at("xxh3").is_string())
                harmed(path, std::string(kManifest) + " describes a part that cannot be: " + dump(part));
        // A folder that was renamed by hand to another step would resume at the wrong place.
        std::string name = fs::path(path).filename().string();
        int64_t step = body.at("step").get<int64_t>();
        for (auto named : {step_of(name, "", ""), step_of(name, ".", ".old")})
            if (named && *named != step) harmed(path, "it holds step " + std::to_string(step));
        return body;
    } catch (const json::exception& e) {
        harmed(path, std::string(kManifest) + " is no whole JSON object (" + e.what() + ")");
    }
}

// Manifests of earlier programs say no more than how many updates in a row were skipped.
std::string fault_of(const json& manifest) {
    if (auto fault = manifest.find("fault"); fault != manifest.end() && fault->is_string()) return *fault;
    const json& meta = manifest.at("meta");
    auto skips = meta.is_object() ? meta.find("skips") : meta.end();
    return skips != meta.end() && skips->is_number_integer() && *skips > 0
               ? skips->dump() + " updates in a row were skipped before it"
               : "";
}

Checkpoint described(const std::string& path, const json& manifest) {
    return {path, manifest.at("step"), manifest.at("meta"), fault_of(manifest)};
}

void check_sizes(const std::string& path, const json& manifest) {
    for (const json& part : manifest.at("parts")) {
        std::string name = part.at("name");
        uint64_t want = part.at("bytes");
        std::error_code error;
        uint64_t have = fs::file_size(path + "/" + name, error);
        if (error) harmed(path, name + " is missing or unreadable (" + error.message() + ")");
        if (have != want)
            harmed(path, name + " has " + std::to_string(have) + " bytes, its manifest says " + std::to_string(want));
    }
}

void check_hashes(const std::string& path, const json& manifest) {
    for (const json& part : manifest.at("parts")) {
        std::string name = part.at("name"), want = part.at("xxh3");
        FileSum sum;
        try {
            sum = file_sum(path + "/" + name);
        } catch (const BadInput& e) {
            harmed(path, e.what());
        }
        if (hex(sum.hash) != want)
            harmed(path,
                   "the bytes of " + name + " changed (XXH3 " + hex(sum.hash) + ", its manifest says " + want + ")");
    }
}

bool is_whole(const std::string& path) {
    try {
        open_checkpoint(path);
        return true;
    } catch (const BadInput&) {
        return false;
    }
}

// Without reading the parts: a manifest of ours, and every part there with its size.
std::optional<Checkpoint> looked_at(const std::string& path) {
    try {
        const json manifest = read_manifest(path);
        check_sizes(path, manifest);
        return described(path, manifest);
    } catch (const BadInput&) {
        return {};
    }
}

bool exists(const std::string& path) {
    std::error_code ignored; // what may not be looked at may well be there
    return fs::symlink_status(path, ignored).type() != fs::file_type::not_found;
}

void remove_quietly(const std::string& path) {
    std::error_code ignored;
    fs::remove_all(path, ignored);
}

// A kill can have struck between setting a checkpoint aside and putting the new one in its place.
void take_back_set_aside(const std::string& run) {
    for (int64_t step : steps_in(run, ".", ".old"))
        if (!exists(final_path(run, step))) rename_path(old_path(run, step), final_path(run, step));
}

void remove_unfinished(const std::string& run) {
    take_back_set_aside(run);
    for (int64_t left : steps_in(run, ".", ".tmp")) remove_quietly(tmp_path(run, left));
}

void write_parts(const std::string& folder, int64_t step, const std::vector<CheckpointPart>& parts, const json& meta,
                 const std::function<std::string()>& fault) {
    std::error_code error;
    if (!fs::create_directory(folder, error))
        throw RunFailed("cannot make the folder " + folder + ": " +
                        (error ? error.message() : "a leftover is in the way, remove it"));
    json list = json::array();
    for (const CheckpointPart& part : parts) {
        FileWriter writer(folder + "/" + part.name);
        part.write(writer);
        if (writer.bytes() != part.bytes)
            throw RunFailed("part " + part.name + " of " + checkpoint_name(step) + " came to " +
                            std::to_string(writer.bytes()) + " bytes where " + std::to_string(part.bytes) +
                            " were announced; this is a fault in the program");
        writer.close();
        list.push_back({{"name", part.name}, {"bytes", part.bytes}, {"xxh3", hex(writer.hash())}});
    }
    std::string text = manifest_text({{"format", kFormat},
                                      {"step", step},
                                      {"meta", meta},
                                      {"parts", list},
                                      {"fault", fault ? fault() : std::string()}});
    FileWriter writer(folder + "/" + kManifest);
    writer.write(text.data(), text.size());
    writer.close();
    sync_folder(folder);
}

// Gives the written folder its final name. At each moment one whole checkpoint of this step, if there was one, has a
// name that newest_checkpoint() reads.
void publish(const std::string& run, int64_t step) {
    std::string final = final_path(run, step), aside = old_path(run, step);
    std::error_code ignored;
    if (exists(final)) {
        if (!fs::is_directory(final, ignored))
            throw RunFailed(final + " is in the way and is no checkpoint; move it elsewhere");
        remove_quietly(aside);
        rename_path(final, aside);
    }
    rename_path(tmp_path(run, step), final);
    sync_folder(run);
    remove_quietly(aside);
}

// Removal, too, goes through the .tmp name: a kill midway leaves nothing that looks like a harmed checkpoint.
void remove_checkpoint(const std::string& run, int64_t step) {
    rename_path(final_path(run, step), tmp_path(run, step));
    sync_folder(run);
    remove_quietly(tmp_path(run, step));
}

} // namespace

std::string checkpoint_name(int64_t step) {
    char name[32];
    std::snprintf(name, sizeof name, "step_%08lld", static_cast<long long>(step));
    return name;
}

void save_checkpoint(const std::string& run, int64_t step, const std::vector<CheckpointPart>& parts, const json& meta,
                     int64_t keep, const std::function<std::string()>& fault) {
    if (step < 0 || keep < 0)
        throw BadInput("cannot save step " + std::to_string(step) + " and keep " + std::to_string(keep) +
                       " checkpoints; neither can be negative");
    for (size_t i = 0; i < parts.size(); i++)
        if (!good_part_name(parts[i].name) ||
            std::any_of(parts.begin(), parts.begin() + i, [&](auto& part) { return part.name == parts[i].name; }))
            throw BadInput("'" + parts[i].name + "' cannot be the name of a checkpoint's part, or is there twice");

    std::error_code error;
    if (fs::create_directories(run, error)) {
        const std::string parent = fs::path(run).lexically_normal().parent_path().string();
        sync_folder(parent.empty() ? "." : parent);
    }
    if (error) throw RunFailed("cannot make the run folder " + run + ": " + error.message() + "; check --out");
    remove_unfinished(run);

    uint64_t need = kDiskReserve;
    for (const CheckpointPart& part : parts) need += std::min(part.bytes, UINT64_MAX - need);
    if (uint64_t have = free_disk_bytes(run); have < need)
        throw RunFailed("saving step " + std::to_string(step) + " needs " + megabytes(need) + ", but the disk of " +
                        run + " has " + megabytes(have) +
                        " left; free some space there, lower --keep, or move the run");
    try {
        write_parts(tmp_path(run, step), step, parts, meta, fault);
        publish(run, step);
    } catch (...) {
        remove_quietly(tmp_path(run, step));
        try {
            take_back_set_aside(run);
        } catch (const Failure&) {
            // The first failure is the one to tell; the checkpoint set aside is found under its .old name as well.
        }
        throw;
    }
    for (int64_t left : steps_in(run, ".", ".old")) remove_quietly(old_path(run, left));
    if (keep) remove_old_checkpoints(run, step, keep);
}

void remove_leftovers(const std::string& run) {
    try {
        remove_unfinished(run);
        for (int64_t left : steps_in(run, ".", ".old"))
            if (is_whole(final_path(run, left))) remove_quietly(old_path(run, left));
    } catch (const Failure&) {
        // All is saved, so no failure: a checkpoint that was set aside is found under its .old name as well.
    }
}

static void remove_old(const std::string& run, int64_t newest, int64_t keep, int64_t trusted) {
    std::vector<Checkpoint> older, given_up;
    bool healthy = false; // one that is stays
    for (int64_t step : steps_in(run, "", "")) {
        std::optional<Checkpoint> found = looked_at(final_path(run, step));
        if (!found) continue;
        if (step > newest && !found->fault.empty()) given_up.push_back(*found);
        if (step == newest) healthy = found->fault.empty() && step < trusted;
        if (step < newest) older.push_back(*found);
    }
    if (healthy)
        for (const Checkpoint& checkpoint : given_up) remove_checkpoint(run, checkpoint.step);
    int64_t whole = 1; // `newest`
    if (static_cast<int64_t>(older.size()) < keep) return;
    for (const Checkpoint& checkpoint : older) {
        const bool good = checkpoint.fault.empty() && checkpoint.step < trusted;
        if (whole >= keep && (healthy || !good)) {
            remove_checkpoint(run, checkpoint.step);
        } else if (is_whole(checkpoint.path)) {
            whole++;
            healthy = healthy || good;
        }
    }
}

void remove_old_checkpoints(const std::string& run, int64_t newest, int64_t keep, int64_t trusted) {
    if (keep == 0) return;
    try {
        remove_old(run, newest, keep, trusted);
    } catch (const Failure&) {
        // A disk that fills up is reported by the next save's own check.
    }
}

void mark_checkpoints(const std::string& run, int64_t from, const std::string& fault) {
    for (int64_t step : steps_in(run, "", "")) {
        const std::string path = final_path(run, step);
        if (std::optional<Checkpoint> found = looked_at(path); !found || step < from || !found->fault.empty()) continue;
        json manifest = read_manifest(path);
        manifest["fault"] = fault;
        write_file_whole(path + "/" + kManifest, manifest_text(manifest));
    }
}

Checkpoint open_checkpoint(const std::string& path) {
    json manifest = read_manifest(path);
    check_sizes(path, manifest);
    check_hashes(path, manifest);
    return described(path, manifest);
}

// Paths of the run's checkpoints, newest first.
static std::vector<std::string> checkpoints_of(const std::string& run) {
    std::vector<std::pair<int64_t, std::string>> found;
    for (int64_t step : steps_in(run, "", "")) found.emplace_back(step, final_path(run, step));
    for (int64_t step : steps_in(run, ".", ".old")) found.emplace_back(step, old_path(run, step));
    std::stable_sort(found.begin(), found.end(), [](auto& a, auto& b) { return a.first > b.first; });
    std::vector<std::string> paths;
    for (const auto& [step, path] : found) paths.push_back(path);
    return paths;
}

// One look through the folder. Another process may be saving there: `gone` tells that a checkpoint went while it was
// read.
static std::optional<Checkpoint> newest_now(const std::string& run, const std::function<void(const std::string&)>& warn,
                                            bool& gone) {
    std::vector<std::string> unhealthy;
    std::string passed_over; // the newest that is not healthy, and why
    auto opened = [&](const std::string& path) -> std::optional<Checkpoint> {
        try {
            return open_checkpoint(path);
        } catch (const BadInput& e) {
            if (exists(path))
                warn(e.what());
            else
                gone = true;
            return {};
        }
    };
    for (const std::string& path : checkpoints_of(run)) {
        if (std::optional<Checkpoint> found = looked_at(path); found && !found->fault.empty()) {
            if (unhealthy.empty()) passed_over = path + " is not healthy (" + found->fault + ")";
            unhealthy.push_back(path);
        } else if (std::optional<Checkpoint> healthy = opened(path)) {
            if (!passed_over.empty()) warn(passed_over + "; " + healthy->path + " is taken, the newest that is");
            return healthy;
        }
        if (gone) return {};
    }
    for (const std::string& path : unhealthy)
        if (std::optional<Checkpoint> found = opened(path)) {
            warn(path + " is not healthy (" + found->fault + "), but no other is; it is taken");
            return found;
        }
    return {};
}

std::optional<Checkpoint> newest_checkpoint(const std::string& run,
                                            const std::function<void(const std::string&)>& warn) {
    constexpr int kTries = 20; // a run that saves faster than its checkpoints can be read is no run to read from
    for (int i = 0; i < kTries; i++) {
        bool gone = false;
        std::optional<Checkpoint> found = newest_now(run, warn, gone);
        if (!gone) return found;
    }
    throw BadInput(run + ": its checkpoints are removed faster than they can be read; wait for the run, or copy one");
}

std::optional<Checkpoint> newest_by_manifest(const std::string& run) {
    std::optional<Checkpoint> newest;
    for (const std::string& path : checkpoints_of(run)) {
        std::optional<Checkpoint> found = looked_at(path);
        if (found && found->fault.empty()) return found;
        if (!newest) newest = found;
    }
    return newest;
}

bool holds_checkpoints(const std::string& run) {
    std::error_code error;
    for (fs::directory_iterator entry(run, error), end; !error && entry != end; entry.increment(error)) {
        std::string name = entry->path().filename().string();
        if (name.rfind("step_", 0) == 0 || (name.rfind(".step_", 0) == 0 && entry->path().extension() == ".old"))
            return true;
    }
    return false;
}
