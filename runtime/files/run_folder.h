// A run's folder beside its checkpoints: the lock that makes it one process's, and the log that a resume goes on with.
#pragma once
#include <cstdint>
#include <functional>
#include <string>

using Warn = std::function<void(const std::string&)>;

// The right to write to a run's folder, held by one process at a time: a lock on RUN/.lock that belongs to the open
// file, so the system releases it however the process ends, and that NFS (version 4 on) carries between machines. The
// file names its holder, for messages only.
class RunLock {
public:
    // The folder must exist. Throws BadInput naming the holder if another process has it; on a file system without
    // locks it warns and goes on.
    RunLock(const std::string& run, const Warn& warn);
    ~RunLock();
    RunLock(const RunLock&) = delete;
    RunLock& operator=(const RunLock&) = delete;

    // Is the folder of this name still the one that was locked? Not if somebody removed, renamed or replaced it.
    bool in_place() const;

private:
    std::string run_;
    int fd_ = -1;
    int folder_ = -1; // open, so that no other folder gets its inode's number
};

// Throws BadInput if --out can be no folder to write to: a file, a path that is too long or cannot be searched, a
// relative one where the working directory is gone. That it does not exist is no fault.
void check_out(const std::string& out);

// Does the folder hold a run, or what is left of one?
bool holds_run(const std::string& folder);

// Where in a run a resume goes on: after `step` steps, with what is due there done already or not.
struct LogPosition {
    int64_t step = 0;
    bool validated = false, sampled = false;
};

// What of RUN/log.jsonl belongs to the run up to there: all before the first event of a later step, of a save or an end
// at this one, or of what is still to be done (a resume writes those again), and never a line that a kill has torn.
struct LogPart {
    int64_t bytes = 0;      // to keep
    int64_t last_step = 0;  // the last of them that is in it
    std::string checkpoint; // the last one that the whole file says was saved, or empty
};
LogPart log_until(const std::string& run, LogPosition position);
