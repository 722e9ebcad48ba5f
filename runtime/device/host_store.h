// Memory beside the device's, for what a step needs only now and then (--offload): pinned host memory on a GPU. The cpu
// build has no second memory and takes disk, so that the same path runs there and resident memory is what the plan
// says.
//
//   store.save(l * bytes, slot[l % 2], bytes, l % 2);       // layer l's input goes while layer l is computed
//   store.wait(l % 2);                                      // two layers later, before slot[l % 2] is written again
//   ...
//   store.load((l - 1) * bytes, slot[(l - 1) % 2], bytes, (l - 1) % 2);  // comes while layer l is computed
//   store.wait((l - 1) % 2);                                             // before layer l - 1 reads it
//
// Copies happen beside what device.stream does, those with the same slot one after another in the order of the calls:
// - A copy begins when all that device.stream was given before the call is done. So save() may follow the kernel that
//   writes `from`, and load() the kernel that last read `to`.
// - What device.stream is given after wait(slot) begins when all copies called with that slot are done. So wait() comes
//   before a kernel that reads what was loaded, or writes where a save reads. A slot is a name for the device memory of
//   a copy; several copies may share it.
// - A load sees what an earlier save of the same bytes wrote, if it has the same slot or comes after a wait for that.
//
// Inside a Recording every copy must be waited for, and none may be waited for that was begun outside: finish() comes
// before it is run and as the last of its launches.
#pragma once
#include <cstddef>
#include <memory>
#include <stdexcept>
#include <string>

#include "device.h"

class HostStore {
public:
    static constexpr int kSlots = 4; // two for what passes through the layers, two for what the optimizer updates

    // Zeroed. `folder` is where the cpu build takes its disk; nothing is allocated for 0 bytes. Throws RunFailed if the
    // system refuses so much. `device` must outlive the store.
    HostStore(const Device& device, const std::string& folder, size_t bytes);
    ~HostStore();
    HostStore(const HostStore&) = delete;
    HostStore& operator=(const HostStore&) = delete;

    size_t bytes() const { return bytes_; }
    // For upload(), download() and fill_zero(), between finish() and the next copy. The host itself may touch it there
    // once the stream has been waited for, too. Null for 0 bytes.
    char* data() const;

    // std::invalid_argument if the bytes lie outside of the store, or for a slot that there is not.
    void save(size_t offset, const void* from, size_t bytes, int slot);
    void load(size_t offset, void* to, size_t bytes, int slot);
    void wait(int slot);
    // wait() for all slots. The cpu build gives back the pages of data() that were touched.
    void finish();

private:
    struct Memory;

    const Device& device_;
    size_t bytes_;
    std::unique_ptr<Memory> memory_; // null for 0 bytes

    static void check_slot(int slot) {
        if (slot < 0 || slot >= kSlots)
            throw std::invalid_argument("no slot " + std::to_string(slot) + " of a host store, which has " +
                                        std::to_string(kSlots));
    }
    void check(size_t offset, size_t bytes, int slot) const {
        check_slot(slot);
        if (offset > bytes_ || bytes > bytes_ - offset)
            throw std::invalid_argument(std::to_string(bytes) + " bytes at offset " + std::to_string(offset) +
                                        " of a host store of " + std::to_string(bytes_));
    }
};
