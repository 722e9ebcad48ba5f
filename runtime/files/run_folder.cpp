#include "run_folder.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <string_view>
#include <system_error>

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <nlohmann/json.hpp>

#include "../base/errors.h"
#include "files.h"

namespace fs = std::filesystem;
using nlohmann::json;

namespace {

std::string this_process() {
    char host[256] = "";
    gethostname(host, sizeof host - 1);
    return "process " + std::to_string(getpid()) + " on " + host;
}

// Of another process, as it wrote it; empty if it has not yet.
std::string holder(int fd) {
    char text[512];
    ssize_t got = pread(fd, text, sizeof text, 0);
    std::string said(text, got > 0 ? static_cast<size_t>(got) : 0);
    said.resize(std::min(said.find('\n'), said.size()));
    return said;
}

} // namespace

RunLock::RunLock(const std::string& run, const Warn& warn) : run_(run) {
    fd_ = open((run + "/.lock").c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    if (fd_ < 0)
        throw BadInput("--out " + run + ": cannot write there (" + strerror(errno) +
                       "); check the permissions, or choose another folder");
    folder_ = open(run.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    struct flock whole = {};
    whole.l_type = F_WRLCK;
    whole.l_whence = SEEK_SET;
    if (fcntl(fd_, F_OFD_SETLK, &whole) != 0) {
        const int error = errno;
        if (error == EAGAIN || error == EACCES) {
            const std::string by = holder(fd_);
            close(fd_), close(folder_);
            throw BadInput("--out " + run + " is in use by " + (by.empty() ? "another process" : by) +
                           ": wait for its end or stop it, or choose another folder");
        }
        warn("the file system of " + run + " has no locks (" + strerror(error) +
             "): see to it that no second process trains there");
        return;
    }
    const std::string self = this_process() + "\n";
    [[maybe_unused]] int cut = ftruncate(fd_, 0);
    [[maybe_unused]] ssize_t written = pwrite(fd_, self.data(), self.size(), 0);
}

RunLock::~RunLock() { close(fd_), close(folder_); }

bool RunLock::in_place() const {
    struct stat ours, there;
    return fstat(folder_, &ours) == 0 && stat(run_.c_str(), &there) == 0 && ours.st_ino == there.st_ino &&
           ours.st_dev == there.st_dev;
}

void check_out(const std::string& out) {
    std::error_code error;
    if (fs::path(out).is_relative() && fs::current_path(error).empty())
        throw BadInput("--out " + out + ": the working directory is gone (" + error.message() +
                       "); change to one that exists");
    const fs::file_status status = fs::status(out, error);
    if (status.type() == fs::file_type::not_found) return;
    if (status.type() == fs::file_type::none)
        throw BadInput("--out " + out + ": " + error.message() + "; choose another folder");
    if (!fs::is_directory(status)) throw BadInput("--out " + out + " is a file: give a folder");
}

bool holds_run(const std::string& folder) {
    std::error_code error;
    for (fs::directory_iterator entry(folder, error), end; !error && entry != end; entry.increment(error)) {
        std::string name = entry->path().filename().string();
        if (name == "options.toml" || name == "log.jsonl" || name.rfind("step_", 0) == 0) return true;
    }
    return false;
}

LogPart log_until(const std::string& run, LogPosition position) {
    LogPart part;
    const std::string path = run + "/log.jsonl";
    std::error_code error;
    if (!fs::exists(path, error)) return part;
    const std::string whole = read_small_file(path, SIZE_MAX);
    const std::string_view text = whole;
    bool kept = true;
    for (size_t begin = 0, end; (end = text.find('\n', begin)) != text.npos; begin = end + 1) {
        const std::string_view line = text.substr(begin, end - begin);
        // A line that is no event (harm, or somebody's note) neither ends nor hides what follows it.
        const json event = json::parse(line.begin(), line.end(), nullptr, false);
        if (event.is_object() && event.contains("event") && event.contains("step") &&
            event["step"].is_number_integer()) {
            const std::string kind = event["event"].is_string() ? event["event"].get<std::string>() : "";
            const int64_t at = event["step"].get<int64_t>();
            const bool again = kind == "save" || kind == "end" || (kind == "val" && !position.validated) ||
                               (kind == "sample" && !position.sampled);
            if (at > position.step || (at == position.step && again)) kept = false;
            if (kept && (kind == "step" || kind == "skip")) part.last_step = at;
            if (kind == "save" && event.contains("path") && event["path"].is_string())
                part.checkpoint = event["path"].get<std::string>();
        }
        if (kept) part.bytes = static_cast<int64_t>(end + 1);
    }
    return part;
}
