// How this process was started: alone, or as one of the ranks of a run.
#pragma once
#include <functional>
#include <string>

// A variable's value, or null: getenv, or a test's own.
using Environment = std::function<const char*(const char*)>;

struct Launch {
    int rank = 0, ranks = 1;
    int local_rank = 0;   // among those of this machine; it chooses the GPU
    std::string launcher; // "mpirun", "srun" or "RANK and WORLD_SIZE"; empty: started alone
    std::string address;  // where rank 0 listens
    int port = 0;
    std::string run; // the same on all ranks of a run, and on no others; empty where nothing tells
};

// Reads, the first that is there:
//   mpirun              OMPI_COMM_WORLD_RANK, …_SIZE and …_LOCAL_RANK of Open MPI; PMI_RANK, PMI_SIZE and
//                       MPI_LOCALRANKID of MPICH and Intel MPI
//   torchrun, or by hand RANK, WORLD_SIZE and LOCAL_RANK
//   srun                SLURM_PROCID, SLURM_STEP_NUM_TASKS (or SLURM_NTASKS) and SLURM_LOCALID. A batch script has
//                       such variables, too, but is no task of a step: it runs alone.
// Rank 0's address is MASTER_ADDR; else under srun the first name of the step's nodes, and this machine where all ranks
// are on it. Its port is LONGHAND_PORT; else the one behind MASTER_PORT, which torchrun's own store has; else one of
// 20000 to 31999 by the run. The run is LONGHAND_RUN; else mpirun's job, TORCHELASTIC_RUN_ID with its count of
// restarts, or srun's step; else Slurm's job.
//
// Throws BadInput that names the variable for one that is missing or makes no sense.
Launch find_launch(const Environment& variable);

// The first name of a list such as "gpu[07-09,12],login": "gpu07".
std::string first_node(const std::string& list);
