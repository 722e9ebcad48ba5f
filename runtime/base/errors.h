// How a run ends badly: thrown anywhere, printed as one line on stderr by main, and turned into the exit code. And what
// it warns of.
#pragma once
#include <cstdio>
#include <stdexcept>
#include <string>

enum ExitCode {
    kDone = 0,
    kRunFailed = 1,      // a run that failed: diverged, disk full, device error
    kBadInput = 2,       // bad options or input files
    kPlanDoesNotFit = 3, // --plan: too large for the memory given
    kStopped = 4         // by a signal or --max-hours, with a checkpoint to resume from
};

// The message says what, where, and what to do; one line, no trailing period.
struct Failure : std::runtime_error {
    ExitCode exit_code;
    Failure(ExitCode code, const std::string& message) : std::runtime_error(message), exit_code(code) {}
};
struct BadInput : Failure {
    explicit BadInput(const std::string& message) : Failure(kBadInput, message) {}
};
struct RunFailed : Failure {
    explicit RunFailed(const std::string& message) : Failure(kRunFailed, message) {}
};

// What any exception means to the user.
Failure failure_of(const std::exception& error);

// What the user should know, on stderr; the run goes on.
inline void warn(const std::string& line) { fprintf(stderr, "warning: %s\n", line.c_str()); }
