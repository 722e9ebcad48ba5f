// SIGINT and SIGTERM ask a run to finish its step, save and stop; a second one ends it at once.
#pragma once

void catch_stop_signals();
// The signal that asked to stop, or 0.
int stop_signal();
