// What is remembered of shared memory: who wrote and read each word last, and with what order among them.
//
// Order is FastTrack's idea (Flanagan & Freund 2009) with a warp in the place of a thread: an access is stamped with
// its warp's time, and a barrier tells each warp up to which time of every other it now is behind. Most of the
// simulator's time goes here, so four cells lie and are judged together, as vectors: an access of 16 bytes costs what
// one of 4 does. Whatever is not plainly in order is judged again cell by cell, which finds the words of the report.
#pragma once
#include "block.h"

namespace simt {

using Four = uint32_t __attribute__((vector_size(16)));

inline Four splat(uint32_t x) { return Four{x, x, x, x}; }
inline bool any(Four v) {
    using Two = uint64_t __attribute__((vector_size(16)));
    Two halves = reinterpret_cast<Two>(v);
    return (halves[0] | halves[1]) != 0;
}
inline Four select(Four mask, Four yes, Four no) { return (mask & yes) | (~mask & no); }

// The cells of four words of shared memory; or of the four bytes of a word, where accesses are smaller than words.
struct alignas(64) Cells {
    Four tag;     // generation (the block they speak of) << 3 | flags
    Four write;   // stamps
    Four read[2]; // the latest, and the latest of another warp or else thread
};
// Where these accesses stand in the code, relative to the program's start.
struct Places {
    Four write, read[2];
};
constexpr uint32_t kAtomic = 1;  // the write was atomic
constexpr uint32_t kPending = 2; // the write is a cp.async that nobody has waited for
constexpr uint32_t kSplit = 4;   // look at the cells of the word's bytes instead

// Of a stamp: its thread's lane, and above it the warp.
constexpr uint32_t kLaneBits = (kLanes - 1u) << kTimeBits;
constexpr int kWarpShift = kTimeBits + 5;

inline uint32_t stamp_thread(Stamp s) { return s >> kTimeBits; }

inline Stamp stamp_now(const Worker& worker) {
    const Thread& me = *worker.current;
    return me.linear << kTimeBits | worker.warps[me.warp].time;
}

// Whether the stamped access lies before everything that the current thread does from now on.
inline bool is_before(const Worker& worker, Stamp s) {
    const Thread& me = *worker.current;
    uint32_t thread = stamp_thread(s), time = s & kTimeMask;
    if (thread == me.linear) return true;
    const Warp& mine = worker.warps[me.warp];
    uint32_t warp = thread / kLanes;
    if (warp != me.warp) return time <= mine.known[warp];
    return time <= mine.floor || (mine.partial && time <= mine.known_lanes[me.lane][thread % kLanes]);
}

inline bool are_before(const Worker& worker, Four stamps) {
    for (int i = 0; i < 4; i++)
        if (stamps[i] && !is_before(worker, stamps[i])) return false;
    return true;
}

// The second place keeps a reader that the first cannot speak for: of another warp if there is one, unless that read
// lies before this one, which then speaks for it.
inline void remember_read(const Worker& worker, Cells& cells, Places& places, Four lanes, Stamp now, uint32_t at) {
    Four first = cells.read[0], second = cells.read[1];
    auto of_my_warp = [&](Four stamps) { return (stamps ^ now) >> kWarpShift == 0; };
    // To a later write all readers of this warp at this time are alike, but for the writer itself: two speak for all.
    auto alike = [&](Four stamps) { return ((stamps ^ now) & ~kLaneBits) == 0; };
    Four far_second = lanes & (second != 0) & ~of_my_warp(second);
    if (any(far_second))
        for (int i = 0; i < 4; i++)
            if (far_second[i] && is_before(worker, second[i])) far_second[i] = 0;
    lanes &= ~((first == now) | (alike(first) & (far_second | alike(second))));
    if (!any(lanes)) return;
    Four other_thread = (first != 0) & ((first ^ now) >> kTimeBits != 0);
    Four moves = lanes & other_thread & (~of_my_warp(first) | ~far_second);
    if (any(moves)) {
        cells.read[1] = select(moves, first, second);
        places.read[1] = select(moves, places.read[0], places.read[1]);
    }
    cells.read[0] = select(lanes, splat(now), first);
    places.read[0] = select(lanes, splat(at), places.read[0]);
}

inline void remember_write(Cells& cells, Places& places, Four lanes, Stamp now, uint32_t at) {
    cells.write = select(lanes, splat(now), cells.write);
    cells.read[0] &= ~lanes;
    cells.read[1] &= ~lanes;
    places.write = select(lanes, splat(at), places.write);
}

// Cells that speak of an earlier block are empty.
inline void renew(const Worker& worker, Cells& cells, Four lanes) {
    Four old = lanes & (cells.tag >> 3 != worker.generation);
    if (!any(old)) return;
    cells.tag = select(old, splat(worker.generation << 3), cells.tag);
    cells.write &= ~old;
    cells.read[0] &= ~old;
    cells.read[1] &= ~old;
}

// By the warps' order alone: whether the accesses of that warp up to this stamp's time lie before.
inline bool is_warp_before(const Worker& worker, Stamp s) {
    const Warp& mine = worker.warps[worker.current->warp];
    uint32_t warp = s >> kWarpShift;
    return (s & kTimeMask) <= (warp == worker.current->warp ? mine.floor : mine.known[warp]);
}

// The commonest case: words of one row that one warp wrote and, if this is a write, one read, all in order.
// False: it is not that case, and nothing was done.
inline bool touch_alike(Worker& worker, uint32_t offset, uint32_t bytes, Access access, uint32_t at) {
    if (bytes % 4 || offset % 4 || offset % 16 + bytes > 16) return false;
    uint32_t first = offset / 4 % 4, count = bytes / 4;
    Four lanes = Four{0, 1, 2, 3} - first < count;
    Cells& cells = worker.words[offset / 16];
    auto differs = [](Four stamps, uint32_t i) { return (stamps ^ stamps[i]) & ~kLaneBits; };
    Four odd = (cells.tag ^ (worker.generation << 3)) | differs(cells.write, first);
    if (access == Access::read) { // of what was written: a cell of this block begins with a write or a report
        if (any(lanes & odd) || !is_warp_before(worker, cells.write[first])) return false;
        remember_read(worker, cells, worker.word_places[offset / 16], lanes, stamp_now(worker), at);
        return true;
    }
    odd |= differs(cells.read[0], first) | differs(cells.read[1], first);
    if (access == Access::atomic || any(lanes & odd) || !is_warp_before(worker, cells.write[first]) ||
        !is_warp_before(worker, cells.read[0][first]) || !is_warp_before(worker, cells.read[1][first]))
        return false;
    remember_write(cells, worker.word_places[offset / 16], lanes, stamp_now(worker), at);
    return true;
}

// act(cells, places, lanes, offset of the first, bytes of each) for the cells of these bytes: words where accesses are
// whole words, else bytes. lanes: all ones for those of the four that are meant.
template <class Act> inline void for_cells(Worker& worker, uint32_t offset, uint32_t bytes, const Act& act) {
    uint32_t end = offset + bytes;
    for (uint32_t row = offset / 16; row * 16 < end; row++) {
        Cells& words = worker.words[row];
        Four begins = splat(row * 16) + Four{0, 4, 8, 12};
        Four whole = (begins >= offset) & (begins + 4 <= end);
        Four split = words.tag == (worker.generation << 3 | kSplit);
        Four plain = whole & ~split;
        if (any(plain)) act(words, worker.word_places[row], plain, row * 16, 4);
        Four in_bytes = (begins + 4 > offset) & (begins < end) & ~plain;
        if (!any(in_bytes)) continue;
        for (uint32_t i = 0; i < 4; i++) {
            if (!in_bytes[i]) continue;
            uint32_t word = row * 4 + i;
            Cells& parts = worker.bytes[word];
            Places& places = worker.byte_places[word];
            if (!split[i]) {
                const Places& whole_places = worker.word_places[row];
                parts = {
                    splat(words.tag[i]), splat(words.write[i]), {splat(words.read[0][i]), splat(words.read[1][i])}};
                places = {splat(whole_places.write[i]),
                          {splat(whole_places.read[0][i]), splat(whole_places.read[1][i])}};
                words.tag[i] = worker.generation << 3 | kSplit;
            }
            Four each = splat(word * 4) + Four{0, 1, 2, 3};
            act(parts, places, (each >= offset) & (each < end), word * 4, 1);
        }
    }
}

} // namespace simt
