// Step 1: FlashAttention's loop with mma.sync. Tiles come through registers into shared memory, row after row, and the
// scores go through shared memory from one product to the next: a warp writes the fragments of S there, takes one row
// at a time for the softmax, and reads P back as the left operand of P·V.
#include "steps.h"

namespace ladder {
namespace {

// The softmax of the warp's 16 rows of one key tile. Lane r keeps the statistics of row r and returns how much of its
// sums so far is left. s (16,64): scores; p (16,64): the weights. row0: the first row.
__device__ __forceinline__ float softmax_rows(const float* s, bf16* p, float& largest, float& sum, float scale,
                                              int row0, int column) {
    float kept = 1;
    int lane = lane_index(), j = column + 2 * lane;
#pragma unroll 1
    for (int r = 0; r < 16; r++) {
        Pack<float, 2> x = load_pack_shared<2>(s + r * kColumns + 2 * lane);
        if (j > row0 + r) x[0] = -flash::kInfinity;
        if (j + 1 > row0 + r) x[1] = -flash::kInfinity;
        float old = __shfl_sync(kFullWarp, largest, r), now = fmaxf(old, warp_max(fmaxf(x[0], x[1])));
        float low = expf(scale * (x[0] - now)), high = expf(scale * (x[1] - now)), total = warp_sum(low + high);
        store_shared(reinterpret_cast<uint32_t*>(p + r * kColumns) + lane, pack_bf16(low, high));
        if (lane == r) {
            kept = expf(scale * (old - now));
            sum = sum * kept + total;
            largest = now;
        }
    }
    return kept;
}

__global__ void __launch_bounds__(kThreads)
    tensor_cores_kernel(Heads<bf16> o, float* lse, Heads<const bf16> q, Heads<const bf16> k, Heads<const bf16> v,
                        flash::View s) {
    flash::Place at = place_of_block(s);
    int row0 = at.tile * kRows, end = min(row0 + kRows, s.Tq); // keys 0 .. end − 1
    int group = lane_index() / 4, pair = lane_index() % 4;
    char *queries = dynamic_shared(), *keys = queries + kTileBytes, *values = keys + kTileBytes;
    // The warp's parts of P and S, 16 rows each.
    bf16* weights = reinterpret_cast<bf16*>(values + kTileBytes) + 16 * warp_index() * kColumns;
    float* raw = reinterpret_cast<float*>(values + 2 * kTileBytes) + 16 * warp_index() * kColumns;
    float largest = -flash::kInfinity, sum = 0, out[1][8][4];
    flash::clear(out);

    load_tile<InOrder>(queries, q, at, row0, s.Tq);
    for (int column = 0; column < end; column += kColumns) {
        __syncthreads(); // everyone has left the tiles before
        load_tile<InOrder>(keys, k, at, column, end);
        load_tile<InOrder>(values, v, at, column, end);
        __syncthreads();

        float fragments[1][8][4];
        scores(fragments, shared_address(queries) + warp_index() * InOrder::offset(16, 0), shared_address(keys));
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
            for (int half = 0; half < 2; half++)
                store_pack_shared(raw + (group + 8 * half) * kColumns + 8 * n + 2 * pair,
                                  Pack<float, 2>{fragments[0][n][2 * half], fragments[0][n][2 * half + 1]});
        __syncwarp();
        float kept = softmax_rows(raw, weights, largest, sum, s.scale, row0 + 16 * warp_index(), column);
        __syncwarp();

#pragma unroll
        for (int half = 0; half < 2; half++) {
            float keep = __shfl_sync(kFullWarp, kept, group + 8 * half);
#pragma unroll
            for (int d = 0; d < 8; d++) out[0][d][2 * half] *= keep, out[0][d][2 * half + 1] *= keep;
        }
        uint32_t packed[1][4][4];
#pragma unroll
        for (int n = 0; n < 4; n++) load_left(packed[0][n], shared_address(weights), n);
        accumulate(out, packed, shared_address(values));
    }

    // The statistics of the rows that this lane's fragments are of; the sum is whole, so one lane of four brings it.
    float row_largest[2], row_sum[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        row_largest[half] = __shfl_sync(kFullWarp, largest, group + 8 * half);
        float total = __shfl_sync(kFullWarp, sum, group + 8 * half);
        row_sum[half] = pair == 0 ? total : 0;
    }
    store_output(o, lse, at, first_row(row0), s, row_largest, row_sum, out);
}

} // namespace

void tensor_cores(Stream stream, Heads<bf16> o, float* lse, Heads<const bf16> q, Heads<const bf16> k,
                  Heads<const bf16> v, float scale, const AttentionShape& shape) {
    constexpr size_t kShared = 4 * kTileBytes + kRows * kColumns * sizeof(float); // Q, K, V, P, S
    run(tensor_cores_kernel, kShared, stream, o, lse, q, k, v, scale, shape);
}

} // namespace ladder
