#include "comm_mpi.h"

#include <algorithm>
#include <ctime>
#include <stdexcept>
#include <string>

#include <mpi.h>

namespace {

constexpr int kTag = 0;

void check(int result, const char* call) {
    if (result == MPI_SUCCESS) return;
    char text[MPI_MAX_ERROR_STRING];
    int length = 0;
    MPI_Error_string(result, text, &length);
    throw std::runtime_error(std::string(call) + ": " + std::string(text, length));
}

// A rank that waits leaves its core to those that compute: MPI's own waits spin.
class Pause {
public:
    // Longer each time; whether it was long enough to look at other things.
    bool operator()() {
        const timespec nap{0, nanoseconds_};
        nanosleep(&nap, nullptr);
        since_ += nanoseconds_;
        nanoseconds_ = std::min(nanoseconds_ * 2, kLongest);
        if (since_ < kLongest) return false;
        since_ = 0;
        return true;
    }

private:
    static constexpr long kLongest = 1000000;
    long nanoseconds_ = 1000, since_ = 0;
};

class OpenMpi : public Mpi {
public:
    OpenMpi(int rank, int ranks) {
        int level = 0, own = 0, all = 0;
        check(MPI_Init_thread(nullptr, nullptr, MPI_THREAD_FUNNELED, &level), "MPI_Init_thread");
        MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN);
        MPI_Comm_rank(MPI_COMM_WORLD, &own);
        MPI_Comm_size(MPI_COMM_WORLD, &all);
        if (level < MPI_THREAD_FUNNELED) throw std::runtime_error("this MPI allows no other threads beside its own");
        if (own != rank || all != ranks)
            throw std::runtime_error("MPI knows this process as rank " + std::to_string(own) + " of " +
                                     std::to_string(all) + ", and it was started as rank " + std::to_string(rank) +
                                     " of " + std::to_string(ranks) + "; start it with this MPI's own mpirun");
    }
    ~OpenMpi() override { MPI_Finalize(); }

    void exchange(const std::vector<MpiPiece>& sends, const std::vector<MpiPiece>& receives,
                  const std::function<void()>& poll) override {
        std::vector<MPI_Request> requests;
        for (const MpiPiece& piece : receives)
            check(MPI_Irecv(piece.data, int(piece.bytes), MPI_BYTE, piece.rank, kTag, MPI_COMM_WORLD,
                            &requests.emplace_back()),
                  "MPI_Irecv");
        for (const MpiPiece& piece : sends)
            check(MPI_Isend(piece.data, int(piece.bytes), MPI_BYTE, piece.rank, kTag, MPI_COMM_WORLD,
                            &requests.emplace_back()),
                  "MPI_Isend");
        for (Pause pause;;) {
            int done = 0;
            check(MPI_Testall(int(requests.size()), requests.data(), &done, MPI_STATUSES_IGNORE), "MPI_Testall");
            if (done) return;
            if (pause()) poll();
        }
    }
};

} // namespace

Mpi* longhand_start_mpi(int rank, int ranks) { return new OpenMpi(rank, ranks); }
