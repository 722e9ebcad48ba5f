// On a stream of its own, which device.stream waits for and which waits for device.stream, by events. NCCL is loaded
// when a run has several ranks, so that a program starts on machines that have none.
#include <algorithm>
#include <array>
#include <cstring>

#include "../../kernels/launch.h"
#include "../base/errors.h"
#include "comm.h"

#if __has_include(<nccl.h>)
#include <dlfcn.h>
#include <nccl.h>
#include <unistd.h>

namespace {

// The functions of the library that is there.
struct Nccl {
#define NCCL_FUNCTIONS(each)                                                                                           \
    each(GetErrorString) each(GetLastError) each(GetUniqueId) each(CommInitRank) each(CommAbort)                       \
        each(CommGetAsyncError) each(AllReduce) each(ReduceScatter) each(AllGather) each(Broadcast) each(Send)         \
            each(Recv) each(GroupStart) each(GroupEnd)
#define NCCL_MEMBER(name) decltype(&nccl##name) name = nullptr;
    NCCL_FUNCTIONS(NCCL_MEMBER)

    Nccl() {
#ifdef LONGHAND_SIMT
#define NCCL_LOAD(name) name = &nccl##name;
#else
        void* library = dlopen("libnccl.so.2", RTLD_NOW);
        if (!library)
            throw BadInput(std::string("several GPUs exchange data through NCCL: ") + dlerror() +
                           "; install libnccl2, or run one rank");
        auto find = [&](auto& function, const char* name) {
            function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(library, name));
            if (!function) throw BadInput(std::string("libnccl.so.2 has no ") + name + "; 2.13 or later is needed");
        };
#define NCCL_LOAD(name) find(name, "nccl" #name);
#endif
        NCCL_FUNCTIONS(NCCL_LOAD)
    }
};

} // namespace

struct Comm::Library {
    // An event that was recorded again since stands for a later call: this many are told apart.
    static constexpr int kEvents = 1024;

    Control& control;
    Nccl nccl;
    ncclComm_t comm = nullptr;
    cudaStream_t stream = nullptr;
    // Of each call and mark: what device.stream was given before it, and itself.
    std::array<cudaEvent_t, kEvents> given = {}, done = {};
    cudaEvent_t all = nullptr; // what device.stream was given before finish()
    cudaEvent_t late =
        nullptr; // what `stream` was given, for those who ask after a call that no event stands for any more
    std::array<int64_t, kEvents> calls = {}; // the number of each among the calls
    Ticket last = 0, finished = 0, waits_in = 0;

    const std::function<void()> before; // what the main thread did while it waited

    explicit Library(Control& c) : control(c), before(c.while_waiting) {}

