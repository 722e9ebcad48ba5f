// Memory beside the device's: what is saved comes back, in order, while the device goes on; refusals say what to do. In
// the simt build a wait too few is told.
#include "../runtime/device/host_store.h"

#include <fstream>

#include "../kernels/gelu.h"
#include "../runtime/base/errors.h"
#include "../runtime/device/recording.h"
#include "asynchronous.h"
#include "check.h"
#include "scratch.h"

namespace {

template <class T> class Array {
public:
    explicit Array(size_t count) : bytes_(count * sizeof(T)), data_(static_cast<T*>(device_alloc(bytes_))) {}
    ~Array() { device_free(data_, bytes_); }
    Array(const Array&) = delete;
    operator T*() const { return data_; }

private:
    size_t bytes_;
    T* data_;
};

std::vector<char> random_bytes(size_t n, uint64_t seed) {
    std::mt19937_64 rng(seed);
    std::vector<char> bytes(n);
    for (char& c : bytes) c = static_cast<char>(rng());
    return bytes;
}

std::vector<char> read_back(const Device& device, const char* from, size_t bytes) {
    std::vector<char> read(bytes);
    download(device, read.data(), from, bytes);
    return read;
}

size_t resident_bytes() {
    size_t all = 0, resident = 0;
    std::ifstream("/proc/self/statm") >> all >> resident;
    return resident * static_cast<size_t>(sysconf(_SC_PAGESIZE));
}

// Layer inputs as training treats them: layer l turns the array of slot l % 2 into that of the other. `careful` is
// whether it waits where the contract wants it.
constexpr int64_t kLayerCount = 7, kLayerSize = 3000; // real numbers
constexpr size_t kLayerBytes = kLayerSize * sizeof(real);

struct Layers {
    const Device& device;
    HostStore& store;
    Array<real> slot[2] = {Array<real>(kLayerSize), Array<real>(kLayerSize)};
    Array<real> inputs{kLayerCount * kLayerSize}, seen{kLayerCount * kLayerSize}; // by forward, by backward

    void copy(real* to, const real* from) { gelu_forward(device.stream, to, from, kLayerSize, Gelu::none); }
    real* at(real* all, int64_t l) { return all + l * kLayerSize; }

    void forward(bool careful) {
        for (int64_t l = 0; l < kLayerCount; l++) {
            if (careful) store.wait(l % 2);
            copy(slot[l % 2], at(inputs, l));
            store.save(l * kLayerBytes, slot[l % 2], kLayerBytes, l % 2);
        }
    }
    void load(int64_t l) {
        if (l >= 0) store.load(l * kLayerBytes, slot[l % 2], kLayerBytes, l % 2);
    }
    void backward(bool careful) {
        if (careful) {
            store.finish();
            for (real* array : slot) fill_zero(device, array, kLayerBytes);
        }
        load(kLayerCount - 1);
        for (int64_t l = kLayerCount - 1; l >= 0; l--) {
            load(l - 1);
            if (careful) store.wait(l % 2);
            copy(at(seen, l), slot[l % 2]);
        }
    }
    // Whether backward found what forward was given, for numbers that belong to `run` alone.
    bool right(int run, const std::function<void()>& passes) {
        std::vector<real> given(kLayerCount * kLayerSize), found(given.size());
        for (size_t i = 0; i < given.size(); i++) assign(given[i], float((i * 7 + run * 13) % 251) + 1);
        upload(device, inputs, given.data(), given.size() * sizeof(real));
        passes();
        download(device, found.data(), seen, found.size() * sizeof(real));
        return check::same_bits(given, found);
    }
};

} // namespace

