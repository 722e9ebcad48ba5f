#include "process.h"

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <new>
#include <string>
#include <vector>

#include <fcntl.h>
#include <unistd.h>

#include "../base/errors.h"
#include "../base/signals.h"
#include "../files/log.h"

namespace {

// A file opened while one of 0, 1, 2 is closed would get its number, and with it what is printed. What stands in
// refuses what it is for, so that an evaluation without an output fails.
void open_standard_descriptors() {
    for (int fd : {STDIN_FILENO, STDOUT_FILENO, STDERR_FILENO})
        if (fcntl(fd, F_GETFD) < 0) open("/dev/null", fd == STDIN_FILENO ? O_WRONLY : O_RDONLY);
}

// Threads that wait for others spin first, by libgomp's own choice for milliseconds: on a machine with a busy neighbour
// they keep from the core the very thread that they wait for (a step then takes four times as long). Some 0.2 ms bridge
// the gaps between parallel regions and cost no such time. libgomp reads this from the environment as it is loaded, so
// the program starts itself again; where that fails it is only slower.
void bound_spinning(char** argv, char** environment) {
    std::vector<char*> extended;
    for (char** entry = environment; *entry; entry++) {
        for (const char* own : {"GOMP_SPINCOUNT=", "OMP_WAIT_POLICY="}) // the user's, or ours by now
            if (strncmp(*entry, own, strlen(own)) == 0) return;
        extended.push_back(*entry);
    }
    char setting[] = "GOMP_SPINCOUNT=10000", path[4096];
    extended.insert(extended.end(), {setting, nullptr});
    const ssize_t size = readlink("/proc/self/exe", path, sizeof path - 1);
    if (size <= 0 || !argv[0]) return;
    path[size] = '\0';
    auto name = [](const char* of) { return strrchr(of, '/') ? strrchr(of, '/') + 1 : of; };
    // Under another name it may be a loader or an emulator, whose arguments these are not.
    if (strcmp(name(path), name(argv[0])) == 0) execve(path, argv, extended.data());
}

// Runs before the constructors of shared libraries, some of which start threads: those inherit the mask.
void prepare_process(int, char** argv, char** environment) {
    bound_spinning(argv, environment);
    block_signals();
    open_standard_descriptors();
}

[[gnu::section(".preinit_array"), gnu::used]] void (*const preparation)(int, char**, char**) = prepare_process;

// What could not be printed of an evaluation, a plan or the help is a failure; a training run prints by print().
void check_output() {
    if (fflush(stdout) != 0) throw RunFailed(std::string("cannot write to standard output: ") + strerror(errno));
    if (ferror(stdout)) throw RunFailed("cannot write to standard output: its disk is full or its reader has gone");
}

} // namespace

// One line, whatever a value quoted in the message holds.
void print_failure(const std::string& name, std::string what) {
    if (what.empty()) return; // another rank says it
    std::replace(what.begin(), what.end(), '\n', ' ');
    print(STDERR_FILENO, name + ": " + what + "\n");
}

int run_program(const char* name, const std::function<void()>& body) {
    signal(SIGPIPE, SIG_IGN); // a reader that has gone is a write error, which ends no training
    signal(SIGXFSZ, SIG_IGN); // and a limit on file sizes one that names the file, like a full disk
    take_stop_signals();
    try {
        body();
        check_output();
        return kDone;
    } catch (const std::exception& error) {
        const Failure failure = failure_of(error);
        print_failure(name, failure.what());
        return failure.exit_code;
    }
}
