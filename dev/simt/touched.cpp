#include "touched.h"

#include <algorithm>
#include <bit>

#include "block.h"

namespace simt {

void Touched::add_slowly(uintptr_t first, uintptr_t last, bool writes, Page*& recent) {
    for (uintptr_t page = first / kWords; page <= last / kWords; page++) {
        const uintptr_t begin = std::max(first, page * kWords), end = std::min(last, page * kWords + kWords - 1);
        recent = &pages_.try_emplace(page, Page{page, {}}).first->second;
        recent->bits[writes] |= words(begin % kWords, end % kWords);
        // Of an access over several pages the last one's place is not `recent`'s.
        if (first / kWords != last / kWords) recent = nullptr;
    }
}

void Touched::add_range(const void* p, size_t bytes, bool writes) {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(p);
    if (bytes && look_up(begin).state != HeapState::foreign) ranges_.push_back({begin, begin + bytes, writes});
}

void Touched::merge(const Touched& other) {
    ranges_.insert(ranges_.end(), other.ranges_.begin(), other.ranges_.end());
    for (const auto& [number, page] : other.pages_) {
        Page& mine = pages_.try_emplace(number, Page{number, {}}).first->second;
        for (int i = 0; i < 2; i++) mine.bits[i] |= page.bits[i];
    }
}

std::optional<Meeting> Touched::meets(const Range& range) const {
    const uintptr_t first = range.begin / kWord, last = (range.end - 1) / kWord;
    auto look = [&](const Page& page) -> std::optional<Meeting> {
        const uintptr_t base = page.number * kWords;
        if (base > last || base + kWords - 1 < first) return {};
        uint64_t both = words(std::max(first, base) - base, std::min(last, base + kWords - 1) - base);
        both &= range.writes ? page.bits[0] | page.bits[1] : page.bits[1];
        if (!both) return {};
        const int word = std::countr_zero(both), count = std::countr_one(both >> word);
        const uintptr_t begin = (base + word) * kWord;
        return Meeting{std::max(begin, range.begin), std::min(begin + count * kWord, range.end),
                       (page.bits[1] >> word & 1) != 0, range.writes};
    };
    if (last / kWords - first / kWords < pages_.size()) {
        for (uintptr_t number = first / kWords; number <= last / kWords; number++)
            if (auto page = pages_.find(number); page != pages_.end())
                if (auto met = look(page->second)) return met;
    } else
        for (const auto& [number, page] : pages_)
            if (auto met = look(page)) return met;
    return {};
}

std::optional<Meeting> Touched::meets(const Touched& other) const {
    for (const Range& mine : ranges_) {
        for (const Range& theirs : other.ranges_)
            if ((mine.writes || theirs.writes) && mine.begin < theirs.end && theirs.begin < mine.end)
                return Meeting{std::max(mine.begin, theirs.begin), std::min(mine.end, theirs.end), mine.writes,
                               theirs.writes};
        if (auto met = other.meets(mine)) return Meeting{met->begin, met->end, met->second_writes, met->first_writes};
    }
    for (const Range& theirs : other.ranges_)
        if (auto met = meets(theirs)) return met;
    const bool smaller = pages_.size() <= other.pages_.size();
    const auto &few = smaller ? pages_ : other.pages_, &many = smaller ? other.pages_ : pages_;
    for (const auto& [number, page] : few)
        if (auto found = many.find(number); found != many.end()) {
            const Page &mine = smaller ? page : found->second, &theirs = smaller ? found->second : page;
            const uint64_t both = (mine.bits[1] & (theirs.bits[0] | theirs.bits[1])) | (mine.bits[0] & theirs.bits[1]);
            if (!both) continue;
            const int word = std::countr_zero(both);
            const uintptr_t begin = (number * kWords + word) * kWord;
            return Meeting{begin, begin + std::countr_one(both >> word) * kWord, (mine.bits[1] >> word & 1) != 0,
                           (theirs.bits[1] >> word & 1) != 0};
        }
    return {};
}

} // namespace simt
