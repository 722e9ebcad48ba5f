// What the host has left, for what a run keeps there.
#pragma once
#include <cstddef>
#include <cstdint>

// Nine tenths of what the system has available, or the process and its control group are allowed, whichever is less,
// for a process on so many threads. 0 if that cannot be said.
size_t host_available_bytes(int64_t threads);
