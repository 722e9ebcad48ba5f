// runtime/ranks/control.h over processes: who meets and who is refused, values in order, and that whatever befalls a
// rank ends all of them with a line that names it.
#include <doctest/doctest.h>

#include <chrono>
#include <filesystem>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>

#include "../runtime/base/errors.h"
#include "../runtime/ranks/control.h"
#include "scratch.h"

namespace {

using Words = std::vector<std::string>;

int free_port() {
    const int fd = socket(AF_INET, SOCK_STREAM, 0);
    sockaddr_in at{};
    at.sin_family = AF_INET, at.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t size = sizeof at;
    const bool bound = bind(fd, reinterpret_cast<sockaddr*>(&at), size) == 0 &&
                       getsockname(fd, reinterpret_cast<sockaddr*>(&at), &size) == 0;
    close(fd);
    REQUIRE(bound);
    return ntohs(at.sin_port);
}

int connected(int port) {
    sockaddr_in at{};
    at.sin_family = AF_INET, at.sin_addr.s_addr = htonl(INADDR_LOOPBACK), at.sin_port = htons(uint16_t(port));
    for (int tries = 0; tries < 500; tries++) {
        const int fd = socket(AF_INET, SOCK_STREAM, 0);
        if (connect(fd, reinterpret_cast<sockaddr*>(&at), sizeof at) == 0) return fd;
        close(fd);
        usleep(10000);
    }
    throw std::runtime_error("nobody listens");
}

void pause(double seconds) { usleep(useconds_t(seconds * 1e6)); }

constexpr double kTimeout = 20, kShort = 1.5; // of runs in which nobody is lost; of those in which somebody is

// Ranks as processes. Each writes to a file what its body throws; exit() tells how each ended.
struct Ranks {
    ScratchFolder folder;
    const int port = free_port();
    std::vector<pid_t> processes;

    Launch launch(int rank, int ranks, const std::string& run = "this") const {
        return {rank, ranks, rank, "a test", "127.0.0.1", port, run};
    }
    Hello hello(int rank) const {
        return {"options", "weights", "host" + std::to_string(rank / 2), "gpu" + std::to_string(rank), getpid(), ""};
    }
    pid_t start(const std::function<void()>& body) {
        fflush(nullptr);
        const size_t number = processes.size();
        const pid_t child = fork();
        if (child == 0) {
            int status = 0;
            try {
                body();
            } catch (const Failure& failure) {
                put_file(folder / std::to_string(number), failure.what());
                status = failure.exit_code;
            } catch (const std::exception& error) {
                put_file(folder / std::to_string(number), std::string("unexpected: ") + error.what());
                status = 99;
            }
            _exit(status);
        }
        processes.push_back(child);
        return child;
    }
    void start_all(int ranks, const std::function<void(Control&)>& body, double timeout = kTimeout) {
        for (int rank = 0; rank < ranks; rank++)
            start([=, this] {
                Control control(launch(rank, ranks), hello(rank), timeout);
                body(control);
            });
    }
    // Exit codes, 128 + signal for those that were killed.
    std::vector<int> ends() {
        std::vector<int> codes;
        for (const pid_t process : processes) {
            int status = 0;
            while (waitpid(process, &status, 0) < 0) {
            }
            codes.push_back(WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status));
        }
        return codes;
    }
    std::string said(int number) const {
        std::ifstream file(folder / std::to_string(number));
        return std::string(std::istreambuf_iterator<char>(file), {});
    }
    ~Ranks() {
        for (const pid_t process : processes) kill(process, SIGKILL);
    }
};

// Works and waits as a rank does, until something is wrong.
void go_on(Control& control) {
    for (int64_t step = 1;; step++) {
        control.enter("forward", step);
        control.begin_waiting(step);
        control.barrier();
        control.end_waiting();
    }
}

// Waits in a collective until something is wrong.
void wait_in(Control& control, int64_t collective) {
    control.enter("backward", 7);
    control.begin_waiting(collective);
    for (;; pause(0.01)) control.check();
}

} // namespace

