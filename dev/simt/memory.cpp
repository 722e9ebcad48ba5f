// What is watched of every access: that it lies in memory that exists, is aligned, reads what was written, and is
// ordered with those of other threads. Also what moves data in ways of its own: cp.async and atomics.
#include <cstring>
#include <type_traits>

#include "block.h"
#include "cells.h"
#include "language.h"
#include "streams.h"

namespace simt {

[[noreturn]] static void raise_race(Worker& worker, const char* mine, const char* theirs, Stamp other,
                                    uint32_t other_at, uint32_t offset, const void* at) {
    const uint3 who = worker.threads[stamp_thread(other)].index;
    worker.raise(FaultKind::race, at,
                 text("%s at byte %u of shared memory, %s by thread (%u,%u,%u) at %s with no barrier between", mine,
                      offset, theirs, who.x, who.y, who.z, place_text(code_at(other_at)).c_str()));
}

// One cell by itself; says what is wrong.
static void touch_one(Worker& worker, Cells& cells, Places& places, int i, Access access, Stamp now, uint32_t offset,
                      const void* at) {
    if (cells.tag[i] & kPending) {
        if (access == Access::read)
            worker.raise(
                FaultKind::unwritten_read, at,
                text("byte %u of shared memory is on its way by the cp.async at %s, which has not been waited for",
                     offset, place_text(code_at(places.write[i])).c_str()));
        raise_race(worker, "write", "where a cp.async is under way", cells.write[i], places.write[i], offset, at);
    }
    bool writes = access != Access::read;
    bool both_atomic = access == Access::atomic && (cells.tag[i] & kAtomic);
    if (cells.write[i] && !both_atomic && !is_before(worker, cells.write[i]))
        raise_race(worker, writes ? "write" : "read", "written", cells.write[i], places.write[i], offset, at);
    if (access != Access::write && !cells.write[i])
        worker.raise(FaultKind::unwritten_read, at, text("nobody has written byte %u of shared memory", offset));
    Four lane{};
    lane[i] = ~0u;
    if (!writes) {
        remember_read(worker, cells, places, lane, now, code_offset(at));
        return;
    }
    for (int r = 0; r < 2; r++)
        if (cells.read[r][i] && !is_before(worker, cells.read[r][i]))
            raise_race(worker, "write", "read", cells.read[r][i], places.read[r][i], offset, at);
    remember_write(cells, places, lane, now, code_offset(at));
    cells.tag[i] = worker.generation << 3 | (access == Access::atomic ? kAtomic : 0);
}

// bytes: of each cell.
static inline void touch(Worker& worker, Cells& cells, Places& places, Four lanes, Access access, Stamp now,
                         uint32_t offset, uint32_t bytes, const void* at) {
    renew(worker, cells, lanes);
    bool flagged = any((cells.tag ^ (worker.generation << 3)) & lanes);
    if (!flagged && access == Access::read && !any(lanes & (cells.write == 0)) &&
        are_before(worker, cells.write & lanes)) {
        remember_read(worker, cells, places, lanes, now, code_offset(at));
        return;
    }
    if (!flagged && access == Access::write && are_before(worker, cells.write & lanes) &&
        are_before(worker, cells.read[0] & lanes) && are_before(worker, cells.read[1] & lanes)) {
        remember_write(cells, places, lanes, now, code_offset(at));
        return;
    }
    for (int i = 0; i < 4; i++)
        if (lanes[i]) touch_one(worker, cells, places, i, access, now, offset + i * bytes, at);
}

[[gnu::noinline]] static void touch_all(Worker& worker, uint32_t offset, uint32_t bytes, Access access,
                                        const void* at) {
    Stamp now = stamp_now(worker);
    for_cells(worker, offset, bytes, [&](Cells& cells, Places& places, Four lanes, uint32_t first, uint32_t each) {
        touch(worker, cells, places, lanes, access, now, first, each, at);
    });
}

static inline void check_shared(Worker& worker, uintptr_t address, size_t bytes, Access access, const void* at) {
    size_t size = worker.grid->shared_bytes;
    uint32_t offset = static_cast<uint32_t>(address - worker.shared);
    if (address < worker.shared || address - worker.shared + bytes > size)
        worker.raise(FaultKind::out_of_bounds, at,
                     text("%zu bytes at offset %lld of %zu bytes of shared memory", bytes,
                          static_cast<long long>(address) - static_cast<long long>(worker.shared), size));
    if (!touch_alike(worker, offset, static_cast<uint32_t>(bytes), access, code_offset(at)))
        touch_all(worker, offset, static_cast<uint32_t>(bytes), access, at);
}

// Data of the program itself: constants and __constant__ tables.
extern "C" char __executable_start, _end;

bool is_kernel_data(const Worker& worker, uintptr_t address, uintptr_t last) {
    uintptr_t parameters = reinterpret_cast<uintptr_t>(worker.grid->parameters);
    if (address - parameters < worker.grid->parameter_bytes) return true;
    return address >= reinterpret_cast<uintptr_t>(&__executable_start) && last < reinterpret_cast<uintptr_t>(&_end);
}

static void check_global(Worker& worker, uintptr_t address, size_t bytes, Access access, const void* at) {
    if (bytes == 0) return;
    uintptr_t last = address + bytes - 1;
    auto touch = [&] {
        if (worker.touched) worker.touched->add(address, bytes, access != Access::read);
    };
    if (address >= worker.allocation_begin && last < worker.allocation_end && last >= address) return touch();
    HeapAnswer answer = look_up(address);
    auto position = [&](uintptr_t where) {
        return static_cast<long long>(where) - static_cast<long long>(answer.begin);
    };
    switch (answer.state) {
    case HeapState::inside:
        if (last < answer.end) {
            worker.allocation_begin = answer.begin;
            worker.allocation_end = answer.end;
            return touch();
        }
        [[fallthrough]];
    case HeapState::outside:
        if (answer.end == 0)
            worker.raise(FaultKind::out_of_bounds, at,
                         text("%zu bytes at %#zx, in no device allocation", bytes, static_cast<size_t>(address)));
        worker.raise(FaultKind::out_of_bounds, at,
                     text("%zu bytes at offset %lld of a device allocation of %zu bytes", bytes, position(address),
                          static_cast<size_t>(answer.end - answer.begin)));
    case HeapState::freed:
        worker.raise(FaultKind::out_of_bounds, at,
                     text("%zu bytes at offset %lld of a device allocation that was freed", bytes, position(address)));
    case HeapState::foreign:
        break;
    }
    if (is_kernel_data(worker, address, last)) return;
    worker.raise(FaultKind::out_of_bounds, at,
                 text("%zu bytes at %#zx, which is no device memory: a null, wild or host pointer", bytes,
                      static_cast<size_t>(address)));
}

void check_access(Worker& worker, uintptr_t address, size_t bytes, Access access, bool aligned, const void* at) {
    if (address - worker.stacks < worker.stacks_bytes) return;
    Inside inside(worker);
    if (aligned && (address & (bytes - 1)))
        worker.raise(FaultKind::misaligned, at,
                     text("%zu bytes at address %#zx, which is %zu past a multiple of %zu", bytes,
                          static_cast<size_t>(address), static_cast<size_t>(address & (bytes - 1)), bytes));
    if (address - worker.arena < worker.arena_bytes)
        check_shared(worker, address, bytes, access, at);
    else
        check_global(worker, address, bytes, access, at);
}

void check_aligned(const void* p, size_t bytes) {
    const void* at = SIMT_CALLER;
    Worker* worker = running_worker;
    uintptr_t address = reinterpret_cast<uintptr_t>(p);
    if (!worker || !(address & (bytes - 1))) return;
    Inside inside(*worker);
    worker->raise(FaultKind::misaligned, at, text("%zu bytes at address %#zx", bytes, static_cast<size_t>(address)));
}

// ---- Explicit accesses ----
static inline void check_explicit(const void* p, size_t bytes, Access access, Space space, const void* at) {
    Worker* worker = running_worker;
    if (!worker) return;
    uintptr_t address = reinterpret_cast<uintptr_t>(p);
    if (worker->counter) {
        bool reads = access == Access::read;
        if (space == Space::global)
            count_access(*worker, address, bytes, reads ? Move::global_read : Move::global_write, at);
        else
            count_access(*worker, address, bytes, reads ? Move::shared_load : Move::shared_store, at);
    }
    if (address >= worker->allocation_begin && address + bytes <= worker->allocation_end && !(address & (bytes - 1)) &&
        space == Space::global) {
        if (worker->touched) worker->touched->add(address, bytes, access != Access::read);
        return;
    }
    Inside inside(*worker);
    bool shared = address - worker->arena < worker->arena_bytes;
    if (shared != (space == Space::shared))
        worker->raise(FaultKind::invalid, at,
                      shared ? "a function for global memory was given a pointer to shared memory"
                             : "a function for shared memory was given another pointer");
    check_access(*worker, address, bytes, access, true, at);
}

#define SIMT_EXPLICIT(bytes, T)                                                                                        \
    T load##bytes(const void* p, Space space) {                                                                        \
        check_explicit(p, bytes, Access::read, space, SIMT_CALLER);                                                    \
        return *static_cast<const T*>(p);                                                                              \
    }                                                                                                                  \
    void store##bytes(void* p, T value, Space space) {                                                                 \
        check_explicit(p, bytes, Access::write, space, SIMT_CALLER);                                                   \
        *static_cast<T*>(p) = value;                                                                                   \
    }