TEST_CASE("a store starts as zeros, and without bytes there is none") {
    ScratchFolder folder;
    Device device(0);
    HostStore none(device, "/does/not/exist", 0);
    CHECK(none.data() == nullptr);
    CHECK_NOTHROW(none.finish());
    CHECK_NOTHROW(none.save(0, nullptr, 0, 0));
    CHECK_THROWS_AS(none.save(0, nullptr, 1, 0), std::invalid_argument);

    const size_t bytes = (3 << 20) + 5;
    HostStore store(device, folder.path(), bytes);
    CHECK(store.bytes() == bytes);
    CHECK(read_back(device, store.data(), bytes) == std::vector<char>(bytes, 0));
    Array<char> array(bytes);
    std::vector<char> ones(bytes, 1);
    upload(device, array, ones.data(), bytes);
    store.load(0, array, bytes, 0);
    store.wait(0);
    CHECK(read_back(device, array, bytes) == std::vector<char>(bytes, 0));
    CHECK(std::filesystem::is_empty(folder.path())); // what the cpu build has there has no name
}

TEST_CASE("what is saved comes back, of any size and from any offset") {
    ScratchFolder folder;
    Device device(0);
    const size_t kBytes = 9 << 20; // several pieces of a copy on many threads
    HostStore store(device, folder.path(), kBytes);
    Array<char> from(kBytes + 3), to(kBytes + 1);
    std::vector<char> expected(kBytes, 0);
    uint64_t seed = 1;
    for (size_t bytes : {size_t(0), size_t(1), size_t(7), size_t(4095), size_t(4096), size_t(100001), size_t(2) << 20,
                         (size_t(2) << 20) + 1, (size_t(5) << 20) + 3, kBytes})
        for (size_t offset : {size_t(0), size_t(1), size_t(4097), (size_t(4) << 20) - 1, kBytes - bytes}) {
            if (offset + bytes > kBytes) continue;
            CAPTURE(bytes);
            CAPTURE(offset);
            const int slot = static_cast<int>(seed % HostStore::kSlots);
            std::vector<char> values = random_bytes(bytes, seed++);
            std::copy(values.begin(), values.end(), expected.begin() + offset);
            upload(device, from + 3, values.data(), bytes);
            store.save(offset, from + 3, bytes, slot);
            fill_zero(device, to, kBytes);
            store.load(offset, to + 1, bytes, slot);
            store.wait(slot);
            CHECK(read_back(device, to + 1, bytes) == values);
        }
    // And nothing around it has changed.
    store.finish();
    CHECK(read_back(device, store.data(), kBytes) == expected);
}

TEST_CASE("layer inputs go and come back through two slots") {
    ScratchFolder folder;
    Device device(0);
    HostStore store(device, folder.path(), kLayerCount * kLayerBytes);
    Layers layers{device, store};
    for (int run = 0; run < 3; run++) CHECK(layers.right(run, [&] { layers.forward(true), layers.backward(true); }));
    // The simulator tells of a wait too few: a save may take what overwrote the array, or a load come too late.
    if (check::kSimulated) {
        CHECK_THROWS_AS(layers.right(3, [&] { layers.forward(false), layers.backward(true); }), RunFailed);
        CHECK_THROWS_AS(layers.right(4, [&] { layers.forward(true), layers.backward(false); }), RunFailed);
    }
}

TEST_CASE("a recording may hold copies") {
    ScratchFolder folder;
    Device device(0);
    HostStore store(device, folder.path(), kLayerCount * kLayerBytes);
    Layers layers{device, store};
    Recording recording;
    auto passes = [&] {
        layers.forward(true), layers.backward(true);
        store.finish();
    };
    // Between runs others use the store, as the optimizer does, and leave a copy that nobody waits for.
    for (int run = 0; run < 5; run++) {
        CHECK(layers.right(run, [&] {
            store.finish();
            recording.run(device, {1}, passes);
        }));
        store.save(0, layers.slot[0], kLayerBytes, 2);
    }
    if (!device_is_host()) { // copies from before, or that nobody waits for, are refused
        auto saves = [&] { layers.forward(true); };
        Recording unfinished, entered;
        store.finish();
        unfinished.run(device, {1}, saves);
        store.finish();
        CHECK_THROWS_AS(unfinished.run(device, {1}, saves), RunFailed);
    }
}