TEST_CASE("ranks meet, and values go both ways in order") {
    for (const int ranks : {2, 3, 8}) {
        CAPTURE(ranks);
        Ranks all;
        all.start_all(ranks, [&](Control& control) {
            demand(control.ranks() == ranks && int(control.hellos().size()) == ranks, "all are there");
            for (int rank = 0; rank < ranks; rank++)
                demand(control.hellos()[rank].host == "host" + std::to_string(rank / 2), "hosts are known everywhere");
            for (int i = 0; i < 200; i++) {
                const std::string said = control.broadcast(control.rank() ? "" : "decision " + std::to_string(i));
                demand(said == "decision " + std::to_string(i), "rank 0's value");
                const Words words = control.gather(std::to_string(control.rank() * 1000 + i));
                demand(int(words.size()) == (control.rank() ? 0 : ranks), "values on rank 0");
                for (size_t rank = 0; rank < words.size(); rank++)
                    demand(words[rank] == std::to_string(rank * 1000 + i), "each rank's value");
            }
            const std::string large(3 << 20, 'x');
            demand(control.broadcast(control.rank() ? "" : large) == large, "a large value");
            demand(control.broadcast() == "", "an empty one");
            control.barrier();
        });
        for (const int code : all.ends()) CHECK(code == 0);
    }
}

TEST_CASE("who does not belong together is refused and named") {
    struct Case {
        std::function<void(Launch&, Hello&)> change; // of the last rank
        const char* said;
    };
    const std::vector<Case> cases = {
        {[](Launch&, Hello& h) { h.options = "other"; }, "has other options than rank 0"},
        {[](Launch&, Hello& h) { h.weights = "other"; }, "has other weights than rank 0"},
        {[](Launch&, Hello& h) { h.wrong = "no GPU"; }, "): no GPU"},
        {[](Launch&, Hello& h) { h.host = "host0", h.device = "gpu1"; }, "have one GPU (gpu1)"},
        {[](Launch& l, Hello&) { l.rank = 1; }, "have one number"},
        {[](Launch& l, Hello&) { l.ranks = 4; }, "was started for 4 ranks and rank 0 for 3"},
    };
    for (const Case& c : cases) {
        CAPTURE(c.said);
        Ranks all;
        for (int rank = 0; rank < 3; rank++)
            all.start([&, rank] {
                Launch launch = all.launch(rank, 3);
                Hello hello = all.hello(rank);
                if (rank == 2) pause(0.3), c.change(launch, hello); // after rank 1
                Control control(launch, hello, kTimeout);
                control.barrier();
            });
        for (const int code : all.ends()) CHECK(code == kBadInput);
        for (int rank = 0; rank < 3; rank++) CHECK(contains(all.said(rank), c.said));
    }
}

TEST_CASE("without a GPU two ranks may share a machine") {
    Ranks all;
    for (int rank = 0; rank < 2; rank++)
        all.start([&, rank] {
            Control control(all.launch(rank, 2), {"options", "weights", "host", "", getpid(), ""}, kTimeout);
            control.barrier();
        });
    CHECK(all.ends() == std::vector<int>{0, 0});
}

TEST_CASE("who is missing is named, and so is a rank 0 that is not there") {
    Ranks all;
    for (const int rank : {0, 2})
        all.start([&, rank] { Control control(all.launch(rank, 4), all.hello(rank), rank ? kTimeout : kShort); });
    CHECK(all.ends() == std::vector<int>(2, kRunFailed));
    CHECK(contains(all.said(1), "rank 1, 3 of 4 did not come"));
    CHECK(contains(all.said(0), "rank 1, 3 of 4 did not come within 1 seconds"));
    Ranks alone;
    alone.start([&] { Control control(alone.launch(1, 2), alone.hello(1), kShort); });
    CHECK(alone.ends() == std::vector<int>{kRunFailed});
    CHECK(contains(alone.said(0), "rank 0 at 127.0.0.1, port " + std::to_string(alone.port) + " was not reached"));
    CHECK(contains(alone.said(0), "Connection refused"));
}

