// runtime/base/signals.h: which signals are blocked, what the first and the second do, and who takes them.
#include <doctest/doctest.h>

#include <csignal>
#include <cstring>
#include <thread>

#include <omp.h>
#include <unistd.h>

#include "../runtime/base/signals.h"
#include "scratch.h"

namespace {

const int kStopping[] = {SIGINT, SIGTERM, SIGHUP, SIGUSR1, SIGUSR2, SIGXCPU};

// As run_program() begins, in a child that keeps quiet.
void begin() {
    freopen("/dev/null", "w", stderr);
    omp_set_num_threads(1); // the parent's other threads are not here
    block_signals();
    take_stop_signals();
}

void send(int number) { kill(getpid(), number); }

// Or for ever: test/run.py ends a test that hangs.
int wait_for_stop() {
    while (!stop_signal()) usleep(100);
    return stop_signal();
}

} // namespace

TEST_CASE("before there is anything to save a signal ends the program") {
    for (int number : kStopping)
        CHECK(run_in_child([&] {
                  begin();
                  send(number);
                  for (;;) pause();
              }) == 128 + number);
}

TEST_CASE("the first signal is remembered, the program goes on") {
    for (int number : kStopping)
        CHECK(run_in_child([&] {
                  begin();
                  save_when_stopped();
                  demand(stop_signal() == 0, "nothing asked yet");
                  send(number);
                  demand(wait_for_stop() == number, "the signal is remembered");
              }) == 0);
    CHECK(stop_signal() == 0); // only in the children
}

TEST_CASE("a second signal, the same or another, ends the program by that signal") {
    for (int first : {SIGINT, SIGHUP})
        for (int second : {SIGINT, SIGTERM, SIGUSR1})
            CHECK(run_in_child([&] {
                      begin();
                      save_when_stopped();
                      send(first);
                      wait_for_stop();
                      for (;; usleep(50000)) send(second); // at once it could be the first one's echo
                  }) == 128 + second);
}

TEST_CASE("signals that the system repeats are no second ones") {
    CHECK(run_in_child([&] {
              begin();
              save_when_stopped();
              for (int i = 0; i < 25; i++, usleep(50000)) send(i % 2 ? SIGXCPU : SIGHUP);
              demand(wait_for_stop() == SIGHUP, "the first one counts");
          }) == 0);
}

TEST_CASE("a signal that the parent ignores stays ignored") {
    for (int number : {SIGINT, SIGHUP})
        CHECK(run_in_child([&] {
                  signal(number, SIG_IGN);
                  begin();
                  save_when_stopped();
                  send(number);
                  send(SIGTERM);
                  demand(wait_for_stop() == SIGTERM, "only the other one is seen");
              }) == 0);
}

TEST_CASE("nothing asynchronous interrupts a thread; faults and job control are as they were") {
    CHECK(run_in_child([] {
              begin();
              std::thread([] { // later threads inherit it
                  sigset_t set;
                  pthread_sigmask(SIG_BLOCK, nullptr, &set);
                  for (int number : {SIGINT, SIGTERM, SIGHUP, SIGUSR1, SIGUSR2, SIGXCPU, SIGPROF, SIGALRM, SIGVTALRM,
                                     SIGIO, SIGPIPE, SIGCHLD, SIGWINCH, SIGRTMIN, SIGRTMAX})
                      demand(sigismember(&set, number) == 1, std::string(strsignal(number)) + " is blocked");
                  for (int number : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGSYS, SIGABRT, SIGTSTP, SIGTTIN,
                                     SIGTTOU, SIGCONT, SIGQUIT})
                      demand(sigismember(&set, number) == 0, std::string(strsignal(number)) + " is not");
              })
                  .join();
          }) == 0);
}

TEST_CASE("a signal to one thread alone is handed on") {
    CHECK(run_in_child([] {
              begin();
              save_when_stopped();
              pthread_kill(pthread_self(), SIGUSR1);
              usleep(10000);
              demand(stop_signal() == 0, "it waits at its thread");
              pass_on_signals();
              demand(wait_for_stop() == SIGUSR1, "and is seen");
          }) == 0);
    CHECK(run_in_child([] { // and if there is nothing to save
              begin();
              pthread_kill(pthread_self(), SIGTERM);
              pass_on_signals();
              for (;;) pause();
          }) == 128 + SIGTERM);
}
