#include "ranks.h"

#include <algorithm>
#include <cstdlib>

#include <omp.h>
#include <unistd.h>

#include "../base/errors.h"
#include "../base/signals.h"
#include "../files/files.h"

static std::string host_name() {
    char name[256] = {};
    return gethostname(name, sizeof name - 1) == 0 ? name : "a machine without a name";
}

Ranks::Ranks(const std::string& options, double timeout)
    : launch_(find_launch([](const char* name) -> const char* { return std::getenv(name); })) {
    if (launch_.ranks == 1) return;
    choose_device(launch_.local_rank);
    Hello own;
    char hash[17];
    snprintf(hash, sizeof hash, "%016llx", static_cast<unsigned long long>(bytes_hash(options.data(), options.size())));
    own.options = hash, own.host = host_name(), own.device = device_identity(), own.process = getpid();
    control_ = std::make_unique<Control>(launch_, own, timeout);
    const auto& all = control_->hellos();
    local_ = int(std::count_if(all.begin(), all.end(), [&](const Hello& other) { return other.host == own.host; }));
    // A share of the machine's cores, unless the user has said how many.
    if (local_ > 1 && !std::getenv("OMP_NUM_THREADS")) omp_set_num_threads(std::max(1, omp_get_num_procs() / local_));
    control_->while_waiting = [this] {
        pass_on_signals();
        if (const int signal = stop_signal()) control_->request_stop(signal);
    };
}

std::unique_ptr<Comm> Ranks::connect(const Device& device) {
    return control_ ? std::make_unique<Comm>(device, control_.get()) : nullptr;
}

void Ranks::run(const std::string& options, double timeout, const std::function<void(const std::string&)>& tell,
                const std::function<void(Ranks&)>& body) {
    Ranks ranks(options, timeout);
    if (!ranks.control_) return body(ranks);
    Control& control = *ranks.control_;
    constexpr double kPatience = 5;
    auto end = [&](ExitCode code, const std::string& what) {
        control.fail(what, code);
        if (const std::string line = control.failure(); control.tells() && !line.empty()) tell(line);
        control.wait_for_first(kPatience);
        throw Failure(code, "");
    };
    // All stop at one step and have saved: what becomes of one of them from here on changes nothing.
    auto stop = [&](const std::string& what) {
        if (ranks.first()) tell(what);
        try {
            control.end_together();
        } catch (const Failure&) {
        }
        control.wait_for_first(kPatience);
        throw Failure(kStopped, "");
    };
    try {
        body(ranks);
    } catch (const Failure& failure) {
        if (failure.exit_code == kStopped) stop(failure.what());
        end(failure.exit_code, failure.what());
    } catch (const std::exception& error) {
        end(kRunFailed, error.what());
    }
}