TEST_CASE("a process of another run and strangers harm nothing") {
    Ranks all;
    all.start([&] { // those who are there first
        const int web = connected(all.port), silent = connected(all.port), mad = connected(all.port);
        demand(write(web, "GET / HTTP/1.1\r\n\r\n", 18) == 18, "sent");
        demand(write(mad, "h\xff\xff\xff\xff????", 9) == 9, "sent");
        char byte;
        demand(read(web, &byte, 1) == 0 && read(mad, &byte, 1) == 0, "strangers are let go");
        Control control(all.launch(1, 2, "that"), all.hello(1), kTimeout);
        close(silent);
    });
    all.start([&] {
        Control control(all.launch(0, 2), all.hello(0), kTimeout);
        control.barrier();
    });
    all.start([&] {
        pause(0.5);
        Control control(all.launch(1, 2), all.hello(1), kTimeout);
        control.barrier();
    });
    CHECK(all.ends() == std::vector<int>{kBadInput, 0, 0});
    CHECK(contains(all.said(0), "another run has this port: 'this', not 'that'"));
}

TEST_CASE("who comes late to a run that is refused is told so") {
    Ranks all;
    for (int rank = 0; rank < 3; rank++)
        all.start([&, rank] {
            if (rank == 2) pause(1);
            Hello own = all.hello(rank);
            if (rank == 1) own.weights = "other";
            Control control(all.launch(rank, 3), own, kTimeout);
        });
    CHECK(all.ends() == std::vector<int>(3, kBadInput));
    for (int rank = 0; rank < 3; rank++) CHECK(contains(all.said(rank), "has other weights than rank 0"));
}

TEST_CASE("where nothing names the run, who has other options is of another one") {
    Ranks all;
    all.start([&] {
        Hello stranger = all.hello(1);
        stranger.options = "other";
        Control control(all.launch(1, 2, ""), stranger, kTimeout);
    });
    pause(0.3);
    all.start([&] {
        Control control(all.launch(0, 2, ""), all.hello(0), kTimeout);
        control.barrier();
    });
    all.start([&] {
        pause(0.7);
        Control control(all.launch(1, 2, ""), all.hello(1), kTimeout);
        control.barrier();
    });
    CHECK(all.ends() == std::vector<int>{kBadInput, 0, 0});
    CHECK(contains(all.said(0), "has other options than rank 0"));
    CHECK(contains(all.said(0), "LONGHAND_RUN"));
}

TEST_CASE("any rank's signal to stop reaches rank 0, the first one counts") {
    Ranks all;
    all.start_all(3, [](Control& control) {
        if (control.rank() == 2) control.request_stop(SIGUSR1);
        control.barrier();
        if (control.rank() == 1) control.request_stop(SIGTERM);
        control.barrier();
        demand(control.stop_requested() == (control.rank() ? 0 : SIGUSR1), "rank 0 knows");
    });
    CHECK(all.ends() == std::vector<int>{0, 0, 0});
}

TEST_CASE("a failure is everybody's, and says whose it was") {
    for (const int culprit : {0, 2}) {
        CAPTURE(culprit);
        Ranks all;
        all.start_all(4, [&](Control& control) {
            if (control.rank() == culprit) {
                control.fail("the loss is not finite");
                for (;; pause(0.01)) control.check();
            }
            go_on(control);
        });
        CHECK(all.ends() == std::vector<int>(4, kRunFailed));
        for (int rank = 0; rank < 4; rank++)
            CHECK(contains(all.said(rank), "rank " + std::to_string(culprit) + " (host" + std::to_string(culprit / 2) +
                                               ", process " + std::to_string(all.processes[culprit]) +
                                               "): the loss is not finite"));
    }
}

