#include "fiber.h"

#ifdef __x86_64__

// Boost.Context's jump also keeps the modes of both floating-point units, which no kernel changes; that took nine
// tenths of its time and a tenth of the simulator's. Here is only what a function must leave as it was (System V ABI).
asm(R"(
    .text
    .p2align 4
    .globl simt_switch_context
    .type simt_switch_context, @function
simt_switch_context:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size simt_switch_context, .-simt_switch_context
)");

namespace simt {

Context make_context(void* top, size_t, void (*run)()) {
    constexpr int kRegisters = 6;
    void** words = static_cast<void**>(top);
    *--words = nullptr; // where run() would return to; as after a call, the stack is 8 bytes off a multiple of 16
    *--words = reinterpret_cast<void*>(run);
    for (int i = 0; i < kRegisters; i++) *--words = nullptr;
    return words;
}

} // namespace simt

#else

#include <boost/context/detail/fcontext.hpp>

namespace simt {

using namespace boost::context::detail;

static thread_local void (*next_run)();

static void begin(transfer_t came) {
    *static_cast<Context*>(came.data) = came.fctx;
    next_run();
}

Context make_context(void* top, size_t bytes, void (*run)()) {
    next_run = run; // the same for all
    return make_fcontext(top, bytes, begin);
}

void switch_context(Context* from, Context to) {
    transfer_t came = jump_fcontext(to, from);
    *static_cast<Context*>(came.data) = came.fctx;
}

} // namespace simt

#endif
