// runtime/files/log.h: what lands in log.jsonl, also when the disk is full; what a pipe and a terminal see.
#include <doctest/doctest.h>
#include <nlohmann/json.hpp>

#include <cmath>
#include <csignal>

#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "../runtime/base/errors.h"
#include "../runtime/files/log.h"
#include "scratch.h"

namespace {

int64_t writes = 0;

}

// Takes the place of the C library's in this program, to count the calls.
extern "C" ssize_t write(int fd, const void* data, size_t bytes) {
    writes++;
    return syscall(SYS_write, fd, data, bytes);
}

namespace {

StepLine line_of(int64_t step) { return {step, 5000, 3.45674, 6e-4, 0.874, 12345, 71.4, 3723}; }

// What `body` prints to stdout, run in a child whose stdout is `fd`.
void with_stdout(int fd, const std::function<void()>& body) {
    CHECK(run_in_child([&] {
              demand(dup2(fd, STDOUT_FILENO) >= 0, "stdout opens");
              body();
          }) == 0);
}

std::string piped(const std::function<void()>& body) {
    ScratchFolder folder;
    std::string path = folder / "stdout";
    int fd = open(path.c_str(), O_WRONLY | O_CREAT, 0600);
    with_stdout(fd, body);
    close(fd);
    return get_file(path);
}

// A pseudo-terminal of the given width. Its newlines come back as \r\n.
std::string on_terminal(unsigned short columns, const std::function<void()>& body) {
    int master = posix_openpt(O_RDWR | O_NOCTTY);
    REQUIRE(master >= 0);
    REQUIRE(grantpt(master) == 0);
    REQUIRE(unlockpt(master) == 0);
    int slave = open(ptsname(master), O_RDWR | O_NOCTTY);
    REQUIRE(slave >= 0);
    winsize size = {};
    size.ws_col = columns;
    REQUIRE(ioctl(master, TIOCSWINSZ, &size) == 0);
    with_stdout(slave, body);
    std::string seen(65536, '\0');
    fcntl(master, F_SETFL, O_NONBLOCK);
    ssize_t n = read(master, seen.data(), seen.size());
    close(slave);
    close(master);
    seen.resize(n > 0 ? size_t(n) : 0);
    return seen;
}

} // namespace

TEST_CASE("one object a line, and the bytes are counted") {
    ScratchFolder folder;
    std::string path = folder / "log.jsonl";
    {
        RunLog log(path, -1);
        CHECK(log.bytes() == 0);
        log.write({{"event", "step"}, {"loss", 0.1}});
        log.write({{"event", "sample"}, {"text", "two\nlines \"quoted\" \xC3"}}); // a cut character is replaced
        log.write({{"event", "skip"}, {"loss", NAN}, {"grad_norm", INFINITY}});
        log.sync();
        CHECK(log.bytes() == int64_t(get_file(path).size()));
    }
    std::string text = get_file(path);
    CHECK(text == "{\"event\":\"step\",\"loss\":0.1}\n"
                  "{\"event\":\"sample\",\"text\":\"two\\nlines \\\"quoted\\\" \xEF\xBF\xBD\"}\n"
                  "{\"event\":\"skip\",\"grad_norm\":null,\"loss\":null}\n");
}

TEST_CASE("opening again appends, or cuts to what a checkpoint counts") {
    ScratchFolder folder;
    std::string path = folder / "log.jsonl";
    int64_t first;
    {
        RunLog log(path, 0);
        log.write({{"step", 1}});
        first = log.bytes();
        log.write({{"step", 2}});
    }
    put_file(path, get_file(path) + "{\"step\":3,\"lo"); // torn by a kill
    {
        RunLog log(path, first);
        CHECK(log.bytes() == first);
        log.write({{"step", 20}});
    }
    CHECK(get_file(path) == "{\"step\":1}\n{\"step\":20}\n");
    {
        RunLog log(path, -1);
        CHECK(log.bytes() == 23);
        log.write({{"step", 21}});
    }
    CHECK(get_file(path) == "{\"step\":1}\n{\"step\":20}\n{\"step\":21}\n");
    CHECK(
        contains(message_of<RunFailed>([&] { RunLog log(path, 1000); }), path + " has 35 bytes, fewer than the 1000"));
    CHECK(get_file(path).size() == 35);
    { RunLog log(path, 0); }
    CHECK(get_file(path).empty());
    CHECK(contains(message_of<RunFailed>([&] { RunLog log(folder / "none/log.jsonl", -1); }), "none/log.jsonl"));
}

TEST_CASE("a full disk is said, and leaves whole lines") {
    if (access("/dev/full", W_OK) == 0) {
        RunLog log("/dev/full", -1);
        std::string said = message_of<RunFailed>([&] { log.write({{"step", 1}}); });
        CHECK(contains(said, "/dev/full: No space left"));
        CHECK(contains(said, "--resume"));
        CHECK(log.bytes() == 0);
    }
    // A limit of file size tears a write where a disk with a little room would.
    ScratchFolder folder;
    std::string path = folder / "log.jsonl";
    CHECK(run_in_child([&] {
              signal(SIGXFSZ, SIG_IGN);
              rlimit limit = {40, 40};
              demand(setrlimit(RLIMIT_FSIZE, &limit) == 0, "the limit is set");
              RunLog log(path, 0);
              log.write({{"step", 1}});
              std::string said = message_of<RunFailed>([&] { log.write({{"text", std::string(100, 'x')}}); });
              demand(contains(said, path), "the second write fails: " + said);
              demand(log.bytes() == 11, "its bytes do not count");
          }) == 0);
    CHECK(get_file(path) == "{\"step\":1}\n");
}