TEST_CASE("a stop that all have agreed on is nobody's failure, however early some leave") {
    for (const int early : {0, 1}) {
        CAPTURE(early);
        Ranks all;
        all.start_all(3, [&](Control& control) {
            control.broadcast("stop");
            control.end_together();
            if (control.rank() == early) throw Failure(kStopped, "stopped");
            pause(0.3);
            control.check();
            throw Failure(kStopped, "stopped");
        });
        CHECK(all.ends() == std::vector<int>(3, kStopped));
    }
}

TEST_CASE("what was said last arrives, though whoever said it has gone and was being spoken to") {
    for (int round = 0; round < 30; round++) {
        Ranks all;
        all.start_all(3, [&](Control& control) {
            control.barrier();
            for (int i = 0; i < 200 && control.rank(); i++) control.request_stop(SIGTERM);
            demand(control.broadcast(std::string(1 << 16, 'x')).size() == 1 << 16, "all of it");
        });
        CHECK(all.ends() == std::vector<int>(3, 0));
    }
}

TEST_CASE("of several failures the first is told") {
    Ranks all;
    all.start_all(3, [](Control& control) {
        if (control.rank() == 1) control.fail("the first");
        while (control.rank() == 2 && !control.failed()) pause(0.01);
        if (control.rank() == 2) control.fail("what follows");
        pause(0.5);
        control.check();
    });
    CHECK(all.ends() == std::vector<int>(3, kRunFailed));
    for (int rank = 0; rank < 3; rank++) CHECK(contains(all.said(rank), "): the first"));
}

TEST_CASE("an exception that nobody told of, and a rank that leaves while others wait") {
    Ranks all;
    all.start_all(3, [](Control& control) {
        if (control.rank() == 1) throw RunFailed("disk full");
        go_on(control);
    });
    CHECK(all.ends() == std::vector<int>(3, kRunFailed));
    CHECK(all.said(1) == "disk full");
    for (const int rank : {0, 2}) CHECK(contains(all.said(rank), "rank 1 (host0"));
    Ranks left;
    left.start_all(3, [](Control& control) {
        if (control.rank() != 1) control.barrier();
    });
    const std::vector<int> ends = left.ends();
    CHECK(ends[0] == kRunFailed);
    CHECK(ends[2] == kRunFailed);
    CHECK(contains(left.said(0), "has left the run while rank 0 waits for it"));
}

TEST_CASE("a rank that is killed is named, with what it was doing") {
    for (const int killed : {0, 1}) {
        CAPTURE(killed);
        Ranks all;
        all.start_all(3, [&](Control& control) {
            control.enter("backward", 7);
            control.barrier();
            if (control.rank() == killed) {
                pause(1.2); // its state goes out every second
                raise(SIGKILL);
            }
            wait_in(control, 3);
        });
        const std::vector<int> ends = all.ends();
        for (int rank = 0; rank < 3; rank++) {
            CHECK(ends[rank] == (rank == killed ? 128 + SIGKILL : kRunFailed));
            if (rank == killed) continue;
            CHECK(contains(all.said(rank), "rank " + std::to_string(killed) + " (host0, process "));
            CHECK(contains(all.said(rank), "ended without a word: step 7, backward"));
        }
    }
}

TEST_CASE("a rank that makes no progress is named, not those that wait for it") {
    for (const int stuck : {0, 2}) {
        CAPTURE(stuck);
        Ranks all;
        all.start_all(
            3,
            [&](Control& control) {
                if (control.rank() != stuck) wait_in(control, 3);
                control.enter("save", 7);
                for (int i = 0; i < 20; i++) pause(0.1), control.progress(); // longer than the timeout, and no fault
                demand(!control.failed(), "progress is progress");
                for (;; pause(0.01)) control.check();
            },
            kShort);
        CHECK(all.ends() == std::vector<int>(3, kRunFailed));
        for (int rank = 0; rank < 3; rank++) {
            CHECK(contains(all.said(rank), "rank " + std::to_string(stuck) + " (host"));
            CHECK(contains(all.said(rank), "has made no progress for 1 seconds (--timeout): step 7, save"));
        }
    }
}

