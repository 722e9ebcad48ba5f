// runtime/ranks/comm.h, run by every rank of a run: `mpirun -n 4 build/cpu/test_ranks_comm`. Started alone it is one
// rank, with RANKS_WITH_LIBRARY=1 one that takes its library's way all the same.
#include "../runtime/ranks/comm.h"

#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "asynchronous.h"
#include "check.h"

namespace {

constexpr double kTimeout = 60;

struct Run {
    Launch launch = find_launch([](const char* name) { return std::getenv(name); });
    Device device{1};
    std::unique_ptr<Control> control;
    std::unique_ptr<Comm> comm;

    Run() {
        Hello own;
        own.options = "ranks_comm", own.host = "host", own.process = getpid();
        if (device.target.cuda) own.device = "gpu" + std::to_string(launch.local_rank);
        if (launch.ranks == 1) launch.address = "127.0.0.1";
        if (launch.ranks > 1 || std::getenv("RANKS_WITH_LIBRARY"))
            control = std::make_unique<Control>(launch, own, kTimeout);
        comm = std::make_unique<Comm>(device, control.get());
    }
};

Run& run() {
    static Run all;
    return all;
}

template <class T> struct Array {
    size_t count;
    T* data;

    explicit Array(size_t n) : count(n), data(static_cast<T*>(device_alloc((n + 1) * sizeof(T)))) {}
    Array(const std::vector<T>& values) : Array(values.size()) { set(values); }
    ~Array() { device_free(data, (count + 1) * sizeof(T)); }
    Array(const Array&) = delete;
    Array& operator=(const Array&) = delete;

    void set(const std::vector<T>& values) { upload(run().device, data, values.data(), values.size() * sizeof(T)); }
    std::vector<T> get() const {
        std::vector<T> values(count);
        download(run().device, values.data(), data, count * sizeof(T));
        return values;
    }
};

float wide(float x) { return x; }
float wide(bf16 x) { return to_float(x); }
double wide(double x) { return x; }
template <class T> void narrow(T& to, double x) { to = T(x); }
void narrow(bf16& to, double x) { to = to_bf16(float(x)); }

// Rank `rank`'s values in a test: anyone can say what another has.
template <class T> std::vector<T> values_of(int rank, size_t count, uint64_t test) {
    std::vector<T> values(count);
    uint64_t state = test * 1000 + rank;
    for (T& value : values) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        narrow(value, float(int32_t(state >> 32)) * 0x1p-31f);
    }
    return values;
}
std::vector<char> bytes_of(int rank, size_t count, uint64_t test) {
    std::vector<char> values(count);
    for (size_t i = 0; i < count; i++) values[i] = char((i * 7 + rank * 31 + test * 13) % 251);
    return values;
}

// The sum of all ranks' values, in the order of the ranks.
template <class T> std::vector<T> sum_of(size_t count, uint64_t test) {
    std::vector<decltype(wide(T()))> sum(count);
    for (int rank = 0; rank < run().comm->ranks(); rank++) {
        const std::vector<T> values = values_of<T>(rank, count, test);
        for (size_t i = 0; i < count; i++) sum[i] = rank ? sum[i] + wide(values[i]) : wide(values[i]);
    }
    std::vector<T> rounded(count);
    for (size_t i = 0; i < count; i++) narrow(rounded[i], sum[i]);
    return rounded;
}

// The cpu build sums in the order of the ranks, so to the bit; NCCL in an order of its own, in bf16 with a rounding
// each.
template <class T> bool is_sum(const std::vector<T>& got, const std::vector<T>& want) {
    if (device_is_host()) return memcmp(got.data(), want.data(), got.size() * sizeof(T)) == 0;
    const float tolerance = run().comm->ranks() * run().comm->ranks() * (sizeof(T) == 2 ? 0x1p-7f : 0x1p-23f);
    for (size_t i = 0; i < got.size(); i++)
        if (!(std::abs(wide(got[i]) - wide(want[i])) <= tolerance)) return false;
    return true;
}

// What is sent at a time is 16 MB of floats: several of them and a part, and fewer elements than ranks.
constexpr int64_t kCounts[] = {0, 1, 3, 1000, (4 << 20) + 5};