TEST_CASE("each line is one write, so that a kill tears at most the last") {
    ScratchFolder folder;
    RunLog log(folder / "log.jsonl", 0);
    int64_t before = writes;
    for (int i = 0; i < 5; i++) log.write({{"step", i}, {"text", std::string(100000, 'x')}});
    CHECK(writes - before == 5);
}

TEST_CASE("the step line") {
    CHECK(format_step(line_of(120)) ==
          "step 120/5000 | loss 3.4567 | lr 6.00e-04 | norm 0.874 | 12.3k tok/s | 71% of peak | 1h02m left");
    StepLine line = line_of(1);
    line.loss = NAN, line.grad_norm = INFINITY, line.peak_percent = NAN, line.seconds_left = NAN;
    line.tokens_per_second = 950;
    CHECK(format_step(line) == "step 1/5000 | loss nan | lr 6.00e-04 | norm inf | 950 tok/s | ? left");
    line.tokens_per_second = 1234567;
    CHECK(contains(format_step(line), "| 1.23M tok/s |"));

    struct Case {
        double seconds;
        const char* text;
    };
    for (const Case& c : std::vector<Case>{{0, "0s"},
                                           {12.4, "12s"},
                                           {59.4, "59s"},
                                           {59.6, "1m00s"},
                                           {200, "3m20s"},
                                           {3599.6, "1h00m"},
                                           {3723, "1h02m"},
                                           {47 * 3600 + 59 * 60, "47h59m"},
                                           {48 * 3600, "2d00h"},
                                           {51 * 3600 + 1800, "2d03h"},
                                           {-1, "?"},
                                           {NAN, "?"},
                                           {INFINITY, "?"}})
        CHECK(format_duration(c.seconds) == c.text);
}

TEST_CASE("piped: the first step, then one a while, the last, and plain lines") {
    CHECK(piped([] {
              Progress progress(3600);
              for (int64_t step = 1; step <= 4999; step++) progress.step(line_of(step));
              progress.say("saved");
              progress.step(line_of(5000));
              progress.finish();
          }) == format_step(line_of(1)) + "\nsaved\n" + format_step(line_of(5000)) + "\n");
    // A run that stops early shows how far it came.
    CHECK(piped([] {
              Progress progress(3600);
              for (int64_t step = 1; step <= 20; step++) progress.step(line_of(step));
              progress.finish();
              progress.finish();
          }) == format_step(line_of(1)) + "\n" + format_step(line_of(20)) + "\n");
    CHECK(piped([] {
              double now = 0;
              Progress progress(10, [&] { return now += 5; });
              for (int64_t step = 1; step <= 5; step++) progress.step(line_of(step));
          }) == format_step(line_of(1)) + "\n" + format_step(line_of(3)) + "\n" + format_step(line_of(5)) + "\n");
    CHECK(piped([] {
              Progress progress(0);
              for (int64_t step = 1; step <= 3; step++) progress.step(line_of(step));
          }) == format_step(line_of(1)) + "\n" + format_step(line_of(2)) + "\n" + format_step(line_of(3)) + "\n");
    CHECK(piped([] {
              Progress progress(3600);
              for (int64_t step : {1, 2, 5000}) progress.step(line_of(step));
          }) == format_step(line_of(1)) + "\n" + format_step(line_of(5000)) + "\n");
    CHECK(piped([] { Progress().finish(); }) == "");
}

TEST_CASE("on a terminal: one line, cut to the width, rewritten") {
    std::string first = format_step(line_of(1)), last = format_step(line_of(5000));
    auto body = [] {
        double now = 0;
        Progress progress(10, [&] { return now; });
        for (int64_t step = 1; step <= 10; step++, now += 0.009) progress.step(line_of(step)); // faster than it redraws
        progress.say("saved");
        progress.step(line_of(5000));
        progress.finish();
    };
    CHECK(on_terminal(200, body) == "\r" + first + "\x1b[K\r\x1b[Ksaved\r\n\r" + last + "\x1b[K\r\n");
    CHECK(on_terminal(30, body) ==
          "\r" + first.substr(0, 29) + "\x1b[K\r\x1b[Ksaved\r\n\r" + last.substr(0, 29) + "\x1b[K\r\n");
    CHECK(on_terminal(200, [] {
              double now = 0;
              Progress progress(3600, [&] { return now; });
              progress.step(line_of(1));
              now += 0.2;
              progress.step(line_of(2));
          }) == "\r" + first + "\x1b[K\r" + format_step(line_of(2)) + "\x1b[K\r\n"); // closed when it goes
    CHECK(contains(on_terminal(0, body), "\r" + first.substr(0, 79) + "\x1b[K"));    // a terminal that knows no width
}
