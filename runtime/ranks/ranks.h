// A run's ranks as its trainer sees them: who this is, what they exchange, and that a failure of one is told once and
// ends all. Started alone a process is rank 0 of 1, and nothing is opened.
#pragma once
#include <functional>
#include <memory>
#include <string>

#include "../device/device.h"
#include "comm.h"
#include "control.h"
#include "launch.h"

class Ranks {
public:
    // By this process's environment (launch.h). body() then does the run. What it throws on one rank ends body() on all
    // others with RunFailed. One of them gives tell() a line that names the rank, and all throw a Failure with no text,
    // which run_program() does not print, once that has happened.
    // `options`: what has to be the same on all ranks. `timeout`: seconds, until a control()->set_timeout().
    static void run(const std::string& options, double timeout, const std::function<void(const std::string&)>& tell,
                    const std::function<void(Ranks&)>& body);

    int rank() const { return launch_.rank; }
    int count() const { return launch_.ranks; }
    bool first() const { return launch_.rank == 0; }
    int on_this_machine() const { return local_; }
    int threads() const { return threads_; }            // this rank's share of the machine's; 0: not shared out
    Control* control() const { return control_.get(); } // null for one rank
    // body(), with the ranks' communication as device.comm; null for one rank. What body() throws is told to the others
    // and ends the communication before it comes out: what waits for the device when it goes, such as a model, must
    // have been made outside.
    void communicate(Device& device, const std::function<void()>& body);
    ~Ranks();

private:
    explicit Ranks(const std::string& options, double timeout);

    Launch launch_;
    int local_ = 1, threads_ = 0;
    std::unique_ptr<Control> control_;
};
