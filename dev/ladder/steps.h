// What the ladder's own steps share, so that a step's file shows its idea and little else. The rest comes from the
// product: the view of a shape, masks, fragments and how rows are stored (kernels/attention_tiles.h).
//
// A block owns 64 queries and passes over their keys in tiles of 64. Each of its 4 warps owns 16 of the queries, from
// the scores to the output.
#pragma once
#include "../../kernels/attention_tiles.h"
#include "ladder.h"

namespace ladder {

constexpr int kD = 64, kRows = 64, kColumns = 64, kWarps = 4, kThreads = kWarps * kWarpSize;
constexpr int kRowBytes = kD * static_cast<int>(sizeof(bf16)), kTileBytes = flash::tile_bytes<kD>(64);

// Blocks in the order of their rows, head after head.
__device__ __forceinline__ flash::Place place_of_block(const flash::View& s) {
    int head = static_cast<int>(blockIdx.x / s.tiles);
    return {static_cast<int>(blockIdx.x % s.tiles), head / s.H, head % s.H};
}

// The first of the two rows of its warp that a lane holds; the other is 8 further on.
__device__ __forceinline__ int first_row(int row0) { return row0 + 16 * warp_index() + lane_index() / 4; }

// ---- Tiles in the order of memory: row after row ----

struct InOrder {
    static __device__ __forceinline__ int offset(int row, int chunk) { return row * kRowBytes + chunk * 16; }
};

// The 64 rows of a head from `first` on to a tile, through registers, with zeros past the last of `rows`.
template <class Layout> __device__ __forceinline__ void load_tile(char* tile, const Heads<const bf16>& x,
                                                                  const flash::Place& at, int first, int rows) {
    constexpr int kChunks = kD / 8;
    int chunk = static_cast<int>(threadIdx.x) % kChunks;
#pragma unroll
    for (int r = static_cast<int>(threadIdx.x) / kChunks; r < 64; r += kThreads / kChunks) {
        Pack128<bf16> values = {};
        if (first + r < rows) values = load128(x.row(at.b, first + r, at.h) + 8 * chunk);
        store128_shared(reinterpret_cast<bf16*>(tile + Layout::offset(r, chunk)), values);
    }
}

// The left operand of a product: 16 rows of a tile, columns 16·k on.
__device__ __forceinline__ void load_left(uint32_t (&left)[4], uint32_t rows, int k) {
    int lane = lane_index();
    ldmatrix_x4(left, rows + InOrder::offset(lane % 16, 2 * k + lane / 16));
}

// s (16,64) := Q·Kᵀ. queries: the warp's 16 rows; keys: a tile.
__device__ __forceinline__ void scores(float (&s)[1][8][4], uint32_t queries, uint32_t keys) {
    int lane = lane_index();
    flash::clear(s);
#pragma unroll
    for (int k = 0; k < kD / 16; k++) {
        uint32_t left[4];
        load_left(left, queries, k);
#pragma unroll
        for (int n = 0; n < 8; n += 2) {
            uint32_t right[4];
            ldmatrix_x4(right, keys + InOrder::offset(8 * n + lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2));
            mma_m16n8k16(s[0][n], left, right[0], right[1]);
            mma_m16n8k16(s[0][n + 1], left, right[2], right[3]);
        }
    }
}

// out (16,64) += P·V. p (16,64): fragments; values: a tile.
__device__ __forceinline__ void accumulate(float (&out)[1][8][4], const uint32_t (&p)[1][4][4], uint32_t values) {
    int lane = lane_index();
#pragma unroll
    for (int k = 0; k < kColumns / 16; k++)
#pragma unroll
        for (int d = 0; d < 8; d += 2) {
            uint32_t right[4];
            ldmatrix_x4_trans(right, values + InOrder::offset(16 * k + lane % 16, d + lane / 16));
            mma_m16n8k16(out[0][d], p[0][k], right[0], right[1]);
            mma_m16n8k16(out[0][d + 1], p[0][k], right[2], right[3]);
        }
}

// ---- Softmax in registers ----

// e^(scale·(score − largest)), as the formula has it.
struct Natural {
    float scale;

    __device__ __forceinline__ float operator()(float score, float largest) const {
        return expf(scale * (score - largest));
    }
};

// −∞ where the key comes after the query. row, column: those of s[0][0][0].
__device__ __forceinline__ void mask_future(float (&s)[1][8][4], int row, int column) {
    flash::mask(
        s, column, [](int, int) { return 0; }, [&](int, int half) { return row + 8 * half; });
}

// One key tile's softmax: s from scores to weights weight(score, largest), and the sums so far rescaled where the
// largest score of a row has grown. A row lies in four lanes. Every row sees key 0, in the first tile, so that its
// largest score is finite from there on.
template <class Weight> __device__ __forceinline__ void softmax(float (&s)[1][8][4], float (&largest)[2],
                                                                float (&sum)[2], float (&out)[1][8][4],
                                                                const Weight& weight) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float now = largest[half];
#pragma unroll
        for (int n = 0; n < 8; n++) now = fmaxf(now, fmaxf(s[0][n][2 * half], s[0][n][2 * half + 1]));
        now = fmaxf(now, __shfl_xor_sync(kFullWarp, now, 1));
        now = fmaxf(now, __shfl_xor_sync(kFullWarp, now, 2));
        float keep = weight(largest[half], now), total = 0;
        largest[half] = now;
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
            for (int e = 2 * half; e < 2 * half + 2; e++) {
                s[0][n][e] = weight(s[0][n][e], now);
                total += s[0][n][e];
                out[0][n][e] *= keep;
            }
        sum[half] = sum[half] * keep + total; // this lane's columns; the lanes meet at the end
    }
}

// Sums of a row's four lanes, then O and LSE of the warp's 16 rows. sum: this lane's part; row: its first.
__device__ __forceinline__ void store_output(const Heads<bf16>& o, float* lse, const flash::Place& at, int row,
                                             const flash::View& s, const float (&largest)[2], const float (&sum)[2],
                                             const float (&out)[1][8][4]) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int i = row + 8 * half;
        float total = sum[half];
        total += __shfl_xor_sync(kFullWarp, total, 1);
        total += __shfl_xor_sync(kFullWarp, total, 2);
        flash::store_row<false>(o.row(at.b, i, at.h), out[0], half, 1 / total, i < s.Tq);
        if (i < s.Tq && lane_index() % 4 == 0)
            store_global(lse + at.b * s.lse_batch + static_cast<int64_t>(at.h) * s.Tq + i,
                         largest[half] * s.scale + logf(total));
    }
}

// ---- Launch ----

using Kernel = void(Heads<bf16>, float*, Heads<const bf16>, Heads<const bf16>, Heads<const bf16>, flash::View);

inline void run(Kernel* kernel, size_t shared_bytes, Stream stream, Heads<bf16> o, float* lse, Heads<const bf16> q,
                Heads<const bf16> k, Heads<const bf16> v, float scale, const AttentionShape& shape) {
    flash::View view = flash::view_of(shape, scale, shape.Tq, kRows);
    launch(kernel, flash::grid_of(view), kThreads, shared_bytes, stream, o, lse, q, k, v, view);
}

} // namespace ladder
