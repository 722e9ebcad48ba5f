// Counts what kernels ask of memory: instructions of warps put together from their lanes, sectors and bank conflicts.
#include "traffic.h"

#include <algorithm>
#include <bit>
#include <cstdio>
#include <cstdlib>

#include "block.h"

namespace simt {

constexpr uint32_t kSectorBytes = 32, kBanks = 32, kWordBytes = 4;

// ---- Sectors ----
void SectorSet::insert(uint64_t sector) { pages_[sector / 128][sector / 64 % 2] |= uint64_t{1} << sector % 64; }

void SectorSet::insert(const SectorSet& other) {
    for (const auto& [page, bits] : other.pages_)
        for (int half = 0; half < 2; half++) pages_[page][half] |= bits[half];
}

uint64_t SectorSet::count() const {
    uint64_t n = 0;
    for (const auto& [page, bits] : pages_) n += std::popcount(bits[0]) + std::popcount(bits[1]);
    return n;
}

void Counter::weigh_global(GlobalTraffic& sum, SectorSet& set, const Form& form, const Instruction& one) {
    uint64_t sectors[kLanes];
    int count = 0;
    for (int lane = 0; lane < kLanes; lane++)
        if (one.lanes >> lane & 1) sectors[count++] = one.address[lane] / kSectorBytes;
    std::sort(sectors, sectors + count);
    int distinct = static_cast<int>(std::unique(sectors, sectors + count) - sectors);
    for (int i = 0; i < distinct; i++) set.insert(sectors[i]);
    sum.instructions++;
    sum.bytes += uint64_t{form.bytes} * count;
    sum.sectors += distinct;
}

// ---- Banks ----

// Wavefronts that these words take: as many as the busiest bank has words. Lanes at the same word share it, unless they
// `take_turns`.
static uint32_t wavefronts(const uint32_t* words, int count, bool take_turns) {
    uint32_t in_bank[kBanks] = {}, most = 0;
    for (int i = 0; i < count; i++) {
        bool again = false;
        for (int j = 0; j < i && !again && !take_turns; j++) again = words[j] == words[i];
        if (!again) most = std::max(most, ++in_bank[words[i] % kBanks]);
    }
    return most;
}

void Counter::weigh_shared(SharedTraffic& sum, const Form& form, const Instruction& one) {
    uint32_t words_each = std::max(form.bytes / kWordBytes, 1u), group = kLanes / words_each;
    sum.instructions++;
    for (uint32_t begin = 0; begin < kLanes; begin += group) {
        uint32_t words[kBanks];
        int count = 0;
        for (uint32_t lane = begin; lane < begin + group; lane++) {
            if (!(one.lanes >> lane & 1)) continue;
            sum.bytes += form.bytes;
            for (uint32_t i = 0; i < words_each; i++)
                words[count++] = static_cast<uint32_t>(one.address[lane] / kWordBytes) + i;
        }
        if (count == 0) continue;
        uint32_t taken = wavefronts(words, count, form.move == Move::shared_atomic);
        sum.wavefronts += taken;
        sum.conflicts += taken - 1;
    }
}

void Counter::tile(const uint32_t (&rows)[8]) {
    uint32_t words[kBanks];
    for (int i = 0; i < static_cast<int>(kBanks); i++) words[i] = rows[i / 4] / kWordBytes + i % 4;
    uint32_t taken = wavefronts(words, kBanks, false);
    total.matrix.bytes += kBanks * kWordBytes;
    total.matrix.wavefronts += taken;
    total.matrix.conflicts += taken - 1;
}

// ---- Instructions from lanes ----
void Counter::weigh(const Form& form, const Instruction& one) {
    switch (form.move) {
    case Move::global_read:
        return weigh_global(total.read, read, form, one);
    case Move::global_write:
        return weigh_global(total.written, written, form, one);
    case Move::global_atomic:
        return weigh_global(total.atomic, atomic, form, one);
    case Move::shared_load:
        return weigh_shared(total.load, form, one);
    case Move::shared_store:
        return weigh_shared(total.store, form, one);
    case Move::shared_async:
        return weigh_shared(total.async, form, one);
    case Move::shared_atomic:
        return weigh_shared(total.exchange, form, one);
    }
}

void Counter::access(uint32_t warp, uint32_t lane, uint32_t live, uint64_t address, uint32_t bytes, Move move,
                     const void* at) {
    uint64_t key = uint64_t{code_offset(at)} << 16 | bytes << 8 | static_cast<uint64_t>(move);
    auto [found, is_new] = number_.try_emplace(key, static_cast<uint32_t>(forms_.size()));
    if (is_new) forms_.push_back({bytes, move});
    uint32_t number = found->second;
    std::vector<Site>& sites = sites_[warp];
    if (number >= sites.size()) sites.resize(forms_.size());
    Site& site = sites[number];
    if (!site.touched) {
        site.touched = true;
        touched_[warp].push_back(number);
    }
    size_t index = site.first + (site.times[lane]++ - site.weighed);
    if (index == site.open.size()) site.open.emplace_back();
    site.open[index].address[lane] = address;
    site.open[index].lanes |= 1u << lane;
    // Lanes come here in order, so the oldest is complete first: at once, if lanes take turns at every access.
    while (site.first < site.open.size() && (site.open[site.first].lanes & live) == live) {
        weigh(forms_[number], site.open[site.first++]);
        site.weighed++;
    }
    if (site.first == site.open.size()) {
        site.open.clear();
        site.first = 0;
    }
}

void Counter::meet(uint32_t warp) {
    for (uint32_t number : touched_[warp]) {
        Site& site = sites_[warp][number];
        for (size_t i = site.first; i < site.open.size(); i++) weigh(forms_[number], site.open[i]);
        site.open.clear();
        site.times = {};
        site.weighed = 0;
        site.first = 0;
        site.touched = false;
    }
    touched_[warp].clear();
}

void Counter::finish_block() {
    for (uint32_t warp = 0; warp < kMaxWarps; warp++) meet(warp);
    total.blocks++;
}

void Counter::collective(Collective kind) {
    switch (kind) {
    case Collective::sync:
        total.warp_syncs++;
        break;
    case Collective::shuffle:
        total.shuffles++;
        break;
    case Collective::ballot:
        total.votes++;
        break;
    case Collective::reduce:
        total.reductions++;
        break;
    case Collective::ldmatrix:
        total.matrix.instructions++;
        break;
    case Collective::mma:
        total.mma++;
    }
}

void count_access(Worker& worker, uintptr_t address, size_t bytes, Move move, const void* at) {
    Inside inside(worker);
    const Thread& me = *worker.current;
    bool global = move == Move::global_read || move == Move::global_write || move == Move::global_atomic;
    worker.counter->access(me.warp, me.lane, worker.warps[me.warp].live, global ? address : address - worker.shared,
                           static_cast<uint32_t>(bytes), move, at);
}

void count_plain(Worker& worker, uintptr_t address) {
    if (is_kernel_data(worker, address, address)) return;
    Traffic& total = worker.counter->total;
    (address - worker.arena < worker.arena_bytes ? total.plain_shared : total.plain_global)++;
}

// ---- Sums ----
static GlobalTraffic sum(const GlobalTraffic& a, const GlobalTraffic& b) {
    return {a.instructions + b.instructions, a.bytes + b.bytes, a.sectors + b.sectors, a.unique + b.unique};
}
static SharedTraffic sum(const SharedTraffic& a, const SharedTraffic& b) {
    return {a.instructions + b.instructions, a.bytes + b.bytes, a.wavefronts + b.wavefronts, a.conflicts + b.conflicts};
}

SharedTraffic Traffic::shared() const { return sum(sum(sum(load, store), sum(async, matrix)), exchange); }

Traffic operator+(Traffic a, const Traffic& b) {
    for (auto part : {&Traffic::read, &Traffic::written, &Traffic::atomic}) a.*part = sum(a.*part, b.*part);
    for (auto part : {&Traffic::load, &Traffic::store, &Traffic::async, &Traffic::matrix, &Traffic::exchange})
        a.*part = sum(a.*part, b.*part);
    for (auto part : {&Traffic::launches, &Traffic::blocks, &Traffic::mma, &Traffic::shuffles, &Traffic::votes,
                      &Traffic::reductions, &Traffic::warp_syncs, &Traffic::barriers, &Traffic::exp2, &Traffic::log2,
                      &Traffic::tanh, &Traffic::plain_global, &Traffic::plain_shared})
        a.*part += b.*part;
    return a;
}

void LaunchCount::add(const Counter& part) {
    std::lock_guard lock(mutex);
    total = total + part.total;
    read.insert(part.read), written.insert(part.written), atomic.insert(part.atomic);
}

// ---- What the process has counted ----
namespace {

using ByKernel = std::map<std::string, Traffic>;
struct Counted {
    std::mutex mutex;
    ByKernel by_kernel, ever; // since the last reset, and of the whole process: the profile
};
Counted& counted() {
    static Counted all;
    return all;
}

std::string table_of(const ByKernel& kernels) {
    std::string table =
        "Bytes are as asked for; sectors have 32 bytes, `B/sector` of which were asked for; `unique` sectors would\n"
        "remain with a perfect cache. Wavefronts, conflicts: shared memory. mma, shuffles (votes and reductions too),\n"
        "barriers: instructions of warps. exp: results of exp2, log2 and tanh. plain: accesses in C++, not counted\n"
        "elsewhere.\n";
    table += text("%8s %8s  %12s %12s %10s  %10s %10s %8s  %10s %9s  %9s %9s %10s %8s %8s  %s\n", "launches", "blocks",
                  "read", "written", "atomic", "sectors", "unique", "B/sector", "wavefronts", "conflicts", "mma",
                  "shuffles", "exp", "barriers", "plain", "kernel");
    auto n = [](uint64_t x) { return static_cast<unsigned long long>(x); };
    for (const auto& [name, t] : kernels) {
        GlobalTraffic global = sum(sum(t.read, t.written), t.atomic);
        SharedTraffic shared = t.shared();
        table += text("%8llu %8llu  %12llu %12llu %10llu  %10llu %10llu ", n(t.launches), n(t.blocks), n(t.read.bytes),
                      n(t.written.bytes), n(t.atomic.bytes), n(global.sectors), n(global.unique));
        table += global.sectors ? text("%8.1f", static_cast<double>(global.bytes) / global.sectors) : text("%8s", "-");
        table += text("  %10llu %9llu  %9llu %9llu %10llu %8llu %8llu  ", n(shared.wavefronts), n(shared.conflicts),
                      n(t.mma), n(t.shuffles + t.votes + t.reductions), n(t.exp2 + t.log2 + t.tanh), n(t.barriers),
                      n(t.plain_global + t.plain_shared)) +
                 name + "\n";
    }
    return table;
}

void write_profile() {
    const char* path = getenv("SIMT_PROFILE");
    FILE* file = path ? fopen(path, "w") : nullptr;
    if (!file) {
        fprintf(stderr, "SIMT_PROFILE: cannot write %s\n", path ? path : "");
        return;
    }
    std::string table = table_of(counted().ever);
    fwrite(table.data(), 1, table.size(), file);
    fclose(file);
}

} // namespace

void record_traffic(const void* kernel, const LaunchCount& launch) {
    std::string name = find_place(static_cast<const char*>(kernel) + 1).file + " " + function_name(kernel);
    Traffic one = launch.total;
    one.launches = 1;
    one.read.unique = launch.read.count();
    one.written.unique = launch.written.count();
    one.atomic.unique = launch.atomic.count();
    Counted& all = counted();
    std::lock_guard lock(all.mutex);
    static const bool at_exit = getenv("SIMT_PROFILE") && atexit(write_profile) == 0;
    static_cast<void>(at_exit);
    for (ByKernel* kernels : {&all.by_kernel, &all.ever}) {
        Traffic& so_far = (*kernels)[name];
        so_far = so_far + one;
    }
}

std::map<std::string, Traffic> traffic() {
    std::lock_guard lock(counted().mutex);
    return counted().by_kernel;
}

Traffic traffic_of(const std::string& part) {
    Traffic found;
    for (const auto& [name, one] : traffic())
        if (name.find(part) != std::string::npos) found = found + one;
    return found;
}

void reset_traffic() {
    std::lock_guard lock(counted().mutex);
    counted().by_kernel.clear();
}

std::string traffic_table() { return table_of(traffic()); }

} // namespace simt
