// The table behind options.h, for its own sources: one row an option.
#pragma once
#include <cmath>
#include <string>
#include <variant>
#include <vector>

#include "options.h"

// What a resumed run may do to an option.
enum class OptionScope {
    fixed,  // part of the run's mathematics: a resume keeps it
    free,   // may change from one resume to the next
    command // of one command, never stored with a run
};

struct OptionRange {
    double low = 0, high = INFINITY;   // every bound below is exact in a double
    bool above = false, below = false; // strictly
    bool as_float = false;             // used as a float, and so judged as one too
};

using OptionMember = std::variant<std::monostate, std::string Options::*, bool Options::*, int64_t Options::*,
                                  uint64_t Options::*, double Options::*, std::vector<int32_t> Options::*>;

struct OptionRow {
    const char* group = "";
    const char* name = "";
    const char* value = ""; // what --help calls the value; empty for a flag
    const char* help = "";
    OptionMember member = {}; // none: --config and --help, which parse_options handles itself
    OptionScope scope = OptionScope::fixed;
    OptionRange range = {};
    const char* unset = nullptr; // what the default stands for, where it is not to be taken as a figure
    std::vector<std::string> choices = {};
    const char* only = nullptr; // the family that has it; null: both
    // Throws BadInput that begins with `where` for a text that the option cannot take; null: it takes any.
    void (*check)(const std::string& text, const std::string& where) = nullptr;
};

std::vector<OptionRow> option_table(const Family& family);

// When an option that is given does what its name says.
struct OptionNeed {
    const char* name;
    bool (*met)(const Options&, const struct Target&);
    const char* otherwise; // why it does not, as the end of a message
    bool refused;          // its user must have meant something else; else worth a warning only
};
const std::vector<OptionNeed>& option_needs();
