#include "arena.h"

#include <algorithm>
#include <bit>
#include <tuple>

#include "memory.h"

// A cache line on the CPU, and enough for any vector access.
constexpr size_t kAlignment = 256;

const char* phase_name(Phases phase) {
    switch (phase) {
    case kForward:
        return "forward";
    case kLosses:
        return "losses";
    case kMlpBackward:
        return "MLP backward";
    case kAttentionBackward:
        return "attention backward";
    default:
        return "update";
    }
}

void Arena::place_bytes(void** pointer, size_t bytes, const char* name) {
    if (!bytes) return;
    bytes = (bytes + kAlignment - 1) / kAlignment * kAlignment;
    items_.push_back({section_, name, phases_, bytes, 0, pointer});
    laid_out_ = false;
}

// Each at the lowest place that is free in all of its phases, in this order.
size_t Arena::lay_out(const std::vector<Item*>& order) {
    size_t end = 0;
    std::vector<const Item*> placed; // by offset
    for (Item* item : order) {
        size_t offset = 0;
        for (const Item* other : placed)
            if (other->phases & item->phases && other->offset < offset + item->bytes)
                offset = std::max(offset, other->offset + other->bytes);
        item->offset = offset;
        end = std::max(end, offset + item->bytes);
        placed.insert(std::upper_bound(placed.begin(), placed.end(), item,
                                       [](const Item* a, const Item* b) { return a->offset < b->offset; }),
                      item);
    }
    return end;
}

// What lasts longest comes first, so that the rest shares one run behind it, and the larger before the smaller. Of the
// orders tried, with the items of each phase in front, the best is taken: mostly that of the phase which needs most,
// whose items then lie without gaps while the others find room beside them.
void Arena::lay_out() {
    std::vector<Item*> order, best;
    for (Item& item : items_) order.push_back(&item);
    bytes_ = SIZE_MAX;
    for (Phases first : kEachPhase) {
        std::stable_sort(order.begin(), order.end(), [&](const Item* a, const Item* b) {
            auto rank = [&](const Item* item) {
                return std::tuple(!(item->phases & first), -std::popcount(item->phases), -int64_t(item->bytes));
            };
            return rank(a) < rank(b);
        });
        const size_t bytes = lay_out(order);
        if (bytes < bytes_) bytes_ = bytes, best = order;
    }
    if (!best.empty()) lay_out(best);
    if (items_.empty()) bytes_ = 0;
    laid_out_ = true;
}

size_t Arena::bytes() {
    if (!laid_out_) lay_out();
    return bytes_;
}

size_t Arena::bytes_in(Phases phase) const {
    size_t sum = 0;
    for (const Item& item : items_)
        if (item.phases & phase) sum += item.bytes;
    return sum;
}

void Arena::commit() {
    if (!bytes()) return;
    memory_ = device_alloc(bytes_);
    for (const Item& item : items_) *item.pointer = static_cast<char*>(memory_) + item.offset;
}

Arena::~Arena() {
    if (memory_) device_free(memory_, bytes_);
}
