// Addresses into source lines, through binutils' addr2line: only when a fault is told, or when two threads wait in
// code at different addresses that may still be one line.
#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>

#include <unistd.h>

#include "block.h"

namespace simt {

extern "C" char __executable_start;

uint32_t code_offset(const void* code) {
    return static_cast<uint32_t>(static_cast<const char*>(code) - &__executable_start);
}
const void* code_at(uint32_t offset) { return &__executable_start + offset; }

namespace {

// Inlined frames of an address, innermost first.
std::vector<Place> frames(const void* address) {
    char program[4096];
    ssize_t length = readlink("/proc/self/exe", program, sizeof program - 1);
    if (length <= 0) return {};
    program[length] = 0;
#if defined(__PIE__) || defined(__PIC__)
    size_t offset = code_offset(address);
#else
    size_t offset = reinterpret_cast<size_t>(address);
#endif
    std::string quoted;
    for (const char* c = program; *c; c++) quoted += *c == '\'' ? std::string("'\\''") : std::string(1, *c);
    std::string command = text("addr2line -f -C -i -e '%s' %#zx 2>/dev/null", quoted.c_str(), offset);
    FILE* pipe = popen(command.c_str(), "r");
    if (!pipe) return {};
    std::vector<Place> found;
    char line[4096];
    while (fgets(line, sizeof line, pipe)) {
        Place place;
        line[strcspn(line, "\n")] = 0;
        place.function = line;
        if (!fgets(line, sizeof line, pipe)) break;
        line[strcspn(line, "\n")] = 0;
        if (char* discriminator = strstr(line, " (")) *discriminator = 0;
        if (char* colon = strrchr(line, ':')) {
            place.line = atoi(colon + 1);
            *colon = 0;
        }
        const char* slash = strrchr(line, '/');
        place.file = slash ? slash + 1 : line;
        found.push_back(place);
    }
    pclose(pipe);
    return found;
}

std::vector<Place> cached_frames(const void* address) {
    static std::mutex mutex;
    // Never destroyed: a report may still be made while the program ends.
    static auto& known = *new std::map<const void*, std::vector<Place>>;
    std::lock_guard lock(mutex);
    auto at = known.find(address);
    if (at == known.end()) at = known.emplace(address, frames(address)).first;
    return at->second;
}

// Files whose lines say less than their callers'.
bool is_plumbing(const std::string& file) {
    for (const char* name :
         {"device.h", "ptx.h", "types.h", "launch.h", "language.h", "copies.h", "tuple", "invoke.h", "cmath"})
        if (file == name) return true;
    return false;
}

} // namespace

Place find_place(const void* return_address) {
    if (!return_address) return {"?", "?", 0};
    std::vector<Place> all = cached_frames(static_cast<const char*>(return_address) - 1);
    for (const Place& place : all)
        if (!is_plumbing(place.file)) return place;
    return all.empty() ? Place{"?", "?", 0} : all.front();
}

std::string place_text(const void* return_address) {
    Place place = find_place(return_address);
    return place.file + ":" + std::to_string(place.line);
}

std::string function_name(const void* function) {
    std::vector<Place> all = cached_frames(function);
    if (all.empty()) return "kernel";
    // Without its parameters: "scale<float>(float*, int)" is scale<float>, "void f<int>(int*)" is f<int>.
    std::string name = all.back().function;
    const std::string unnamed = "(anonymous namespace)::";
    for (size_t at; (at = name.find(unnamed)) != std::string::npos;) name.erase(at, unnamed.size());
    int depth = 0;
    size_t end = name.size(), begin = 0;
    for (size_t i = 0; i < name.size(); i++) {
        char c = name[i];
        if (c == '<') depth++;
        if (c == '>') depth--;
        if (depth == 0 && c == ' ' && end == name.size()) begin = i + 1;
        if (depth == 0 && c == '(' && i > begin && end == name.size()) end = i;
    }
    return name.substr(begin, end - begin);
}

} // namespace simt
