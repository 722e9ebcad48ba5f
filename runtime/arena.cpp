#include "arena.h"

#include <algorithm>

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

// The largest first, each at the lowest place that is free in all of its phases. What lasts through all phases comes
// before the rest, so that the others share one run behind it.
void Arena::lay_out() {
    std::vector<Item*> order;
    for (Item& item : items_) order.push_back(&item);
    std::stable_sort(order.begin(), order.end(), [](const Item* a, const Item* b) {
        const bool a_always = a->phases == kAlways, b_always = b->phases == kAlways;
        return a_always != b_always ? a_always : !a_always && a->bytes > b->bytes;
    });
    bytes_ = 0;
    std::vector<const Item*> placed; // by offset
    for (Item* item : order) {
        size_t offset = 0;
        for (const Item* other : placed)
            if (other->phases & item->phases && other->offset < offset + item->bytes)
                offset = std::max(offset, other->offset + other->bytes);
        item->offset = offset;
        bytes_ = std::max(bytes_, offset + item->bytes);
        placed.insert(std::upper_bound(placed.begin(), placed.end(), item,
                                       [](const Item* a, const Item* b) { return a->offset < b->offset; }),
                      item);
    }
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
