// What the kernel tests share: fresh random inputs, poisoned outputs, and a comparison that names the worst element.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include <doctest/doctest.h>
#include <omp.h>
#include <sys/mman.h>
#include <unistd.h>

#include "../dev/simt/simt.h"
#include "../kernels/types.h"
#include "../runtime/device/memory.h"

// What kernels read and write, seen by the host too: device memory in the simt build, managed memory on a GPU, where
// test/main.cpp makes every launch wait for its end.
template <class T> struct ManagedAllocator {
    using value_type = T;
    ManagedAllocator() = default;
    template <class U> ManagedAllocator(const ManagedAllocator<U>&) {}
    T* allocate(size_t n) { return static_cast<T*>(managed_alloc(n * sizeof(T))); }
    void deallocate(T* pointer, size_t) { managed_free(pointer); }
    template <class U> bool operator==(const ManagedAllocator<U>&) const { return true; }
};
template <class T> using Vector = std::vector<T, ManagedAllocator<T>>;

// Values that a wrong kernel cannot leave behind by luck: NaN in every output until it is written.
template <class T> Vector<T> poisoned(size_t n) {
    Vector<T> v(n);
    for (T& x : v) assign(x, NAN);
    return v;
}

// n normal values, rounded to T, so that kernel and oracle start from the same numbers.
template <class T> Vector<T> random_normal(size_t n, uint64_t seed, float scale = 1, float mean = 0) {
    std::mt19937_64 rng(seed);
    std::normal_distribution<float> normal(mean, scale);
    Vector<T> v(n);
    for (T& x : v) assign(x, normal(rng));
    return v;
}

template <class T, class A> std::vector<double> to_double(const std::vector<T, A>& v) {
    std::vector<double> d(v.size());
    for (size_t i = 0; i < v.size(); i++) d[i] = to_float(v[i]);
    return d;
}

// |got − want| <= tolerance·(norm of want per element + floor) for every element. `tolerance` is a derived bound: an
// epsilon times the square root of the number of additions, times a small constant stated where it is used.
// `allowance`, if given, is what an element may be off beyond that.
template <class T, class A> void check_close(const char* name, const std::vector<T, A>& got,
                                             const std::vector<double>& want, double tolerance, double floor = 0,
                                             const std::vector<double>& allowance = {}) {
    REQUIRE(got.size() == want.size());
    double norm = 0;
    for (double w : want) norm += std::isinf(w) ? 0 : w * w;
    norm = std::sqrt(norm / (want.empty() ? 1 : want.size()));
    double bound = tolerance * (norm + floor), worst = -1;
    size_t at = 0;
    for (size_t i = 0; i < want.size(); i++) {
        double error = std::abs(to_float(got[i]) - want[i]);
        // An element much larger than the norm is allowed its own rounding.
        if (std::isinf(want[i]))
            error = to_float(got[i]) == want[i] ? 0 : INFINITY;
        else
            error -= tolerance * std::abs(want[i]) + (allowance.empty() ? 0 : allowance[i]);
        if (std::isnan(error)) error = INFINITY;
        if (error > worst) worst = error, at = i;
    }
    std::string said = std::string(name) + ": worst at " + std::to_string(at) + " of " + std::to_string(want.size());
    if (worst > bound)
        said += ": got " + std::to_string(to_float(got[at])) + ", want " + std::to_string(want[at]) + ", error " +
                std::to_string(worst) + " > bound " + std::to_string(bound);
    CHECK_MESSAGE(worst <= bound, said);
}