SIMT_EXPLICIT(1, uint8_t)
SIMT_EXPLICIT(2, uint16_t)
SIMT_EXPLICIT(4, uint32_t)
SIMT_EXPLICIT(8, uint64_t)
SIMT_EXPLICIT(16, Quad)

void* copy_memory(void* to, const void* from, size_t bytes, std::source_location place) {
    Worker* worker = running_worker;
    if (!worker) {
        host_touches(from, bytes, false, "memcpy", place);
        host_touches(to, bytes, true, "memcpy", place);
    } else if (bytes) {
        const void* at = SIMT_CALLER;
        check_access(*worker, reinterpret_cast<uintptr_t>(from), bytes, Access::read, false, at);
        check_access(*worker, reinterpret_cast<uintptr_t>(to), bytes, Access::write, false, at);
    }
    return memcpy(to, from, bytes);
}

void* set_memory(void* to, int value, size_t bytes, std::source_location place) {
    Worker* worker = running_worker;
    if (!worker)
        host_touches(to, bytes, true, "memset", place);
    else if (bytes)
        check_access(*worker, reinterpret_cast<uintptr_t>(to), bytes, Access::write, false, SIMT_CALLER);
    return memset(to, value, bytes);
}

// ---- cp.async ----
uint32_t shared_address(const void* p) {
    const Worker& worker = *running_worker;
    return static_cast<uint32_t>(reinterpret_cast<uintptr_t>(p) - worker.shared) + kSharedWindow;
}

