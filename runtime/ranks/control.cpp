#include "control.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <sstream>

#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "../base/errors.h"
#include "connection.h"

namespace {

constexpr double kStranger = 5;        // seconds for a greeting, once connected
constexpr size_t kGreeting = 64 << 10; // bytes of one
constexpr double kNotice = 10;         // seconds of waiting, whereupon the user is told of it
constexpr double kLate = 10;           // seconds for those that come to a run that is refused already
constexpr double kFarewell = 2;        // seconds for the last words to those that do not take them
constexpr double kSilence = 2;         // periods without the word that each brings
constexpr int kFlight = 1;             // milliseconds between looks at whether they have arrived
constexpr char kMagic[] = "longhand control 1\n";
enum Kind : char {
    kHello = 'h',
    kWelcome = 'w',
    kRefusal = 'r',
    kState = 's',
    kValue = 'v',
    kStop = 'x',
    kFailure = 'f',
    kBye = 'b'
};

// Fields in lines; no field may hold a line's end.
std::string join(const std::vector<std::string>& fields) {
    std::string text;
    for (std::string field : fields) {
        std::replace(field.begin(), field.end(), '\n', ' ');
        text += field + "\n";
    }
    return text;
}

std::vector<std::string> split(const std::string& text) {
    std::vector<std::string> fields;
    std::istringstream lines(text);
    for (std::string line; std::getline(lines, line);) fields.push_back(line);
    return fields;
}

std::vector<std::string> fields_of(const Hello& hello) {
    return {hello.options, hello.weights, hello.host, hello.device, std::to_string(hello.process), hello.wrong};
}

Hello hello_of(const std::vector<std::string>& fields, size_t first) {
    Hello hello;
    hello.options = fields.at(first), hello.weights = fields.at(first + 1), hello.host = fields.at(first + 2);
    hello.device = fields.at(first + 3), hello.process = atoi(fields.at(first + 4).c_str());
    hello.wrong = fields.at(first + 5);
    return hello;
}
constexpr size_t kHelloFields = 6;

std::string describe(int rank, const Hello& hello) {
    return "rank " + std::to_string(rank) + " (" + hello.host + ", process " + std::to_string(hello.process) + ")";
}

std::string describe(const Whereabouts& at) {
    std::string text = "step " + std::to_string(at.step) + ", " + at.phase;
    if (at.waiting) text += ", waiting for other ranks in collective " + std::to_string(at.collective);
    return text;
}

} // namespace

// To another rank.
struct Control::Link {
    int rank;
    Connection connection;
    std::deque<std::string> values;
    Whereabouts at;
    double heard = seconds_now(), moved = seconds_now();
    bool left = false; // it has said goodbye

    Link(int rank, Socket socket, size_t most = Connection::kMost) : rank(rank), connection(std::move(socket), most) {}
};

Control::Control(const Launch& launch, const Hello& own, double timeout) : launch_(launch), timeout_(timeout) {
    if (launch.rank == 0)
        meet_as_first(own);
    else
        join_first(own);
    wake_ = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    moved_ = seconds_now();
    for (auto& link : links_)
        if (link) link->heard = link->moved = seconds_now();
    service_ = std::thread([this] { serve(); });
}

std::string Control::name(int rank) const { return describe(rank, hellos_[rank]); }

