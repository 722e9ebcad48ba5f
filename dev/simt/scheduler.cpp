// Fibers, barriers and collectives: the threads of one block take turns on one thread of the machine, and change only
// where they wait. Whose turn is next is drawn from the seed.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdarg>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <numeric>
#include <thread>

#include <omp.h>
#include <sys/mman.h>
#include <unistd.h>

#include "block.h"
#include "cells.h"
#include "include/cuda_runtime.h"
#include "signals.h"
#include "streams.h"

namespace simt {

constinit thread_local Worker* running_worker = nullptr;

std::string text(const char* format, ...) {
    char line[512];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(line, sizeof line, format, arguments);
    va_end(arguments);
    return line;
}

static std::string triple(uint3 v) { return text("(%u,%u,%u)", v.x, v.y, v.z); }

// splitmix64: every block gets its own stream, whichever worker runs it.
static uint64_t mix(uint64_t x) {
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

static void* reserve(size_t bytes) {
    void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw RunFailed("simt: cannot reserve " + std::to_string(bytes) + " bytes of address space");
    return p;
}

Worker::Worker() : threads(kMaxThreads), warps(kMaxWarps) {
    stacks_bytes = kMaxThreads * kStackBytes;
    stacks = reinterpret_cast<uintptr_t>(reserve(stacks_bytes));
    for (int i = 0; i < kMaxThreads; i++)
        mprotect(reinterpret_cast<void*>(stacks + i * kStackBytes), kGuardBytes, PROT_NONE);
    arena_bytes = kSharedBytes + 2 * kRedZoneBytes;
    arena = reinterpret_cast<uintptr_t>(reserve(arena_bytes));
    shared = arena + kRedZoneBytes;
    mprotect(reinterpret_cast<void*>(arena), kRedZoneBytes, PROT_NONE);
    mprotect(reinterpret_cast<void*>(shared + kSharedBytes), kRedZoneBytes, PROT_NONE);
    words = static_cast<Cells*>(reserve(kSharedBytes / 16 * sizeof(Cells)));
    bytes = static_cast<Cells*>(reserve(kSharedBytes / 4 * sizeof(Cells)));
    word_places = static_cast<Places*>(reserve(kSharedBytes / 16 * sizeof(Places)));
    byte_places = static_cast<Places*>(reserve(kSharedBytes / 4 * sizeof(Places)));
    ready.reserve(kMaxThreads);
    for (int i = 0; i < kMaxThreads; i++) {
        threads[i].linear = i;
        threads[i].warp = i / kLanes;
        threads[i].lane = i % kLanes;
    }
}

Worker::~Worker() {
    munmap(reinterpret_cast<void*>(stacks), stacks_bytes);
    munmap(reinterpret_cast<void*>(arena), arena_bytes);
    munmap(words, kSharedBytes / 16 * sizeof(Cells));
    munmap(bytes, kSharedBytes / 4 * sizeof(Cells));
    munmap(word_places, kSharedBytes / 16 * sizeof(Places));
    munmap(byte_places, kSharedBytes / 4 * sizeof(Places));
}

// ---- Turns ----
static void run_fiber() {
    Worker& worker = *running_worker;
    worker.inside = false;
    worker.grid->entry(worker.grid->parameters);
    worker.inside = true;
    worker.finish_thread();
}

void Worker::make_ready(Thread& thread) {
    thread.state = State::ready;
    ready.push_back(static_cast<uint16_t>(thread.linear));
}

void Worker::pick_next() {
    Thread* self = current;
    if (ready.empty()) {
        switch_context(&self->context, scheduler);
        return;
    }
    random ^= random << 13, random ^= random >> 7, random ^= random << 17;
    size_t chosen = static_cast<size_t>((random >> 32) * ready.size() >> 32);
    Thread& next = threads[ready[chosen]];
    ready[chosen] = ready.back();
    ready.pop_back();
    current = &next;
    if (&next != self) switch_context(&self->context, next.context);
}

void Worker::note(FaultKind kind, const Thread& thread, const void* at, std::string what) {
    if (report.raised) return;
    report = {true, kind, at, block, thread.index, std::move(what)};
}

void Worker::raise(FaultKind kind, const void* at, std::string what) {
    note(kind, *current, at, std::move(what));
    switch_context(&current->context, scheduler);
    __builtin_unreachable();
}

void Worker::finish_thread() {
    Thread& me = *current;
    Warp& warp = warps[me.warp];
    warp.live &= ~(1u << me.lane);
    me.state = State::done;
    done_count++;
    Barrier& all = barriers[0];
    if (all.arrived != 0 && all.expected == thread_count)
        raise(FaultKind::divergent_barrier, all.first_at,
              text("thread %s returned while %u of %u threads wait at this barrier", triple(me.index).c_str(),
                   all.arrived, thread_count));
    for (size_t i = 0; i < warp.pending.size(); i++)
        if ((warp.pending[i].mask & warp.live) == warp.pending[i].arrived) {
            Pending complete = warp.pending[i];
            warp.pending.erase(warp.pending.begin() + i);
            finish_collective(warp, complete);
            break;
        }
    pick_next();
    __builtin_unreachable();
}

void Worker::explain_stuck() {
    std::string said;
    const Thread* first = nullptr;
    std::vector<const Thread*> told;
    auto waits_alike = [](const Thread& a, const Thread& b) {
        return a.state == b.state && a.waits_at == b.waits_at &&
               (a.state != State::at_barrier || a.barrier == b.barrier);
    };
    for (uint32_t i = 0; i < thread_count; i++) {
        const Thread& t = threads[i];
        if (t.state == State::done) continue;
        if (!first) first = &t;
        bool known = false;
        for (const Thread* other : told) known |= waits_alike(*other, t);
        if (known || told.size() == 4) continue;
        told.push_back(&t);
        uint32_t count = 0;
        for (uint32_t j = 0; j < thread_count; j++) count += waits_alike(threads[j], t);
        said += text("%s%u thread%s from %s on wait%s at %s", said.empty() ? "" : "; ", count, count == 1 ? "" : "s",
                     triple(t.index).c_str(), count == 1 ? "s" : "", place_text(t.waits_at).c_str());
        if (t.state == State::at_barrier) said += text(" (barrier %d)", t.barrier);
        if (t.state == State::in_warp)
            for (const Pending& p : warps[t.warp].pending)
                if (p.arrived >> t.lane & 1)
                    said += text(" (%s, mask %08x, still missing %08x)", collective_name(p.kind), p.mask,
                                 p.mask & warps[t.warp].live & ~p.arrived);
    }
    if (done_count) said += text("; %u threads have returned", done_count);
    note(FaultKind::deadlock, *first, first->waits_at, said);
}

void Worker::run_block(const Grid& g, uint64_t linear) {
    grid = &g;
    block = {static_cast<unsigned>(linear % g.grid.x), static_cast<unsigned>(linear / g.grid.x % g.grid.y),
             static_cast<unsigned>(linear / g.grid.x / g.grid.y)};
    thread_count = g.block.x * g.block.y * g.block.z;
    warp_count = (thread_count + kLanes - 1) / kLanes;
    done_count = 0;
    random = mix(mix(g.seed) ^ linear) | 1;
    report = {};
    ready.clear();
    barriers = {};
    if (++generation == 1u << 29) {
        memset(static_cast<void*>(words), 0, kSharedBytes / 16 * sizeof(Cells));
        memset(static_cast<void*>(bytes), 0, kSharedBytes / 4 * sizeof(Cells));
        generation = 1;
    }
    // All ones: a NaN in fp32 and bf16 alike.
    memset(reinterpret_cast<void*>(shared), 0xff, g.shared_bytes);
    for (uint32_t w = 0; w < warp_count; w++) {
        uint32_t lanes = thread_count - w * kLanes;
        Warp& warp = warps[w];
        warp.live = lanes >= 32 ? 0xffffffffu : (1u << lanes) - 1;
        warp.time = 1;
        warp.floor = 0;
        warp.partial = false;
        warp.known.fill(0);
        warp.pending.clear();
    }
    for (uint32_t i = 0; i < thread_count; i++) {
        Thread& t = threads[i];
        t.index = {i % g.block.x, i / g.block.x % g.block.y, i / g.block.x / g.block.y};
        t.groups = 0;
        t.copies.clear();
        // Tops are staggered, else all stacks would share a few cache sets.
        uintptr_t top = stacks + (i + 1) * kStackBytes - i * 272 % 4096 / 16 * 16;
        t.context = make_context(reinterpret_cast<void*>(top), kStackBytes - kGuardBytes - 4096, run_fiber);
        make_ready(t);
    }
    std::swap(ready.back(), ready[random % ready.size()]);
    running_worker = this;
    running = inside = true;
    current = &threads[ready.back()];
    ready.pop_back();
    switch_context(&scheduler, current->context);
    running = false;
    if (counter) counter->finish_block();
    if (!report.raised && done_count != thread_count) explain_stuck();
    running_worker = nullptr;
}

// ---- Order among accesses ----
void Worker::advance(Warp& warp) {
    if (++warp.time > kTimeMask)
        raise(FaultKind::invalid, current->waits_at, "a warp synchronised more than four million times in one block");
}

void Worker::order_lanes(Warp& warp, uint32_t mask) {
    if ((mask & warp.live) == warp.live) {
        warp.floor = warp.time;
        warp.partial = false;
    } else {
        if (!warp.partial) warp.known_lanes = {};
        warp.partial = true;
        std::array<uint32_t, kLanes> joined{};
        for (int lane = 0; lane < kLanes; lane++) {
            if (!(mask >> lane & 1)) continue;
            for (int other = 0; other < kLanes; other++)
                joined[other] = std::max(joined[other], warp.known_lanes[lane][other]);
        }
        for (int lane = 0; lane < kLanes; lane++)
            if (mask >> lane & 1) joined[lane] = warp.time;
        for (int lane = 0; lane < kLanes; lane++)
            if (mask >> lane & 1) warp.known_lanes[lane] = joined;
    }
    advance(warp);
}

// ---- Collectives of a warp ----
const char* collective_name(Collective kind) {
    switch (kind) {
    case Collective::sync:
        return "__syncwarp";
    case Collective::shuffle:
        return "shuffle";
    case Collective::ballot:
        return "vote";
    case Collective::reduce:
        return "warp reduction";
    case Collective::ldmatrix:
        return "ldmatrix";
    case Collective::mma:
        return "mma";
    }
    return "";
}

void Worker::finish_collective(Warp& warp, Pending pending) {
    if (pending.complete) pending.complete(*this, warp, pending);
    // Of all that a warp does together only __syncwarp orders memory: CUDA promises that of no shuffle, vote or
    // product.
    if (pending.kind == Collective::sync) order_lanes(warp, pending.arrived);
    uint32_t index = static_cast<uint32_t>(&warp - warps.data()), first = index * kLanes;
    if (counter) {
        counter->collective(pending.kind);
        if ((pending.arrived & warp.live) == warp.live) counter->meet(index);
    }
    for (int lane = 0; lane < kLanes; lane++)
        if (pending.arrived >> lane & 1) make_ready(threads[first + lane]);
}

void collective(Collective kind, unsigned mask, void* operand, const void* at,
                void (*complete)(Worker&, Warp&, const Pending&)) {
    Worker& worker = *running_worker;
    Inside inside(worker);
    Thread& me = *worker.current;
    Warp& warp = worker.warps[me.warp];
    uint32_t bit = 1u << me.lane;
    if (!(mask & bit))
        worker.raise(FaultKind::divergent_warp, at,
                     text("lane %u calls a %s whose mask %08x leaves it out", me.lane, collective_name(kind), mask));
    me.waits_at = at;
    me.state = State::in_warp;
    warp.operand[me.lane] = operand;
    size_t i = 0;
    while (i < warp.pending.size() && warp.pending[i].mask != mask) i++;
    if (i == warp.pending.size()) warp.pending.push_back({mask, 0, kind, at, complete});
    Pending& pending = warp.pending[i];
    bool aligned = kind == Collective::ldmatrix || kind == Collective::mma;
    if (pending.kind != kind || (aligned && pending.at != at && place_text(pending.at) != place_text(at)))
        worker.raise(FaultKind::divergent_warp, at,
                     text("lane %u comes to a %s, but other lanes of its warp wait in a %s at %s", me.lane,
                          collective_name(kind), collective_name(pending.kind), place_text(pending.at).c_str()));
    pending.arrived |= bit;
    if (pending.arrived == (mask & warp.live)) {
        Pending complete_now = pending;
        warp.pending.erase(warp.pending.begin() + i);
        worker.finish_collective(warp, complete_now);
    }
    worker.pick_next();
}

// ---- Barriers ----
void Worker::release(Barrier& b) {
    std::array<uint32_t, kMaxWarps> known{};
    for (uint32_t w = 0; w < warp_count; w++) {
        if (!b.lanes[w]) continue;
        for (uint32_t other = 0; other < warp_count; other++)
            known[other] = std::max(known[other], warps[w].known[other]);
        known[w] = std::max(known[w], b.time[w]);
    }
    for (uint32_t w = 0; w < warp_count; w++) {
        if (!b.waits[w]) continue;
        if (counter) counter->meet(w);
        Warp& warp = warps[w];
        warp.known = known;
        warp.floor = warp.time;
        warp.partial = false;
        advance(warp);
        for (int lane = 0; lane < kLanes; lane++)
            if (b.waits[w] >> lane & 1) make_ready(threads[w * kLanes + lane]);
    }
    b = {};
}

void barrier(int id, int count, bool wait) {
    const void* at = SIMT_CALLER;
    Worker& worker = *running_worker;
    Inside inside(worker);
    Thread& me = *worker.current;
    uint32_t whole = worker.warp_count * kLanes;
    if (id < 0 || id >= kBarriers)
        worker.raise(FaultKind::invalid, at, text("barrier %d: there are %d", id, kBarriers));
    if (count >= 0 && (count == 0 || count % kLanes || static_cast<uint32_t>(count) > whole))
        worker.raise(
            FaultKind::invalid, at,
            text("barrier %d for %d threads: must be a multiple of 32 up to the block's %u", id, count, whole));
    Warp& warp = worker.warps[me.warp];
    // Among some warps, each arrives as a whole: what a lane does after its arrival is not behind the barrier.
    if (count >= 0) collective(Collective::sync, warp.live, nullptr, at, nullptr);
    Barrier& b = worker.barriers[id];
    uint32_t expected = count < 0 ? worker.thread_count : static_cast<uint32_t>(count);
    if (count < 0 && worker.done_count)
        worker.raise(FaultKind::divergent_barrier, at,
                     text("%u threads of the block have returned before this barrier", worker.done_count));
    if (b.arrived == 0) {
        b.expected = expected;
        b.first_at = at;
    } else if (b.expected != expected)
        worker.raise(FaultKind::divergent_barrier, at,
                     text("barrier %d is for %u threads here and for %u at %s", id, expected, b.expected,
                          place_text(b.first_at).c_str()));
    const void* other = b.lanes[me.warp] ? b.at[me.warp] : count < 0 ? b.first_at : at;
    if (other != at && place_text(other) != place_text(at))
        worker.raise(
            FaultKind::divergent_barrier, at,
            text("this thread is at one barrier, others of the block wait at another: %s", place_text(other).c_str()));
    if (b.lanes[me.warp] >> me.lane & 1)
        worker.raise(FaultKind::divergent_barrier, at, text("arrived twice at barrier %d before it was complete", id));
    if (!b.lanes[me.warp]) {
        b.at[me.warp] = at;
        if (worker.counter) worker.counter->total.barriers++;
        // A last warp that is not full counts as one all the same.
        if (count >= 0) b.arrived += kLanes - std::min<uint32_t>(kLanes, worker.thread_count - me.warp * kLanes);
    }
    b.time[me.warp] = count < 0 ? warp.time : warp.floor;
    b.lanes[me.warp] |= 1u << me.lane;
    b.arrived++;
    if (wait) {
        b.waits[me.warp] |= 1u << me.lane;
        me.state = State::at_barrier;
        me.barrier = id;
        me.waits_at = at;
    }
    if (b.arrived == b.expected) worker.release(b);
    if (wait) worker.pick_next();
}

// ---- Launches ----
uint3 thread_index() { return running_worker->current->index; }
uint3 block_index() { return running_worker->block; }
dim3 block_size() { return running_worker->grid->block; }
dim3 grid_size() { return running_worker->grid->grid; }
char* shared_memory() { return reinterpret_cast<char*>(running_worker->shared); }
const void* running_kernel() { return running_worker->grid->kernel; }

const char* fault_name(FaultKind kind) {
    switch (kind) {
    case FaultKind::deadlock:
        return "deadlock";
    case FaultKind::divergent_barrier:
        return "divergent barrier";
    case FaultKind::divergent_warp:
        return "divergent warp operation";
    case FaultKind::race:
        return "race on shared memory";
    case FaultKind::unwritten_read:
        return "read of unwritten shared memory";
    case FaultKind::out_of_bounds:
        return "out of bounds";
    case FaultKind::misaligned:
        return "misaligned access";
    case FaultKind::invalid:
        return "invalid operand";
    case FaultKind::unordered:
        return "unordered operations";
    case FaultKind::mismatch:
        return "mismatched collective";
    }
    return "";
}

Fault::Fault(FaultKind kind, std::string kernel, std::string file, int line, uint3 block, uint3 thread,
             std::string text)
    : RunFailed(std::string(fault_name(kind)) + " in " + kernel + " at " + file + ":" + std::to_string(line) +
                ", block " + triple(block) + ", thread " + triple(thread) + ": " + text),
      kind(kind), kernel(std::move(kernel)), file(std::move(file)), text(std::move(text)), line(line), block(block),
      thread(thread) {}
Fault::Fault(FaultKind kind, std::string text)
    : RunFailed(std::string(fault_name(kind)) + ": " + text), kind(kind), text(std::move(text)) {}

constinit const bool kPresent = true;

Settings& settings() {
    static Settings all = [] {
        Settings s;
        const char *seed = getenv("SIMT_SEED"), *threads = getenv("SIMT_THREADS");
        s.count = getenv("SIMT_PROFILE") != nullptr;
        s.seed = seed ? strtoull(seed, nullptr, 10) : 0;
        s.threads = threads ? atoi(threads) : static_cast<int>(std::thread::hardware_concurrency());
        if (s.threads < 1) s.threads = 1;
        s.device_bytes = s.pinned_bytes =
            static_cast<size_t>(sysconf(_SC_PHYS_PAGES)) * static_cast<size_t>(sysconf(_SC_PAGE_SIZE));
        return s;
    }();
    return all;
}

std::function<std::vector<uint64_t>(uint64_t)> some_blocks(uint64_t each, std::vector<uint64_t> around) {
    return [each, around](uint64_t count) {
        std::vector<uint64_t> chosen;
        auto add = [&](uint64_t begin, uint64_t end) {
            for (uint64_t b = begin; b < std::min(end, count); b++) chosen.push_back(b);
        };
        add(0, each);
        for (uint64_t middle : around) add(middle < each ? 0 : middle - each, middle + each);
        add(count < each ? 0 : count - each, count);
        std::sort(chosen.begin(), chosen.end());
        chosen.erase(std::unique(chosen.begin(), chosen.end()), chosen.end());
        return chosen;
    };
}

// The blocks of `order`, noting what they touch if somebody wants to know.
static cudaError_t run_grid(const Grid& g, const std::vector<uint64_t>& order, Touched* touched) {
    const Settings& set = settings();
    std::atomic<size_t> next{0};
    std::atomic<bool> stop{false};
    Report report;
    SignalHandlers handlers;
    LaunchCount counted;
    std::mutex merging;
    auto work = [&](size_t most) {
        static thread_local std::unique_ptr<Worker> own;
        if (!own) own = std::make_unique<Worker>();
        own->allocation_begin = own->allocation_end = 0;
        own->counter = set.count ? std::make_unique<Counter>() : nullptr;
        Touched here;
        own->touched = touched ? &here : nullptr;
        SignalStack stack;
        for (size_t i, ran = 0; ran < most && !stop && (i = next++) < order.size(); ran++) {
            own->run_block(g, order[i]);
            if (own->report.raised && !stop.exchange(true)) report = own->report;
        }
        if (own->counter) counted.add(*own->counter);
        own->touched = nullptr;
        std::lock_guard lock(merging);
        if (touched) touched->merge(here);
    };
    // Waking the other workers costs as much as a few small blocks: the first block tells whether it is worth it.
    constexpr std::chrono::microseconds kWorthSharing{1000};
    auto begin = std::chrono::steady_clock::now();
    int workers = static_cast<int>(std::min<size_t>(set.threads, order.size()));
    if (workers > 1) work(1);
    if (workers <= 1 || (std::chrono::steady_clock::now() - begin) * order.size() < kWorthSharing)
        work(order.size());
    else {
#pragma omp parallel num_threads(workers)
        work(order.size());
    }
    if (report.raised) {
        Place place = find_place(report.at);
        throw Fault(report.kind, function_name(g.kernel), place.file, place.line, report.block, report.thread,
                    report.text);
    }
    if (set.count) record_traffic(g.kernel, counted);
    return cudaSuccess;
}

cudaError_t launch(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                   void (*entry)(const void*), const void* parameters, size_t parameter_bytes) {
    const Settings& set = settings();
    uint64_t threads = uint64_t{block.x} * block.y * block.z;
    if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535 ||
        threads == 0 || threads > kMaxThreads || block.z > 64 || shared_bytes > set.shared_per_block)
        return cudaErrorInvalidConfiguration;
    if (shared_bytes > kSharedBytes) return cudaErrorInvalidConfiguration;
    uint64_t count = uint64_t{grid.x} * grid.y * grid.z;
    if (!set.blocks && count > 1u << 26)
        throw RunFailed("simt: a grid of " + std::to_string(count) + " blocks; choose some with Settings::blocks");
    note_launch(kernel, threads, shared_bytes);
    // Whatever becomes of the parameters, the seed and the choice of blocks until it runs.
    auto kept = std::make_shared<std::vector<std::max_align_t>>(parameter_bytes / sizeof(std::max_align_t) + 1);
    memcpy(kept->data(), parameters, parameter_bytes);
    auto run = [=, seed = set.seed, blocks = set.blocks](Touched* touched) {
        Grid g{kernel,          grid, block, shared_bytes, entry, reinterpret_cast<const char*>(kept->data()),
               parameter_bytes, seed};
        std::vector<uint64_t> order;
        if (blocks)
            order = blocks(count);
        else {
            order.resize(count);
            std::iota(order.begin(), order.end(), 0);
        }
        uint64_t random = mix(seed);
        for (size_t i = order.size(); i > 1; i--) std::swap(order[i - 1], order[(random = mix(random)) % i]);
        return run_grid(g, order, touched);
    };
    return give(stream, {"kernel", {}, kernel, true, nullptr, run});
}

} // namespace simt
