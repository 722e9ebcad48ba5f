// Signals. oneDNN's generated products point the stack register into their work space, where the frame of a handler
// overwrites data: so no signal may interrupt a thread that computes. Those that could are blocked from before the
// first thread starts (process.cpp), and one thread takes those that stop a run.
#pragma once

// In this thread and all that it starts: all but faults (SEGV, ABRT, …), job control (TSTP, TTIN, TTOU, CONT) and QUIT,
// whose own handling needs no stack. A debugger's breakpoints are faults and perf needs no signal; profilers by SIGPROF
// see nothing, and to interrupt from a debugger takes `kill -STOP`.
void block_signals();

// Starts the thread that takes INT, TERM, HUP, USR1, USR2 and XCPU, but none that the parent process had ignored
// (nohup, background jobs of a script). Such a signal then ends the process at once; after save_when_stopped() the
// first asks for it, which stop_signal() tells, and a later one ends the process.
void take_stop_signals();
void save_when_stopped();
// The signal that asked to stop, or 0.
int stop_signal();
// A signal that was sent to a single thread waits there until that thread takes it: hands such signals of this thread
// and its OpenMP team on to the process. Outside parallel regions, wherever a run can stop.
void pass_on_signals();
