#include "launch.h"

#include <charconv>
#include <cstdint>
#include <cstring>

#include "../base/errors.h"

namespace {

constexpr int kMostRanks = 1 << 16, kFirstPort = 20000, kPorts = 12000, kLastPort = 65535;

// Where a launcher says what; a null name: it does not.
struct Variables {
    const char *launcher, *rank, *ranks, *local_rank, *local_ranks;
};
constexpr Variables kVariables[] = {
    {"mpirun", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK",
     "OMPI_COMM_WORLD_LOCAL_SIZE"},
    {"mpirun", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"},
    {"RANK and WORLD_SIZE", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"},
};

class Reader {
public:
    explicit Reader(const Environment& variable) : variable_(variable) {}

    std::string text(const char* name) const {
        const char* value = name ? variable_(name) : nullptr;
        return value ? value : "";
    }
    bool has(const char* name) const { return !text(name).empty(); }

    int number(const char* name, int least, int most) const {
        const std::string value = text(name);
        int found = 0;
        const auto [end, error] = std::from_chars(value.data(), value.data() + value.size(), found);
        if (error != std::errc() || end != value.data() + value.size() || found < least || found > most)
            throw BadInput(std::string("environment: ") + name + "=" + value + ": not a number from " +
                           std::to_string(least) + " to " + std::to_string(most));
        return found;
    }
    int needed(const char* name, int least, int most, const char* beside) const {
        if (!has(name))
            throw BadInput(std::string("environment: ") + beside + " is set and " + name +
                           " is not: set both, or neither for a run of one rank");
        return number(name, least, most);
    }

private:
    const Environment& variable_;
};

Launch read_ranks(const Reader& reader, const Variables& names) {
    Launch launch;
    launch.launcher = names.launcher;
    launch.ranks = reader.needed(names.ranks, 1, kMostRanks, names.rank);
    launch.rank = reader.needed(names.rank, 0, launch.ranks - 1, names.ranks);
    if (reader.has(names.local_rank))
        launch.local_rank = reader.number(names.local_rank, 0, kMostRanks);
    else if (launch.ranks > 1)
        throw BadInput(std::string("environment: ") + names.local_rank +
                       " is not set: it says which of its machine's ranks, and so on which GPU, a rank is");
    return launch;
}

bool all_here(const Reader& reader, const Launch& launch, const char* local_ranks) {
    return reader.has(local_ranks) && reader.number(local_ranks, 1, kMostRanks) == launch.ranks;
}

// Slurm's step is that of srun alone: what mpirun and torchrun start on several nodes is in a step of each node, or in
// none.
std::string run_of(const Reader& reader, const std::string& launcher) {
    if (reader.has("LONGHAND_RUN")) return reader.text("LONGHAND_RUN");
    const std::string job = reader.has("SLURM_JOB_ID") ? "slurm-" + reader.text("SLURM_JOB_ID") : "";
    if (launcher == "srun") return job + "." + reader.text("SLURM_STEP_ID");
    if (launcher == "mpirun") {
        for (const char* name : {"PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "PMI_JOBID"})
            if (reader.has(name)) return reader.text(name);
    } else if (const std::string elastic = reader.text("TORCHELASTIC_RUN_ID");
               !elastic.empty() && elastic != "none") { // what torchrun says where it was told nothing
        return elastic + "." + reader.text("TORCHELASTIC_RESTART_COUNT");
    }
    return job;
}

int port_of(const Reader& reader, const std::string& run) {
    if (reader.has("LONGHAND_PORT")) return reader.number("LONGHAND_PORT", 1, kLastPort);
    if (reader.has("MASTER_PORT")) return reader.number("MASTER_PORT", 1, kLastPort - 1) + 1;
    uint64_t hash = 1469598103934665603u; // FNV-1a
    for (const char c : run) hash = (hash ^ static_cast<unsigned char>(c)) * 1099511628211u;
    return kFirstPort + static_cast<int>(hash % kPorts);
}

} // namespace

std::string first_node(const std::string& list) {
    const size_t bracket = list.find('['), comma = list.find(',');
    if (bracket == std::string::npos || comma < bracket) return list.substr(0, comma);
    const size_t end = list.find_first_of("-,]", bracket);
    if (end == std::string::npos) return "";
    const size_t close = list.find(']', bracket), after = list.find(',', close);
    const std::string tail = close == std::string::npos ? "" : list.substr(close + 1, after - close - 1);
    return list.substr(0, bracket) + list.substr(bracket + 1, end - bracket - 1) + tail;
}

Launch find_launch(const Environment& variable) {
    const Reader reader(variable);
    Launch launch;
    bool here = false;
    for (const Variables& names : kVariables) {
        if (!reader.has(names.rank) && !reader.has(names.ranks)) continue;
        // srun sets PMI_RANK, too, if that is how MPI is to find its ranks.
        if (!reader.has(names.local_rank) && reader.has("SLURM_STEP_ID") && std::string("PMI_RANK") == names.rank)
            continue;
        launch = read_ranks(reader, names);
        here = all_here(reader, launch, names.local_ranks);
        break;
    }
    if (launch.launcher.empty() && reader.has("SLURM_PROCID") && reader.has("SLURM_STEP_ID")) {
        const char* ranks = reader.has("SLURM_STEP_NUM_TASKS") ? "SLURM_STEP_NUM_TASKS" : "SLURM_NTASKS";
        launch = read_ranks(reader, {"srun", "SLURM_PROCID", ranks, "SLURM_LOCALID", nullptr});
        launch.address =
            first_node(reader.text(reader.has("SLURM_STEP_NODELIST") ? "SLURM_STEP_NODELIST" : "SLURM_JOB_NODELIST"));
    }
    if (launch.ranks == 1) return launch;
    launch.run = run_of(reader, launch.launcher);
    launch.port = port_of(reader, launch.run);
    if (reader.has("MASTER_ADDR")) launch.address = reader.text("MASTER_ADDR");
    if (launch.address.empty() && here) launch.address = "127.0.0.1";
    if (launch.address.empty())
        throw BadInput("environment: MASTER_ADDR is not set: " + std::to_string(launch.ranks) +
                       " ranks need the name of rank 0's machine" +
                       (launch.launcher == "mpirun" ? " (mpirun -x MASTER_ADDR=NAME)" : ""));
    return launch;
}