// Rank 0: everyone's greeting, until all are here. Strangers are refused and forgotten.
void Control::meet_as_first(const Hello& own) {
    const Socket listener = listen_at(launch_.address, launch_.port);
    hellos_.resize(launch_.ranks);
    hellos_[0] = own;
    links_.resize(launch_.ranks);
    std::vector<std::unique_ptr<Link>> strangers;
    int missing = launch_.ranks - 1;
    std::string wrong; // why nobody can take part; those who are still to come are told, too
    double until = seconds_now() + timeout_;
    auto refuse_all = [&](const std::string& why) {
        if (!wrong.empty()) return;
        wrong = why;
        until = std::min(until, seconds_now() + kLate);
    };
    std::string turned_away; // whom this run does not concern, the last of them
    const std::string port = " port " + std::to_string(launch_.port);
    double notice = seconds_now() + kNotice;
    auto absent = [&] {
        std::string ranks;
        for (int rank = 1; rank < launch_.ranks; rank++)
            if (!links_[rank]) ranks += (ranks.empty() ? "rank " : ", ") + std::to_string(rank);
        return ranks + " of " + std::to_string(launch_.ranks);
    };
    if (!own.wrong.empty()) refuse_all(describe(0, own) + ": " + own.wrong);
    // What a greeting is refused for; `ours` if that is this run's fault.
    auto judge = [&](Link& link, const std::string& text, bool& ours) -> std::string {
        ours = false;
        const std::vector<std::string> fields = split(text);
        if (fields.size() != 4 + kHelloFields || fields[0] + "\n" != kMagic)
            return "this is the control channel of another program or version";
        if (fields[1] != launch_.run)
            return "another run has this port: '" + launch_.run + "', not '" + fields[1] + "'";
        ours = true;
        const int rank = atoi(fields[2].c_str());
        const Hello hello = hello_of(fields, 4);
        const std::string who = describe(rank, hello);
        // Where nothing names the run, other options may be another run's.
        if (launch_.run.empty() && hello.options != own.options) {
            ours = false;
            return who + " has other options than rank 0 (" + own.host + ", process " + std::to_string(own.process) +
                   "); runs of one machine at one time need LONGHAND_RUN or LONGHAND_PORT to be told apart";
        }
        if (!wrong.empty()) return wrong;
        if (!hello.wrong.empty()) return who + ": " + hello.wrong;
        if (fields[3] != std::to_string(launch_.ranks) || rank < 1 || rank >= launch_.ranks)
            return who + " was started for " + fields[3] + " ranks and rank 0 for " + std::to_string(launch_.ranks);
        if (links_[rank]) return who + " and " + name(rank) + " have one number";
        if (hello.options != own.options) return who + " has other options than rank 0";
        if (hello.weights != own.weights) return who + " has other weights than rank 0";
        for (int other = 0; other < launch_.ranks; other++)
            if (!hello.device.empty() && (other == 0 || links_[other]) && hellos_[other].host == hello.host &&
                hellos_[other].device == hello.device)
                return who + " and " + name(other) + " have one GPU (" + hello.device + "); give each rank its own";
        hellos_[rank] = hello;
        link.rank = rank;
        return "";
    };
    while (missing > 0) {
        std::vector<pollfd> polled{{listener.fd(), POLLIN, 0}};
        for (auto& stranger : strangers) polled.push_back({stranger->connection.fd(), POLLIN, 0});
        const double left = until - seconds_now();
        if (left <= 0) break;
        if (seconds_now() > notice) {
            notice = until;
            warn("waiting for " + absent() + " at" + port + " for " + std::to_string(int(left)) + " more seconds" +
                 turned_away);
        }
        poll(polled.data(), polled.size(), std::max(1, int(std::min(1.0, left) * 1000)));
        while (Socket one = accept_from(listener))
            strangers.push_back(std::make_unique<Link>(-1, std::move(one), kGreeting));
        for (auto& stranger : strangers) {
            Connection& connection = stranger->connection;
            char kind;
            std::string text;
            const bool open = connection.fill();
            // What begins otherwise is no rank of anybody's.
            if (connection.first() == kHello && connection.next(kind, text)) {
                bool ours;
                const std::string refused = judge(*stranger, text, ours);
                missing -= refused.empty() || ours;
                if (refused.empty()) {
                    connection.set_most();
                    links_[stranger->rank] = std::move(stranger);
                    continue;
                }
                connection.put(kRefusal, refused);
                connection.flush();
                connection.close();
                if (ours)
                    refuse_all(refused);
                else
                    turned_away = "; turned away: " + refused;
            } else if (!open || seconds_now() - stranger->heard > kStranger || connection.broken() ||
                       (connection.first() && connection.first() != kHello)) {
                connection.close();
            }
        }
        std::erase_if(strangers, [](auto& link) { return !link || !link->connection.open(); });
    }
    const bool late = missing > 0 && wrong.empty();
    if (late)
        wrong = absent() + " did not come within " + std::to_string(int(timeout_)) + " seconds to" + port + turned_away;
    if (!wrong.empty()) {
        for (auto& link : links_)
            if (link) link->connection.put(late ? kFailure : kRefusal, wrong), link->connection.flush();
        if (late) throw RunFailed(wrong);
        throw BadInput(wrong);
    }
    std::vector<std::string> all;
    for (const Hello& hello : hellos_)
        for (const std::string& field : fields_of(hello)) all.push_back(field);
    for (auto& link : links_)
        if (link) link->connection.put(kWelcome, join(all));
}