TEST_CASE("pieces of a state are updated through two staging slots, over and over") {
    ScratchFolder folder;
    Device device(0);
    const int64_t kPieces = 5, kSize = 2000;
    const size_t bytes = kSize * sizeof(real);
    HostStore store(device, folder.path(), kPieces * bytes);
    Array<real> staging[2] = {Array<real>(kSize), Array<real>(kSize)}, updated(kSize);
    std::vector<real> state(kPieces * kSize), got(state.size());
    for (size_t i = 0; i < state.size(); i++) assign(state[i], float(i % 97) - 48);
    store.finish();
    upload(device, store.data(), state.data(), kPieces * bytes);
    const int kSteps = 3;
    for (int step = 0; step < kSteps; step++) {
        store.load(0, staging[0], bytes, 0);
        for (int64_t piece = 0; piece < kPieces; piece++) {
            const int slot = piece % 2;
            // The next piece's load comes behind the save from the same staging, and this piece's update meanwhile.
            if (piece + 1 < kPieces) store.load((piece + 1) * bytes, staging[1 - slot], bytes, 1 - slot);
            store.wait(slot);
            gelu_forward(device.stream, updated, staging[slot], kSize, Gelu::tanh);
            gelu_forward(device.stream, staging[slot], updated, kSize, Gelu::none);
            store.save(piece * bytes, staging[slot], bytes, slot);
        }
    }
    store.finish();
    download(device, got.data(), store.data(), kPieces * bytes);
    Array<real> array(kPieces * kSize), other(kPieces * kSize);
    upload(device, array, state.data(), kPieces * bytes);
    for (int step = 0; step < kSteps; step++) {
        gelu_forward(device.stream, other, array, kPieces * kSize, Gelu::tanh);
        gelu_forward(device.stream, array, other, kPieces * kSize, Gelu::none);
    }
    std::vector<real> want(got.size());
    download(device, want.data(), array, kPieces * bytes);
    CHECK(check::same_bits(got, want));
}

TEST_CASE("upload() and download() reach what is in the store, behind the copies") {
    ScratchFolder folder;
    Device device(0);
    const size_t bytes = (2 << 20) + 11; // more than the pinned memory that upload() goes through
    HostStore store(device, folder.path(), 2 * bytes);
    Array<char> array(bytes);
    std::vector<char> first = random_bytes(bytes, 1), second = random_bytes(bytes, 2);
    upload(device, array, first.data(), bytes);
    store.save(bytes, array, bytes, 0);
    store.finish();
    CHECK(read_back(device, store.data() + bytes, bytes) == first);
    upload(device, store.data() + bytes, second.data(), bytes);
    store.load(bytes, array, bytes, 1);
    store.wait(1);
    CHECK(read_back(device, array, bytes) == second);
    store.finish();
    fill_zero(device, store.data() + bytes, bytes);
    CHECK(read_back(device, store.data(), 2 * bytes) == std::vector<char>(2 * bytes, 0));
}

TEST_CASE("a store that goes waits for its copies") {
    ScratchFolder folder;
    Device device(0);
    Array<char> array(kLayerBytes);
    const std::vector<char> given = random_bytes(kLayerBytes, 1);
    upload(device, array, given.data(), kLayerBytes);
    for (bool loads : {false, true}) {
        HostStore store(device, folder.path(), kLayerBytes);
        store.save(0, array, kLayerBytes, 0);
        if (loads) store.load(0, array, kLayerBytes, 0);
    }
    CHECK(read_back(device, array, kLayerBytes) == given);
}

