// Streams and events by CUDA's rules. What a stream is given waits in its queue and runs at some time that these rules
// allow: when somebody waits for it at the latest, and at times before, as a seed draws it. The legacy default stream
// and blocking streams wait for each other, non-blocking ones for nobody but events.
//
// Every operation has a vector clock: of each stream the number of its operations that must be done before. It says
// what may run; and when an operation has run, what it touched is held against all that ran before, with nothing that
// orders the two. So a missing wait is told in whatever order this seed ran them. What the host knows to be done is
// forgotten.
//
// What is captured follows CUDA's rules: a stream takes part once it waits for an event of one that does, must not wait
// for what was recorded outside, and must have been waited for at the end.
#include "streams.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <deque>

#include <unistd.h>

#include "block.h"

namespace {

using simt::Clock;
using simt::Operation;

struct Given {
    Operation operation;
    Clock clock;
    uint64_t number; // in its timeline
    bool awaited;    // the host waits for it at once
};

constexpr size_t kHost = 0, kLegacy = 1; // timelines

uint64_t at(const Clock& clock, size_t timeline) { return timeline < clock.size() ? clock[timeline] : 0; }
void join(Clock& clock, const Clock& other) {
    clock.resize(std::max(clock.size(), other.size()));
    for (size_t i = 0; i < other.size(); i++) clock[i] = std::max(clock[i], other[i]);
}

} // namespace

struct CUstream_st {
    size_t timeline;
    bool blocking;          // waits for the legacy default stream, and that for it
    bool destroyed = false; // by the program; it goes when its work is done
    uint64_t given, done;
    Clock clock = {}; // of all that it was given, and of the events that it waits for
    std::deque<Given> waiting = {};
    std::deque<Given> ran = {}; // what the host does not know to be done
    uint64_t capture = 0;       // the capture in which it takes part; 0: none
    size_t branch = 0;
    uint64_t taken = 0, seen = 0; // works in that capture, and after how many of them another stream waited for it
};

struct CUevent_st {
    Clock clock;
    uint64_t capture = 0; // in which it was last recorded; 0: outside of any
    size_t number = 0, branch = 0;
    uint64_t after = 0; // so many works of its branch
};

namespace {

using Stream = CUstream_st;

struct Machine {
    std::vector<std::unique_ptr<Stream>> streams; // by timeline; null: the host, and those that are gone
    std::vector<uint64_t> reached;                // by timelines of streams that are gone
    Clock host;                                   // what the host knows to be done; and how often it touched memory
    std::deque<Given> host_touched;               // while work waits that it may meet
    uint64_t seed = 0, random = 0;

    uint64_t capture = 0; // the number of the latest
    bool capturing = false;
    std::vector<Stream*> branches;
    simt::Steps steps;
    size_t events = 0;

    Machine() {
        streams.resize(1), reached.resize(1), host.resize(1);
        make_stream(true);
    }
    Stream* make_stream(bool blocking);
    Stream& stream(cudaStream_t given) { return given ? *given : *streams[kLegacy]; }
    bool takes_part(cudaStream_t given) const { return capturing && given && given->capture == capture; }
    template <class Body> void for_streams(Body body) {
        for (auto& stream : streams)
            if (stream) body(*stream);
    }

