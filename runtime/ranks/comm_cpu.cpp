#include <algorithm>
#include <cstring>
#include <filesystem>

#include <dlfcn.h>

#include "../base/errors.h"
#include "comm.h"
#include "comm_mpi.h"

namespace {

// At most this is exchanged at a time: sums need as much memory beside their arrays, MPI counts in int, and each is a
// sign of progress.
constexpr int64_t kChunkBytes = int64_t{16} << 20;

std::unique_ptr<Mpi> start_mpi(int rank, int ranks) {
    const std::filesystem::path path = std::filesystem::read_symlink("/proc/self/exe").parent_path() / "comm_mpi.so";
    void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_GLOBAL); // MPI loads parts of its own that want its names
    if (!library)
        throw BadInput(std::string("the ranks of the cpu build exchange data through MPI: ") + dlerror() +
                       "; install it and its compiler mpicxx, and build again");
    auto* start = reinterpret_cast<decltype(&longhand_start_mpi)>(dlsym(library, "longhand_start_mpi"));
    if (!start) throw BadInput(path.string() + " is of another version; build again");
    try {
        return std::unique_ptr<Mpi>(start(rank, ranks));
    } catch (const std::runtime_error& error) {
        throw BadInput(error.what());
    }
}

// out (n) = sum of parts, in their order; out may be one of them.
template <class T> void add_parts(T* out, const std::vector<const T*>& parts, int64_t n) {
    constexpr int64_t kBlock = 1024;
    auto wide = [](T x) {
        if constexpr (std::is_same_v<T, double>)
            return x;
        else
            return to_float(x);
    };
    decltype(wide(T())) sum[kBlock];
    for (int64_t first = 0; first < n; first += kBlock) {
        const int64_t count = std::min(kBlock, n - first);
        for (int64_t i = 0; i < count; i++) sum[i] = wide(parts[0][first + i]);
        for (size_t p = 1; p < parts.size(); p++)
            for (int64_t i = 0; i < count; i++) sum[i] += wide(parts[p][first + i]);
        for (int64_t i = 0; i < count; i++) {
            if constexpr (std::is_same_v<T, double>)
                out[first + i] = sum[i];
            else
                assign(out[first + i], sum[i]);
        }
    }
}

void copy(void* to, const void* from, size_t bytes) {
    if (to != from && bytes) memcpy(to, from, bytes);
}

char* at(const void* data, size_t bytes) { return static_cast<char*>(const_cast<void*>(data)) + bytes; }

} // namespace

struct Comm::Library {
    Control& control;
    std::unique_ptr<Mpi> mpi;
    std::vector<char> scratch;

    int rank() const { return control.rank(); }
    int ranks() const { return control.ranks(); }

    void exchange(const std::vector<MpiPiece>& sends, const std::vector<MpiPiece>& receives) {
        for (size_t first = 0;; first += kChunkBytes) {
            auto chunk = [&](const std::vector<MpiPiece>& pieces) {
                std::vector<MpiPiece> chunks;
                for (const MpiPiece& piece : pieces)
                    if (piece.bytes > first)
                        chunks.push_back({piece.rank, static_cast<char*>(piece.data) + first,
                                          std::min<size_t>(kChunkBytes, piece.bytes - first)});
                return chunks;
            };
            const std::vector<MpiPiece> sent = chunk(sends), received = chunk(receives);
            if (sent.empty() && received.empty()) return;
            try {
                mpi->exchange(sent, received, [&] { control.check(), control.while_waiting(); });
            } catch (const Failure&) {
                throw;
            } catch (const std::runtime_error& error) { // MPI's
                throw RunFailed(error.what());
            }
            control.progress();
        }
    }

    // A piece for each other rank, and from each.
    void with_all(const std::function<MpiPiece(int)>& sent, const std::function<MpiPiece(int)>& received) {
        std::vector<MpiPiece> sends, receives;
        for (int other = 0; other < ranks(); other++) {
            if (other == rank()) continue;
            sends.push_back(sent(other));
            receives.push_back(received(other));
        }
        exchange(sends, receives);
    }

    // out (n) = sum over ranks of what each has for this one: part(r) (count(r)), all of rank r's own data.
    template <class T> void sum_own(T* out, const T* own, int64_t n, const std::function<MpiPiece(int)>& part) {
        scratch.resize(ranks() * n * sizeof(T));
        std::vector<const T*> parts(ranks());
        for (int other = 0; other < ranks(); other++)
            parts[other] = other == rank() ? own : reinterpret_cast<T*>(scratch.data()) + other * n;
        with_all(part, [&](int other) { return MpiPiece{other, const_cast<T*>(parts[other]), n * sizeof(T)}; });
        add_parts(out, parts, n);
    }

