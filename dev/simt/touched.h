// Which bytes of device and pinned memory an operation reads and writes: whole ranges for copies, fills and products,
// and for a kernel the words of 16 bytes that its threads came to.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <unordered_map>
#include <vector>

namespace simt {

struct Range {
    uintptr_t begin, end;
    bool writes;
};

struct Meeting {
    uintptr_t begin, end;
    bool first_writes, second_writes;
};

class Touched {
public:
    Touched() = default;
    Touched(const Touched&) = delete;
    Touched& operator=(const Touched&) = delete;

    void add(uintptr_t address, size_t bytes, bool writes) {
        const uintptr_t first = address / kWord, last = (address + bytes - 1) / kWord, page = first / kWords;
        Page*& recent = recent_[(page ^ page / recent_.size()) % recent_.size()]; // allocations begin at like pages
        if (recent && recent->number == page && last / kWords == page)
            recent->bits[writes] |= words(first % kWords, last % kWords);
        else
            add_slowly(first, last, writes, recent);
    }
    void add_range(const void* p, size_t bytes, bool writes); // nothing if it is memory that the device does not know
    void merge(const Touched& other);

    // Bytes that both touch and one of them writes, if there are any.
    std::optional<Meeting> meets(const Touched& other) const;

private:
    static constexpr uintptr_t kWord = 16, kWords = 64, kPage = kWord * kWords;
    struct Page {
        uintptr_t number;
        std::array<uint64_t, 2> bits; // words read, written
    };

    std::vector<Range> ranges_;
    std::unordered_map<uintptr_t, Page> pages_;
    std::array<Page*, 64> recent_{};

    static uint64_t words(uintptr_t first, uintptr_t last) { return ~uint64_t{0} >> (63 - (last - first)) << first; }
    void add_slowly(uintptr_t first, uintptr_t last, bool writes, Page*& recent);
    std::optional<Meeting> meets(const Range& range) const; // in pages; `range` is the second
};

} // namespace simt
