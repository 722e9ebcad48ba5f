// Between each two ranks a ring of bytes each way, in a file that all map. A call first tells the others what it is. A
// thread of its own does it, as a GPU would: the stream goes on when it has ended, and the process meanwhile.
#include "include/nccl.h"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <filesystem>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include <fcntl.h>
#include <sched.h>
#include <sys/mman.h>
#include <unistd.h>

#include "../../kernels/types.h"
#include "block.h"
#include "streams.h"

namespace {

constexpr size_t kRing = 32 << 10;

struct Ring {
    alignas(64) std::atomic<uint64_t> written;
    alignas(64) std::atomic<uint64_t> read;
    alignas(64) char data[kRing];
};
struct Shared {
    alignas(64) std::atomic<int> arrived;
    Ring rings[]; // (from, to)
};

struct Piece {
    int rank; // the other one
    char* data;
    size_t bytes;
};

// What a rank says that it does, to each that it does it with.
struct Header {
    char call[24];
    uint64_t number, count;
    int type, root;
};

size_t bytes_of(ncclDataType_t type) {
    return type == ncclFloat64 ? 8 : type == ncclFloat32 ? 4 : type == ncclBfloat16 ? 2 : 1;
}

template <class T> void add_to(T& total, T x) { assign(total, to_float(total) + to_float(x)); }
void add_to(double& total, double x) { total += x; }

const char* last_error = "";

ncclResult_t refuse(ncclResult_t result, const char* why) {
    last_error = why;
    return result;
}

// Of one process: p2p calls wait for the end of their group.
struct Group {
    int depth = 0;
    ncclComm_t comm = nullptr;
    cudaStream_t stream = nullptr;
    std::vector<Piece> sends, receives;
} group;

} // namespace

namespace {

struct Aborted {};

// A call under way.
struct Running {
    std::thread thread;
    std::atomic<bool> done = false;
    std::exception_ptr error;

    ~Running() {
        if (thread.joinable()) thread.join();
    }
};

} // namespace

struct ncclComm {
    int ranks, rank;
    Shared* shared = nullptr;
    size_t bytes = 0;
    uint64_t calls = 0;
    std::shared_ptr<std::atomic<bool>> aborted = std::make_shared<std::atomic<bool>>(false);
    std::shared_ptr<Running> running = nullptr; // the latest

    Ring& ring(int from, int to) { return shared->rings[from * ranks + to]; }

    // All pieces at once; those of one pair in their order.
    void exchange(std::vector<Piece> sends, std::vector<Piece> receives) {
        for (unsigned idle = 0;;) {
            bool left = false, moved = false;
            auto move = [&](std::vector<Piece>& pieces, bool send) {
                std::vector<bool> busy(ranks); // with an earlier piece
                for (Piece& piece : pieces) {
                    if (!piece.bytes || busy[piece.rank]) continue;
                    busy[piece.rank] = left = true;
                    Ring& r = send ? ring(rank, piece.rank) : ring(piece.rank, rank);
                    const uint64_t written = r.written.load(), read = r.read.load();
                    const uint64_t at = (send ? written : read) % kRing;
                    const size_t n =
                        std::min<size_t>({piece.bytes, kRing - at, send ? kRing - (written - read) : written - read});
                    if (!n) continue;
                    if (send)
                        memcpy(r.data + at, piece.data, n), r.written.store(written + n);
                    else
                        memcpy(piece.data, r.data + at, n), r.read.store(read + n);
                    piece.data += n, piece.bytes -= n;
                    moved = true;
                }
            };
            move(sends, true);
            move(receives, false);
            if (!left) return;
            if (*aborted) throw Aborted();
            if (moved)
                idle = 0;
            else if (++idle < 100)
                sched_yield();
            else
                usleep(std::min(idle, 1000u)); // the other rank's core may be this one
        }
    }

    // The others' headers, each of which must be this rank's.
    void agree(const Header& own) {
        std::vector<Header> theirs(ranks, own);
        std::vector<Piece> sends, receives;
        for (int other = 0; other < ranks; other++) {
            if (other == rank) continue;
            sends.push_back({other, reinterpret_cast<char*>(const_cast<Header*>(&own)), sizeof own});
            receives.push_back({other, reinterpret_cast<char*>(&theirs[other]), sizeof own});
        }
        exchange(sends, receives);
        auto said = [](const Header& h) {
            return simt::text("%s of %zu of type %d with root %d", h.call, static_cast<size_t>(h.count), h.type,
                              h.root);
        };
        for (int other = 0; other < ranks; other++)
            if (memcmp(&theirs[other], &own, sizeof own) != 0)
                throw simt::Fault(simt::FaultKind::mismatch,
                                  simt::text("rank %d calls %s, and rank %d %s, as call %zu of their communicator",
                                             rank, said(own).c_str(), other, said(theirs[other]).c_str(),
                                             static_cast<size_t>(own.number)));
    }

