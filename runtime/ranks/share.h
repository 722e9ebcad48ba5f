// What rank 0 has, for all: in one order on all ranks.
#pragma once
#include <cstddef>
#include <optional>
#include <string>

#include "../files/files.h"
#include "control.h"

// data (bytes) = rank 0's. Host memory, over the control channel.
void share(Control& control, void* data, size_t bytes);

// A file that rank 0 reads and no other rank has to have: all make the same calls of read() on what this returns.
// `own`: rank 0's; null elsewhere.
FileReader share_reader(Control& control, std::optional<FileReader> own);
