// Faults that the processor finds before the simulator does: guard pages, unmapped addresses, divisions by zero. They
// are turned into reports like any other. Installed for the time of a launch only, since test frameworks and debuggers
// have handlers of their own.
#pragma once
#include <csignal>
#include <memory>

namespace simt {

class SignalHandlers {
public:
    SignalHandlers();
    ~SignalHandlers();
    SignalHandlers(const SignalHandlers&) = delete;
    SignalHandlers& operator=(const SignalHandlers&) = delete;

private:
    struct sigaction before_[3];
};

// A stack for the handler, on every thread that runs blocks: that of a fiber may be what overflowed.
class SignalStack {
public:
    SignalStack();
    ~SignalStack();
    SignalStack(const SignalStack&) = delete;
    SignalStack& operator=(const SignalStack&) = delete;

private:
    std::unique_ptr<char[]> memory_;
    stack_t before_;
};

} // namespace simt
