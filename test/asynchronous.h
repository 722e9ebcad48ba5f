// For tests that wait for a GPU where a program must: launches return at once, as they do for a user.
#pragma once
#include <cstdlib>

// Set before main(), which makes launches wait for their end where nothing is said.
inline const bool launches_return_at_once = setenv("CUDA_LAUNCH_BLOCKING", "0", 1) == 0;
