// All of a run's device memory as one allocation, laid out before the first step. Nothing is allocated later.
//
//   Arena arena;
//   arena.place(acts.qkv, L * N * 3 * C, "qkv");     // only notes the size
//   arena.commit();                                  // allocates once, zeroed, and sets every pointer
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

class Arena {
public:
    Arena() = default;
    ~Arena();
    Arena(const Arena&) = delete;
    Arena& operator=(const Arena&) = delete;

    // `pointer` must outlive commit(). count 0 leaves it null.
    template <class T> void place(T*& pointer, int64_t count, const char* name) {
        pointer = nullptr;
        place_bytes(reinterpret_cast<void**>(&pointer), static_cast<size_t>(count) * sizeof(T), name);
    }
    size_t bytes() const { return bytes_; }
    void commit();

private:
    struct Slot {
        void** pointer;
        size_t offset, bytes;
        std::string name;
    };
    std::vector<Slot> slots_;
    size_t bytes_ = 0;
    void* memory_ = nullptr;
    void place_bytes(void** pointer, size_t bytes, const char* name);
};