void Control::join_first(const Hello& own) {
    const double until = seconds_now() + timeout_;
    const std::string where = "rank 0 at " + launch_.address + ", port " + std::to_string(launch_.port);
    std::string why = "nobody answers";
    std::vector<std::string> greeting = {std::string(kMagic, strlen(kMagic) - 1), launch_.run,
                                         std::to_string(launch_.rank), std::to_string(launch_.ranks)};
    for (const std::string& field : fields_of(own)) greeting.push_back(field);
    for (double pause = 0.02; seconds_now() < until; pause = std::min(1.0, 2 * pause)) {
        if (Socket socket = connect_to(launch_.address, launch_.port, until, why)) {
            auto link = std::make_unique<Link>(0, std::move(socket));
            Connection& connection = link->connection;
            connection.put(kHello, join(greeting));
            char kind = 0;
            std::string text;
            for (bool open = true; open && !connection.next(kind, text) && seconds_now() < until;) {
                pollfd ready{connection.fd(), connection.events(), 0};
                poll(&ready, 1, 100);
                const bool flushed = connection.flush(); // though not, a refusal may have come
                open = connection.fill() && flushed;
                if (!open) connection.next(kind, text);
            }
            if (kind == kRefusal) throw BadInput(where + ": " + text);
            if (kind == kFailure) throw RunFailed(where + ": " + text);
            if (kind == kWelcome) {
                const std::vector<std::string> fields = split(text);
                for (int rank = 0; rank < launch_.ranks; rank++)
                    hellos_.push_back(hello_of(fields, rank * kHelloFields));
                links_.push_back(std::move(link));
                return;
            }
            why = "it answers and goes away, or is no rank 0";
        }
        usleep(useconds_t(pause * 1e6));
    }
    throw RunFailed(where + " was not reached within " + std::to_string(int(timeout_)) + " seconds: " + why);
}

Control::~Control() {
    if (std::uncaught_exceptions() > 0 && !ended_ && !failed()) fail("it stops for an error of its own");
    {
        std::lock_guard lock(mutex_);
        leaving_ = seconds_now();
        send_all(kBye, "");
    }
    service_.join();
    close(wake_);
}

// What follows is under the mutex; sending only fills the links, which the service empties.
void Control::send(Link& link, char kind, const std::string& text) {
    if (link.connection.open()) link.connection.put(kind, text);
    const uint64_t one = 1;
    if (write(wake_, &one, sizeof one) < 0) return; // full: then the service is awake
}

void Control::send_all(char kind, const std::string& text) {
    for (auto& link : links_)
        if (link) send(*link, kind, text);
}

void Control::send_state() {
    send_all(kState, join({here_.phase, std::to_string(here_.step), std::to_string(here_.collective),
                           here_.waiting ? "1" : "0", std::to_string(here_.signs)}));
}

// The first failure is the one that is told: the others follow from it.
void Control::set_failure(const std::string& what, ExitCode code) {
    if (!failure_.empty() || ended_) return;
    failure_ = what, failed_with_ = code, failed_at_ = seconds_now();
    if (launch_.rank == 0) send_all(kFailure, join({std::to_string(code), what}));
    changed_.notify_all();
}

void Control::lose(Link& link) {
    link.connection.close();
    if (!link.left && !leaving_) set_failure(name(link.rank) + " ended without a word: " + describe(link.at));
    changed_.notify_all();
}

void Control::take(Link& link, char kind, const std::string& text) {
    link.heard = seconds_now();
    if (kind == kState) {
        const std::vector<std::string> f = split(text);
        if (f.size() != 5) return lose(link);
        const Whereabouts at{f[0], atoll(f[1].c_str()), atoll(f[2].c_str()), f[3] == "1", atoll(f[4].c_str())};
        if (at.signs != link.at.signs) link.moved = link.heard;
        link.at = at;
    } else if (kind == kValue) {
        link.values.push_back(text);
    } else if (kind == kStop) {
        if (!stop_) stop_ = atoi(text.c_str());
    } else if (kind == kFailure) {
        told_ = launch_.rank != 0 && failure_.empty();
        const std::vector<std::string> said = split(text);
        if (said.size() != 2) return lose(link);
        set_failure(launch_.rank == 0 ? name(link.rank) + ": " + said[1] : said[1], ExitCode(atoi(said[0].c_str())));
    } else if (kind == kBye) {
        link.left = true;
    }
    changed_.notify_all();
}

