// The part of TOML that a flat list of options needs: `key = value` lines, comments, strings with their escapes,
// numbers, booleans, arrays of these. No tables. CLI11 has a reader of its own, but the one that distributions ship
// knows no escapes and cuts a string at `#`, so a path could come back as another.
#pragma once
#include <string>
#include <vector>

struct TomlItem {
    std::string key;
    std::vector<std::string> values; // one, unless it is an array; strings without their quotes
    bool string = false;             // a quoted value
    bool array = false;
    int line = 0;
};

// Throws BadInput with `name` and the line for whatever is not in that part, and for a key that comes twice.
std::vector<TomlItem> parse_toml(const std::string& text, const std::string& name);

// A basic string, quotes included, that reads back as `text`.
std::string toml_string(const std::string& text);