    // to (count) = sum over ranks of what rank r sends here, own among it; added one after another from a rank on that
    // changes along the array, as on NCCL's rings, and rounded each time.
    template <class T> void sum(T* to, const T* own, size_t count, const std::function<const T*(int)>& sent) {
        constexpr size_t kChunk = 4096;
        std::vector<std::vector<T>> parts(ranks, std::vector<T>(kChunk));
        for (size_t first = 0; first < count; first += kChunk) {
            const size_t n = std::min(kChunk, count - first);
            std::vector<Piece> sends, receives;
            for (int other = 0; other < ranks; other++) {
                if (other == rank) continue;
                sends.push_back({other, reinterpret_cast<char*>(const_cast<T*>(sent(other) + first)), n * sizeof(T)});
                receives.push_back({other, reinterpret_cast<char*>(parts[other].data()), n * sizeof(T)});
            }
            std::copy(own + first, own + first + n, parts[rank].begin());
            exchange(sends, receives);
            const size_t begin = first / kChunk;
            for (size_t i = 0; i < n; i++) {
                T total = parts[begin % ranks][i];
                for (int r = 1; r < ranks; r++) add_to(total, parts[(begin + r) % ranks][i]);
                to[first + i] = total;
            }
        }
    }
};

namespace {

// What a stream does for a call: begins it, and is not ready until it has ended.
std::function<cudaError_t(simt::Touched*)> in_a_thread(ncclComm_t comm, std::function<void()> work) {
    auto running = std::make_shared<Running>();
    return [=, aborted = comm->aborted](simt::Touched*) {
        if (*aborted) return cudaSuccess;
        if (!running->thread.joinable()) {
            comm->running = running;
            running->thread = std::thread([=] {
                try {
                    work();
                } catch (...) {
                    running->error = std::current_exception();
                }
                running->done = true;
            });
        }
        if (!running->done) return cudaErrorNotReady;
        running->thread.join();
        if (running->error) std::rethrow_exception(running->error);
        return cudaSuccess;
    };
}

// Gives the stream a call of all ranks. `reads` and `writes`: bytes of from and to.
ncclResult_t give_call(ncclComm_t comm, cudaStream_t stream, const char* call, const void* from, size_t reads, void* to,
                       size_t writes, size_t count, ncclDataType_t type, int root, std::function<void()> work) {
    if (group.depth) return refuse(ncclInvalidUsage, "only ncclSend and ncclRecv may be grouped here");
    auto known = [](const void* p, size_t bytes) {
        const uintptr_t begin = reinterpret_cast<uintptr_t>(p);
        const simt::HeapAnswer memory = simt::look_up(begin);
        return !bytes || (memory.state == simt::HeapState::inside && begin + bytes <= memory.end);
    };
    if (!known(from, reads) || !known(to, writes))
        return refuse(ncclInvalidArgument, "an array that is not whole in device memory");
    auto touches = std::make_shared<simt::Touched>();
    touches->add_range(from, reads, false);
    touches->add_range(to, writes, true);
    Header header{};
    snprintf(header.call, sizeof header.call, "%s", call);
    header.number = comm->calls++, header.count = count, header.type = type, header.root = root;
    auto run = in_a_thread(comm, [=] { comm->agree(header), work(); });
    const cudaError_t status =
        simt::give(stream, {call, std::source_location::current(), nullptr, false, touches, run});
    return status == cudaSuccess ? ncclSuccess : refuse(ncclUnhandledCudaError, "giving work to the stream");
}

const char* at(const void* p, size_t bytes) { return static_cast<const char*>(p) + bytes; }
char* at(void* p, size_t bytes) { return static_cast<char*>(p) + bytes; }

// The same from each rank, or to each: piece(r) of `from` goes to rank r.
void pieces(ncclComm_t comm, const void* from, void* to, size_t bytes, const std::function<size_t(int)>& piece) {
    std::vector<Piece> sends, receives;
    memmove(at(to, comm->rank * bytes), at(from, piece(comm->rank)), bytes);
    for (int other = 0; other < comm->ranks; other++) {
        if (other == comm->rank) continue;
        sends.push_back({other, const_cast<char*>(at(from, piece(other))), bytes});
        receives.push_back({other, at(to, other * bytes), bytes});
    }
    comm->exchange(sends, receives);
}

template <class T> void sum_pieces(ncclComm_t comm, const void* from, void* to, size_t count, size_t stride) {
    const T* data = static_cast<const T*>(from);
    comm->sum<T>(static_cast<T*>(to), data + comm->rank * stride, count,
                 [=](int other) { return data + other * stride; });
}

ncclResult_t add(const char* call, const void* from, void* to, size_t count, size_t stride, ncclDataType_t type,
                 ncclRedOp_t op, ncclComm_t comm, cudaStream_t stream) {
    if (op != ncclSum || type == ncclInt8) return refuse(ncclInvalidArgument, "a sum of another type");
    const size_t bytes = count * bytes_of(type);
    return give_call(comm, stream, call, from, stride ? bytes * comm->ranks : bytes, to, bytes, count, type, 0, [=] {
        if (type == ncclFloat32) return sum_pieces<float>(comm, from, to, count, stride);
        if (type == ncclBfloat16) return sum_pieces<bf16>(comm, from, to, count, stride);
        sum_pieces<double>(comm, from, to, count, stride);
    });
}

ncclResult_t add_to_group(std::vector<Piece>& pieces, const void* data, size_t count, ncclDataType_t type, int peer,
                          ncclComm_t comm, cudaStream_t stream) {
    if (peer < 0 || peer >= comm->ranks) return refuse(ncclInvalidArgument, "no such rank");
    ncclGroupStart();
    if (group.comm && (group.comm != comm || group.stream != stream))
        return refuse(ncclInvalidUsage, "a group of several communicators or streams");
    group.comm = comm, group.stream = stream;
    pieces.push_back({peer, const_cast<char*>(static_cast<const char*>(data)), count * bytes_of(type)});
    return ncclGroupEnd();
}

// Pairs alone agree on what they exchange: each says how much it sends, for every piece.
void exchange_group(ncclComm_t comm, std::vector<Piece> sends, std::vector<Piece> receives) {
    std::vector<uint64_t> sent(sends.size()), expected(receives.size());
    std::vector<Piece> tell, hear;
    // Those to itself never leave this process.
    for (Piece& send : sends) {
        if (send.rank != comm->rank) continue;
        auto receive = std::find_if(receives.begin(), receives.end(),
                                    [&](const Piece& p) { return p.rank == comm->rank && p.data; });
        if (receive == receives.end() || receive->bytes != send.bytes)
            throw simt::Fault(simt::FaultKind::mismatch, "a rank sends to itself what it does not receive");
        memmove(receive->data, send.data, send.bytes);
        *receive = {comm->rank, nullptr, 0}, send = {comm->rank, nullptr, 0};
    }
    for (size_t i = 0; i < sends.size(); i++) {
        sent[i] = sends[i].bytes;
        if (sends[i].rank != comm->rank) tell.push_back({sends[i].rank, reinterpret_cast<char*>(&sent[i]), 8});
    }
    for (size_t i = 0; i < receives.size(); i++)
        if (receives[i].rank != comm->rank)
            hear.push_back({receives[i].rank, reinterpret_cast<char*>(&expected[i]), 8});
    comm->exchange(tell, hear);
    for (size_t i = 0; i < receives.size(); i++)
        if (receives[i].rank != comm->rank && expected[i] != receives[i].bytes)
            throw simt::Fault(simt::FaultKind::mismatch,
                              simt::text("rank %d sends %zu bytes to rank %d, which receives %zu", receives[i].rank,
                                         static_cast<size_t>(expected[i]), comm->rank, receives[i].bytes));
    comm->exchange(std::move(sends), std::move(receives));
}

} // namespace

