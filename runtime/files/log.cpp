#include "log.h"

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <climits>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <utility>

#include <fcntl.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <nlohmann/json.hpp>

#include "../base/errors.h"
#include "../base/signals.h"

namespace {

[[noreturn]] void fail(const std::string& doing, const std::string& path, int error) {
    throw RunFailed("cannot " + doing + " " + path + ": " + strerror(error) +
                    (error == ENOSPC || error == EDQUOT ? "; make room and go on with --resume" : ""));
}

} // namespace

RunLog::RunLog(const std::string& path, int64_t keep_bytes) : path_(path) {
    fd_ = open(path.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
    if (fd_ < 0) fail("open", path_, errno);
    struct stat status;
    if (fstat(fd_, &status) != 0) {
        int error = errno;
        close(fd_);
        fail("look at", path_, error);
    }
    bytes_ = status.st_size;
    if (keep_bytes < 0) return;
    if (bytes_ < keep_bytes) {
        close(fd_);
        throw RunFailed(path_ + " has " + std::to_string(bytes_) + " bytes, fewer than the " +
                        std::to_string(keep_bytes) + " to keep: it was cut or replaced at this moment");
    }
    if (ftruncate(fd_, keep_bytes) != 0) {
        int error = errno;
        close(fd_);
        fail("cut", path_, error);
    }
    bytes_ = keep_bytes;
}

RunLog::~RunLog() { close(fd_); }

void RunLog::write(const nlohmann::json& event) {
    // nlohmann-json writes NaN and Inf as null; bytes that are no UTF-8 are replaced instead of thrown at us.
    std::string line = event.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace) + "\n";
    for (size_t done = 0; done < line.size();) {
        ssize_t n = ::write(fd_, line.data() + done, line.size() - done);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) {
            int error = errno;
            // A piece of the line may have found room. If the cut fails too, a resume makes it.
            [[maybe_unused]] int cut = ftruncate(fd_, bytes_);
            fail("write", path_, error);
        }
        done += static_cast<size_t>(n);
    }
    bytes_ += static_cast<int64_t>(line.size());
}

void RunLog::sync() {
    if (fsync(fd_) != 0) fail("flush", path_, errno);
}

namespace {

size_t terminal_width() {
    winsize size = {};
    if (ioctl(STDOUT_FILENO, TIOCGWINSZ, &size) != 0 || size.ws_col == 0) return 80;
    return size.ws_col;
}

std::string format(const char* pattern, double value) {
    char text[64];
    snprintf(text, sizeof text, pattern, value);
    return text;
}

std::string format_count(double n) {
    if (n >= 1e6) return format("%.2fM", n / 1e6);
    if (n >= 1e4) return format("%.1fk", n / 1e3);
    return format("%.0f", n);
}

// A terminal redraws no faster than this: a tiny model's steps would make it flicker.
constexpr double kRedraw = 0.1;

} // namespace

void print(int fd, const std::string& text) {
    constexpr int kLook = 100; // milliseconds between two looks at stop_signal()
    for (size_t done = 0; done < text.size();) {
        pollfd ready = {fd, POLLOUT, 0};
        if (poll(&ready, 1, kLook) <= 0) {
            if (stop_signal()) return;
            continue;
        }
        // A pipe that is ready takes this much without waiting.
        ssize_t n = ::write(fd, text.data() + done, std::min<size_t>(text.size() - done, PIPE_BUF));
        if (n <= 0 && errno != EINTR && errno != EAGAIN) return;
        if (n > 0) done += static_cast<size_t>(n);
    }
}

double steady_seconds() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

Progress::Progress(double every, std::function<double()> clock)
    : terminal_(isatty(STDOUT_FILENO)), every_(every), last_(-INFINITY), clock_(std::move(clock)) {}

void Progress::show(const std::string& text) {
    if (terminal_)
        print(STDOUT_FILENO, std::string("\r") + text.substr(0, terminal_width() - 1) + "\x1b[K");
    else
        print(STDOUT_FILENO, text + "\n");
    drawn_ = terminal_;
    waiting_.clear();
}

void Progress::step(const StepLine& line) {
    double time = clock_();
    waiting_ = format_step(line);
    if (line.step < line.steps && time - last_ < (terminal_ ? kRedraw : every_)) return;
    last_ = time;
    show(waiting_);
}

void Progress::say(const std::string& line) {
    print(STDOUT_FILENO, (drawn_ ? "\r\x1b[K" : "") + line + "\n");
    drawn_ = false;
}

void Progress::finish() {
    if (!waiting_.empty()) show(waiting_);
    if (drawn_) print(STDOUT_FILENO, "\n");
    drawn_ = false;
}

std::string format_step(const StepLine& line) {
    std::string text = "step " + std::to_string(line.step) + "/" + std::to_string(line.steps);
    text += format(" | loss %.4f", line.loss) + format(" | lr %.2e", line.lr) + format(" | norm %.3g", line.grad_norm);
    text += " | " + format_count(line.tokens_per_second) + " tok/s";
    if (std::isfinite(line.peak_percent)) text += format(" | %.0f%% of peak", line.peak_percent);
    return text + " | " + format_duration(line.seconds_left) + " left";
}

std::string format_duration(double seconds) {
    if (!(seconds >= 0) || seconds > 1e15) return "?";
    int64_t s = std::llround(seconds);
    char text[48];
    if (s < 60)
        snprintf(text, sizeof text, "%ds", int(s));
    else if (s < 3600)
        snprintf(text, sizeof text, "%dm%02ds", int(s / 60), int(s % 60));
    else if (s < 48 * 3600)
        snprintf(text, sizeof text, "%dh%02dm", int(s / 3600), int(s / 60 % 60));
    else
        snprintf(text, sizeof text, "%lldd%02dh", static_cast<long long>(s / 86400), int(s / 3600 % 24));
    return text;
}
