#include "ranks.h"

#include <algorithm>
#include <cstdlib>

#include <omp.h>
#include <unistd.h>

#include "../base/errors.h"
#include "../base/progress.h"
#include "../base/signals.h"
#include "../files/files.h"

static std::string host_name() {
    char name[256] = {};
    return gethostname(name, sizeof name - 1) == 0 ? name : "a machine without a name";
}

Ranks::Ranks(const std::string& options, double timeout)
    : launch_(find_launch([](const char* name) -> const char* { return std::getenv(name); })) {
    if (launch_.ranks == 1) return;
    Hello own;
    char hash[17];
    snprintf(hash, sizeof hash, "%016llx", static_cast<unsigned long long>(bytes_hash(options.data(), options.size())));
    own.options = hash, own.host = host_name(), own.process = getpid();
    try {
        choose_device(launch_.local_rank);
        own.device = device_identity();
    } catch (const Failure& failure) {
        own.wrong = failure.what();
    }
    control_ = std::make_unique<Control>(launch_, own, timeout);
    const auto& all = control_->hellos();
    local_ = int(std::count_if(all.begin(), all.end(), [&](const Hello& other) { return other.host == own.host; }));
    // A share of the machine's cores, unless the user has said how many.
    if (local_ > 1 && !std::getenv("OMP_NUM_THREADS"))
        omp_set_num_threads(threads_ = std::max(1, omp_get_num_procs() / local_));
    control_->while_waiting = [this] {
        pass_on_signals();
        if (const int signal = stop_signal()) control_->request_stop(signal);
    };
    on_progress = [this] { control_->progress(); };
}

Ranks::~Ranks() { on_progress = nullptr; }

void Ranks::communicate(Device& device, const std::function<void()>& body) {
    if (!control_) return body();
    const auto comm = std::make_unique<Comm>(device, control_.get());
    device.comm = comm.get();
    try {
        body();
    } catch (const std::exception& error) {
        // Before anything of the run goes: what others are told of later may be that a connection ended.
        const Failure failure = failure_of(error);
        if (failure.exit_code != kStopped) control_->fail(failure.what(), failure.exit_code);
        comm->abandon();
        device.comm = nullptr;
        throw;
    }
    device.comm = nullptr;
}

void Ranks::run(const std::string& options, double timeout, const std::function<void(const std::string&)>& tell,
                const std::function<void(Ranks&)>& body) {
    Ranks ranks(options, timeout);
    if (!ranks.control_) return body(ranks);
    Control& control = *ranks.control_;
    control.tell = tell;
    try {
        body(ranks);
        control.end_together();
    } catch (const std::exception& error) {
        Failure failure = failure_of(error);
        if (failure.exit_code ==
            kStopped) { // on all ranks at one step, which is saved; what happens now changes nothing
            if (ranks.first()) tell(failure.what());
            try {
                control.end_together();
            } catch (const Failure&) {
            }
        } else {
            control.fail(failure.what(), failure.exit_code);
            if (const std::string line = control.failure().what(); control.tells() && !line.empty()) tell(line);
        }
        control.wait_for_first();
        if (failure.exit_code != kStopped && control.failed()) failure = control.failure();
        throw Failure(failure.exit_code, "");
    }
}