void Control::receive(Link& link) {
    const bool open = link.connection.fill();
    char kind;
    std::string text;
    while (link.connection.open() && link.connection.next(kind, text)) take(link, kind, text);
    if (link.connection.open() && (!open || link.connection.broken())) lose(link);
}

// Who keeps the others waiting: a rank that waits for nobody and makes no progress; where all wait for each other, the
// one furthest behind.
void Control::watch(double time) {
    if (!failure_.empty() || leaving_) return;
    bool silent = false; // some rank, so that others may be late for no fault of theirs
    for (auto& link : links_) {
        if (!link || !link->connection.open() || link->left) continue;
        if (time - link->heard > timeout_)
            return set_failure(name(link->rank) + " has not answered for " + std::to_string(int(timeout_)) +
                               " seconds: " + describe(link->at));
        silent |= time - link->heard > kSilence * period();
    }
    if (launch_.rank != 0 || silent) return;
    struct Seen {
        int rank;
        Whereabouts at;
        double moved;
    };
    std::vector<Seen> ranks = {{0, here_, moved_}};
    for (auto& link : links_)
        if (link && link->connection.open() && !link->left) ranks.push_back({link->rank, link->at, link->moved});
    auto late = [&](const Seen& one) { return time - one.moved > timeout_; };
    auto works = [](const Seen& one) { return !one.at.waiting; };
    auto culprit = std::find_if(ranks.begin(), ranks.end(), [&](const Seen& one) { return works(one) && late(one); });
    if (culprit == ranks.end() && std::all_of(ranks.begin(), ranks.end(), late)) // all wait
        culprit = std::min_element(ranks.begin(), ranks.end(),
                                   [](const Seen& a, const Seen& b) { return a.at.collective < b.at.collective; });
    if (culprit != ranks.end())
        set_failure(name(culprit->rank) + " has made no progress for " + std::to_string(int(timeout_)) +
                    " seconds (--timeout): " + describe(culprit->at));
}

// Whether a failed run's rank has had its time to end.
bool Control::is_over(double now) const {
    if (failure_.empty() || leaving_) return false;
    if (launch_.rank == 0)
        return holding_ ? now - std::max(failed_at_, moved_) > timeout_ : now - failed_at_ > std::min(kGrace, timeout_);
    const Link& first = *links_[0];
    const bool alone = first.left || !first.connection.open() || now - first.heard > timeout_;
    return !waiting_for_first_ && alone && now - failed_at_ > std::min(kGrace, timeout_);
}

// Seconds between a rank's words.
double Control::period() const { return std::min(1.0, timeout_ / 5); }

void Control::serve() {
    double told = 0, before = seconds_now();
    for (std::unique_lock lock(mutex_);; before = seconds_now()) {
        const double time = seconds_now();
        if (time - told >= period()) {
            told = time;
            send_state();
            watch(time);
        }
        std::vector<pollfd> polled{{wake_, POLLIN, 0}};
        std::vector<Link*> of{nullptr};
        bool pending = false;
        for (auto& link : links_) {
            if (!link || !link->connection.open()) continue;
            if (!link->connection.flush()) { // it has gone; what it said last may still be here
                receive(*link);
                if (link->connection.open()) lose(*link);
                continue;
            }
            pending |= link->connection.pending() || (leaving_ && link->connection.in_flight());
            polled.push_back({link->connection.fd(), link->connection.events(), 0});
            of.push_back(link.get());
        }
        if (leaving_ && (!pending || time - leaving_ > kFarewell)) return;
        if (is_over(time)) {
            if (tells()) tell(failure_);
            _exit(failed_with_);
        }
        lock.unlock();
        poll(polled.data(), polled.size(), leaving_ ? kFlight : int(period() * 1000));
        uint64_t count;
        while (read(wake_, &count, sizeof count) > 0) {
        }
        lock.lock();
        if (seconds_now() - before > kSilence * period() + period()) { // this machine slept, and others perhaps
            moved_ = seconds_now();
            for (auto& link : links_)
                if (link) link->heard = link->moved = moved_;
        }
        for (size_t i = 1; i < of.size(); i++)
            if (of[i]->connection.open() && (polled[i].revents & (POLLIN | POLLHUP | POLLERR))) receive(*of[i]);
    }
}