    Clock before(const Stream& stream);
    cudaError_t run_until(size_t timeline, uint64_t number);
    cudaError_t run_next(Stream& stream);
    cudaError_t run_some();
    cudaError_t finish(const Clock& clock);
    cudaError_t ask(const Clock& clock); // the same, or cudaErrorNotReady
    void check_order(const Stream& stream, const Given& given);
    void forget();
    void drop_everything();
    std::string name(const Given& given, size_t timeline) const;
    [[noreturn]] void raise(const std::string& mine, const std::string& theirs, const simt::Meeting& met);
};

Machine& machine() {
    static Machine only;
    return only;
}

// As the runtime, which takes it for on at "1".
bool launch_blocking() {
    const char* wanted = getenv("CUDA_LAUNCH_BLOCKING");
    return wanted && !strcmp(wanted, "1");
}

std::string place(const char* what, std::source_location at) {
    const char* slash = strrchr(at.file_name(), '/');
    return simt::text("%s (%s:%u)", what, slash ? slash + 1 : at.file_name(), static_cast<unsigned>(at.line()));
}

Stream* Machine::make_stream(bool blocking) {
    size_t timeline = std::find(streams.begin() + 1, streams.end(), nullptr) - streams.begin();
    if (timeline == streams.size()) streams.emplace_back(), reached.push_back(0);
    streams[timeline].reset(new Stream{timeline, blocking, false, reached[timeline], reached[timeline]});
    return streams[timeline].get();
}

// What must be done before something that the stream is given now.
Clock Machine::before(const Stream& stream) {
    Clock clock = stream.clock;
    join(clock, host);
    if (stream.timeline == kLegacy)
        for_streams([&](Stream& other) {
            if (other.blocking) join(clock, other.clock);
        });
    else if (stream.blocking)
        join(clock, streams[kLegacy]->clock);
    return clock;
}

cudaError_t Machine::run_until(size_t timeline, uint64_t number) {
    while (streams[timeline] && streams[timeline]->done < number) {
        Stream& stream = *streams[timeline];
        for (size_t other = 1; other < streams.size(); other++)
            if (other != timeline)
                if (cudaError_t status = run_until(other, at(stream.waiting.front().clock, other))) return status;
        if (cudaError_t status = run_next(stream)) return status;
    }
    return cudaSuccess;
}

cudaError_t Machine::run_next(Stream& stream) {
    Given given = std::move(stream.waiting.front());
    stream.waiting.pop_front();
    stream.done = given.number;
    // Most tests launch one kernel and wait for it, with nothing beside it that it could meet.
    bool alone = given.awaited && host_touched.empty();
    for_streams([&](Stream& other) { alone = alone && other.waiting.empty() && other.ran.empty(); });
    Operation& operation = given.operation;
    const bool finds_out = !alone && !operation.touches;
    if (finds_out) operation.touches = std::make_shared<simt::Touched>();
    try {
        const cudaError_t status = operation.work(finds_out ? operation.touches.get() : nullptr);
        if (status == cudaErrorNotReady) {
            if (finds_out) operation.touches.reset();
            stream.done = given.number - 1;
            stream.waiting.push_front(std::move(given));
        }
        if (status != cudaSuccess) return status;
        operation.work = nullptr;
        if (!alone) check_order(stream, given);
    } catch (...) {
        drop_everything();
        if (std::uncaught_exceptions()) return cudaErrorLaunchFailure; // a second exception would end the program
        throw;
    }
    if (!alone) stream.ran.push_back(std::move(given));
    return cudaSuccess;
}

// After each thing that it is given, the machine may do nothing, or one of the things that wait, or all of a stream.
cudaError_t Machine::run_some() {
    if (seed != simt::settings().seed || !random) seed = simt::settings().seed, random = ~seed | 1;
    random = random * 6364136223846793005u + 1442695040888963407u;
    const uint64_t drawn = random >> 33;
    if (drawn & 2) return cudaSuccess;
    std::vector<Stream*> busy;
    for_streams([&](Stream& stream) {
        if (!stream.waiting.empty()) busy.push_back(&stream);
    });
    if (busy.empty()) return cudaSuccess;
    const Stream& chosen = *busy[drawn / 4 % busy.size()];
    const cudaError_t status = run_until(chosen.timeline, drawn & 1 ? chosen.given : chosen.done + 1);
    return status == cudaErrorNotReady ? cudaSuccess : status;
}

cudaError_t Machine::ask(const Clock& clock) {
    for (size_t timeline = 1; timeline < clock.size(); timeline++)
        if (cudaError_t status = run_until(timeline, clock[timeline])) return status;
    join(host, clock);
    forget();
    return cudaSuccess;
}

cudaError_t Machine::finish(const Clock& clock) {
    for (size_t timeline = 1; timeline < clock.size(); timeline++) {
        cudaError_t status = cudaSuccess;
        while ((status = run_until(timeline, clock[timeline])) == cudaErrorNotReady) usleep(50);
        if (status != cudaSuccess) return status;
    }
    join(host, clock);
    forget();
    return cudaSuccess;
}

void Machine::check_order(const Stream& stream, const Given& given) {
    const simt::Touched& touches = *given.operation.touches;
    auto check = [&](size_t timeline, const Given& other) {
        if (auto met = touches.meets(*other.operation.touches))
            raise(name(given, stream.timeline), name(other, timeline), *met);
    };
    for_streams([&](Stream& other) {
        if (&other == &stream) return;
        for (auto it = other.ran.rbegin(); it != other.ran.rend() && it->number > at(given.clock, other.timeline); ++it)
            check(other.timeline, *it);
    });
    for (const Given& touched : host_touched)
        if (touched.number > at(given.clock, kHost)) check(kHost, touched);
}

void Machine::forget() {
    uint64_t oldest = UINT64_MAX;
    for (auto& stream : streams) {
        if (!stream) continue;
        const uint64_t known = at(host, stream->timeline);
        while (!stream->ran.empty() && stream->ran.front().number <= known) stream->ran.pop_front();
        if (!stream->waiting.empty()) oldest = std::min(oldest, at(stream->waiting.front().clock, kHost));
        if (!stream->destroyed || !stream->waiting.empty() || known < stream->given) continue;
        reached[stream->timeline] = stream->given;
        stream.reset();
    }
    while (!host_touched.empty() && host_touched.front().number <= oldest) host_touched.pop_front();
}

// After a failure nothing that was given is done any more.
void Machine::drop_everything() {
    for_streams([&](Stream& stream) {
        stream.waiting.clear();
        stream.done = stream.given;
        join(host, stream.clock);
    });
    forget();
}

std::string Machine::name(const Given& given, size_t timeline) const {
    const Operation& operation = given.operation;
    std::string said = operation.kernel
                           ? "kernel " + simt::function_name(operation.kernel) + " (" +
                                 simt::find_place(static_cast<const char*>(operation.kernel) + 1).file + ")"
                           : place(operation.what, operation.at);
    if (timeline == kHost) return said + " by the host";
    if (timeline == kLegacy) return said + " in the legacy default stream";
    const bool blocking = streams[timeline] && streams[timeline]->blocking;
    return said + (blocking ? " in blocking stream " : " in non-blocking stream ") + std::to_string(timeline);
}

void Machine::raise(const std::string& mine, const std::string& theirs, const simt::Meeting& met) {
    const simt::HeapAnswer memory = simt::look_up(met.begin);
    drop_everything();
    throw simt::Fault(simt::FaultKind::unordered,
                      simt::text("%s %s, and %s %s, bytes %zu to %zu of an allocation of %zu, and nothing orders them",
                                 theirs.c_str(), met.second_writes ? "writes" : "reads", mine.c_str(),
                                 met.first_writes ? "writes" : "reads", static_cast<size_t>(met.begin - memory.begin),
                                 static_cast<size_t>(met.end - memory.begin),
                                 static_cast<size_t>(memory.end - memory.begin)));
}

} // namespace

