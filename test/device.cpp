// Memory of a device and its way to and from the host, in the order that a run relies on.
#include "../runtime/device/device.h"

#include <unistd.h>

#include <algorithm>
#include <string>
#include <vector>

#include "asynchronous.h"
#include "check.h"
#include "scratch.h"

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

TEST_CASE("bytes of any number go up and come back, through memory that is in use already") {
    Device device(0);
    const size_t most = (size_t(5) << 20) + 3;
    char* memory = static_cast<char*>(device_alloc(most));
    for (size_t bytes : {size_t(0), size_t(1), (size_t(1) << 20) - 1, size_t(1) << 20, (size_t(1) << 20) + 1,
                         size_t(2) << 20, (size_t(3) << 20) + 7, most}) {
        CAPTURE(bytes);
        std::vector<char> given(bytes), found(bytes);
        for (int round = 1; round <= 3; round++) {
            for (size_t i = 0; i < bytes; i++) given[i] = static_cast<char>(i * 31 + i / 1000 * round);
            upload(device, memory + most - bytes, given.data(), bytes);
            const std::vector<char> kept = given;
            std::fill(given.begin(), given.end(), 0); // `from` may be used again
            download(device, found.data(), memory + most - bytes, bytes);
            CHECK((found == kept));
        }
    }
    device_free(memory, most);
}

TEST_CASE("what a run may take, and how fast it is") {
    Device device(0);
    CHECK(device.peak_flops < 1e16); // of a product that was waited for: no GPU is as fast as that
    if (device_is_host()) return;
    const size_t all = available_bytes(0), taken = all / 3;
    CHECK(all > taken);
    void* memory = device_alloc(taken); // as if by another process
    CHECK(available_bytes(0) <= all - taken);
    device_free(memory, taken);
    CHECK(available_bytes(0) == all);
}

TEST_CASE("a GPU that drives a display, and ends what keeps it from that, is warned of") {
    if (!check::kSimulated) return;
    ScratchFolder folder;
    const std::string path = folder / "stderr.txt";
    auto said = [&](bool timeout) {
        simt::SettingsGuard guard;
        simt::settings().kernel_timeout = timeout;
        fflush(stderr);
        const int kept = dup(STDERR_FILENO);
        demand(freopen(path.c_str(), "w", stderr) != nullptr, "stderr opens");
        { Device device(0); }
        fflush(stderr);
        dup2(kept, STDERR_FILENO);
        close(kept);
        return get_file(path);
    };
    CHECK(said(false) == "");
    CHECK(said(true).rfind("warning: this GPU also drives a display", 0) == 0);
}