TEST_CASE("bytes that lie outside, and slots that there are not, are refused") {
    ScratchFolder folder;
    Device device(0);
    HostStore store(device, folder.path(), 1000);
    Array<char> array(2000);
    for (auto [offset, bytes] : std::vector<std::pair<size_t, size_t>>{
             {0, 1001}, {1000, 1}, {999, 2}, {1001, 0}, {1, SIZE_MAX}, {SIZE_MAX, 1}, {SIZE_MAX, SIZE_MAX}}) {
        CHECK_THROWS_AS(store.save(offset, array, bytes, 0), std::invalid_argument);
        CHECK_THROWS_AS(store.load(offset, array, bytes, 0), std::invalid_argument);
    }
    for (int slot : {-1, HostStore::kSlots}) {
        CHECK_THROWS_AS(store.save(0, array, 1, slot), std::invalid_argument);
        CHECK_THROWS_AS(store.load(0, array, 1, slot), std::invalid_argument);
        CHECK_THROWS_AS(store.wait(slot), std::invalid_argument);
    }
    store.save(999, array, 1, 0);
    store.save(1000, array, 0, 0);
}

TEST_CASE("more than there is is refused, with what and where and what to do") {
    ScratchFolder folder;
    Device device(0);
    for (size_t bytes : {size_t(1) << 50, (size_t(1) << 63) + 1, SIZE_MAX}) {
        std::string said = message_of<RunFailed>([&] { HostStore(device, folder.path(), bytes); });
        CAPTURE(said);
        CHECK(contains(said, std::to_string(bytes)));
        CHECK(contains(said, "--offload"));
        CHECK(contains(said, device_is_host() ? folder.path() : "--host-memory"));
    }
    if (device_is_host()) {
        std::string said = message_of<RunFailed>([&] { HostStore(device, folder / "missing", 1000); });
        CHECK((contains(said, folder / "missing") && contains(said, "check the path")));
        int status = run_in_child([&] {
            const size_t kDisk = 8 << 20;
            enter_small_disk(folder.path(), kDisk);
            std::string said = message_of<RunFailed>([&] { HostStore(device, folder.path(), kDisk + 1); });
            demand(contains(said, folder.path()) && contains(said, std::to_string(kDisk + 1)), said);
            demand(contains(said, "No space left on device") && contains(said, "--offload"), said);
            HostStore most(device, folder.path(), kDisk - (1 << 20)); // what is reserved is nobody else's
            said = message_of<RunFailed>([&] { HostStore(device, folder.path(), 2 << 20); });
            demand(contains(said, "No space left on device"), said);
        });
        if (status == kChildSkipped) MESSAGE("skipped: no tmpfs can be mounted here");
        CHECK((status == 0 || status == kChildSkipped));
    }
    if (!check::kSimulated) return;
    simt::SettingsGuard guard;
    simt::settings().pinned_bytes = 10 << 20;
    HostStore fits(device, folder.path(), 7 << 20); // beside the device's own two megabytes
    CHECK_THROWS_AS(HostStore(device, folder.path(), 2 << 20), RunFailed);
}

TEST_CASE("the cpu build's memory does not grow by what it keeps on disk") {
    if (!device_is_host()) return;
    ScratchFolder folder;
    Device device(0);
    const size_t bytes = size_t(256) << 20, slack = size_t(16) << 20;
    Array<char> array(bytes);
    memset(array, 1, bytes);
    HostStore store(device, folder.path(), bytes);
    const size_t before = resident_bytes(), most = peak_resident_bytes();
    store.save(0, array, bytes, 0);
    store.load(0, array, bytes, 0);
    CHECK(resident_bytes() < before + slack);
    CHECK(peak_resident_bytes() < most + slack); // nor for a moment
    // Except for what is touched in place, until finish().
    CHECK(std::count(store.data(), store.data() + bytes, 1) == static_cast<ptrdiff_t>(bytes));
    CHECK(resident_bytes() > before + bytes / 2);
    store.data()[bytes - 1] = 7;
    store.finish();
    CHECK(resident_bytes() < before + slack);
    CHECK(store.data()[bytes - 1] == 7);
}
