// A trainer as a process: what is set up before main, and what becomes of an error.
#pragma once
#include <functional>
#include <string>

// Runs a trainer's body and turns what it throws into one line on stderr and the exit code. In a program that calls
// this, signals are blocked (signals.h), descriptors 0 to 2 are open and OpenMP's threads wait as said in process.cpp,
// all before anything else has run.
int run_program(const char* name, const std::function<void()>& body);
// That line, if there is anything to say.
void print_failure(const std::string& name, std::string what);
