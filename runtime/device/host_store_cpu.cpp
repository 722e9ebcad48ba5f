#include "host_store.h"

#include <algorithm>
#include <cstdint>
#include <exception>

#include "../base/errors.h"
#include "../files/files.h"

// Read and written with system calls and not through a mapping: as fast, no page becomes resident, and a disk that
// fails is an error that says so and no SIGBUS.
struct HostStore::Memory {
    UnnamedFile file;
};

// Large enough to hide the call; writers of one file take turns anyway.
constexpr size_t kPieceBytes = size_t(2) << 20;

// copy(begin, bytes) for all pieces, on all threads.
template <class Copy> static void in_pieces(size_t bytes, Copy copy) {
    const int64_t pieces = static_cast<int64_t>((bytes + kPieceBytes - 1) / kPieceBytes);
    std::exception_ptr failed; // no exception may leave a parallel region
#pragma omp parallel for schedule(static) if (pieces > 1)
    for (int64_t piece = 0; piece < pieces; piece++) {
        const size_t begin = piece * kPieceBytes;
        try {
            copy(begin, std::min(kPieceBytes, bytes - begin));
        } catch (...) {
#pragma omp critical(host_store)
            failed = std::current_exception();
        }
    }
    if (failed) std::rethrow_exception(failed);
}

HostStore::HostStore(const Device& device, const std::string& folder, size_t bytes) : device_(device), bytes_(bytes) {
    if (!bytes) return;
    try {
        memory_.reset(new Memory{{folder, bytes}});
    } catch (const RunFailed& refused) {
        throw RunFailed(std::string("--offload: ") + refused.what());
    }
}

HostStore::~HostStore() = default;

char* HostStore::data() const { return memory_ ? memory_->file.data() : nullptr; }

void HostStore::save(size_t offset, const void* from, size_t bytes, int slot) {
    check(offset, bytes, slot);
    in_pieces(bytes, [&](size_t begin, size_t count) {
        memory_->file.write(offset + begin, static_cast<const char*>(from) + begin, count);
    });
}

void HostStore::load(size_t offset, void* to, size_t bytes, int slot) {
    check(offset, bytes, slot);
    in_pieces(bytes, [&](size_t begin, size_t count) {
        memory_->file.read(offset + begin, static_cast<char*>(to) + begin, count);
    });
}

void HostStore::wait(int slot) { check_slot(slot); }

void HostStore::finish() {
    if (memory_) memory_->file.drop_pages();
}
