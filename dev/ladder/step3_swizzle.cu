// Step 3: swizzled tiles. In a tile that lies row after row, the 8 rows that ldmatrix reads at once are 128 bytes
// apart: all in the same banks, and they take turns. With each row's chunks permuted by the row's number, they meet 8
// different quarters of them. The products are the product's own, which expect this layout.
#include "steps.h"

namespace ladder {
namespace {

struct Swizzled {
    static __device__ __forceinline__ int offset(int row, int chunk) { return InOrder::offset(row, chunk ^ row % 8); }
};

__global__ void __launch_bounds__(kThreads) swizzle_kernel(Heads<bf16> o, float* lse, Heads<const bf16> q,
                                                           Heads<const bf16> k, Heads<const bf16> v, flash::View s) {
    flash::Place at = place_of_block(s);
    int row0 = at.tile * kRows, end = min(row0 + kRows, s.Tq), row = first_row(row0); // keys 0 .. end − 1
    char *queries = dynamic_shared(), *keys = queries + kTileBytes, *values = keys + kTileBytes;
    float largest[2] = {-flash::kInfinity, -flash::kInfinity}, sum[2] = {0, 0}, out[1][8][4];
    flash::clear(out);
    flash::Lane<kD> lane;

    load_tile<Swizzled>(queries, q, at, row0, s.Tq);
    for (int column = 0; column < end; column += kColumns) {
        __syncthreads(); // everyone has left the tiles before
        load_tile<Swizzled>(keys, k, at, column, end);
        load_tile<Swizzled>(values, v, at, column, end);
        __syncthreads();

        float weights[1][8][4];
        flash::scores<kD>(weights, shared_address(queries) + warp_index() * InOrder::offset(16, 0),
                          shared_address(keys), lane);
        mask_future(weights, row, column + lane_index() % 4 * 2);
        softmax(weights, largest, sum, out, Natural{s.scale});
        uint32_t packed[1][4][4];
        flash::pack(packed, weights);
        flash::accumulate<kD>(out, packed, shared_address(values), lane);
    }
    store_output(o, lse, at, row, s, largest, sum, out);
}

} // namespace

void swizzle(Stream stream, Heads<bf16> o, float* lse, Heads<const bf16> q, Heads<const bf16> k, Heads<const bf16> v,
             float scale, const AttentionShape& shape) {
    constexpr size_t kShared = 3 * kTileBytes; // Q, K, V
    run(swizzle_kernel, kShared, stream, o, lse, q, k, v, scale, shape);
}

} // namespace ladder
