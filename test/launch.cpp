// runtime/ranks/launch.h: what each launcher sets, what is missing or makes no sense, and what a machine has set for
// other reasons.
#include <doctest/doctest.h>

#include <map>
#include <string>

#include "../runtime/base/errors.h"
#include "../runtime/ranks/launch.h"
#include "scratch.h"

namespace {

using Variables = std::map<std::string, std::string>;

Launch found(const Variables& variables) {
    return find_launch([&](const char* name) {
        const auto at = variables.find(name);
        return at == variables.end() ? nullptr : at->second.c_str();
    });
}

Variables operator+(Variables a, const Variables& b) {
    for (const auto& [name, value] : b) a[name] = value;
    return a;
}

std::string refusal(const Variables& variables) {
    return message_of<BadInput>([&] { found(variables); });
}

const Variables kTorchrun = {{"RANK", "5"},
                             {"WORLD_SIZE", "16"},
                             {"LOCAL_RANK", "1"},
                             {"MASTER_ADDR", "gpu-03"},
                             {"MASTER_PORT", "29500"},
                             {"TORCHELASTIC_RUN_ID", "abc"},
                             {"TORCHELASTIC_RESTART_COUNT", "1"}};
const Variables kMpirun = {{"OMPI_COMM_WORLD_RANK", "3"},
                           {"OMPI_COMM_WORLD_SIZE", "4"},
                           {"OMPI_COMM_WORLD_LOCAL_RANK", "3"},
                           {"OMPI_COMM_WORLD_LOCAL_SIZE", "4"},
                           {"PMIX_NAMESPACE", "123456"}};
const Variables kBatch = {{"SLURM_PROCID", "0"},
                          {"SLURM_NTASKS", "8"},
                          {"SLURM_LOCALID", "0"},
                          {"SLURM_JOB_ID", "77"},
                          {"SLURM_JOB_NODELIST", "gpu[07-08]"}};
const Variables kStep = kBatch + Variables{{"SLURM_PROCID", "6"},
                                           {"SLURM_LOCALID", "2"},
                                           {"SLURM_STEP_ID", "0"},
                                           {"SLURM_STEP_NUM_TASKS", "8"},
                                           {"SLURM_STEP_NODELIST", "gpu[07-08]"}};

} // namespace

TEST_CASE("a process that no launcher started is a run of one rank") {
    for (const Variables& variables :
         {Variables{}, kBatch, Variables{{"MASTER_ADDR", "gpu-03"}, {"LOCAL_RANK", "2"}}}) {
        const Launch launch = found(variables);
        CHECK(launch.rank == 0);
        CHECK(launch.ranks == 1);
        CHECK(launch.local_rank == 0);
        CHECK(launch.launcher == "");
    }
    CHECK(found({{"RANK", "0"}, {"WORLD_SIZE", "1"}}).ranks == 1);
}

TEST_CASE("what each launcher says") {
    Launch launch = found(kTorchrun);
    CHECK(launch.rank == 5);
    CHECK(launch.ranks == 16);
    CHECK(launch.local_rank == 1);
    CHECK(launch.address == "gpu-03");
    CHECK(launch.port == 29501); // torchrun listens on MASTER_PORT itself
    CHECK(launch.run == "abc.1");
    CHECK(launch.launcher == "RANK and WORLD_SIZE");
    const Variables unnamed = kTorchrun + Variables{{"TORCHELASTIC_RUN_ID", "none"}};
    CHECK(found(unnamed).run == "");
    // One torchrun a node: each is in a step of its own.
    CHECK(found(unnamed + Variables{{"SLURM_JOB_ID", "77"}, {"SLURM_STEP_ID", "3"}}).run == "slurm-77");

    launch = found(kMpirun);
    CHECK(launch.rank == 3);
    CHECK(launch.ranks == 4);
    CHECK(launch.local_rank == 3);
    CHECK(launch.address == "127.0.0.1");
    CHECK(launch.run == "123456");
    CHECK(launch.launcher == "mpirun");

    launch = found(kStep);
    CHECK(launch.rank == 6);
    CHECK(launch.ranks == 8);
    CHECK(launch.local_rank == 2);
    CHECK(launch.address == "gpu07");
    CHECK(launch.run == "slurm-77.0");
    CHECK(launch.launcher == "srun");
    launch = found(kStep + Variables{{"PMI_RANK", "6"}, {"PMI_SIZE", "8"}}); // --mpi=pmi2
    CHECK(launch.launcher == "srun");
    CHECK(launch.local_rank == 2);

    launch = found({{"PMI_RANK", "1"}, {"PMI_SIZE", "2"}, {"MPI_LOCALRANKID", "1"}, {"MPI_LOCALNRANKS", "2"}});
    CHECK(launch.rank == 1);
    CHECK(launch.ranks == 2);
    CHECK(launch.address == "127.0.0.1");
}

