// The GPUs that --gpu plans for: what they have and what of it a step is assumed to get.
#pragma once
#include <cstddef>
#include <cstdint>

struct Gpu {
    const char *name, *title;
    double memory;            // bytes, as the CUDA runtime presents the card: less than its name says, ECC and the
                              // driver take theirs. The smaller figure where cards were seen to differ
    double flops;             // a second, dense bf16 on tensor cores with float sums: the data sheet's
    double bandwidth;         // bytes a second: the data sheet's
    double copies;            // bytes a second between host and device: what pinned copies reach in one direction, 25
                              // of the 32 GB/s of PCIe 4 x16, 50 of the 64 GB/s of PCIe 5
    double matmul, attention; // parts of `flops` that a step is assumed to reach
    int capability;           // major number of the compute capability
};

constexpr double kGpuGiB = 1 << 30, kTera = 1e12, kGiga = 1e9;

// Matmul: cuBLASLt on a step's shapes. 740 to 800 TFLOP/s of large products on an H100 (75% to 80%) and about as much
// of an A100's peak, less for a step's narrow ones; an L4 is held back by its 72 W. Attention, forward and backward
// together: FlashAttention-2's figures, which our sm_80 kernels are written to meet: 171 to 189 of 312 on an A100, 284
// to 328 of 989 on Hopper, whose peak mma.sync cannot reach. To be replaced by dev/RESULTS.md's as they are measured.
//
// Data sheets: "NVIDIA A100 Tensor Core GPU" (2021), "NVIDIA H100 Tensor Core GPU" (SXM), "NVIDIA H200 Tensor Core
// GPU", "NVIDIA L4 Tensor Core GPU" (half of the sparse figure), "NVIDIA Ada GPU Architecture" (4090: the rate with
// float sums). Memory: totals in reports of torch.cuda.OutOfMemoryError, which are cudaMemGetInfo's.
constexpr Gpu kGpus[] = {
    {"a100-40", "A100 40 GB", 39.39 * kGpuGiB, 312 * kTera, 1555 * kGiga, 25 * kGiga, 0.70, 0.55, 8},
    {"a100-80", "A100 80 GB", 79.15 * kGpuGiB, 312 * kTera, 2039 * kGiga, 25 * kGiga, 0.70, 0.55, 8},
    {"h100", "H100 SXM", 79.10 * kGpuGiB, 989 * kTera, 3350 * kGiga, 50 * kGiga, 0.65, 0.30, 9},
    {"h200", "H200 SXM", 139.7 * kGpuGiB, 989 * kTera, 4800 * kGiga, 50 * kGiga, 0.65, 0.30, 9},
    {"l4", "L4", 21.95 * kGpuGiB, 121 * kTera, 300 * kGiga, 25 * kGiga, 0.50, 0.40, 8},
    {"4090", "RTX 4090", 23.50 * kGpuGiB, 165 * kTera, 1008 * kGiga, 25 * kGiga, 0.70, 0.55, 8},
};

inline const Gpu* find_gpu(const char* name) {
    for (const Gpu& gpu : kGpus) {
        const char *a = gpu.name, *b = name;
        while (*a && *a == *b) a++, b++;
        if (*a == *b) return &gpu;
    }
    return nullptr;
}