namespace simt {

cudaError_t give(cudaStream_t stream, Operation operation) {
    Machine& m = machine();
    if (m.takes_part(stream)) {
        stream->taken++;
        m.steps.push_back({Step::Kind::work, stream->branch, 0, std::move(operation)});
        return cudaSuccess;
    }
    Stream& s = m.stream(stream);
    Clock clock = m.before(s);
    clock.resize(std::max(clock.size(), s.timeline + 1));
    clock[s.timeline] = ++s.given;
    s.clock = clock;
    const bool awaited = operation.launch && launch_blocking();
    s.waiting.push_back({std::move(operation), clock, s.given, awaited});
    return awaited ? m.finish(clock) : m.run_some();
}

cudaError_t wait_for(cudaStream_t stream) {
    Machine& m = machine();
    if (m.capturing && (!stream || m.takes_part(stream))) return cudaErrorStreamCaptureUnsupported;
    return m.finish(m.stream(stream).clock);
}

cudaError_t wait_for_all() {
    Clock all;
    machine().for_streams([&](Stream& stream) { join(all, stream.clock); });
    return machine().finish(all);
}

void host_touches(const void* p, size_t bytes, bool writes, const char* what, std::source_location at) {
    if (!bytes || look_up(reinterpret_cast<uintptr_t>(p)).state != HeapState::inside) return;
    Machine& m = machine();
    Given touched{{what, at}, {}, 0, false};
    touched.operation.touches = std::make_shared<Touched>();
    touched.operation.touches->add_range(p, bytes, writes);
    bool waits = false;
    m.for_streams([&](Stream& stream) {
        waits = waits || !stream.waiting.empty();
        for (const Given& other : stream.ran)
            if (auto met = touched.operation.touches->meets(*other.operation.touches))
                m.raise(m.name(touched, kHost), m.name(other, stream.timeline), *met);
    });
    if (!waits) return;
    touched.number = ++m.host[kHost];
    m.host_touched.push_back(std::move(touched));
}

void host_releases(const void* p, const char* what, std::source_location at) {
    const HeapAnswer memory = look_up(reinterpret_cast<uintptr_t>(p));
    if (memory.state != HeapState::inside) return;
    Machine& m = machine();
    Given released{{what, at}, {}, 0, false};
    Touched all;
    all.add_range(p, memory.end - memory.begin, true);
    m.for_streams([&](Stream& stream) {
        for (const auto* queue : {&stream.ran, &stream.waiting})
            for (const Given& other : *queue)
                if (auto met = other.operation.touches ? all.meets(*other.operation.touches) : std::nullopt)
                    m.raise(m.name(released, kHost), m.name(other, stream.timeline), *met);
    });
}

bool capturing() { return machine().capturing; }
bool takes_part(cudaStream_t stream) { return machine().takes_part(stream); }

cudaError_t begin_capture(cudaStream_t origin) {
    Machine& m = machine();
    // The legacy default stream cannot be captured.
    if (!origin || m.capturing) return cudaErrorStreamCaptureUnsupported;
    m.capturing = true;
    m.branches = {origin};
    m.steps.clear();
    m.events = 0;
    origin->capture = ++m.capture;
    origin->branch = 0;
    return cudaSuccess;
}

cudaError_t end_capture(cudaStream_t, Steps& steps) {
    Machine& m = machine();
    if (!m.capturing) return cudaErrorInvalidValue;
    m.capturing = false;
    cudaError_t status = cudaSuccess;
    for (Stream* stream : m.branches) {
        if (stream != m.branches[0] && stream->seen < stream->taken) status = cudaErrorStreamCaptureUnjoined;
        stream->capture = stream->taken = stream->seen = 0;
    }
    steps = std::move(m.steps);
    return status;
}

cudaError_t run_steps(const Steps& steps, cudaStream_t stream, std::vector<cudaStream_t>& branches) {
    Machine& m = machine();
    if (m.takes_part(stream)) return cudaErrorStreamCaptureUnsupported;
    std::vector<Clock> events;
    auto branch = [&](size_t number) -> cudaStream_t {
        if (number == 0) return stream;
        while (branches.size() < number) branches.push_back(m.make_stream(false));
        return branches[number - 1];
    };
    for (const Step& step : steps) {
        Stream& s = m.stream(branch(step.branch));
        if (step.kind == Step::Kind::record)
            events.push_back(m.before(s));
        else if (step.kind == Step::Kind::wait)
            join(s.clock, events[step.event]);
        else if (cudaError_t status = give(branch(step.branch), step.operation))
            return status;
    }
    return cudaSuccess;
}

} // namespace simt

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
    *stream = machine().make_stream(flags != cudaStreamNonBlocking);
    return cudaSuccess;
}
cudaError_t cudaStreamCreate(cudaStream_t* stream) { return cudaStreamCreateWithFlags(stream, cudaStreamDefault); }
// It does not wait: the stream goes when its work is done.
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    stream->destroyed = true;
    machine().forget();
    return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) { return simt::wait_for(stream); }