void cp_async(uint32_t shared, const void* global, int bytes, int from) {
    const void* at = SIMT_CALLER;
    Worker& worker = *running_worker;
    Inside inside(worker);
    Thread& me = *worker.current;
    uint32_t offset = shared - kSharedWindow, size = static_cast<uint32_t>(bytes);
    uintptr_t source = reinterpret_cast<uintptr_t>(global);
    if (shared % size || (from && source % size))
        worker.raise(FaultKind::misaligned, at,
                     text("cp.async of %u bytes from %#zx to offset %d of shared memory", size,
                          static_cast<size_t>(source), static_cast<int>(offset)));
    if (from) {
        if (source - worker.arena < worker.arena_bytes)
            worker.raise(FaultKind::invalid, at, "the source of a cp.async is shared memory");
        check_global(worker, source, static_cast<size_t>(from), Access::read, at);
    }
    if (worker.counter) {
        if (from) count_access(worker, source, static_cast<size_t>(from), Move::global_read, at);
        count_access(worker, worker.shared + static_cast<int32_t>(offset), size, Move::shared_async, at);
    }
    // As a write of this moment it must not race with what others read before ...
    check_shared(worker, worker.shared + static_cast<int32_t>(offset), size, Access::write, at);
    // ... and until its wait nobody may touch it.
    for_cells(worker, offset, size,
              [](Cells& cells, Places&, Four lanes, uint32_t, uint32_t) { cells.tag |= lanes & kPending; });
    memset(reinterpret_cast<void*>(worker.shared + offset), 0xff, size);
    me.copies.push_back({offset, size, static_cast<uint32_t>(from), global, me.groups, at});
}

