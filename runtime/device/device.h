// The machine that layers run on: its stream, its library handles and its memory. A trainer opens one and passes it on.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

#include "../../kernels/matmul.h"
#include "../../kernels/types.h"
#include "memory.h"

struct Device {
    Stream stream = nullptr;
    Matmul* matmul = nullptr;
    struct Staging* staging = nullptr; // pinned memory of the cuda build
    Target target;
    int threads = 0;
    // Matmul rate of this machine and precision, measured at opening: too low where others were busy on it then.
    mutable double peak_flops = 0;
    class Comm* comm = nullptr; // with the other ranks (ranks/comm.h), whoever opened it; null for one rank

    // threads 0: all cores. Says so on stderr if only one thread runs.
    explicit Device(int64_t threads);
    // A machine to plan for: nothing of it is opened.
    explicit Device(const Target& planned) : target(planned) {}
    ~Device();
    Device(const Device&) = delete;
    Device& operator=(const Device&) = delete;
};

// For one of several ranks: of this machine's GPUs the one with this number. Throws BadInput if there are not so many.
void choose_device(int number);
// What tells it from all others: a GPU's UUID; empty where ranks share a device, as on a CPU.
std::string device_identity();

// Throws RunFailed where kernels cannot run: no GPU, or too old a one.
void check_machine();

// Percent of the peak that a rate is, at most 100: a rate beyond the peak proves that to be too low. It then becomes
// the peak, or what a CPU measures anew by the time that the process had of it.
double peak_percent(const Device& device, double flops_per_second);

// "cpu fp32, AMD EPYC, 2 threads": the first line of a run.
std::string device_line(const Device& device);

// Copies between host and device and fills, ordered on the stream. upload() may return before the data has arrived, but
// `from` may be reused at once; download() waits for its data. A HostStore's memory may take the device's place.
void upload(const Device& device, void* to, const void* from, size_t bytes);
void download(const Device& device, void* to, const void* from, size_t bytes);
void fill_zero(const Device& device, void* to, size_t bytes);
