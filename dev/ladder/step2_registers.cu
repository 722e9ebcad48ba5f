// Step 2: S and P stay in registers. The fragment in which mma leaves S, rounded and packed in pairs, is the one in
// which it takes the left operand of P·V, and a row lies in four neighbouring lanes: two shuffles find its maximum.
#include "steps.h"

namespace ladder {
namespace {

__global__ void __launch_bounds__(kThreads) registers_kernel(Heads<bf16> o, float* lse, Heads<const bf16> q,
                                                             Heads<const bf16> k, Heads<const bf16> v, flash::View s) {
    flash::Place at = place_of_block(s);
    int row0 = at.tile * kRows, end = min(row0 + kRows, s.Tq), row = first_row(row0); // keys 0 .. end − 1
    char *queries = dynamic_shared(), *keys = queries + kTileBytes, *values = keys + kTileBytes;
    float largest[2] = {-flash::kInfinity, -flash::kInfinity}, sum[2] = {0, 0}, out[1][8][4];
    flash::clear(out);

    load_tile<InOrder>(queries, q, at, row0, s.Tq);
    for (int column = 0; column < end; column += kColumns) {
        __syncthreads(); // everyone has left the tiles before
        load_tile<InOrder>(keys, k, at, column, end);
        load_tile<InOrder>(values, v, at, column, end);
        __syncthreads();

        float weights[1][8][4];
        scores(weights, shared_address(queries) + warp_index() * InOrder::offset(16, 0), shared_address(keys));
        mask_future(weights, row, column + lane_index() % 4 * 2);
        softmax(weights, largest, sum, out, Natural{s.scale});
        uint32_t packed[1][4][4];
        flash::pack(packed, weights);
        accumulate(out, packed, shared_address(values));
    }
    store_output(o, lse, at, row, s, largest, sum, out);
}

} // namespace

void registers(Stream stream, Heads<bf16> o, float* lse, Heads<const bf16> q, Heads<const bf16> k, Heads<const bf16> v,
               float scale, const AttentionShape& shape) {
    constexpr size_t kShared = 3 * kTileBytes; // Q, K, V
    run(registers_kernel, kShared, stream, o, lse, q, k, v, scale, shape);
}

} // namespace ladder
