// dev/simt's NCCL: ranks that do not call the same thing are told what each has called. Two ranks in one process here;
// what is right is tested by test/ranks_comm.cpp, in processes.
#include <nccl.h>

#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "../dev/simt/simt.h"
#include "../kernels/device.h"
#include "check.h"

namespace {

constexpr int kRanks = 2, kCount = 64;

struct Rank {
    ncclComm_t comm = nullptr;
    cudaStream_t stream;
    float *from, *to; // (kRanks, kCount)
};

// What each rank calls, and what the simulator then says.
std::string fault_of(const std::function<void(Rank&)>& zero, const std::function<void(Rank&)>& one) {
    Rank ranks[kRanks];
    ncclUniqueId id;
    REQUIRE(ncclGetUniqueId(&id) == ncclSuccess);
    std::vector<std::thread> joining;
    for (int r = 0; r < kRanks; r++) joining.emplace_back([&, r] { ncclCommInitRank(&ranks[r].comm, kRanks, id, r); });
    for (std::thread& each : joining) each.join();
    for (Rank& rank : ranks) {
        REQUIRE(rank.comm);
        cudaStreamCreateWithFlags(&rank.stream, cudaStreamNonBlocking);
        for (float** array : {&rank.from, &rank.to}) cudaMalloc(array, kRanks * kCount * sizeof(float));
        cudaMemset(rank.from, 0, kRanks * kCount * sizeof(float));
    }
    std::string said;
    try {
        cudaDeviceSynchronize();
        zero(ranks[0]);
        one(ranks[1]);
        // To wait for one stream would be to wait for a rank that is not given its turn.
        for (bool ready = false; !ready;) {
            ready = true;
            for (Rank& rank : ranks) ready &= cudaStreamQuery(rank.stream) == cudaSuccess;
        }
    } catch (const simt::Fault& fault) {
        CHECK(fault.kind == simt::FaultKind::mismatch);
        said = fault.what();
    }
    for (Rank& rank : ranks) {
        ncclCommAbort(rank.comm);
        cudaStreamDestroy(rank.stream);
        for (float* array : {rank.from, rank.to}) cudaFree(array);
    }
    return said;
}

void all_reduce(Rank& rank, size_t count = kCount, ncclDataType_t type = ncclFloat32) {
    CHECK(ncclAllReduce(rank.from, rank.to, count, type, ncclSum, rank.comm, rank.stream) == ncclSuccess);
}
void broadcast(Rank& rank, int root) {
    CHECK(ncclBroadcast(rank.from, rank.to, kCount, ncclFloat32, root, rank.comm, rank.stream) == ncclSuccess);
}
void send_receive(Rank& rank, int other, size_t sent, size_t received) {
    ncclGroupStart();
    CHECK(ncclSend(rank.from, sent, ncclInt8, other, rank.comm, rank.stream) == ncclSuccess);
    CHECK(ncclRecv(rank.to, received, ncclInt8, other, rank.comm, rank.stream) == ncclSuccess);
    CHECK(ncclGroupEnd() == ncclSuccess);
}

} // namespace

TEST_CASE("ranks that call the same are in order") {
    CHECK(fault_of([](Rank& r) { all_reduce(r); }, [](Rank& r) { all_reduce(r); }) == "");
    CHECK(fault_of([](Rank& r) { send_receive(r, 1, 8, 16); }, [](Rank& r) { send_receive(r, 0, 16, 8); }) == "");
}

TEST_CASE("another collective, count, type or root on a rank is a fault") {
    auto gather = [](Rank& r) {
        CHECK(ncclAllGather(r.from, r.to, kCount, ncclFloat32, r.comm, r.stream) == ncclSuccess);
    };
    const std::string skipped = fault_of([](Rank& r) { all_reduce(r); }, gather);
    CAPTURE(skipped);
    CHECK(skipped.find("ncclAllReduce of 64") != std::string::npos);
    CHECK(skipped.find("ncclAllGather of 64") != std::string::npos);
    CHECK(skipped.find("as call 0") != std::string::npos);
    auto other = [](size_t count, ncclDataType_t type) {
        return fault_of([](Rank& r) { all_reduce(r); }, [=](Rank& r) { all_reduce(r, count, type); });
    };
    CHECK(other(kCount - 1, ncclFloat32).find("ncclAllReduce of 63") != std::string::npos);
    CHECK(other(kCount, ncclBfloat16).find("of type") != std::string::npos);
    CHECK(fault_of([](Rank& r) { broadcast(r, 0); }, [](Rank& r) { broadcast(r, 1); }).find("with root 1") !=
          std::string::npos);
}

TEST_CASE("a message of another length than its receiver's is a fault") {
    const std::string said =
        fault_of([](Rank& r) { send_receive(r, 1, 8, 8); }, [](Rank& r) { send_receive(r, 0, 8, 16); });
    CHECK(said.find("rank 0 sends 8 bytes to rank 1, which receives 16") != std::string::npos);
}
