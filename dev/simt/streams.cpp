// Streams and events. The oldest stream, which kernels run in whatever stream they were given, does everything at once.
// What any other is given it does as late as it may: when somebody waits for it. A missing wait then shows as data that
// is not there yet, or as data that was overwritten before it was copied.
//
// What is captured follows CUDA's rules: a stream takes part once it waits for an event of one that does, must not wait
// for what was recorded outside, and must have been waited for at the end.
#include <algorithm>
#include <chrono>
#include <deque>
#include <memory>
#include <vector>

#include "graph.h"
#include "include/cuda_runtime.h"

namespace {

using Work = std::function<cudaError_t()>;

struct Stream {
    bool late = false;
    std::deque<Work> waiting;
    uint64_t done = 0;            // works done since it was made
    uint64_t capture = 0;         // the capture in which it takes part; 0: none
    uint64_t taken = 0, seen = 0; // works in that capture, and after how many of them another stream waited for it

    uint64_t given() const { return done + waiting.size(); }
    cudaError_t run_until(uint64_t count) {
        while (done < count && !waiting.empty()) {
            Work next = std::move(waiting.front());
            waiting.pop_front();
            done++;
            if (cudaError_t status = next()) return status;
        }
        return cudaSuccess;
    }
};

struct Streams {
    std::vector<std::shared_ptr<Stream>> all; // in the order of their making
    std::shared_ptr<Stream> origin;           // of the capture
    uint64_t capture = 0;                     // the number of the latest
};
Streams& streams() {
    static Streams only;
    return only;
}

bool in_capture(const Stream& stream) { return simt::capturing() && stream.capture == streams().capture; }

} // namespace

struct CUstream_st {
    std::shared_ptr<Stream> stream;
};
struct CUevent_st {
    std::chrono::steady_clock::time_point time;
    std::shared_ptr<Stream> stream; // in which it was last recorded; null: never, or in the default stream
    uint64_t after = 0;             // so many works of the stream, or of its capture
    uint64_t capture = 0;           // in which it was recorded; 0: none

    cudaError_t wait() const { return stream && !capture ? stream->run_until(after) : cudaSuccess; }
};

namespace simt {

bool takes_part(cudaStream_t stream) { return capturing() && (!stream || in_capture(*stream->stream)); }

cudaError_t give(cudaStream_t stream, Work work) {
    if (takes_part(stream)) {
        if (stream) stream->stream->taken++;
        capture(std::move(work));
        return cudaSuccess;
    }
    if (!stream || !stream->stream->late) return work();
    stream->stream->waiting.push_back(std::move(work));
    return cudaSuccess;
}

cudaError_t finish_streams() {
    for (const auto& stream : streams().all)
        if (cudaError_t status = stream->run_until(stream->given())) return status;
    return cudaSuccess;
}

void begin_capture(cudaStream_t origin) {
    Streams& s = streams();
    s.capture++;
    s.origin = origin->stream;
    s.origin->capture = s.capture;
}

cudaError_t end_capture(cudaStream_t) {
    Streams& s = streams();
    cudaError_t status = cudaSuccess;
    for (const auto& stream : s.all) {
        if (stream->capture != s.capture) continue;
        if (stream != s.origin && stream->seen < stream->taken) status = cudaErrorStreamCaptureUnjoined;
        stream->capture = 0;
    }
    s.origin = nullptr;
    return status;
}

} // namespace simt

cudaError_t cudaStreamCreate(cudaStream_t* stream) {
    auto made = std::make_shared<Stream>();
    made->late = !streams().all.empty();
    streams().all.push_back(made);
    *stream = new CUstream_st{made};
    return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) { return cudaStreamCreate(stream); }
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    cudaError_t status = cudaStreamSynchronize(stream);
    std::erase(streams().all, stream->stream);
    delete stream;
    return status;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    if (simt::takes_part(stream)) return cudaErrorStreamCaptureUnsupported;
    return stream ? stream->stream->run_until(stream->stream->given()) : cudaSuccess;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
    if (!event->stream) return cudaSuccess;
    if (event->capture) {
        if (!simt::capturing() || !stream || event->capture != streams().capture) return cudaErrorCapturedEvent;
        stream->stream->capture = event->capture;
        if (event->stream != stream->stream) event->stream->seen = std::max(event->stream->seen, event->after);
        return cudaSuccess;
    }
    if (simt::takes_part(stream)) return cudaErrorStreamCaptureIsolation;
    // As it was recorded now, whatever becomes of the event.
    return simt::give(stream, [recorded = *event] { return recorded.wait(); });
}
cudaError_t cudaEventCreate(cudaEvent_t* event) {
    *event = new CUevent_st{};
    return cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) { return cudaEventCreate(event); }
cudaError_t cudaEventDestroy(cudaEvent_t event) {
    delete event;
    return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    event->time = std::chrono::steady_clock::now();
    event->stream = stream ? stream->stream : nullptr;
    if (!stream) return cudaSuccess;
    event->capture = in_capture(*stream->stream) ? streams().capture : 0;
    event->after = event->capture ? stream->stream->taken : stream->stream->given();
    return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    if (simt::capturing()) return cudaErrorStreamCaptureUnsupported;
    return event->capture ? cudaErrorCapturedEvent : event->wait();
}
cudaError_t cudaEventQuery(cudaEvent_t event) {
    return !event->stream || event->stream->done >= event->after ? cudaSuccess : cudaErrorNotReady;
}
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t begin, cudaEvent_t end) {
    *milliseconds = std::chrono::duration<float, std::milli>(end->time - begin->time).count();
    return cudaSuccess;
}
