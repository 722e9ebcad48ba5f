// Stacks that take turns on one thread of the machine.
#pragma once
#include <cstddef>

namespace simt {

using Context = void*; // of a fiber that waits: the top of its stack, where its registers lie

// A fiber that will begin with run(), which never returns, on the `bytes` below `top`, a multiple of 16.
Context make_context(void* top, size_t bytes, void (*run)());

// The current fiber waits, to be found in *from, and `to` goes on.
void switch_context(Context* from, Context to) asm("simt_switch_context");

} // namespace simt
