// The calls of MPI that comm_cpu.cpp makes. They lie in a library of their own, comm_mpi.so beside the program: a run
// of several ranks loads it, and one of a single rank needs no MPI. comm_mpi.cpp is all that mpicxx compiles.
#pragma once
#include <cstddef>
#include <functional>
#include <vector>

struct MpiPiece {
    int rank; // the other one
    void* data;
    size_t bytes; // below 2^31
};

class Mpi {
public:
    virtual ~Mpi() = default; // ends MPI, which waits for all ranks
    // Sends and receives all pieces; between two ranks in the order that they are listed. Calls poll() about once a
    // millisecond while it waits. Throws std::runtime_error with what MPI says.
    virtual void exchange(const std::vector<MpiPiece>& sends, const std::vector<MpiPiece>& receives,
                          const std::function<void()>& poll) = 0;
};

// Starts MPI. Throws std::runtime_error if it finds another rank, or another number of ranks.
extern "C" Mpi* longhand_start_mpi(int rank, int ranks);
