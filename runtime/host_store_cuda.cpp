// Copies on a stream for each direction, since a bus carries both at once; the GPU's copy engines serve them while
// device.stream's kernels run. Events order the streams; a wait takes an event as it was last recorded before the call,
// so that one may be used again.
#include "host_store.h"

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "../kernels/launch.h"
#include "errors.h"

struct HostStore::Memory {
    char* data = nullptr;
    cudaStream_t saves = nullptr, loads = nullptr;
    cudaEvent_t given = nullptr;     // in device.stream: what it was given before the latest copy
    cudaEvent_t copied[kSlots] = {}; // behind the slot's latest copy, and so behind all before with this slot
    // The latest copy's, if device.stream has not been told yet to wait for copied[slot].
    cudaStream_t pending[kSlots] = {};

    // A member function, so that the destructor tidies up after a failure half way.
    void open(size_t bytes) {
        if (cudaError_t status = cudaMallocHost(&data, bytes); status != cudaSuccess) {
            cudaGetLastError();
            data = nullptr;
            throw RunFailed("cannot get " + std::to_string(bytes) +
                            " bytes of pinned host memory for --offload: " + cudaGetErrorString(status) +
                            "; offload less (--offload, --host-memory), or free some of the host's memory");
        }
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
        if (data) cudaFreeHost(data);
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

// By hand and on all threads: the first touch of a hundred gigabytes, and no call of the runtime promises zeros.
static void clear(char* data, size_t bytes) {
    const size_t kPiece = size_t(1) << 20;
    const int64_t pieces = static_cast<int64_t>((bytes + kPiece - 1) / kPiece);
#pragma omp parallel for schedule(static)
    for (int64_t piece = 0; piece < pieces; piece++)
        memset(data + piece * kPiece, 0, std::min(kPiece, bytes - piece * kPiece));
}

HostStore::HostStore(const Device& device, const std::string&, size_t bytes) : device_(device), bytes_(bytes) {
    if (!bytes) return;
    memory_ = std::make_unique<Memory>();
    memory_->open(bytes);
    clear(memory_->data, bytes);
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
