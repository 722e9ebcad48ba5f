#include "signals.h"

#include <atomic>
#include <csignal>

namespace {

// The one variable of the program outside any function: a handler is given nothing but the number of its signal.
// Atomic, because with OpenMP it runs on whichever thread the system picks; lock-free, because a handler must not wait.
std::atomic<int> asked_to_stop = 0;
static_assert(std::atomic<int>::is_always_lock_free);

void on_signal(int number) {
    int before = 0;
    if (asked_to_stop.compare_exchange_strong(before, number)) return;
    // The second one: raised again under the system's own handling, it takes effect when this handler returns.
    signal(number, SIG_DFL);
    raise(number);
}

} // namespace

void catch_stop_signals() {
    struct sigaction action = {};
    action.sa_handler = on_signal;
    action.sa_flags = SA_RESTART; // a read or write under way goes on
    sigemptyset(&action.sa_mask);
    for (int number : {SIGINT, SIGTERM}) sigaction(number, &action, nullptr);
    signal(SIGXFSZ, SIG_IGN); // a limit on file sizes is then a write error that names the file, like a full disk
}

int stop_signal() { return asked_to_stop.load(); }