const char* ncclGetErrorString(ncclResult_t result) {
    switch (result) {
    case ncclSuccess:
        return "no error";
    case ncclUnhandledCudaError:
        return "unhandled cuda error";
    case ncclSystemError:
        return "unhandled system error";
    case ncclInvalidArgument:
        return "invalid argument";
    case ncclInvalidUsage:
        return "invalid usage";
    }
    return "unknown result";
}
const char* ncclGetLastError(ncclComm_t) { return last_error; }

ncclResult_t ncclGetUniqueId(ncclUniqueId* id) {
    *id = {};
    std::error_code error;
    const std::string name = std::filesystem::temp_directory_path(error).string() + "/simt_nccl_XXXXXX";
    if (error || name.size() >= sizeof id->internal) return refuse(ncclSystemError, "no folder for temporary files");
    memcpy(id->internal, name.c_str(), name.size());
    const int fd = mkstemp(id->internal);
    if (fd < 0) return refuse(ncclSystemError, strerror(errno));
    close(fd);
    return ncclSuccess;
}

ncclResult_t ncclCommInitRank(ncclComm_t* made, int ranks, ncclUniqueId id, int rank) {
    if (rank < 0 || rank >= ranks) return refuse(ncclInvalidArgument, "no such rank");
    auto comm = std::make_unique<ncclComm>(ncclComm{ranks, rank});
    comm->bytes = sizeof(Shared) + sizeof(Ring) * ranks * ranks;
    const int fd = open(id.internal, O_RDWR | O_CLOEXEC);
    if (fd < 0) return refuse(ncclSystemError, strerror(errno));
    const bool sized = ftruncate(fd, static_cast<off_t>(comm->bytes)) == 0; // to the same by all; new bytes are zero
    void* mapped = sized ? mmap(nullptr, comm->bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0) : MAP_FAILED;
    close(fd);
    if (mapped == MAP_FAILED) return refuse(ncclSystemError, strerror(errno));
    comm->shared = static_cast<Shared*>(mapped);
    comm->shared->arrived++;
    while (comm->shared->arrived < ranks) usleep(1000);
    if (rank == 0) unlink(id.internal);
    *made = comm.release();
    return ncclSuccess;
}