namespace check {

// The simt build runs kernels thousands of times slower than a GPU: shapes shrink there.
inline const bool& kSimulated = simt::kPresent;

// Is this the first of the seeds that test/run.py gives the simulator? What takes minutes there runs under one alone.
inline bool first_seed() {
    const char* seed = std::getenv("SIMT_SEED");
    return !kSimulated || !seed || std::string(seed) == "1";
}

// Equal to the bit, so that NaN equals itself and −0 is not 0.
template <class T, class A> bool same_bits(const std::vector<T, A>& a, const std::vector<T, A>& b) {
    return a.size() == b.size() && (a.empty() || memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

// A copy that starts between two multiples of 16 bytes.
template <class T> class Unaligned {
public:
    explicit Unaligned(const Vector<T>& v) : all_(v.size() + 1) { std::copy(v.begin(), v.end(), all_.begin() + 1); }
    T* data() { return all_.data() + 1; }
    Vector<T> copy() const { return Vector<T>(all_.begin() + 1, all_.end()); }

private:
    Vector<T> all_;
};

// Scratch as the contracts want it, of exactly the size asked for: 64-byte aligned, full of NaN, with guards behind it.
class Scratch {
public:
    explicit Scratch(size_t bytes) : bytes_(bytes), memory_(bytes + 2 * kGuards, 0xff) {
        memset(get() + bytes_, kGuardByte, kGuards);
    }
    ~Scratch() {
        bool hold = true;
        for (size_t i = 0; i < kGuards; i++) hold = hold && get()[bytes_ + i] == kGuardByte;
        CHECK_MESSAGE(hold, "scratch was overrun");
    }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    unsigned char* get() {
        size_t past = reinterpret_cast<uintptr_t>(memory_.data()) % kGuards;
        return memory_.data() + (past ? kGuards - past : 0);
    }
    operator void*() { return get(); }

private:
    static constexpr size_t kGuards = 64;
    static constexpr unsigned char kGuardByte = 0x5a;
    size_t bytes_;
    Vector<unsigned char> memory_;
};

// Runs `body` with each number of threads; more threads than cores or rows is a case of its own. The simulator's
// threads are not these, so that two runs are enough there.
template <class Body> void with_threads(std::initializer_list<int> counts, Body body) {
    const int before = omp_get_max_threads();
    int runs = 0;
    for (int count : counts) {
        if (kSimulated && runs++ == 2) break;
        omp_set_num_threads(count);
        body(count);
    }
    omp_set_num_threads(before);
}

// Which blocks of a launch to run, by their numbers, given how many there are.
using BlockChoice = std::function<std::vector<uint64_t>(uint64_t)>;

// While it lives, launches of the simt build run only the blocks chosen; others run whole.
class OnlyBlocks {
public:
    explicit OnlyBlocks(BlockChoice choose) { simt::settings().blocks = std::move(choose); }

private:
    simt::SettingsGuard guard_;
};

// The `each` first and last blocks and as many on both sides of a part of the grid, 0 < part < 1; all of a small grid.
inline BlockChoice blocks_at(double part, uint64_t each = 3) {
    return [part, each](uint64_t count) {
        const uint64_t middle = uint64_t(part * count);
        std::vector<uint64_t> chosen;
        auto add = [&](uint64_t begin, uint64_t end) {
            for (uint64_t i = begin; i < end; i++) chosen.push_back(i);
        };
        if (count <= 64)
            add(0, count);
        else
            add(0, each), add(std::max(each, middle - each), std::min(middle + each, count - each)),
                add(count - each, count);
        return chosen;
    };
}

// Whether there is room for Huge arrays of so many bytes together; if not, a line says so. Only a GPU has to hold them
// all, and one that does not have them may hang over it.
inline bool has_room(double bytes) {
    if (device_is_host() || kSimulated || bytes <= 0.9 * double(available_bytes(0))) return true;
    MESSAGE("skipped: ", bytes / 1e9, " GB of free GPU memory are needed");
    return false;
}

// More elements than memory could hold, for offsets past 2^31. Untouched pages read as zero and cost nothing;
// `mirrored` arrays may be written everywhere too: all but the last window are one and the same piece of memory, seen
// many times. On a GPU it is managed memory, all of it.
template <class T> class Huge {
public:
    explicit Huge(int64_t n, bool mirrored = false) : bytes_((n * sizeof(T) / kWindow + 1) * kWindow) {
        simt::settings().device_bytes = size_t(1) << 42;
        if (!device_is_host()) {
            REQUIRE(has_room(double(n) * sizeof(T)));
            data_ = static_cast<T*>(managed_alloc(n * sizeof(T)));
            // A write here and there must not take two megabytes each time.
            if (mirrored)
                madvise(reinterpret_cast<void*>(uintptr_t(data_) / kPage * kPage), n * sizeof(T), MADV_NOHUGEPAGE);
            const uintptr_t first = (uintptr_t(data_) + kPage - 1) / kPage * kPage, end = uintptr_t(data_ + n);
            if (kSimulated && mirrored && end > first) mirror(reinterpret_cast<char*>(first), end - first);
            return;
        }
        const int kAnonymous = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
        void* at = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, kAnonymous, -1, 0);
        REQUIRE(at != MAP_FAILED);
        data_ = static_cast<T*>(at);
        madvise(at, bytes_, MADV_HUGEPAGE); // the shared huge page of zeros: a 512th of the faults
        if (mirrored) mirror(static_cast<char*>(at), bytes_);
    }
    ~Huge() {
        if (!device_is_host())
            managed_free(data_);
        else
            munmap(data_, bytes_);
    }
    Huge(const Huge&) = delete;
    T* data() { return data_; }
    T& operator[](int64_t i) { return data_[i]; }

private:
    static constexpr size_t kWindow = 64 << 20, kPage = 4096;
    size_t bytes_;
    T* data_;

    // All but the last window or two of these bytes, from a page's start on.
    static void mirror(char* at, size_t bytes) {
        int fd = memfd_create("mirrored", 0);
        REQUIRE(fd >= 0);
        REQUIRE(ftruncate(fd, kWindow) == 0);
        for (size_t byte = 0; byte + 2 * kWindow <= bytes; byte += kWindow)
            REQUIRE(mmap(at + byte, kWindow, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0) != MAP_FAILED);
        close(fd);
    }
};

} // namespace check
