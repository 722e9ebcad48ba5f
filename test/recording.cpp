// Recordings: the same results as the launches themselves, with the memory of the moment, and anew for another key.
#include "../runtime/device/recording.h"

#include "../kernels/gelu.h"
#include "../runtime/base/errors.h"
#include "asynchronous.h"
#include "check.h"

namespace {

constexpr int64_t kCount = 1000;

struct Arrays {
    real *from, *to; // (kCount)
    Arrays() {
        for (real** array : {&from, &to}) *array = static_cast<real*>(device_alloc(kCount * sizeof(real)));
    }
    ~Arrays() {
        for (real* array : {from, to}) device_free(array, kCount * sizeof(real));
    }
};

} // namespace

TEST_CASE("a recording does what its launches do") {
    Device device(0);
    Arrays a;
    Recording recording;
    int64_t n = kCount;
    int launched = 0;
    auto run = [&](double key) {
        recording.run(device, {key}, [&] {
            launched++;
            fill_zero(device, a.to, kCount * sizeof(real));
            gelu_forward(device.stream, a.to, a.from, n, Gelu::none);
        });
    };
    auto check = [&](float value) {
        std::vector<real> in(kCount), out(kCount);
        for (real& x : in) assign(x, value);
        upload(device, a.from, in.data(), kCount * sizeof(real));
        run(double(n));
        download(device, out.data(), a.to, kCount * sizeof(real));
        bool right = true;
        for (int64_t i = 0; i < kCount; i++) right = right && to_float(out[i]) == (i < n ? value : 0);
        CHECK(right);
    };
    for (float value : {1.f, 2.f, 3.f, 4.f}) check(value);
    // The first run launches and the second records; a CPU has nothing to record.
    CHECK(launched == (device_is_host() ? 4 : 2));
    n = 500;
    for (float value : {5.f, 6.f, 7.f}) check(value);
    CHECK(launched == (device_is_host() ? 7 : 4));
}

TEST_CASE("what fails while it is recorded says so, and leaves the stream usable") {
    Device device(0);
    Arrays a;
    Recording recording;
    auto fails = [&] { throw RunFailed("no"); };
    recording.run(device, {1}, [] {});
    CHECK_THROWS_AS(recording.run(device, {1}, fails), RunFailed);
    if (!device_is_host()) {
        // Waiting is not allowed inside.
        Recording waiting;
        real host;
        auto waits = [&] { download(device, &host, a.from, sizeof host); };
        waiting.run(device, {1}, waits);
        CHECK_THROWS_AS(waiting.run(device, {1}, waits), RunFailed);
    }
    std::vector<real> out(kCount);
    recording.run(device, {2}, [&] { gelu_forward(device.stream, a.to, a.from, kCount, Gelu::none); });
    download(device, out.data(), a.to, kCount * sizeof(real));
    CHECK(to_float(out[kCount - 1]) == 0);
}