    // A member function, so that the destructor tidies up after a failure half way.
    void open() {
        check_cuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "creating a stream for other ranks");
        for (cudaEvent_t* event : {&all, &late})
            check_cuda(cudaEventCreateWithFlags(event, cudaEventDisableTiming), "creating an event");
        for (auto* events : {&given, &done})
            for (cudaEvent_t& event : *events)
                check_cuda(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "creating an event");
        ncclUniqueId id = {};
        if (control.rank() == 0) check(nccl.GetUniqueId(&id), "ncclGetUniqueId");
        const std::string all = control.broadcast(std::string(id.internal, sizeof id.internal));
        memcpy(id.internal, all.data(), sizeof id.internal);
        control.begin_waiting(0);
        check(nccl.CommInitRank(&comm, control.ranks(), id, control.rank()), "ncclCommInitRank");
        control.end_waiting();
        control.while_waiting = [this] { before(), poll(); };
    }
    // What went wrong since the calls returned. In the simulator streams go on when they are asked.
    void poll() {
        cudaStreamQuery(stream);
        ncclResult_t error = ncclSuccess;
        check(nccl.CommGetAsyncError(comm, &error), "ncclCommGetAsyncError");
        check(error, "NCCL");
    }
    // An abort does not wait for others, who may be gone; the orderly end is Control's.
    void abandon() {
        control.while_waiting = before;
        if (comm) nccl.CommAbort(comm);
        comm = nullptr;
    }
    ~Library() {
        abandon();
        for (cudaEvent_t event : {all, late})
            if (event) cudaEventDestroy(event);
        for (auto* events : {&given, &done})
            for (cudaEvent_t event : *events)
                if (event) cudaEventDestroy(event);
        if (stream) cudaStreamDestroy(stream);
    }
    Library(const Library&) = delete;
    Library& operator=(const Library&) = delete;

    void check(ncclResult_t result, const char* call) {
        if (result == ncclSuccess) return;
        control.check(); // the rank that failed first has more to say
        std::string why = nccl.GetErrorString(result);
        if (const char* last = nccl.GetLastError(comm); last && *last) why += std::string(" (") + last + ")";
        throw RunFailed(std::string(call) + ": " + why);
    }

    // A piece for each rank and from each, all at once.
    void all_to_all(void* to, const void* from, size_t bytes) {
        check(nccl.GroupStart(), "ncclGroupStart");
        for (int other = 0; other < control.ranks(); other++) {
            check(nccl.Send(static_cast<const char*>(from) + other * bytes, bytes, ncclInt8, other, comm, stream),
                  "ncclSend");
            check(nccl.Recv(static_cast<char*>(to) + other * bytes, bytes, ncclInt8, other, comm, stream), "ncclRecv");
        }
        check(nccl.GroupEnd(), "ncclGroupEnd");
    }

    void send_receive(const Call& call) {
        check(nccl.GroupStart(), "ncclGroupStart");
        if (call.count) check(nccl.Send(call.from, call.count, ncclInt8, call.target, comm, stream), "ncclSend");
        if (call.received) check(nccl.Recv(call.to, call.received, ncclInt8, call.source, comm, stream), "ncclRecv");
        check(nccl.GroupEnd(), "ncclGroupEnd");
    }

    static bool is_done(cudaEvent_t event) {
        const cudaError_t status = cudaEventQuery(event);
        if (status != cudaErrorNotReady) check_cuda(status, "asking for an event");
        return status == cudaSuccess;
    }
    static void record(cudaEvent_t event, cudaStream_t stream) {
        check_cuda(cudaEventRecord(event, stream), "recording an event");
    }
    static void wait(cudaStream_t stream, cudaEvent_t event) {
        check_cuda(cudaStreamWaitEvent(stream, event, 0), "waiting for an event");
    }

    // The event of what comes next.
    int next(int64_t call) {
        const int at = int(++last % kEvents);
        calls[at] = call;
        return at;
    }
    void begin(const Device& device, const Call& call, int64_t number) {
        control.check();
        const int at = next(number);
        record(given[at], cuda_stream(device.stream));
        wait(stream, given[at]);
        run(call);
        record(done[at], stream);
    }
    void mark(const Device& device) {
        const int at = next(0);
        for (cudaEvent_t event : {given[at], done[at]}) record(event, cuda_stream(device.stream));
        look();
    }
    void wait(const Device& device, Ticket ticket) {
        const bool known = last - ticket < kEvents;
        if (!known) record(late, stream);
        wait(cuda_stream(device.stream), known ? done[ticket % kEvents] : late);
    }

    // What has ended since, and whether the device waits for other ranks now.
    void look() {
        const Ticket before = finished;
        finished = std::max(finished, last - kEvents);
        while (finished < last && is_done(done[(finished + 1) % kEvents])) finished++;
        if (finished == before) {
            const int at = int((finished + 1) % kEvents);
            if (!waits_in && finished < last && calls[at] && is_done(given[at]))
                control.begin_waiting(waits_in = calls[at]);
            return;
        }
        if (waits_in) control.end_waiting(), waits_in = 0;
        control.progress();
    }

    void finish(const Device& device) {
        record(all, cuda_stream(device.stream));
        for (; !is_done(all); usleep(50)) {
            control.check();
            control.while_waiting();
            look();
        }
        if (waits_in) control.end_waiting(), waits_in = 0;
        finished = last;
    }

    void run(const Call& call) {
        const ncclDataType_t types[] = {ncclFloat32, ncclBfloat16, ncclFloat64, ncclInt8},
                             type = types[int(call.element)];
        switch (call.kind) {
        case Kind::all_reduce:
            return check(nccl.AllReduce(call.from, call.to, call.count, type, ncclSum, comm, stream), "ncclAllReduce");
        case Kind::reduce_scatter:
            return check(nccl.ReduceScatter(call.from, call.to, call.count, type, ncclSum, comm, stream),
                         "ncclReduceScatter");
        case Kind::all_gather:
            return check(nccl.AllGather(call.from, call.to, call.count, type, comm, stream), "ncclAllGather");
        case Kind::broadcast:
            return check(nccl.Broadcast(call.from, call.to, call.count, type, call.source, comm, stream),
                         "ncclBroadcast");
        case Kind::send_receive:
            return send_receive(call);
        case Kind::all_to_all:
            return all_to_all(call.to, call.from, call.count);
        }
    }
};

#else

struct Comm::Library {
    explicit Library(Control&) {}
    void open() {
        throw BadInput("this program was built without NCCL, through which several GPUs exchange data: install "
                       "libnccl-dev and build again, or run one rank");
    }
    void begin(const Device&, const Call&, int64_t) {}
    void abandon() {}
    void mark(const Device&) {}
    void wait(const Device&, Ticket) {}
    void finish(const Device&) {}
};

#endif

Comm::Comm(const Device& device, Control* control) : device_(device), control_(control) {
    if (!control) return;
    library_ = std::make_unique<Library>(*control);
    library_->open();
    // Rings and trees for sums, and a connection to each rank.
    const size_t bytes = 2 * ranks() * sizeof(float);
    float* greeting = static_cast<float*>(device_alloc(bytes));
    fill_zero(device, greeting, bytes);
    all_reduce(greeting, 1);
    wait(all_to_all(greeting, greeting + ranks(), sizeof(float)));
    finish();
    device_free(greeting, bytes);
}
Comm::~Comm() = default;
void Comm::abandon() {
    if (library_) library_->abandon();
}

Comm::Ticket Comm::begin(const Call& call) {
    last_++, calls_++;
    if (library_)
        library_->begin(device_, call, calls_);
    else if (call.to != call.from && call.count)
        check_cuda(
            cudaMemcpyAsync(call.to, call.from, call.bytes(), cudaMemcpyDeviceToDevice, cuda_stream(device_.stream)),
            "copying");
    return last_;
}

void Comm::wait(Ticket ticket) {
    if (library_) library_->wait(device_, ticket);
}
void Comm::mark() {
    last_++;
    if (library_) library_->mark(device_);
}
void Comm::finish() {
    if (library_) library_->finish(device_);
}
