// runtime/signals.h: the first signal asks, the second kills, and a read under way goes on.
#include <doctest/doctest.h>

#include <csignal>
#include <thread>

#include <unistd.h>

#include "../runtime/signals.h"
#include "scratch.h"

TEST_CASE("the first signal is remembered, the program goes on") {
    for (int number : {SIGINT, SIGTERM})
        CHECK(run_in_child([&] {
                  demand(stop_signal() == 0, "nothing asked before");
                  catch_stop_signals();
                  demand(stop_signal() == 0, "nothing asked yet");
                  raise(number);
                  demand(stop_signal() == number, "the signal is remembered");
              }) == 0);
    CHECK(stop_signal() == 0); // only in the children
}

TEST_CASE("a second signal, the same or the other, ends the program by that signal") {
    for (int first : {SIGINT, SIGTERM})
        for (int second : {SIGINT, SIGTERM})
            CHECK(run_in_child([&] {
                      catch_stop_signals();
                      raise(first);
                      raise(second);
                      throw 5; // not reached
                  }) == 128 + second);
}

TEST_CASE("a signal that another thread takes is seen") {
    CHECK(run_in_child([] {
              catch_stop_signals();
              std::thread([] { pthread_kill(pthread_self(), SIGTERM); }).join();
              demand(stop_signal() == SIGTERM, "seen from the main thread");
          }) == 0);
}

TEST_CASE("a read under way goes on after the first signal") {
    CHECK(run_in_child([] {
              catch_stop_signals();
              int ends[2];
              demand(pipe(ends) == 0, "a pipe");
              pthread_t reader = pthread_self();
              std::thread helper([&] {
                  usleep(30000);
                  pthread_kill(reader, SIGINT); // the read below is waiting
                  usleep(30000);
                  demand(write(ends[1], "x", 1) == 1, "a byte is written");
              });
              char byte = 0;
              ssize_t n = read(ends[0], &byte, 1);
              helper.join();
              demand(n == 1 && byte == 'x', "the read is not cut short");
              demand(stop_signal() == SIGINT, "and the signal is seen");
          }) == 0);
}
