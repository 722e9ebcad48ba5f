// What the tests of files share: a folder that vanishes, whole files in and out, the message of a failure, a body run
// in a child process, and the two ways for that child to run out of disk.
#pragma once
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <stdexcept>
#include <string>

#include <fcntl.h>
#include <sched.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

// The sanitizers' build looks for bad accesses, and a tenth of the trials does: what comes out is checked in the
// others.
#ifdef __SANITIZE_ADDRESS__
constexpr bool kSanitized = true;
#else
constexpr bool kSanitized = false;
#endif

class ScratchFolder {
public:
    explicit ScratchFolder(const std::string& parent = std::filesystem::temp_directory_path().string()) {
        std::string name = parent + "/longhand_XXXXXX";
        if (!mkdtemp(name.data())) throw std::runtime_error("cannot make a scratch folder like " + name);
        path_ = name;
    }
    ~ScratchFolder() {
        std::error_code ignored;
        std::filesystem::remove_all(path_, ignored);
    }
    ScratchFolder(const ScratchFolder&) = delete;
    ScratchFolder& operator=(const ScratchFolder&) = delete;

    const std::string& path() const { return path_; }
    std::string operator/(const std::string& name) const { return path_ + "/" + name; }

private:
    std::string path_;
};

inline void put_file(const std::string& path, const std::string& bytes) {
    std::ofstream file(path, std::ios::binary | std::ios::trunc);
    file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
    if (!file.flush()) throw std::runtime_error("cannot write " + path);
}

inline std::string get_file(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    if (!file) throw std::runtime_error("cannot read " + path);
    return std::string(std::istreambuf_iterator<char>(file), {});
}

inline bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

// The message of the E that `body` throws; empty if it throws nothing. Other exceptions pass through.
template <class E> std::string message_of(const std::function<void()>& body) {
    try {
        body();
    } catch (const E& e) {
        return e.what();
    }
    return "";
}

// For bodies that run where doctest's checks cannot be used.
inline void demand(bool holds, const std::string& what) {
    if (!holds) throw std::runtime_error("not so: " + what);
}

constexpr int kChildSkipped = 77; // this machine does not allow what the body needs

// Runs `body` in a child process and returns its exit status: 0, kChildSkipped if it threw kChildSkipped, 1 if it threw
// anything else, 128 + signal if it was killed.
inline int run_in_child(const std::function<void()>& body) {
    std::fflush(nullptr);
    pid_t child = fork();
    if (child < 0) throw std::runtime_error("cannot fork");
    if (child == 0) {
        int status = 0;
        try {
            body();
        } catch (int code) {
            status = code;
        } catch (const std::exception& e) {
            std::fprintf(stderr, "child: %s\n", e.what());
            status = 1;
        }
        std::fflush(nullptr);
        _exit(status);
    }
    int status = 0;
    while (waitpid(child, &status, 0) < 0) {
    }
    return WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
}

// In a child: mounts a file system of `bytes` over `folder`, seen by this process alone and gone with it. Needs root or
// user namespaces; without either it ends the body with kChildSkipped.
inline void enter_small_disk(const std::string& folder, size_t bytes) {
    uid_t user = getuid();
    gid_t group = getgid();
    if (unshare(CLONE_NEWNS) != 0) {
        if (unshare(CLONE_NEWUSER | CLONE_NEWNS) != 0) throw kChildSkipped;
        try {
            put_file("/proc/self/setgroups", "deny");
            put_file("/proc/self/uid_map", "0 " + std::to_string(user) + " 1");
            put_file("/proc/self/gid_map", "0 " + std::to_string(group) + " 1");
        } catch (const std::runtime_error&) {
            throw kChildSkipped;
        }
    }
    std::string size = "size=" + std::to_string(bytes);
    if (mount("none", "/", nullptr, MS_REC | MS_PRIVATE, nullptr) != 0 ||
        mount("tmpfs", folder.c_str(), "tmpfs", 0, size.c_str()) != 0)
        throw kChildSkipped;
}

// In a child: no file may grow past `bytes`; writes beyond fail with EFBIG.
inline void limit_file_size(size_t bytes) {
    std::signal(SIGXFSZ, SIG_IGN);
    rlimit limit{bytes, bytes};
    demand(setrlimit(RLIMIT_FSIZE, &limit) == 0, "the file size can be limited");
}
