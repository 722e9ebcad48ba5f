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
// of an A100's peak, less for a step's narrow ones; an L4 is held back by its 72 W.
//
// Attention, forward and backward together, in FLOPs of 2 + 5 products: by count, for a 128x128 tile (dev/RESULTS.md),
// the cycles of what limits each pass. With heads of 64 an A100's tensor cores take 2048 + 7168 (two products and
// seven) where the peak would take 7168; with heads of 128 twice that: 0.78. A Hopper's mma.sync takes 0.77 of these
// cycles and its peak half, so that shared memory limits backward: 3584 of 1567 + 6408 with heads of 64, 7168 of 3277 +
// 14088 with 128: 0.45 and 0.41. FlashAttention-2 counts 0.96 and 1.00 on an A100, 0.51 and 0.53 on Hopper, and reaches
// 171 and 189 of 312 TFLOP/s, 284 and 328 of 989: 0.55 to 0.62 of its count, less with heads of 64. The same part of
// ours: 0.44 to 0.47 and 0.25 to 0.26. Ada's tensor cores take 4 cycles and are the limit (0.78) as an A100's are; an
// L4 loses as much more as in its products. To be replaced by dev/RESULTS.md's as they are measured.
//
// Data sheets: "NVIDIA A100 Tensor Core GPU" (2021), "NVIDIA H100 Tensor Core GPU" (SXM), "NVIDIA H200 Tensor Core
// GPU", "NVIDIA L4 Tensor Core GPU" (half of the sparse figure), "NVIDIA Ada GPU Architecture" (4090: the rate with
// float sums). Memory: totals in reports of torch.cuda.OutOfMemoryError, which are cudaMemGetInfo's.
constexpr Gpu kGpus[] = {
    {"a100-40", "A100 40 GB", 39.39 * kGpuGiB, 312 * kTera, 1555 * kGiga, 25 * kGiga, 0.70, 0.45, 8},
    {"a100-80", "A100 80 GB", 79.15 * kGpuGiB, 312 * kTera, 2039 * kGiga, 25 * kGiga, 0.70, 0.45, 8},
    {"h100", "H100 SXM", 79.10 * kGpuGiB, 989 * kTera, 3350 * kGiga, 50 * kGiga, 0.65, 0.25, 9},
    {"h200", "H200 SXM", 139.7 * kGpuGiB, 989 * kTera, 4800 * kGiga, 50 * kGiga, 0.65, 0.25, 9},
    {"l4", "L4", 21.95 * kGpuGiB, 121 * kTera, 300 * kGiga, 25 * kGiga, 0.50, 0.39, 8},
    {"4090", "RTX 4090", 23.50 * kGpuGiB, 165 * kTera, 1008 * kGiga, 25 * kGiga, 0.70, 0.45, 8},
};

inline const Gpu* find_gpu(const char* name) {
    for (const Gpu& gpu : kGpus) {
        const char *a = gpu.name, *b = name;
        while (*a && *a == *b) a++, b++;
        if (*a == *b) return &gpu;
    }
    return nullptr;
}
