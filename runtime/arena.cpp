#include "arena.h"

#include "memory.h"

// A cache line on the CPU, and enough for any vector access.
constexpr size_t kAlignment = 256;

void Arena::place_bytes(void** pointer, size_t bytes, const char* name) {
    if (!bytes) return;
    slots_.push_back({pointer, bytes_, bytes, name});
    bytes_ += (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

void Arena::commit() {
    if (!bytes_) return;
    memory_ = device_alloc(bytes_);
    for (const Slot& slot : slots_) *slot.pointer = static_cast<char*>(memory_) + slot.offset;
}

Arena::~Arena() {
    if (memory_) device_free(memory_, bytes_);
}
