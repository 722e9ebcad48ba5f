// g++ -fsanitize=thread puts a call before every access to memory that others might see. libtsan is not linked; these
// are the functions it would bring, and they ask the simulator. Outside of a launch they do nothing.
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "block.h"

using simt::Access;

static inline void access(void* p, size_t bytes, Access kind, bool aligned, const void* at) {
    simt::Worker* worker = simt::running_worker;
    if (!worker || worker->inside) return;
    uintptr_t address = reinterpret_cast<uintptr_t>(p);
    if (address - worker->stacks < worker->stacks_bytes) return;
    if (worker->counter) simt::count_plain(*worker, address);
    // The commonest access of all: the allocation met last, aligned.
    if (address >= worker->allocation_begin && address + bytes <= worker->allocation_end && !(address & (bytes - 1))) {
        if (worker->touched) worker->touched->add(address, bytes, kind != Access::read);
        return;
    }
    simt::check_access(*worker, address, bytes, kind, aligned, at);
}

#define SIMT_HOOKS(bytes)                                                                                              \
    extern "C" void __tsan_read##bytes(void* p) { access(p, bytes, Access::read, true, SIMT_CALLER); }                 \
    extern "C" void __tsan_write##bytes(void* p) { access(p, bytes, Access::write, true, SIMT_CALLER); }               \
    extern "C" void __tsan_volatile_read##bytes(void* p) { access(p, bytes, Access::read, true, SIMT_CALLER); }        \
    extern "C" void __tsan_volatile_write##bytes(void* p) { access(p, bytes, Access::write, true, SIMT_CALLER); }
SIMT_HOOKS(1)
SIMT_HOOKS(2)
SIMT_HOOKS(4)
SIMT_HOOKS(8)
SIMT_HOOKS(16)

// Accesses through types that promise less alignment than their size: nvcc would split them.
#define SIMT_UNALIGNED_HOOKS(bytes)                                                                                    \
    extern "C" void __tsan_unaligned_read##bytes(void* p) { access(p, bytes, Access::read, false, SIMT_CALLER); }      \
    extern "C" void __tsan_unaligned_write##bytes(void* p) { access(p, bytes, Access::write, false, SIMT_CALLER); }
SIMT_UNALIGNED_HOOKS(2)
SIMT_UNALIGNED_HOOKS(4)
SIMT_UNALIGNED_HOOKS(8)
SIMT_UNALIGNED_HOOKS(16)

static void access_range(void* p, size_t bytes, Access kind, const void* at) {
    simt::Worker* worker = simt::running_worker;
    if (!worker || worker->inside || !bytes) return;
    if (worker->counter) simt::count_plain(*worker, reinterpret_cast<uintptr_t>(p));
    simt::check_access(*worker, reinterpret_cast<uintptr_t>(p), bytes, kind, false, at);
}
extern "C" void __tsan_read_range(void* p, size_t bytes) { access_range(p, bytes, Access::read, SIMT_CALLER); }
extern "C" void __tsan_write_range(void* p, size_t bytes) { access_range(p, bytes, Access::write, SIMT_CALLER); }

extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
extern "C" void __tsan_vptr_update(void**, void*) {}
extern "C" void __tsan_vptr_read(void**) {}
extern "C" void __tsan_atomic_thread_fence(int) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
extern "C" void __tsan_atomic_signal_fence(int) {}

// The __atomic builtins, which the instrumentation replaces whole. Orders are given as the strongest.
#define SIMT_ATOMIC_UPDATE(bits, T, name)                                                                              \
    extern "C" T __tsan_atomic##bits##_fetch_##name(volatile T* p, T value, int) {                                     \
        access(const_cast<T*>(p), sizeof(T), Access::atomic, true, SIMT_CALLER);                                       \
        return __atomic_fetch_##name(p, value, __ATOMIC_SEQ_CST);                                                      \
    }
#define SIMT_ATOMIC_EXCHANGE(bits, T, name)                                                                            \
    extern "C" bool __tsan_atomic##bits##_compare_exchange_##name(volatile T* p, T* expected, T value, int, int) {     \
        access(const_cast<T*>(p), sizeof(T), Access::atomic, true, SIMT_CALLER);                                       \
        return __atomic_compare_exchange_n(p, expected, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);             \
    }
#define SIMT_ATOMIC_HOOKS(bits, T)                                                                                     \
    extern "C" T __tsan_atomic##bits##_load(const volatile T* p, int) {                                                \
        access(const_cast<T*>(p), sizeof(T), Access::read, true, SIMT_CALLER);                                         \
        return __atomic_load_n(p, __ATOMIC_SEQ_CST);                                                                   \
    }                                                                                                                  \
    extern "C" void __tsan_atomic##bits##_store(volatile T* p, T value, int) {                                         \
        access(const_cast<T*>(p), sizeof(T), Access::write, true, SIMT_CALLER);                                        \
        __atomic_store_n(p, value, __ATOMIC_SEQ_CST);                                                                  \
    }                                                                                                                  \
    extern "C" T __tsan_atomic##bits##_exchange(volatile T* p, T value, int) {                                         \
        access(const_cast<T*>(p), sizeof(T), Access::atomic, true, SIMT_CALLER);                                       \
        return __atomic_exchange_n(p, value, __ATOMIC_SEQ_CST);                                                        \
    }                                                                                                                  \
    SIMT_ATOMIC_UPDATE(bits, T, add)                                                                                   \
    SIMT_ATOMIC_UPDATE(bits, T, sub)                                                                                   \
    SIMT_ATOMIC_UPDATE(bits, T, and)                                                                                   \
    SIMT_ATOMIC_UPDATE(bits, T, or)                                                                                    \
    SIMT_ATOMIC_UPDATE(bits, T, xor)                                                                                   \
    SIMT_ATOMIC_UPDATE(bits, T, nand)                                                                                  \
    SIMT_ATOMIC_EXCHANGE(bits, T, strong)                                                                              \
    SIMT_ATOMIC_EXCHANGE(bits, T, weak)
SIMT_ATOMIC_HOOKS(8, uint8_t)
SIMT_ATOMIC_HOOKS(16, uint16_t)
SIMT_ATOMIC_HOOKS(32, uint32_t)
SIMT_ATOMIC_HOOKS(64, uint64_t)
