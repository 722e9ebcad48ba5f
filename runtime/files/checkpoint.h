// Checkpoints that survive whatever happens to the machine.
//
// RUN/step_00000100/ holds the parts (model.bin, …) and manifest.json: the meta data, and size and XXH3 of every part
// and of the manifest itself. It is written as RUN/.step_00000100.tmp, every file fsynced, then renamed whole and the
// run folder fsynced. So a folder with a final name is whole, unless somebody harmed it since: then its hashes tell,
// it is named and skipped, and the one before it is used.
//
// A whole checkpoint can still hold a state that no training goes on from: weights that are not finite, or weights with
// which every update was skipped. Its manifest then says what is wrong; it is healthy if nothing is. The newest healthy
// one is what a run goes on from, and what no limit on their number removes.
//
// Two hidden names can stay behind after a kill. `.step_N.tmp` is half written or half removed, is never read, and goes
// with the next save. `.step_N.old` is a whole checkpoint that a new one of the same step was about to replace: it
// counts as step N until that has happened.
#pragma once
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "files.h"

struct CheckpointPart {
    std::string name;                       // "model.bin"
    uint64_t bytes;                         // exactly what write() will write; the disk-space check relies on it
    std::function<void(FileWriter&)> write; // called once
};

struct Checkpoint {
    std::string path; // RUN/step_00000100
    int64_t step;
    nlohmann::json meta;
    std::string fault; // what keeps it from being healthy; empty: it is

    std::string part(const std::string& name) const { return path + "/" + name; }
};

// Checks the disk has room for all parts (plus 16 MiB), writes, renames, then removes old checkpoints as
// remove_old_checkpoints() does. A failure throws RunFailed, removes what it had written, and leaves every earlier
// checkpoint untouched. If step's folder exists already (a resumed run saves again), it is replaced whole. `fault` is
// asked once the parts are written.
void save_checkpoint(const std::string& run, int64_t step, const std::vector<CheckpointPart>& parts,
                     const nlohmann::json& meta, int64_t keep, const std::function<std::string()>& fault = {});

// What a save that was killed has left, as the next save removes it: for a run that has nothing more to save. A
// checkpoint that was set aside goes only where the one in its place is whole.
void remove_leftovers(const std::string& run);

// Removes the oldest whole checkpoints until `keep` are left (0 keeps all), `newest` among them, and besides the newest
// healthy one below `trusted`. Newer ones that are not healthy, from which a resume went back, go as well.
//
// Before anything is removed, the newer ones that stay in its place are read and hashed, so that a harmed one never
// counts; harmed and foreign folders are left where they are. An old checkpoint that cannot be removed is no failure:
// the next time tries again.
void remove_old_checkpoints(const std::string& run, int64_t newest, int64_t keep, int64_t trusted = INT64_MAX);

// Notes in the manifests of all healthy checkpoints of step `from` and later what has turned out to be wrong with them.
void mark_checkpoints(const std::string& run, int64_t from, const std::string& fault);

// The newest healthy checkpoint of a run folder whose every part has its size and hash; if none is healthy, the newest
// of the others. What is passed over is reported through `warn`, one line each, and left where it is. None: empty.
std::optional<Checkpoint> newest_checkpoint(const std::string& run,
                                            const std::function<void(const std::string&)>& warn);

// The same by manifests and sizes alone, in no time and without a warning.
std::optional<Checkpoint> newest_by_manifest(const std::string& run);

// One checkpoint folder, verified; throws BadInput naming what is wrong.
Checkpoint open_checkpoint(const std::string& path);

// Does the folder hold checkpoints, whole or not?
bool holds_checkpoints(const std::string& run);

std::string checkpoint_name(int64_t step); // step_00000100
