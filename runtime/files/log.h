// What a run says: log.jsonl for machines, one refreshed line (or plain lines, when piped) for people.
#pragma once
#include <cstdint>
#include <functional>
#include <string>

#include <nlohmann/json_fwd.hpp>

// RUN/log.jsonl, one object a line, each handed to the system in one write, so that a kill tears at most the last line.
// NaN and Inf become null. A write that fails (disk full) throws RunFailed and leaves whole lines only.
class RunLog {
public:
    // Opens or creates; `keep_bytes` >= 0 first cuts the file to that many bytes (a resume drops what came after its
    // checkpoint). Throws RunFailed if the file is shorter than that.
    RunLog(const std::string& path, int64_t keep_bytes);
    ~RunLog();
    RunLog(const RunLog&) = delete;
    RunLog& operator=(const RunLog&) = delete;

    void write(const nlohmann::json& event);
    int64_t bytes() const { return bytes_; }
    void sync(); // fsync, before a checkpoint: the log on the disk never lags behind it

private:
    std::string path_;
    int fd_ = -1;
    int64_t bytes_ = 0;
};

// Writes what a person may read, and never fails: what a descriptor does not take is dropped. Waits for a slow reader,
// but not when the run has been asked to stop.
void print(int fd, const std::string& text);

struct StepLine {
    int64_t step, steps;
    double loss, lr, grad_norm, tokens_per_second, peak_percent, seconds_left;
};

// On a terminal one line is rewritten in place, cut to the terminal's width; piped, a line goes out at most every
// `every` seconds and for the last step. say() prints a full line of its own above it; finish() shows the newest step
// if it has not been shown, and leaves the cursor on a fresh line. All of it goes to stdout.
double steady_seconds();
class Progress {
public:
    // clock: seconds since some moment.
    explicit Progress(double every = 10, std::function<double()> clock = steady_seconds);
    ~Progress() { finish(); } // so that an error does not land on the drawn line
    void step(const StepLine& line);
    void say(const std::string& line);
    void finish();

private:
    bool terminal_;
    bool drawn_ = false;
    double every_, last_; // last_: when a step was last shown
    std::function<double()> clock_;
    std::string waiting_; // the newest step, if it has not been shown
    void show(const std::string& text);
};

std::string format_step(const StepLine& line);
std::string format_duration(double seconds); // "2d03h", "1h02m", "3m20s", "12s"; "?" if it is not known