// The next value of a rank; waiting for it is no progress.
std::string Control::next_value(std::unique_lock<std::mutex>& lock, Link& link) {
    constexpr auto kPause = std::chrono::milliseconds(2);
    here_.waiting = true;
    auto ready = [&] { return !link.values.empty() || !failure_.empty() || link.left; };
    while (!changed_.wait_for(lock, kPause, ready)) {
        lock.unlock();
        while_waiting();
        lock.lock();
    }
    here_.waiting = false;
    if (!failure_.empty()) throw Failure(failed_with_, failure_);
    if (link.values.empty())
        throw RunFailed(name(link.rank) + " has left the run while rank " + std::to_string(launch_.rank) +
                        " waits for it");
    std::string value = std::move(link.values.front());
    link.values.pop_front();
    here_.signs++, moved_ = seconds_now();
    return value;
}

std::string Control::broadcast(const std::string& value) {
    std::unique_lock lock(mutex_);
    if (!failure_.empty()) throw Failure(failed_with_, failure_);
    if (launch_.rank != 0) return next_value(lock, *links_[0]);
    send_all(kValue, value);
    here_.signs++, moved_ = seconds_now();
    return value;
}

std::vector<std::string> Control::gather(const std::string& value) {
    std::unique_lock lock(mutex_);
    if (!failure_.empty()) throw Failure(failed_with_, failure_);
    if (launch_.rank != 0) {
        send(*links_[0], kValue, value);
        return {};
    }
    std::vector<std::string> all = {value};
    for (int rank = 1; rank < launch_.ranks; rank++) all.push_back(next_value(lock, *links_[rank]));
    return all;
}

void Control::barrier() {
    gather("");
    broadcast();
}

void Control::end_together() {
    barrier();
    std::lock_guard lock(mutex_);
    ended_ = true;
}

void Control::enter(const std::string& phase, int64_t step) {
    std::lock_guard lock(mutex_);
    here_.phase = phase, here_.step = step, here_.signs++, moved_ = seconds_now();
    send_state();
}

void Control::set_timeout(double seconds) {
    std::lock_guard lock(mutex_);
    timeout_ = seconds;
}

void Control::progress() {
    std::lock_guard lock(mutex_);
    here_.signs++, moved_ = seconds_now();
}

void Control::begin_waiting(int64_t collective) {
    std::lock_guard lock(mutex_);
    here_.collective = collective, here_.waiting = true;
}

void Control::end_waiting() {
    std::lock_guard lock(mutex_);
    here_.waiting = false, here_.signs++, moved_ = seconds_now();
}

void Control::request_stop(int signal) {
    std::lock_guard lock(mutex_);
    if (launch_.rank == 0) {
        if (!stop_) stop_ = signal;
    } else {
        send(*links_[0], kStop, std::to_string(signal));
    }
}

int Control::stop_requested() {
    std::lock_guard lock(mutex_);
    return stop_;
}

void Control::fail(const std::string& what, ExitCode code) {
    std::lock_guard lock(mutex_);
    if (launch_.rank == 0)
        set_failure(name(0) + ": " + what, code);
    else
        send(*links_[0], kFailure, join({std::to_string(code), what}));
}

// One rank prints what all of them throw: rank 0, or, if that one can tell nobody any more, the first of each machine,
// of which one may be gone.
bool Control::tells() const {
    if (launch_.rank == 0 || told_) return launch_.rank == 0;
    for (int other = 1; other < launch_.rank; other++)
        if (hellos_[other].host == hellos_[launch_.rank].host) return false;
    return true;
}

bool Control::failed() {
    std::lock_guard lock(mutex_);
    return !failure_.empty();
}

void Control::wait_for_first() {
    if (launch_.rank == 0) return;
    std::unique_lock lock(mutex_);
    waiting_for_first_ = true;
    const Link& link = *links_[0];
    while (!link.left && link.connection.open() && seconds_now() - link.heard < timeout_)
        changed_.wait_for(lock, std::chrono::seconds(1));
}

void Control::hold(bool on) {
    std::lock_guard lock(mutex_);
    holding_ = on;
    failed_at_ = seconds_now(); // from now on, if anything has
}

Failure Control::failure() {
    std::lock_guard lock(mutex_);
    return Failure(failed_with_, failure_);
}

void Control::check() {
    std::lock_guard lock(mutex_);
    if (!failure_.empty()) throw Failure(failed_with_, failure_);
}
