#include "signals.h"

#include <ucontext.h>

#include "block.h"

namespace simt {

constexpr int kSignals[] = {SIGSEGV, SIGBUS, SIGFPE};
constexpr size_t kSignalStackBytes = 64 * 1024;

// Where the interrupted fiber goes on: never back.
static void leave_block() {
    Worker& worker = *running_worker;
    worker.raise(worker.report.kind, worker.report.at, {});
}

static void handle(int signal, siginfo_t* info, void* context) {
    Worker* worker = running_worker;
    if (!worker || !worker->running || !worker->current) {
        std::signal(signal, SIG_DFL);
        std::raise(signal);
        return;
    }
    worker->inside = true;
    auto* machine = &static_cast<ucontext_t*>(context)->uc_mcontext;
#if defined(__x86_64__)
    uintptr_t at = static_cast<uintptr_t>(machine->gregs[REG_RIP]);
#else
    uintptr_t at = machine->pc;
#endif
    uintptr_t address = reinterpret_cast<uintptr_t>(info->si_addr);
    // find_place takes return addresses, which lie behind the instruction.
    const void* behind = reinterpret_cast<const void*>(at + 1);
    if (signal == SIGFPE)
        worker->note(FaultKind::invalid, *worker->current, behind, "an integer divided by zero");
    else if (address - worker->stacks < worker->stacks_bytes)
        worker->note(FaultKind::out_of_bounds, *worker->current, behind,
                     text("the fiber's stack of %zu bytes overflowed: too much in local arrays", kStackBytes));
    else
        worker->note(FaultKind::out_of_bounds, *worker->current, behind,
                     text("address %#zx is not mapped", static_cast<size_t>(address)));
    // The fiber is given up; its stack serves once more to jump from, unless that is what ran out: then its top does,
    // which nothing needs any longer.
    uintptr_t top = worker->stacks + (worker->current->linear + 1) * kStackBytes - 4096;
#if defined(__x86_64__)
    machine->gregs[REG_RSP] = static_cast<greg_t>(top / 16 * 16 - 8);
    machine->gregs[REG_RIP] = static_cast<greg_t>(reinterpret_cast<uintptr_t>(&leave_block));
#else
    machine->sp = top / 16 * 16;
    machine->pc = reinterpret_cast<uintptr_t>(&leave_block);
#endif
}

SignalHandlers::SignalHandlers() {
    struct sigaction action {};
    action.sa_sigaction = handle;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    for (int i = 0; i < 3; i++) sigaction(kSignals[i], &action, &before_[i]);
}
SignalHandlers::~SignalHandlers() {
    for (int i = 0; i < 3; i++) sigaction(kSignals[i], &before_[i], nullptr);
}

SignalStack::SignalStack() : memory_(new char[kSignalStackBytes]) {
    stack_t stack{};
    stack.ss_sp = memory_.get();
    stack.ss_size = kSignalStackBytes;
    sigaltstack(&stack, &before_);
}
SignalStack::~SignalStack() { sigaltstack(&before_, nullptr); }

} // namespace simt
