// dev/simt's streams: what may come late comes late under some seed and early under another, what CUDA orders is in
// order under all, and of what nothing orders every seed tells both places.
#include <doctest/doctest.h>

#include <functional>
#include <string>
#include <vector>

#include "../dev/simt/simt.h"
#include "../kernels/device.h"
#include "../kernels/launch.h"
#include "asynchronous.h"

namespace {

constexpr int kCount = 64, kSeeds = 12;
constexpr size_t kBytes = kCount * sizeof(int);

__global__ void fill(int* to, int value) { store_global(to + threadIdx.x, value); }
__global__ void add_one(int* at) { store_global(at + threadIdx.x, load_global(at + threadIdx.x) + 1); }
__global__ void copy(int* to, const int* from) { store_global(to + threadIdx.x, load_global(from + threadIdx.x)); }

void checked(cudaError_t status) { check_cuda(status, "testing streams"); }
Stream opaque(cudaStream_t stream) { return reinterpret_cast<Stream>(stream); }

// Streams and memory of one case, anew for each seed.
struct Scene {
    cudaStream_t legacy = nullptr, blocking, one, two; // the latter do not wait for the legacy stream
    cudaEvent_t event;
    int *memory, *other, *pinned; // (kCount)
    int host[kCount] = {};

    Scene() {
        checked(cudaStreamCreateWithFlags(&blocking, cudaStreamDefault));
        for (cudaStream_t* stream : {&one, &two}) checked(cudaStreamCreateWithFlags(stream, cudaStreamNonBlocking));
        checked(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
        for (int** array : {&memory, &other}) checked(cudaMalloc(array, kBytes));
        checked(cudaMallocHost(&pinned, kBytes));
        std::fill(pinned, pinned + kCount, 5);
        std::fill(host, host + kCount, 6);
    }
    ~Scene() {
        for (cudaStream_t stream : {blocking, one, two}) cudaStreamDestroy(stream);
        cudaEventDestroy(event);
        for (int* array : {memory, other}) cudaFree(array);
        cudaFreeHost(pinned);
    }
    void launch_fill(cudaStream_t stream, int* to, int value) { launch(fill, 1, kCount, 0, opaque(stream), to, value); }
    int last(const int* array) { // of device memory, when everything is done
        int found[kCount];
        checked(cudaDeviceSynchronize());
        checked(cudaMemcpy(found, array, kBytes, cudaMemcpyDeviceToHost));
        for (int x : found) CHECK(x == found[0]);
        return found[kCount - 1];
    }
};

void with_seeds(const std::function<void(Scene&)>& body) {
    simt::SettingsGuard guard;
    for (uint64_t seed = 1; seed <= kSeeds; seed++) {
        CAPTURE(seed);
        simt::settings().seed = seed;
        Scene scene;
        body(scene);
    }
}

// Every seed tells of it, with these words, at the latest when everything is waited for; then the machine serves again.
void must_tell(const std::vector<std::string>& words, const std::function<void(Scene&)>& body) {
    with_seeds([&](Scene& s) {
        std::string said = "nothing";
        try {
            body(s);
            checked(cudaDeviceSynchronize());
        } catch (const simt::Fault& fault) {
            said = fault.what();
            CHECK(fault.kind == simt::FaultKind::unordered);
        }
        CAPTURE(said);
        for (const std::string& word : words) CHECK(said.find(word) != std::string::npos);
        s.launch_fill(s.one, s.memory, 9);
        CHECK(s.last(s.memory) == 9);
    });
}

// What the host sees, once that body is through, in its own memory: both under some seed.
void must_see_both(int early, int late, const std::function<int(Scene&)>& body) {
    int earlier = 0, later = 0;
    with_seeds([&](Scene& s) {
        const int seen = body(s);
        earlier += seen == early, later += seen == late;
        checked(cudaDeviceSynchronize());
    });
    CHECK(earlier > 0);
    CHECK(later > 0);
    CHECK(earlier + later == kSeeds);
}

// Writes to memory, in each of the ways that there are.
using Write = std::function<void(Scene&, cudaStream_t)>;
struct Way {
    const char* name;
    Write write;
};
const std::vector<Way> kWays = {
    {"kernel fill (simt_streams.cpp)", [](Scene& s, cudaStream_t stream) { s.launch_fill(stream, s.memory, 1); }},
    {"cudaMemsetAsync (simt_streams.cpp",
     [](Scene& s, cudaStream_t stream) { checked(cudaMemsetAsync(s.memory, 0, kBytes, stream)); }},
    {"cudaMemcpyAsync (simt_streams.cpp",
     [](Scene& s, cudaStream_t stream) {
         checked(cudaMemcpyAsync(s.memory, s.pinned, kBytes, cudaMemcpyHostToDevice, stream));
     }},
    {"cudaMemcpyAsync (simt_streams.cpp",
     [](Scene& s, cudaStream_t stream) { // from pageable memory
         checked(cudaMemcpyAsync(s.memory, s.host, kBytes, cudaMemcpyDefault, stream));
     }},
    {"cudaMemcpyAsync (simt_streams.cpp",
     [](Scene& s, cudaStream_t stream) {
         checked(cudaMemcpyAsync(s.memory, s.other, kBytes, cudaMemcpyDeviceToDevice, stream));
     }},
};

} // namespace

TEST_CASE("work comes early or late, and when it is waited for at the latest") {
    must_see_both(1, 5, [](Scene& s) {
        s.launch_fill(s.one, s.pinned, 1);
        return s.pinned[0];
    });
    must_see_both(0, 5, [](Scene& s) {
        checked(cudaMemsetAsync(s.pinned, 0, kBytes, s.legacy));
        return s.pinned[0];
    });
    const std::vector<std::function<void(Scene&)>> waits = {
        [](Scene& s) { checked(cudaStreamSynchronize(s.one)); },
        [](Scene&) { checked(cudaDeviceSynchronize()); },
        [](Scene& s) { checked(cudaEventSynchronize(s.event)); },
        [](Scene&) {
            void* memory;
            checked(cudaMalloc(&memory, 1));
            checked(cudaFree(memory));
        },
        [](Scene& s) { checked(cudaMemcpyAsync(s.host, s.memory, kBytes, cudaMemcpyDeviceToHost, s.one)); },
    };
    for (const auto& wait : waits)
        with_seeds([&](Scene& s) {
            s.launch_fill(s.one, s.pinned, 1);
            s.launch_fill(s.one, s.memory, 2);
            checked(cudaEventRecord(s.event, s.one));
            wait(s);
            CHECK(s.pinned[0] == 1);
        });
    // A fill waits by itself where the host may look.
    with_seeds([](Scene& s) {
        checked(cudaMemset(s.pinned, 0, kBytes));
        CHECK(s.pinned[0] == 0);
    });
}

TEST_CASE("a launch keeps its parameters, and a copy what pageable memory held") {
    with_seeds([](Scene& s) {
        int value = 3;
        launch(fill, 1, kCount, 0, opaque(s.one), s.memory, value);
        value = 4;
        checked(cudaMemcpyAsync(s.other, s.host, kBytes, cudaMemcpyHostToDevice, s.one));
        s.host[kCount - 1] = s.host[0] = 7;
        CHECK(s.last(s.memory) == 3);
        CHECK(s.last(s.other) == 6);
    });
    // Pinned memory is read when the copy is done.
    int changed = 0;
    with_seeds([&](Scene& s) {
        checked(cudaMemcpyAsync(s.memory, s.pinned, kBytes, cudaMemcpyHostToDevice, s.one));
        std::fill(s.pinned, s.pinned + kCount, 7);
        changed += s.last(s.memory) == 7;
    });
    CHECK((changed > 0 && changed < kSeeds));
}

TEST_CASE("with CUDA_LAUNCH_BLOCKING a launch waits for its end, and copies and fills do not") {
    setenv("CUDA_LAUNCH_BLOCKING", "1", 1);
    with_seeds([](Scene& s) {
        s.launch_fill(s.one, s.pinned, 1);
        CHECK(s.pinned[0] == 1);
    });
    must_see_both(0, 5, [](Scene& s) {
        checked(cudaMemsetAsync(s.pinned, 0, kBytes, s.one));
        return s.pinned[0];
    });
    setenv("CUDA_LAUNCH_BLOCKING", "0", 1);
}

TEST_CASE("a stream is in order, and the legacy default stream and blocking streams with each other") {
    for (const auto& [name, write] : kWays) {
        CAPTURE(name);
        for (auto [first, second] : {std::pair{&Scene::one, &Scene::one},
                                     {&Scene::legacy, &Scene::legacy},
                                     {&Scene::legacy, &Scene::blocking},
                                     {&Scene::blocking, &Scene::legacy}})
            with_seeds([&](Scene& s) {
                s.launch_fill(s.*first, s.memory, 1);
                write(s, s.*second);
                s.launch_fill(s.*first, s.memory, 2);
                CHECK(s.last(s.memory) == 2);
            });
    }
}

TEST_CASE("what nothing orders is told") {
    for (const auto& [name, write] : kWays) {
        CAPTURE(name);
        for (auto [first, second] : {std::pair{&Scene::one, &Scene::two},
                                     {&Scene::legacy, &Scene::one},
                                     {&Scene::one, &Scene::legacy},
                                     {&Scene::blocking, &Scene::one}}) {
            must_tell({name, "kernel add_one (simt_streams.cpp)", "bytes 0 to 256 of an allocation of 256"},
                      [&](Scene& s) {
                          write(s, s.*first);
                          launch(add_one, 1, kCount, 0, opaque(s.*second), s.memory);
                      });
            // An event that was recorded too early, and one that nobody waits for.
            must_tell({name, "kernel copy"}, [&](Scene& s) {
                checked(cudaEventRecord(s.event, s.*first));
                write(s, s.*first);
                checked(cudaStreamWaitEvent(s.*second, s.event));
                checked(cudaEventRecord(s.event, s.*first));
                launch(copy, 1, kCount, 0, opaque(s.*second), s.other, s.memory);
            });
        }
    }
    must_tell({"cudaMemset (simt_streams.cpp", "in the legacy default stream writes",
               "cudaMemcpyAsync (simt_streams.cpp", "in non-blocking stream", "and nothing orders them"},
              [](Scene& s) {
                  checked(cudaMemset(s.memory, 0, kBytes));
                  checked(cudaMemcpyAsync(s.memory, s.host, kBytes, cudaMemcpyHostToDevice, s.one));
              });
    must_tell({"cudaMemcpy (", "kernel add_one"}, [](Scene& s) { // its last part is under way when it returns
        checked(cudaMemcpy(s.memory, s.host, kBytes, cudaMemcpyHostToDevice));
        launch(add_one, 1, kCount, 0, opaque(s.one), s.memory);
    });
}

TEST_CASE("events and waits order, and readers need no order") {
    const std::vector<std::function<void(Scene&)>> orders = {
        [](Scene& s) { checked(cudaStreamWaitEvent(s.two, s.event)); },
        [](Scene& s) { checked(cudaEventSynchronize(s.event)); },
        [](Scene& s) { checked(cudaStreamSynchronize(s.one)); }, [](Scene&) { checked(cudaDeviceSynchronize()); },
        [](Scene& s) { // by a third stream
            checked(cudaStreamWaitEvent(s.blocking, s.event));
            checked(cudaEventRecord(s.event, s.blocking));
            checked(cudaStreamWaitEvent(s.two, s.event));
        }};
    for (const auto& [name, write] : kWays)
        for (const auto& order : orders)
            with_seeds([&](Scene& s) {
                write(s, s.one);
                s.launch_fill(s.one, s.memory, 3);
                checked(cudaEventRecord(s.event, s.one));
                order(s);
                launch(add_one, 1, kCount, 0, opaque(s.two), s.memory);
                CHECK(s.last(s.memory) == 4);
            });
    with_seeds([](Scene& s) {
        checked(cudaMemset(s.memory, 0, kBytes));
        checked(cudaDeviceSynchronize());
        for (cudaStream_t stream : {s.one, s.two}) {
            checked(cudaMemcpyAsync(s.pinned + (stream == s.two) * kCount / 2, s.memory, kBytes / 2,
                                    cudaMemcpyDeviceToHost, stream));
            launch(copy, 1, kCount / 2, 0, opaque(stream), s.other + (stream == s.two) * kCount / 2, s.memory);
        }
        CHECK(s.last(s.other) == 0);
    });
}

TEST_CASE("neighbours do not meet") {
    for (int second : {kCount / 2, kCount / 2 - 1}) {
        auto body = [&](Scene& s) {
            launch(fill, 1, kCount / 2, 0, opaque(s.one), s.memory, 1);
            launch(fill, 1, kCount / 2, 0, opaque(s.two), s.memory + second, 1);
        };
        if (second == kCount / 2)
            with_seeds(body);
        else
            must_tell({"bytes 112 to 128"}, body); // to the words of 16 bytes
    }
}

TEST_CASE("the host's own copies are held against the streams'") {
    must_tell({"cudaMemcpyAsync", "memcpy (simt_streams.cpp", "by the host writes"}, [](Scene& s) {
        checked(cudaMemcpyAsync(s.memory, s.pinned, kBytes, cudaMemcpyHostToDevice, s.one));
        memcpy(s.pinned, s.host, kBytes);
    });
    must_tell({"kernel fill", "memcpy (simt_streams.cpp", "by the host reads"}, [](Scene& s) {
        s.launch_fill(s.one, s.pinned, 1);
        memcpy(s.host, s.pinned, kBytes);
    });
    with_seeds([](Scene& s) {
        s.launch_fill(s.two, s.other, 1); // what waits elsewhere does not matter
        memcpy(s.pinned, s.host, kBytes);
        checked(cudaMemcpyAsync(s.memory, s.pinned, kBytes, cudaMemcpyHostToDevice, s.one));
        checked(cudaEventRecord(s.event, s.one));
        launch(add_one, 1, kCount, 0, opaque(s.one), s.memory);
        checked(cudaEventSynchronize(s.event));
        memcpy(s.host, s.pinned, kBytes);
        memset(s.pinned, 0, kBytes);
        CHECK(s.last(s.memory) == 7);
    });
    must_tell({"cudaFreeHost", "cudaMemcpyAsync"}, [](Scene& s) {
        checked(cudaMemcpyAsync(s.memory, s.pinned, kBytes, cudaMemcpyHostToDevice, s.one));
        checked(cudaFreeHost(s.pinned));
    });
}

TEST_CASE("a stream that was destroyed does its work") {
    with_seeds([](Scene& s) {
        cudaStream_t stream;
        for (int i = 0; i < 3; i++) { // and may have its place taken
            checked(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
            launch(add_one, 1, kCount, 0, opaque(stream), i == 0 ? s.memory : s.other);
            s.launch_fill(stream, i == 0 ? s.memory : s.other, i);
            checked(cudaStreamDestroy(stream));
            if (i == 1) checked(cudaDeviceSynchronize());
        }
        CHECK(s.last(s.memory) == 0);
        CHECK(s.last(s.other) == 2);
    });
    must_tell({"kernel fill", "kernel add_one"}, [](Scene& s) {
        s.launch_fill(s.one, s.memory, 1);
        cudaStream_t stream;
        checked(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
        launch(add_one, 1, kCount, 0, opaque(stream), s.memory);
        checked(cudaStreamDestroy(stream));
    });
}

TEST_CASE("a graph is given to its stream at each launch, with the order that was captured") {
    auto record = [](Scene& s, bool joined) {
        checked(cudaStreamBeginCapture(s.one, cudaStreamCaptureModeThreadLocal));
        s.launch_fill(s.one, s.memory, 1);
        checked(cudaEventRecord(s.event, s.one));
        checked(cudaStreamWaitEvent(s.two, s.event));
        launch(copy, 1, kCount, 0, opaque(s.two), s.other, s.memory);
        if (!joined) launch(add_one, 1, kCount, 0, opaque(s.one), s.memory); // beside the copy
        checked(cudaEventRecord(s.event, s.two));
        checked(cudaStreamWaitEvent(s.one, s.event));
        if (joined) launch(add_one, 1, kCount, 0, opaque(s.one), s.memory);
        cudaGraph_t graph;
        checked(cudaStreamEndCapture(s.one, &graph));
        cudaGraphExec_t exec;
        checked(cudaGraphInstantiateWithFlags(&exec, graph, 0));
        checked(cudaGraphDestroy(graph));
        return exec;
    };
    with_seeds([&](Scene& s) {
        cudaGraphExec_t exec = record(s, true);
        for (int i = 0; i < 3; i++) {
            s.launch_fill(s.one, s.other, 8);
            checked(cudaGraphLaunch(exec, s.one));
            launch(add_one, 1, kCount, 0, opaque(s.one), s.other);
        }
        checked(cudaGraphExecDestroy(exec));
        CHECK(s.last(s.memory) == 2);
        CHECK(s.last(s.other) == 2);
    });
    must_tell({"kernel copy", "kernel add_one"}, [&](Scene& s) {
        cudaGraphExec_t exec = record(s, false);
        checked(cudaGraphLaunch(exec, s.one));
        checked(cudaGraphExecDestroy(exec));
    });
    // What is launched after it in another stream is not behind it.
    must_tell({"kernel fill", "kernel"}, [&](Scene& s) {
        cudaGraphExec_t exec = record(s, true);
        checked(cudaGraphLaunch(exec, s.one));
        checked(cudaGraphExecDestroy(exec));
        s.launch_fill(s.two, s.memory, 1);
    });
    with_seeds([&](Scene& s) { // which had taken part, and is free again
        launch(copy, 1, kCount, 0, opaque(s.two), s.other, s.memory);
        cudaGraphExec_t exec = record(s, true);
        checked(cudaStreamSynchronize(s.two));
        checked(cudaGraphLaunch(exec, s.one));
        checked(cudaGraphExecDestroy(exec));
        CHECK(s.last(s.other) == 1);
    });
}

TEST_CASE("a kernel's fault is told by whoever lets it run, and the rest is dropped") {
    with_seeds([](Scene& s) {
        auto run = [&] {
            s.launch_fill(s.one, s.memory + 1, 1); // one past the end
            s.launch_fill(s.one, s.other, 1);
            checked(cudaStreamSynchronize(s.one));
        };
        CHECK_THROWS_AS(run(), simt::Fault);
        CHECK_NOTHROW(checked(cudaDeviceSynchronize()));
        s.launch_fill(s.one, s.other, 2);
        CHECK(s.last(s.other) == 2);
    });
}