template <class T> void check_sums() {
    Comm& comm = *run().comm;
    const int ranks = comm.ranks(), rank = comm.rank();
    uint64_t test = sizeof(T);
    for (const int64_t count : kCounts) {
        CAPTURE(count);
        test += 10;
        Array<T> data(values_of<T>(rank, count, test));
        comm.wait(comm.all_reduce(data.data, count));
        const std::vector<T> sum = data.get();
        CHECK(is_sum(sum, sum_of<T>(count, test)));
        data.set(values_of<T>(rank, count, test));
        comm.wait(comm.all_reduce(data.data, count));
        CHECK(memcmp(data.get().data(), sum.data(), count * sizeof(T)) == 0);
    }
    for (const int64_t each : kCounts) {
        if (each > 1000 && ranks > 3) continue;
        CAPTURE(each);
        test += 10;
        const std::vector<T> all = sum_of<T>(each * ranks, test);
        const std::vector<T> want(all.begin() + rank * each, all.begin() + (rank + 1) * each);
        Array<T> data(values_of<T>(rank, each * ranks, test)), own(each);
        comm.wait(comm.reduce_scatter(own.data, data.data, each));
        CHECK(is_sum(own.get(), want));
        comm.wait(comm.reduce_scatter(data.data + rank * each, data.data, each));
        const std::vector<T> after = data.get();
        CHECK(is_sum(std::vector<T>(after.begin() + rank * each, after.begin() + (rank + 1) * each), want));
    }
}

} // namespace

TEST_CASE("sums of float") { check_sums<float>(); }
TEST_CASE("sums of bf16, rounded once") { check_sums<bf16>(); }
TEST_CASE("sums of double") { check_sums<double>(); }

TEST_CASE("everybody has what everybody had") {
    Comm& comm = *run().comm;
    for (const size_t bytes : {size_t{0}, size_t{1}, size_t{999}, size_t{17} << 20}) {
        if (bytes * comm.ranks() > 80u << 20) continue;
        CAPTURE(bytes);
        std::vector<char> want;
        for (int rank = 0; rank < comm.ranks(); rank++) {
            const std::vector<char> values = bytes_of(rank, bytes, 1);
            want.insert(want.end(), values.begin(), values.end());
        }
        Array<char> own(bytes_of(comm.rank(), bytes, 1)), all(bytes * comm.ranks());
        comm.wait(comm.all_gather(all.data, own.data, bytes));
        CHECK((all.get() == want));

        Array<char> in_place(bytes * comm.ranks());
        char* part = in_place.data + comm.rank() * bytes;
        upload(run().device, part, own.get().data(), bytes);
        comm.wait(comm.all_gather(in_place.data, part, bytes));
        CHECK((in_place.get() == want));
    }
}

TEST_CASE("any rank's data to all") {
    Comm& comm = *run().comm;
    for (int root = 0; root < comm.ranks(); root++)
        for (const size_t bytes : {size_t{1}, (size_t{16} << 20) + 3}) {
            CAPTURE(root);
            Array<char> data(bytes_of(comm.rank(), bytes, 2));
            comm.wait(comm.broadcast(data.data, bytes, root));
            CHECK((data.get() == bytes_of(root, bytes, 2)));
        }
}

TEST_CASE("round a ring, each its own length, both ways") {
    Comm& comm = *run().comm;
    const int ranks = comm.ranks(), rank = comm.rank();
    auto length = [](int of) { return of == 1 ? (size_t{16} << 20) + 9 : size_t(of * 1001); };
    for (const int by : {1, ranks - 1}) {
        CAPTURE(by);
        const int to = (rank + by) % ranks, from = (rank + ranks - by) % ranks;
        Array<char> own(bytes_of(rank, length(rank), 3)), data(length(from));
        comm.wait(comm.send_receive(data.data, length(from), from, own.data, length(rank), to));
        CHECK((data.get() == bytes_of(from, length(from), 3)));
    }
}

TEST_CASE("everybody has a piece for everybody") {
    Comm& comm = *run().comm;
    for (const size_t bytes : {size_t{0}, size_t{5}, size_t{100000}}) {
        CAPTURE(bytes);
        std::vector<char> want;
        for (int from = 0; from < comm.ranks(); from++) {
            const std::vector<char> theirs = bytes_of(from, bytes * comm.ranks(), 4);
            want.insert(want.end(), theirs.begin() + comm.rank() * bytes, theirs.begin() + (comm.rank() + 1) * bytes);
        }
        Array<char> own(bytes_of(comm.rank(), bytes * comm.ranks(), 4)), data(bytes * comm.ranks());
        comm.wait(comm.all_to_all(data.data, own.data, bytes));
        CHECK((data.get() == want));
    }
}

TEST_CASE("in the order of the device's work") {
    Comm& comm = *run().comm;
    constexpr int64_t kCount = 1000;
    const std::vector<float> ones(kCount, 1);
    Array<float> data(ones), other(ones);
    Comm::Ticket last = 0;
    for (int turn = 0; turn < 5; turn++) {
        fill_zero(run().device, data.data, kCount * sizeof(float)); // before
        upload(run().device, data.data, ones.data(), kCount * sizeof(float));
        const Comm::Ticket first = comm.all_reduce(data.data, kCount);
        const Comm::Ticket second = comm.all_gather(other.data, data.data, 0);
        CHECK(second > first);
        CHECK(first > last);
        last = second;
        comm.wait(second); // which is to wait for the first
        CHECK((data.get() == std::vector<float>(kCount, float(comm.ranks()))));
    }
}
