// Memory of a device and its way to and from the host, in the order that a run relies on.
#include "../runtime/device.h"

#include <algorithm>
#include <vector>

#include "asynchronous.h"
#include "check.h"

namespace {

// Zeros but for the ends, which hold what was uploaded at once.
void check_memory(const Device& device, size_t bytes) {
    CAPTURE(bytes);
    char* memory = static_cast<char*>(device_alloc(bytes));
    const std::vector<char> given(1000, 7);
    std::vector<char> found(2 * given.size());
    upload(device, memory, given.data(), given.size());
    upload(device, memory + bytes - given.size(), given.data(), given.size());
    auto count = [&](size_t begin) {
        download(device, found.data(), memory + begin, found.size());
        return std::count(found.begin(), found.end(), 7);
    };
    CHECK(count(0) == 1000);
    CHECK(count(bytes - found.size()) == 1000);
    CHECK(count(bytes / 2) == 0);
    device_free(memory, bytes);
}

} // namespace

TEST_CASE("memory is clear before the first upload, and stays as that left it") {
    Device device(0);
    check_memory(device, 10000);
    // A GPU takes milliseconds to clear as much.
    check_memory(device, std::min(size_t(8) << 30, available_bytes(0) / 2));
}
