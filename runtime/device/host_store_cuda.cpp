// Copies on a stream for each direction, since a bus carries both at once; the GPU's copy engines serve them while
// device.stream's kernels run. Events order the streams; a wait takes an event as it was last recorded before the call,
// so that one may be used again.
#include "host_store.h"

#include <cerrno>
#include <cstdint>
#include <cstring>

#include <omp.h>
#include <sys/mman.h>

#include "../../kernels/launch.h"
#include "../base/errors.h"
#include "host_memory.h"

// Touched for the first time by all threads: a hundred gigabytes are half a minute's work for one, and that is what a
// call makes of it that allocates and pins at once.
static void touch(char* data, size_t bytes) {
    constexpr size_t kPage = 4096;
    const int64_t pages = static_cast<int64_t>((bytes + kPage - 1) / kPage);
#pragma omp parallel for schedule(static)
    for (int64_t page = 0; page < pages; page++) const_cast<volatile char*>(data)[page * kPage] = 0;
}

struct HostStore::Memory {
    char* data = nullptr;
    size_t bytes = 0;
    bool pinned = false;
    cudaStream_t saves = nullptr, loads = nullptr;
    cudaEvent_t given = nullptr;     // in device.stream: what it was given before the latest copy
    cudaEvent_t copied[kSlots] = {}; // behind the slot's latest copy, and so behind all before with this slot
    // The latest copy's, if device.stream has not been told yet to wait for copied[slot].
    cudaStream_t pending[kSlots] = {};

    // A member function, so that the destructor tidies up after a failure half way.
    void open(size_t wanted) {
        auto refuse = [&](const std::string& why) {
            throw RunFailed("cannot get " + std::to_string(wanted) + " bytes of pinned host memory for --offload: " +
                            why + "; offload less (--offload, --host-memory), or free some of the host's memory");
        };
        // Pages are promised before they are there; to touch more than there are would end the process.
        if (const size_t available = host_available_bytes(omp_get_max_threads()); available && wanted > available)
            refuse(std::to_string(available) + " are available");
        void* mapped = mmap(nullptr, wanted, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (mapped == MAP_FAILED) refuse(strerror(errno));
        data = static_cast<char*>(mapped), bytes = wanted;
        madvise(data, bytes, MADV_HUGEPAGE);
        touch(data, bytes);
        if (cudaError_t status = cudaHostRegister(data, bytes, cudaHostRegisterDefault); status != cudaSuccess) {
            cudaGetLastError();
            refuse(cudaGetErrorString(status));
        }
        pinned = true;
        for (cudaStream_t* stream : {&saves, &loads})
            check_cuda(cudaStreamCreateWithFlags(stream, cudaStreamNonBlocking), "creating a stream for copies");
        check_cuda(cudaEventCreateWithFlags(&given, cudaEventDisableTiming), "creating an event");
        for (cudaEvent_t& event : copied)
            check_cuda(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "creating an event");
    }
    ~Memory() {
        for (cudaStream_t stream : {saves, loads})
            if (stream) cudaStreamSynchronize(stream), cudaStreamDestroy(stream);
        if (given) cudaEventDestroy(given);
        for (cudaEvent_t event : copied)
            if (event) cudaEventDestroy(event);
        if (pinned) cudaHostUnregister(data);
        if (data) munmap(data, bytes);
    }

    void copy(cudaStream_t stream, cudaStream_t copies, void* to, const void* from, size_t bytes, int slot) {
        // The copy must not begin before what writes `from`, or last reads `to`, is done.
        check_cuda(cudaEventRecord(given, stream), "ordering a copy after the step");
        check_cuda(cudaStreamWaitEvent(copies, given, 0), "ordering a copy after the step");
        if (pending[slot] && pending[slot] != copies)
            check_cuda(cudaStreamWaitEvent(copies, copied[slot], 0), "ordering a copy after one the other way");
        check_cuda(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, copies), "copying between GPU and host");
        check_cuda(cudaEventRecord(copied[slot], copies), "marking the end of a copy");
        pending[slot] = copies;
    }

    // Without a copy since the last wait there is nothing to wait for; and in a recording an event from before it would
    // be refused.
    void wait(cudaStream_t stream, int slot) {
        if (!pending[slot]) return;
        check_cuda(cudaStreamWaitEvent(stream, copied[slot], 0), "waiting for a copy");
        pending[slot] = nullptr;
    }
};

HostStore::HostStore(const Device& device, const std::string&, size_t bytes) : device_(device), bytes_(bytes) {
    if (!bytes) return;
    memory_ = std::make_unique<Memory>();
    memory_->open(bytes);
}

HostStore::~HostStore() = default;

char* HostStore::data() const { return memory_ ? memory_->data : nullptr; }

void HostStore::save(size_t offset, const void* from, size_t bytes, int slot) {
    check(offset, bytes, slot);
    if (bytes) memory_->copy(cuda_stream(device_.stream), memory_->saves, memory_->data + offset, from, bytes, slot);
}

void HostStore::load(size_t offset, void* to, size_t bytes, int slot) {
    check(offset, bytes, slot);
    if (bytes) memory_->copy(cuda_stream(device_.stream), memory_->loads, to, memory_->data + offset, bytes, slot);
}

void HostStore::wait(int slot) {
    check_slot(slot);
    if (memory_) memory_->wait(cuda_stream(device_.stream), slot);
}

void HostStore::finish() {
    for (int slot = 0; slot < kSlots; slot++) wait(slot);
}
