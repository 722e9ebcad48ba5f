// Step 4: cp.async with two buffers. While a tile of K and V is worked on, the next one is on its way to shared memory,
// past the registers. One barrier a tile serves both ends: behind it, the next tile is there for everyone, and everyone
// has left the one before, whose place the copies that start now may take.
#include "steps.h"

namespace ladder {
namespace {

__global__ void __launch_bounds__(kThreads)
    async_copies_kernel(Heads<bf16> o, float* lse, Heads<const bf16> q, Heads<const bf16> k, Heads<const bf16> v,
                        flash::View s) {
    flash::Place at = place_of_block(s);
    int row0 = at.tile * kRows, end = min(row0 + kRows, s.Tq), row = first_row(row0); // keys 0 .. end − 1
    uint32_t queries = shared_address(dynamic_shared()), buffers = queries + kTileBytes;
    float largest[2] = {-flash::kInfinity, -flash::kInfinity}, sum[2] = {0, 0}, out[1][8][4];
    flash::clear(out);
    flash::Lane<kD> lane;

    flash::Rows<kD, kThreads, kColumns> keys(k, at.b, at.h, 0), values(v, at.b, at.h, 0);
    auto buffer = [&](int column) { return buffers + column / kColumns % 2 * 2 * kTileBytes; };
    auto start = [&](int column) {
        if (column < end) {
            keys.load(buffer(column), end - column);
            values.load(buffer(column) + kTileBytes, end - column);
        }
        cp_async_commit();
    };
    flash::Rows<kD, kThreads, kRows>(q, at.b, at.h, row0).load(queries, s.Tq - row0);
    start(0);
    for (int column = 0; column < end; column += kColumns) {
        cp_async_wait<0>();
        __syncthreads();
        start(column + kColumns);

        float weights[1][8][4];
        flash::scores<kD>(weights, queries + warp_index() * InOrder::offset(16, 0), buffer(column), lane);
        mask_future(weights, row, column + lane_index() % 4 * 2);
        softmax(weights, largest, sum, out, Natural{s.scale});
        uint32_t packed[1][4][4];
        flash::pack(packed, weights);
        flash::accumulate<kD>(out, packed, buffer(column) + kTileBytes, lane);
    }
    store_output(o, lse, at, row, s, largest, sum, out);
}

} // namespace

void async_copies(Stream stream, Heads<bf16> o, float* lse, Heads<const bf16> q, Heads<const bf16> k,
                  Heads<const bf16> v, float scale, const AttentionShape& shape) {
    constexpr size_t kShared = 5 * kTileBytes; // Q, and K and V twice
    run(async_copies_kernel, kShared, stream, o, lse, q, k, v, scale, shape);
}

} // namespace ladder