void cp_async_commit() { running_worker->current->groups++; }

void cp_async_wait(int groups_left) {
    Worker& worker = *running_worker;
    Inside inside(worker);
    Thread& me = *worker.current;
    uint64_t landed = me.groups < static_cast<uint64_t>(groups_left) ? 0 : me.groups - groups_left;
    Stamp now = stamp_now(worker);
    size_t kept = 0;
    for (const AsyncCopy& copy : me.copies) {
        if (copy.group >= landed) {
            me.copies[kept++] = copy;
            continue;
        }
        char* to = reinterpret_cast<char*>(worker.shared + copy.offset);
        if (copy.from) memcpy(to, copy.source, copy.from);
        memset(to + copy.from, 0, copy.bytes - copy.from);
        for_cells(worker, copy.offset, copy.bytes, [&](Cells& cells, Places& places, Four lanes, uint32_t, uint32_t) {
            cells.tag = select(lanes, splat(worker.generation << 3), cells.tag);
            cells.write = select(lanes, splat(now), cells.write);
            places.write = select(lanes, splat(code_offset(copy.at)), places.write);
        });
    }
    me.copies.resize(kept);
}

// ---- Atomics ----
// Blocks of other workers may be at the same address, so these are atomic on the machine too.
template <class T, class New> static T atomically(T* p, const void* at, New make_new) {
    if (Worker* worker = running_worker) {
        uintptr_t address = reinterpret_cast<uintptr_t>(p);
        check_access(*worker, address, sizeof(T), Access::atomic, true, at);
        bool shared = address - worker->arena < worker->arena_bytes;
        if (worker->counter)
            count_access(*worker, address, sizeof(T), shared ? Move::shared_atomic : Move::global_atomic, at);
    }
    using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
    Bits* bits = reinterpret_cast<Bits*>(p);
    Bits old = __atomic_load_n(bits, __ATOMIC_RELAXED);
    for (;;) {
        T value = make_new(__builtin_bit_cast(T, old));
        if (__atomic_compare_exchange_n(bits, &old, __builtin_bit_cast(Bits, value), false, __ATOMIC_SEQ_CST,
                                        __ATOMIC_SEQ_CST))
            return __builtin_bit_cast(T, old);
    }
}

template <class T> T atomic_add(T* p, T value) {
    return atomically(p, SIMT_CALLER, [=](T old) { return static_cast<T>(old + value); });
}
template <class T> T atomic_max(T* p, T value) {
    return atomically(p, SIMT_CALLER, [=](T old) { return old < value ? value : old; });
}
template <class T> T atomic_min(T* p, T value) {
    return atomically(p, SIMT_CALLER, [=](T old) { return value < old ? value : old; });
}
template <class T> T atomic_exchange(T* p, T value) {
    return atomically(p, SIMT_CALLER, [=](T) { return value; });
}
template <class T> T atomic_compare_exchange(T* p, T expected, T value) {
    return atomically(p, SIMT_CALLER, [=](T old) { return old == expected ? value : old; });
}
template <class T> T atomic_or(T* p, T value) {
    return atomically(p, SIMT_CALLER, [=](T old) { return old | value; });
}
template <class T> T atomic_and(T* p, T value) {
    return atomically(p, SIMT_CALLER, [=](T old) { return old & value; });
}

#define SIMT_ATOMICS(T)                                                                                                \
    template T atomic_max<T>(T*, T);                                                                                   \
    template T atomic_min<T>(T*, T);                                                                                   \
    template T atomic_compare_exchange<T>(T*, T, T);                                                                   \
    template T atomic_or<T>(T*, T);                                                                                    \
    template T atomic_and<T>(T*, T);                                                                                   \
    template T atomic_add<T>(T*, T);                                                                                   \
    template T atomic_exchange<T>(T*, T);
SIMT_ATOMICS(int)
SIMT_ATOMICS(unsigned)
SIMT_ATOMICS(unsigned long long)
template float atomic_add<float>(float*, float);
template float atomic_exchange<float>(float*, float);
template double atomic_add<double>(double*, double);

} // namespace simt
