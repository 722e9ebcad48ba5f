#include "signals.h"

#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <thread>

#include <poll.h>
#include <unistd.h>

namespace {

using Clock = std::chrono::steady_clock;

std::atomic<bool> saves = false;
std::atomic<int> asked_to_stop = 0;

// One stop often arrives as two signals: `timeout` sends to the process and then to its group, which Ctrl-C reaches
// anyway. Nobody who has read what the first one said is faster than this.
constexpr auto kEcho = std::chrono::seconds(1);

// The system repeats XCPU every second, and both shell and terminal send HUP when a connection ends: neither is
// anybody's second thought.
bool insists(int number) { return number != SIGXCPU && number != SIGHUP; }

[[noreturn]] void end_by(int number) {
    signal(number, SIG_DFL);
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, number);
    pthread_sigmask(SIG_UNBLOCK, &set, nullptr);
    raise(number);
    _exit(128 + number); // as process 1 of a container no signal's own handling ends it
}

// The run may be hours from its next word, and whoever pressed Ctrl-C would press again.
void announce(int number) {
    char line[200];
    int size = snprintf(line, sizeof line,
                        "%s%s: stopping after this micro-batch and saving a checkpoint; a second signal ends the run "
                        "at once, without saving\n",
                        isatty(STDERR_FILENO) ? "\r\x1b[K" : "", strsignal(number));
    // A reader that has gone to sleep must not keep the next signal waiting.
    pollfd ready = {STDERR_FILENO, POLLOUT, 0};
    if (poll(&ready, 1, 0) == 1) [[maybe_unused]]
        ssize_t written = write(STDERR_FILENO, line, static_cast<size_t>(size));
}

// Those that stop a run, but for those that are ignored.
sigset_t stop_signals() {
    sigset_t set;
    sigemptyset(&set);
    for (int number : {SIGINT, SIGTERM, SIGHUP, SIGUSR1, SIGUSR2, SIGXCPU}) {
        struct sigaction action;
        if (sigaction(number, nullptr, &action) == 0 && action.sa_handler != SIG_IGN) sigaddset(&set, number);
    }
    return set;
}

void take(sigset_t set) {
    Clock::time_point first;
    for (;;) {
        int number = 0;
        if (sigwait(&set, &number) != 0) continue;
        if (!saves) end_by(number);
        if (!asked_to_stop) {
            first = Clock::now();
            asked_to_stop = number;
            announce(number);
        } else if (insists(number) && Clock::now() - first > kEcho) {
            end_by(number);
        }
    }
}

} // namespace

void block_signals() {
    sigset_t set;
    sigfillset(&set);
    for (int number :
         {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGSYS, SIGABRT, SIGTSTP, SIGTTIN, SIGTTOU, SIGCONT, SIGQUIT})
        sigdelset(&set, number);
    pthread_sigmask(SIG_BLOCK, &set, nullptr);
}

void take_stop_signals() { std::thread(take, stop_signals()).detach(); }

void save_when_stopped() { saves = true; }

int stop_signal() { return asked_to_stop; }

void pass_on_signals() {
    const sigset_t set = stop_signals();
#pragma omp parallel
    {
        const timespec none = {};
        int number = sigtimedwait(&set, nullptr, &none);
        if (number > 0) kill(getpid(), number);
    }
}
