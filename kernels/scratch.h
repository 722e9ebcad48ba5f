// How kernels divide their scratch, on a CPU and on a GPU, but for what attention does on a GPU (attention_flash.h,
// attention_plain.h). It lies apart from X.cpp and X.cu, which lay out by it, so that every build can tell the scratch
// of every target (scratch.cpp).
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "attention.h"
#include "common.h"

// Throws unless there is a kernel.
inline void require_head_dim(int64_t D) {
    require(attention_supports(D), "attention: no kernel for this head dim; it must be 32, 64, 80, 128 or 256");
}

namespace scratch {

// ---- Attention on the CPU ----
namespace attention {

// A tile is kRows × kLaneCount scores: rows are keys in the forward pass and queries in the backward pass. Both are
// multiples of every register block of attention.cpp. Larger tiles load and store the accumulators less often, smaller
// ones waste less on the diagonal and stay in L1. Tried on Zen 4: 48 rows are 2 to 6% slower at D = 64 and the same
// elsewhere, 72 lie between.
constexpr int kRows = 96;
constexpr int kLaneCount = 96;

inline int64_t tiles(int64_t n, int64_t size) { return (n + size - 1) / size; }

// What each thread holds for itself.
constexpr int64_t forward_floats(int64_t D) { return 2 * D * kLaneCount + 2 * kRows * D + kRows * kLaneCount; }
constexpr int64_t backward_floats(int64_t D) { return 5 * D * kLaneCount + 2 * kRows * D + 2 * kRows * kLaneCount; }

// Rows of a head's query tiles, the last one filled up.
inline int64_t padded_rows(int64_t Tq) { return tiles(Tq, kRows) * kRows; }
// What the threads that share a head hold together: dQ, Δ and LSE in base 2.
inline int64_t head_floats(const AttentionShape& s) { return padded_rows(s.Tq) * (s.D + 2); }

// Two ways to share the work: a head to a thread, each with a dQ of its own; or all threads on one head after another,
// with one dQ. The better one keeps fewer key tiles waiting for the slowest thread.
inline bool threads_share_heads(const AttentionShape& s, int64_t threads) {
    int64_t heads = s.B * s.H, keys = tiles(s.Tk, kLaneCount);
    return heads * tiles(keys, threads) < tiles(heads, threads) * keys;
}

} // namespace attention

// ---- LayerNorm: (parts,2,stride) floats, the dw and db of each thread of a CPU and of each block of a GPU ----
namespace layernorm {

inline int64_t part_stride(int64_t C) { return (C + 15) / 16 * 16; } // whole cache lines

// Three arrays are read at once, 48 bytes a thread and pack. To hide 700 ns at 35 GB/s an SM needs some 25 KB under
// way, and twice that while half of the warps sit in a reduction. Two blocks on each SM of an H100: 16 warps of 3 packs
// have 72 KB, 1024 threads of one pack 48 KB.
constexpr int64_t kBackwardBlocks = 264;
// Depends on N alone, so that the scratch of a large batch serves a small one.
inline int64_t backward_blocks(int64_t N) { return std::min(kBackwardBlocks, N); }

} // namespace layernorm

// ---- Embedding on a GPU ----
namespace embedding {

constexpr int kDigitBits = 8, kDigits = 1 << kDigitBits; // of the sort
constexpr int kTile = 16 * 32;                           // pairs that a warp sorts, in 16 rounds
constexpr int kPiece = 256;                              // rows of one token that are added in one run

struct Scratch {
    uint64_t *pairs, *other;  // (N), (N)
    int32_t *counts, *totals; // (kDigits,tiles), (kDigits)
    float* partial;           // (N/kPiece + 1,C)
    int64_t tiles;
    size_t bytes;

    Scratch(void* memory, int64_t N, int64_t C) : tiles((N + kTile - 1) / kTile), bytes(0) {
        auto place = [&](auto*& pointer, int64_t n) {
            pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(static_cast<char*>(memory) + bytes);
            bytes += (n * sizeof *pointer + 63) / 64 * 64;
        };
        place(pairs, N), place(other, N);
        place(counts, kDigits * tiles), place(totals, kDigits);
        place(partial, (N / kPiece + 1) * C);
    }
};

} // namespace embedding

// ---- Global norm: (blocks) doubles, a sum of squares each ----
namespace global_norm {

// Of a CPU.
constexpr int64_t kBlock = 1 << 16; // elements behind one partial sum; fixed, so that no thread count changes the norm
inline int64_t blocks_of(int64_t n) { return (n + kBlock - 1) / kBlock; }

// Of a GPU.
constexpr int kThreads = 256;
constexpr int kUnroll = 4;        // loads of 16 bytes under way in a thread: 64 KB on an SM with 1024 threads
constexpr int64_t kBlocks = 1056; // 8 for each SM of an H100

// Elements of each block, whole rounds of kUnroll loads a thread; the last block may have fewer, or none.
template <class T> int64_t run_of(int64_t n) {
    constexpr int64_t kRound = kThreads * kUnroll * (16 / sizeof(T));
    const int64_t rounds = (n + kRound - 1) / kRound;
    return (rounds + kBlocks - 1) / kBlocks * kRound;
}
template <class T> int64_t blocks_of(int64_t n) { return n == 0 ? 0 : (n + run_of<T>(n) - 1) / run_of<T>(n); }

} // namespace global_norm

} // namespace scratch
