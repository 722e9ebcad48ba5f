// The control channel between the ranks of a run, apart from the data: who is there, what was decided, who failed. A
// TCP connection from every rank to rank 0, which a thread of its own serves on each, so that it answers whatever the
// main thread does. The same in all builds; one rank has none.
//
// Main threads call broadcast(), gather() and barrier() in one order on all ranks. Whatever goes wrong anywhere is told
// to everybody once, in one line that names the rank: those that wait here throw it (with that rank's exit code), the
// others find it with check(), and a rank whose main thread does not look for kGrace seconds, or the timeout if that is
// less, is ended: rank 0 first, whom the others give the time to save what it has.
#pragma once
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "../base/errors.h"
#include "launch.h"

// What a rank says of itself when it comes. Options and weights are hashes.
struct Hello {
    std::string options, weights;
    std::string host, device; // a GPU's UUID; empty in the cpu build, whose ranks share their machine
    int process = 0;
    std::string wrong; // why this rank cannot take part: all are then refused for it, by BadInput
};

// What a rank is doing, for the line that says where it was lost.
struct Whereabouts {
    std::string phase = "start";
    int64_t step = 0, collective = 0;
    bool waiting = false; // in that collective, for other ranks
    int64_t signs = 0;    // of progress, so far
};

class Control {
public:
    static constexpr double kGrace = 10;

    // Meets all ranks and compares what they say. Throws RunFailed naming who has not come within `timeout` seconds or
    // where rank 0 cannot be reached, and BadInput naming a rank with other options or weights, two with one GPU, two
    // of one number. A process of another run is refused, and is told so; it harms no run that it does not belong to.
    Control(const Launch& launch, const Hello& own, double timeout);
    // Goodbye: without it a connection that ends is a rank that died.
    ~Control();
    Control(const Control&) = delete;
    Control& operator=(const Control&) = delete;

    int rank() const { return launch_.rank; }
    int ranks() const { return launch_.ranks; }
    const std::vector<Hello>& hellos() const { return hellos_; } // by rank
    void set_timeout(double seconds);                            // from now on

    std::string broadcast(const std::string& value = "");      // rank 0's
    std::vector<std::string> gather(const std::string& value); // all, by rank, on rank 0; empty elsewhere
    void barrier();
    // A barrier before an end that all ranks have agreed on, whatever their exit code: whoever leaves after it, and
    // however, is no failure.
    void end_together();

    // Signs of progress. A rank that gives none for `timeout` seconds, or does not answer at all, ends the run.
    void enter(const std::string& phase, int64_t step);
    void progress();
    void begin_waiting(int64_t collective); // for other ranks, which is no progress but no fault of this rank's
    void end_waiting();

    void request_stop(int signal);
    int stop_requested(); // on rank 0: the signal that any rank asked to stop for, or 0

    void fail(const std::string& what, ExitCode code = kRunFailed); // of this rank, to all
    bool failed();
    void check();       // throws Failure once anything has failed
    bool tells() const; // whether this rank is the one to print it
    Failure failure();  // that line; empty: none yet
    // Elsewhere than on rank 0: until rank 0 has left or does not answer. Before a rank ends with another exit code
    // than 0, whereupon mpirun ends all that are there.
    void wait_for_first();
    // On rank 0: what it does is worth waiting for though the run has failed, for as long as it makes progress.
    void hold(bool on);

    // Prints a line for the user, where the main thread does not come to it. Set before anything may fail.
    std::function<void(const std::string&)> tell = [](const std::string& line) {
        fprintf(stderr, "%s\n", line.c_str());
    };
    // Called now and then by a main thread that waits for others, here or in Comm.
    std::function<void()> while_waiting = [] {};

private:
    struct Link;

    const Launch launch_;
    std::vector<Hello> hellos_;
    std::vector<std::unique_ptr<Link>> links_; // rank 0: by rank, its own empty; elsewhere one, to rank 0
    int wake_ = -1;                            // an eventfd that ends the service's wait
    std::mutex mutex_;                         // of all that follows, and of what the links hold
    std::condition_variable changed_;
    double timeout_;
    Whereabouts here_;
    double moved_ = 0; // when here_.signs last grew
    std::string failure_;
    ExitCode failed_with_ = kRunFailed;
    bool told_ = false;  // by rank 0
    bool ended_ = false; // together
    bool holding_ = false, waiting_for_first_ = false;
    double failed_at_ = 0;
    int stop_ = 0;
    double leaving_ = 0; // since when, or 0
    std::thread service_;

    void meet_as_first(const Hello& own);
    void join_first(const Hello& own);
    void serve();
    void receive(Link& link);
    void take(Link& link, char kind, const std::string& text);
    void lose(Link& link);
    void watch(double now);
    double period() const;
    void send(Link& link, char kind, const std::string& text);
    void send_all(char kind, const std::string& text);
    void send_state();
    void set_failure(const std::string& what, ExitCode code = kRunFailed);
    bool is_over(double now) const;
    std::string next_value(std::unique_lock<std::mutex>& lock, Link& link);
    std::string name(int rank) const;
};
