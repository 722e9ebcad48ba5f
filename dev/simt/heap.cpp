// Device memory: one reserved range of addresses, in which every allocation gets whole slots of its own, ends right
// before pages that cannot be touched, and keeps its place when freed, so that a late access is told apart.
#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>

#include <sys/mman.h>

#include "block.h"

namespace simt {

constexpr size_t kHeapBytes = size_t{1} << 42;
constexpr size_t kSlotBytes = 64 * 1024;
constexpr size_t kSlots = kHeapBytes / kSlotBytes;
constexpr size_t kPage = 4096;
constexpr size_t kAlignment = 256; // what cudaMalloc promises
// Filled with NaN at the start, as a GPU's memory holds what it held. Beyond, untouched pages (zeros) cost nothing.
constexpr size_t kPoisonedBytes = size_t{64} << 20;

namespace {

struct Allocation {
    uintptr_t begin, end;
    size_t slot;
    Memory memory;
    bool freed;
};

struct Heap {
    uintptr_t base;
    uint32_t* slots; // number of the allocation, from 1; 0: none
    std::vector<Allocation> allocations;
    size_t next_slot = 1, in_use[2] = {};      // of the device, pinned
    std::map<uintptr_t, uintptr_t> registered; // of the host's own memory: begin, end
    std::mutex mutex;                          // of allocate and release; blocks only look up, while nobody allocates

    Heap() {
        auto map = [](size_t bytes, int protection) {
            void* p = mmap(nullptr, bytes, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
            if (p == MAP_FAILED) throw RunFailed("simt: cannot reserve address space for device memory");
            return p;
        };
        base = reinterpret_cast<uintptr_t>(map(kHeapBytes, PROT_NONE));
        slots = static_cast<uint32_t*>(map(kSlots * sizeof(uint32_t), PROT_READ | PROT_WRITE));
    }
};

Heap& heap() {
    static Heap only;
    return only;
}

size_t& in_use(Memory memory) { return heap().in_use[memory == Memory::pinned]; }

} // namespace

void* allocate(size_t bytes, Memory memory, size_t limit) {
    Heap& h = heap();
    std::lock_guard lock(h.mutex);
    size_t& used = in_use(memory);
    size_t whole = (std::max<size_t>(bytes, 1) + kAlignment - 1) / kAlignment * kAlignment;
    size_t pages = (whole + kPage - 1) / kPage * kPage;
    size_t count = pages / kSlotBytes + 2; // at least one page free behind it, whatever the rounding
    if (bytes > limit || used > limit - bytes || h.next_slot + count >= kSlots) return nullptr;
    uintptr_t first = h.base + h.next_slot * kSlotBytes;
    if (mprotect(reinterpret_cast<void*>(first), pages, PROT_READ | PROT_WRITE) != 0) return nullptr;
    uintptr_t begin = first + pages - whole;
    madvise(reinterpret_cast<void*>(first), pages, MADV_HUGEPAGE);
    if (bytes <= kPoisonedBytes) memset(reinterpret_cast<void*>(begin), 0xff, whole);
    h.allocations.push_back({begin, begin + bytes, h.next_slot, memory, false});
    for (size_t i = 0; i < count; i++) h.slots[h.next_slot + i] = static_cast<uint32_t>(h.allocations.size());
    h.next_slot += count;
    used += bytes;
    return reinterpret_cast<void*>(begin);
}

bool release(void* pointer) {
    Heap& h = heap();
    std::lock_guard lock(h.mutex);
    uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
    if (address - h.base >= kHeapBytes) return false;
    uint32_t number = h.slots[(address - h.base) / kSlotBytes];
    if (!number) return false;
    Allocation& a = h.allocations[number - 1];
    if (a.begin != address || a.freed) return false;
    a.freed = true;
    in_use(a.memory) -= a.end - a.begin;
    uintptr_t first = h.base + a.slot * kSlotBytes, end = (a.end + kPage - 1) / kPage * kPage;
    // Mapped anew: gives the pages back and closes them at once.
    mmap(reinterpret_cast<void*>(first), std::max(end, first + kPage) - first, PROT_NONE,
         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    return true;
}

bool register_host(void* pointer, size_t bytes, size_t limit) {
    Heap& h = heap();
    std::lock_guard lock(h.mutex);
    const uintptr_t begin = reinterpret_cast<uintptr_t>(pointer);
    size_t& used = in_use(Memory::pinned);
    if (bytes > limit || used > limit - bytes) return false;
    h.registered[begin] = begin + bytes;
    used += bytes;
    return true;
}

bool unregister_host(void* pointer) {
    Heap& h = heap();
    std::lock_guard lock(h.mutex);
    const auto found = h.registered.find(reinterpret_cast<uintptr_t>(pointer));
    if (found == h.registered.end()) return false;
    in_use(Memory::pinned) -= found->second - found->first;
    h.registered.erase(found);
    return true;
}

size_t allocated(Memory memory) { return in_use(memory); }

HeapAnswer look_up(uintptr_t address) {
    Heap& h = heap();
    if (address - h.base >= kHeapBytes) {
        const auto after = h.registered.upper_bound(address);
        if (after != h.registered.begin())
            if (const auto& [begin, end] = *std::prev(after); address < end)
                return {HeapState::inside, begin, end, Memory::pinned};
        return {HeapState::foreign, 0, 0, {}};
    }
    uint32_t number = h.slots[(address - h.base) / kSlotBytes];
    if (!number) return {HeapState::outside, 0, 0, {}};
    const Allocation& a = h.allocations[number - 1];
    HeapState state = a.freed                                 ? HeapState::freed
                      : address >= a.begin && address < a.end ? HeapState::inside
                                                              : HeapState::outside;
    return {state, a.begin, a.end, a.memory};
}

} // namespace simt