// What nobody but another process keeps from running is done by then: nothing runs here by itself.
cudaError_t cudaStreamQuery(cudaStream_t stream) { return machine().ask(machine().stream(stream).clock); }

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
    Machine& m = machine();
    if (!event->capture) {
        if (m.takes_part(stream)) return event->clock.empty() ? cudaSuccess : cudaErrorStreamCaptureIsolation;
        // As it was recorded now, whatever becomes of the event.
        join(m.stream(stream).clock, event->clock);
        return cudaSuccess;
    }
    if (!m.capturing || !stream || event->capture != m.capture) return cudaErrorCapturedEvent;
    if (stream->capture != m.capture) {
        stream->capture = m.capture;
        stream->branch = m.branches.size();
        m.branches.push_back(stream);
    }
    Stream* recorded_in = m.branches[event->branch];
    if (recorded_in != stream) recorded_in->seen = std::max(recorded_in->seen, event->after);
    m.steps.push_back({simt::Step::Kind::wait, stream->branch, event->number, {}});
    return cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
    *event = new CUevent_st{};
    return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
    delete event;
    return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    Machine& m = machine();
    if (m.takes_part(stream)) {
        *event = {{}, m.capture, m.events++, stream->branch, stream->taken};
        m.steps.push_back({simt::Step::Kind::record, stream->branch, event->number, {}});
    } else
        *event = {m.before(m.stream(stream))};
    return cudaSuccess;
}
cudaError_t cudaEventQuery(cudaEvent_t event) { return machine().ask(event->clock); }
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    if (simt::capturing()) return cudaErrorStreamCaptureUnsupported;
    return event->capture ? cudaErrorCapturedEvent : machine().finish(event->clock);
}
