// What differs between benches on a CPU and on a GPU: backend_cpu.cpp and backend_cuda.cu.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

namespace bench {

// What a bench does; `what` is a word of the command line, for a bench that knows some, or empty.
void run(const std::string& what);

// Zeroed memory of the layers' device; on a CPU each page is touched first by the thread that will use it.
void* allocate(size_t bytes);
void release(void* pointer, size_t bytes);
void upload(void* to, const void* from, size_t bytes);

// Returns when everything launched so far is done.
void wait();
// Calls to launch before waiting, so that waiting does not show in the time of one: 1 on a CPU, where a call returns
// when it is done.
int calls_per_wait(double seconds_of_one);

// Bytes per second of the plainest loop that reads and writes as many bytes as the layer does: what its mix of streams
// can reach, in cache or in memory, whichever its size lands in. Above 1 GiB the buffers keep the mix and shrink.
double bandwidth_ceiling(double read_bytes, double written_bytes);

bool is_gpu();
// Side of a square product that reaches the machine's matmul rate.
int64_t square_size();

// "2 threads", or the GPU's name and the rate at which it copies its own memory.
std::string machine();

} // namespace bench