    template <class T> void all_reduce(T* data, int64_t count) {
        constexpr int64_t kChunk = kChunkBytes / sizeof(T);
        for (int64_t first = 0; first < count; first += kChunk) {
            const int64_t n = std::min(kChunk, count - first);
            auto begin = [&](int r) { return first + n * r / ranks(); };
            auto piece = [&](int other, int of) {
                return MpiPiece{other, data + begin(of), (begin(of + 1) - begin(of)) * sizeof(T)};
            };
            T* own = data + begin(rank());
            sum_own<T>(own, own, begin(rank() + 1) - begin(rank()), [&](int other) { return piece(other, other); });
            with_all([&](int other) { return piece(other, rank()); }, [&](int other) { return piece(other, other); });
        }
    }

    template <class T> void reduce_scatter(T* own, const T* data, int64_t each) {
        const int64_t chunk = std::max<int64_t>(1, kChunkBytes / sizeof(T) / ranks());
        for (int64_t first = 0; first < each; first += chunk) {
            const int64_t n = std::min(chunk, each - first);
            sum_own<T>(own + first, data + rank() * each + first, n, [&](int other) {
                return MpiPiece{other, const_cast<T*>(data + other * each + first), n * sizeof(T)};
            });
        }
    }

    // Each rank has piece(r) of `from` for rank r, and gets one of `bytes` bytes from each.
    void pieces(void* to, const void* from, size_t bytes, const std::function<size_t(int)>& piece) {
        copy(at(to, rank() * bytes), at(from, piece(rank())), bytes);
        with_all(
            [&](int other) {
                return MpiPiece{other, at(from, piece(other)), bytes};
            },
            [&](int other) {
                return MpiPiece{other, at(to, other * bytes), bytes};
            });
    }

    void broadcast(void* data, size_t bytes, int root) {
        if (rank() != root) return exchange({}, {{root, data, bytes}});
        std::vector<MpiPiece> sends;
        for (int other = 0; other < ranks(); other++)
            if (other != root) sends.push_back({other, data, bytes});
        exchange(sends, {});
    }

    template <class T> void sum(const Call& call) {
        T* to = static_cast<T*>(call.to);
        if (call.kind == Kind::all_reduce)
            all_reduce(to, call.count);
        else
            reduce_scatter(to, static_cast<const T*>(call.from), call.count);
    }

    void run(const Call& call) {
        switch (call.kind) {
        case Kind::all_reduce:
        case Kind::reduce_scatter:
            if (call.element == Element::fp32) return sum<float>(call);
            return call.element == Element::bf16 ? sum<bf16>(call) : sum<double>(call);
        case Kind::all_gather:
            return pieces(call.to, call.from, call.count, [](int) { return 0; });
        case Kind::all_to_all:
            return pieces(call.to, call.from, call.count, [&](int other) { return other * call.count; });
        case Kind::broadcast:
            return broadcast(call.to, call.count, call.source);
        case Kind::send_receive:
            return exchange({{call.target, at(call.from, 0), call.count}}, {{call.source, call.to, call.received}});
        }
    }
};

Comm::Comm(const Device& device, Control* control) : device_(device), control_(control) {
    if (!control) return;
    control->begin_waiting(0);
    library_.reset(new Library{*control, start_mpi(rank(), ranks()), {}});
    control->end_waiting();
    std::vector<char> greeting(2 * ranks());
    all_to_all(greeting.data(), greeting.data() + ranks(), 1);
}

Comm::~Comm() = default;

// MPI's end waits for all ranks. Without it mpirun ends those that are left, which is right for a run that failed.
void Comm::abandon() {
    if (library_) library_->mpi.release();
}

Comm::Ticket Comm::begin(const Call& call) {
    last_++, calls_++;
    if (!library_) {
        copy(call.to, call.from, call.bytes());
        return last_;
    }
    control_->begin_waiting(calls_);
    library_->run(call);
    control_->end_waiting();
    return last_;
}

void Comm::wait(Ticket) {}
void Comm::mark() {
    last_++;
    if (control_) control_->progress();
}
void Comm::finish() {}