TEST_CASE("a rank that skipped a collective is the one behind") {
    Ranks all;
    all.start_all(
        3, [](Control& control) { wait_in(control, control.rank() == 1 ? 4 : 5); }, kShort);
    CHECK(all.ends() == std::vector<int>(3, kRunFailed));
    for (int rank = 0; rank < 3; rank++) CHECK(contains(all.said(rank), "rank 1 (host0"));
    CHECK(contains(all.said(0), "waiting for other ranks in collective 4"));
}

TEST_CASE("a process that is stopped is named by the others") {
    for (const int stopped : {0, 1}) {
        CAPTURE(stopped);
        Ranks all;
        all.start_all(
            3, [](Control& control) { go_on(control); }, kShort);
        pause(0.5);
        kill(all.processes[stopped], SIGSTOP);
        for (int rank = 0; rank < 3; rank++) {
            if (rank == stopped) continue;
            int status = 0;
            waitpid(all.processes[rank], &status, 0);
            CHECK(WEXITSTATUS(status) == kRunFailed);
            CHECK(contains(all.said(rank), "rank " + std::to_string(stopped) + " (host0"));
        }
        kill(all.processes[stopped], SIGCONT); // it finds out, and ends
        int status = 0;
        waitpid(all.processes[stopped], &status, 0);
        CHECK(WEXITSTATUS(status) == kRunFailed);
    }
}

TEST_CASE("a process that is stopped is named, and not one that waits for it without saying so") {
    Ranks all;
    all.start_all(
        3,
        [](Control& control) {
            if (control.rank() == 2) pause(0.5), raise(SIGSTOP);
            for (;; pause(0.01)) control.check();
        },
        kShort);
    for (const int rank : {0, 1}) {
        int status = 0;
        waitpid(all.processes[rank], &status, 0);
        CHECK(WEXITSTATUS(status) == kRunFailed);
        CHECK(contains(all.said(rank), "rank 2 (host1"));
    }
    kill(all.processes[2], SIGCONT);
    waitpid(all.processes[2], nullptr, 0);
}

TEST_CASE("rank 0 is given the time to save what it has, while it makes progress") {
    Ranks all;
    all.start_all(
        3,
        [&](Control& control) {
            if (control.rank() == 1) control.fail("disk full");
            while (!control.failed()) pause(0.01);
            if (control.rank() == 0) {
                control.hold(true);
                for (int i = 0; i < 30; i++) pause(0.1), control.progress(); // longer than the timeout
                put_file(all.folder / "saved", "");
                control.hold(false);
            } else if (control.rank() == 1) {
                control.wait_for_first();
                demand(std::filesystem::exists(all.folder / "saved"), "it has waited");
            } else {
                for (;;) pause(0.1); // does not look
            }
            throw control.failure();
        },
        kShort);
    CHECK(all.ends() == std::vector<int>(3, kRunFailed));
    for (const int rank : {0, 1}) CHECK(contains(all.said(rank), "): disk full"));
}

TEST_CASE("a machine that slept finds no fault with others for that") {
    Ranks all;
    all.start_all(
        2,
        [](Control& control) {
            control.barrier();
            for (int i = 0; i < 40; i++) pause(0.1), control.progress();
            control.barrier();
        },
        kShort);
    pause(0.5);
    for (const pid_t process : all.processes) kill(process, SIGSTOP);
    pause(2 * kShort);
    for (const pid_t process : all.processes) kill(process, SIGCONT);
    CHECK(all.ends() == std::vector<int>(2, 0));
}

TEST_CASE("a rank that computes on though the run has failed is ended") {
    Ranks all;
    all.start_all(
        2,
        [](Control& control) {
            if (control.rank() == 0) control.fail("out of memory");
            for (;; pause(0.01)) control.progress();
        },
        kShort);
    CHECK(all.ends() == std::vector<int>(2, kRunFailed));
}