ncclResult_t ncclCommAbort(ncclComm_t comm) {
    *comm->aborted = true;
    if (comm->running && comm->running->thread.joinable()) comm->running->thread.join();
    munmap(comm->shared, comm->bytes);
    delete comm;
    return ncclSuccess;
}

ncclResult_t ncclCommGetAsyncError(ncclComm_t, ncclResult_t* error) {
    *error = ncclSuccess;
    return ncclSuccess;
}

ncclResult_t ncclAllReduce(const void* from, void* to, size_t count, ncclDataType_t type, ncclRedOp_t op,
                           ncclComm_t comm, cudaStream_t stream) {
    return add("ncclAllReduce", from, to, count, 0, type, op, comm, stream);
}
ncclResult_t ncclReduceScatter(const void* from, void* to, size_t received, ncclDataType_t type, ncclRedOp_t op,
                               ncclComm_t comm, cudaStream_t stream) {
    return add("ncclReduceScatter", from, to, received, received, type, op, comm, stream);
}
ncclResult_t ncclAllGather(const void* from, void* to, size_t sent, ncclDataType_t type, ncclComm_t comm,
                           cudaStream_t stream) {
    const size_t bytes = sent * bytes_of(type);
    return give_call(comm, stream, "ncclAllGather", from, bytes, to, bytes * comm->ranks, sent, type, 0,
                     [=] { pieces(comm, from, to, bytes, [](int) { return 0; }); });
}
ncclResult_t ncclBroadcast(const void* from, void* to, size_t count, ncclDataType_t type, int root, ncclComm_t comm,
                           cudaStream_t stream) {
    const size_t bytes = count * bytes_of(type);
    const bool sends = root == comm->rank;
    return give_call(comm, stream, "ncclBroadcast", from, sends ? bytes : 0, to, bytes, count, type, root, [=] {
        if (!sends) return comm->exchange({}, {{root, static_cast<char*>(to), bytes}});
        std::vector<Piece> all;
        for (int other = 0; other < comm->ranks; other++)
            if (other != root) all.push_back({other, const_cast<char*>(at(from, 0)), bytes});
        comm->exchange(all, {});
        memmove(to, from, bytes);
    });
}

ncclResult_t ncclSend(const void* from, size_t count, ncclDataType_t type, int peer, ncclComm_t comm,
                      cudaStream_t stream) {
    return add_to_group(group.sends, from, count, type, peer, comm, stream);
}
ncclResult_t ncclRecv(void* to, size_t count, ncclDataType_t type, int peer, ncclComm_t comm, cudaStream_t stream) {
    return add_to_group(group.receives, to, count, type, peer, comm, stream);
}
ncclResult_t ncclGroupStart() {
    group.depth++;
    return ncclSuccess;
}
ncclResult_t ncclGroupEnd() {
    if (!group.depth) return refuse(ncclInvalidUsage, "ncclGroupEnd without ncclGroupStart");
    if (--group.depth) return ncclSuccess;
    Group all = std::move(group);
    group = {};
    if (!all.comm) return ncclSuccess;
    auto touches = std::make_shared<simt::Touched>();
    for (const Piece& piece : all.sends) touches->add_range(piece.data, piece.bytes, false);
    for (const Piece& piece : all.receives) touches->add_range(piece.data, piece.bytes, true);
    auto run = in_a_thread(all.comm, [all] { exchange_group(all.comm, all.sends, all.receives); });
    const cudaError_t status =
        simt::give(all.stream, {"ncclGroupEnd", std::source_location::current(), nullptr, false, touches, run});
    return status == cudaSuccess ? ncclSuccess : refuse(ncclUnhandledCudaError, "giving work to the stream");
}