TEST_CASE("mpirun within a Slurm job, and within what torchrun has left in the environment") {
    for (const Variables& around : {kBatch, kStep, kTorchrun}) {
        const Launch launch = found(around + kMpirun);
        CHECK(launch.rank == 3);
        CHECK(launch.ranks == 4);
        CHECK(launch.launcher == "mpirun");
        CHECK(launch.run == "123456"); // not the job's, which may have several
    }
}

TEST_CASE("address, port and run by the user") {
    CHECK(found(kStep + Variables{{"MASTER_ADDR", "10.0.0.7"}}).address == "10.0.0.7");
    CHECK(found(kTorchrun + Variables{{"LONGHAND_PORT", "4000"}}).port == 4000);
    CHECK(found(kTorchrun + Variables{{"LONGHAND_RUN", "mine"}}).run == "mine");
    // By the run where nothing is said: the same on all ranks, another for another run.
    const int port = found(kMpirun).port;
    CHECK(port >= 20000);
    CHECK(port < 32000);
    CHECK(found(kMpirun + Variables{{"OMPI_COMM_WORLD_RANK", "0"}, {"OMPI_COMM_WORLD_LOCAL_RANK", "0"}}).port == port);
    CHECK(found(kMpirun + Variables{{"PMIX_NAMESPACE", "123457"}}).port != port);
}

TEST_CASE("what is missing or makes no sense is named") {
    CHECK(contains(refusal({{"RANK", "0"}}), "RANK is set and WORLD_SIZE is not"));
    CHECK(contains(refusal({{"WORLD_SIZE", "2"}}), "WORLD_SIZE is set and RANK is not"));
    CHECK(contains(refusal({{"RANK", "2"}, {"WORLD_SIZE", "2"}}), "RANK=2: not a number from 0 to 1"));
    CHECK(contains(refusal({{"RANK", "-1"}, {"WORLD_SIZE", "2"}}), "RANK=-1: not a number from 0 to 1"));
    CHECK(contains(refusal({{"RANK", "1"}, {"WORLD_SIZE", "two"}}), "WORLD_SIZE=two: not a number"));
    CHECK(contains(refusal({{"RANK", "1"}, {"WORLD_SIZE", "2x"}}), "WORLD_SIZE=2x: not a number"));
    CHECK(contains(refusal({{"RANK", "1"}, {"WORLD_SIZE", "99999999999"}}), "WORLD_SIZE=99999999999: not a number"));
    CHECK(contains(refusal({{"RANK", "1"}, {"WORLD_SIZE", "2"}}), "LOCAL_RANK is not set"));
    CHECK(contains(refusal({{"RANK", "1"}, {"WORLD_SIZE", "2"}, {"LOCAL_RANK", "1"}}), "MASTER_ADDR is not set"));
    CHECK(contains(refusal(kMpirun + Variables{{"OMPI_COMM_WORLD_LOCAL_SIZE", "2"}}), "mpirun -x MASTER_ADDR=NAME"));
    CHECK(contains(refusal(kTorchrun + Variables{{"MASTER_PORT", "65535"}}),
                   "MASTER_PORT=65535: not a number from 1 to 65534"));
    CHECK(contains(refusal(kTorchrun + Variables{{"LONGHAND_PORT", "0"}}), "LONGHAND_PORT=0: not a number"));
}

TEST_CASE("the first node of a list") {
    CHECK(first_node("gpu07") == "gpu07");
    CHECK(first_node("a,b,c") == "a");
    CHECK(first_node("gpu[07-09,12],login") == "gpu07");
    CHECK(first_node("gpu[3,5]") == "gpu3");
    CHECK(first_node("login,gpu[07-09]") == "login");
    CHECK(first_node("rack[1-2]n") == "rack1n");
    CHECK(first_node("gpu[") == "");
}
