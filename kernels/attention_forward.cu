// FlashAttention's forward pass on tensor cores (Dao 2023), with sm_80 instructions.
//
// A block owns a tile of queries; each warp owns 16 or 32 of them whole, so that a row's maximum and sum need no more
// than its four lanes. S = Q·Kᵀ comes out in the layout that P needs as left operand of P·V: between the two products
// nothing leaves the registers. Tiles of K and V take turns in a ring of slots:
//
//   before       K0 and V0 under way (with 2 slots, K0)
//   each tile    wait for K, barrier, start loading what comes next into the slot that everyone has left
//                S = Q·Kᵀ, mask, softmax
//                wait for V, barrier, start the next
//                O += P·V
#include "attention_flash.h"
#include "attention_tiles.h"

namespace flash {
namespace {

// One key tile's softmax: s (16·M,8·N) scores to weights 2^(c·(s − max)). The running maximum is that of the raw
// scores, so that the scale and log2(e) cost nothing: one fused multiply-add takes c·s − c·max to the exponential.
template <int M, int N, int O> __device__ __forceinline__ void softmax(float (&s)[M][N][4], float (&largest)[M][2],
                                                                       float (&sum)[M][2], float (&out)[M][O][4],
                                                                       float c) {
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float old = largest[m][half], now = old;
#pragma unroll
            for (int n = 0; n < N; n++) now = fmaxf(now, fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
            now = fmaxf(now, __shfl_xor_sync(kFullWarp, now, 1));
            now = fmaxf(now, __shfl_xor_sync(kFullWarp, now, 2));
            // A row that has seen nothing yet: any finite shift makes its weights 0, where −∞ would make ∞ − ∞.
            float shift = now == -kInfinity ? 0 : now * c;
            float keep = exp2_approx(old * c - shift), total = 0;
#pragma unroll
            for (int n = 0; n < N; n++)
#pragma unroll
                for (int e = 2 * half; e < 2 * half + 2; e++) {
                    s[m][n][e] = exp2_approx(s[m][n][e] * c - shift);
                    total += s[m][n][e];
                }
            largest[m][half] = now;
            sum[m][half] = sum[m][half] * keep + total; // this lane's columns; the lanes meet at the end
#pragma unroll
            for (int n = 0; n < O; n++) out[m][n][2 * half] *= keep, out[m][n][2 * half + 1] *= keep;
        }
}

template <int D, bool Small, class Out>
__global__ void __launch_bounds__(forward_tile<D>(Small).threads(), forward_tile<D>(Small).blocks())
    forward_kernel(Heads<Out> o, float* lse, Heads<const bf16> q, Heads<const bf16> k, Heads<const bf16> v, View s) {
    constexpr Tile tile = forward_tile<D>(Small);
    constexpr int kColumns = tile.columns, M = tile.rows / tile.warps / 16, N = kColumns / 8;
    constexpr int kAhead = tile.slots - 1; // tiles under way while one is worked on
    constexpr uint32_t kSlot = tile_bytes<D>(tile.columns), kRing = tile.slots * kSlot;
    if constexpr (kSmallShared && !Small) return; // never launched there, and too large to compile without spills

    Place place = place_of_block<true>(s);
    const int64_t* starts = s.doc_start ? s.doc_start + static_cast<int64_t>(place.b) * s.Tq : nullptr;
    int row0 = place.tile * tile.rows, row_end = min(row0 + tile.rows, s.Tq);
    Span span = {first_key(s, starts, row0), last_key(s, row_end - 1) + 1, first_key(s, starts, row_end - 1),
                 last_key(s, row0) + 1};

    // The warp's rows; those past the end see what the last one sees, and nobody stores them.
    int row = row0 + warp_index() * 16 * M + lane_index() / 4;
    float largest[M][2], sum[M][2], out[M][D / 8][4];
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) largest[m][half] = -kInfinity, sum[m][half] = 0;
    clear(out);

    if (span.begin < span.end) {
        uint32_t queries = shared_address(dynamic_shared()), ring = queries + tile_bytes<D>(tile.rows);
        int* first = reinterpret_cast<int*>(dynamic_shared() + tile_bytes<D>(tile.rows) + kRing); // (rows)
        for (int r = threadIdx.x; r < tile.rows; r += tile.threads())
            store_shared(first + r, first_key(s, starts, min(row0 + r, s.Tq - 1)));
        Lane<D> lane;
        Rows<D, tile.threads(), kColumns> keys(k, place.b, place.h, span.begin),
            values(v, place.b, place.h, span.begin);
        uint32_t load_at = 0, work_at = 0; // slots of the next tile to load and to work on
        auto next = [](uint32_t slot) { return slot + kSlot == kRing ? 0 : slot + kSlot; };
        auto start = [&](auto& rows, int column) {
            if (column < span.end) rows.load(ring + load_at, span.end - column);
            cp_async_commit();
            load_at = next(load_at);
        };
        auto wait = [&] { // for the next tile; behind it, everyone has left the slot worked on before
            cp_async_wait<kAhead - 1>();
            __syncthreads();
        };

        Rows<D, tile.threads(), tile.rows>(q, place.b, place.h, row0).load(queries, s.Tq - row0);
        start(keys, span.begin);
        if constexpr (kAhead == 2) start(values, span.begin);
        float c = s.scale_log2;
        for (int column = span.begin; column < span.end; column += kColumns) {
            float weights[M][N][4];
            wait();
            kAhead == 2 ? start(keys, column + kColumns) : start(values, column);
            scores<D>(weights, queries + tile_bytes<D>(16 * M) * warp_index(), ring + work_at, lane);
            work_at = next(work_at);
            if (span.masked(column, kColumns))
                mask(
                    weights, column + lane_index() % 4 * 2,
                    [&](int m, int half) { return load_shared(first + row - row0 + 16 * m + 8 * half); },
                    [&](int m, int half) { return last_key(s, row + 16 * m + 8 * half); });
            softmax(weights, largest, sum, out, c);
            uint32_t packed[M][N / 2][4]; // before the wait, so that it finds half as many registers in use
            pack(packed, weights);
            wait();
            start(kAhead == 2 ? values : keys, column + kColumns);
            accumulate<D>(out, packed, ring + work_at, lane);
            work_at = next(work_at);
        }
    }

#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int i = row + 16 * m + 8 * half;
            float total = sum[m][half];
            total += __shfl_xor_sync(kFullWarp, total, 1);
            total += __shfl_xor_sync(kFullWarp, total, 2);
            store_row<false>(o.row(place.b, i, place.h), out[m], half, total == 0 ? 0 : 1 / total, i < s.Tq);
            if (i < s.Tq && lane_index() % 4 == 0)
                store_global(lse + place.b * s.lse_batch + static_cast<int64_t>(place.h) * s.Tq + i,
                             total == 0 ? -kInfinity : largest[m][half] * s.scale + logf(total));
        }
}

template <int D, bool Small, class Out> void run(Stream stream, Heads<Out> o, float* lse, Heads<const bf16> q,
                                                 Heads<const bf16> k, Heads<const bf16> v, float scale,
                                                 const AttentionShape& shape) {
    constexpr Tile tile = forward_tile<D>(Small);
    constexpr int kShared = tile_bytes<D>(tile.rows + tile.slots * tile.columns) + tile.rows * 4;
    static_assert(kShared <= (Small ? kSmallSharedBytes : kMediumSharedBytes));
    static_assert(!Small || D == 256 || 2 * (kShared + 1024) <= kSmallSharedBytes + 1024);
    View view = view_of(shape, scale, shape.Tq, tile.rows);
    if (view.tiles == 0 || view.heads == 0) return;
    launch(forward_kernel<D, Small, Out>, grid_of(view), dim3(tile.threads()), kShared, stream, o, lse, q, k, v, view);
}

} // namespace

bool supports(const AttentionShape& s, float scale) { return std::is_same_v<real, bf16> && has_tiles(s) && scale > 0; }

template <class Out> void forward(Stream stream, Heads<Out> o, float* lse, Heads<const bf16> q, Heads<const bf16> k,
                                  Heads<const bf16> v, float scale, const AttentionShape& shape) {
    if constexpr (std::is_same_v<real, bf16>) {
        bool small = shared_per_block() <= kSmallSharedBytes;
        with_head_dim(shape.D, [&](auto D) {
            auto with = [&](auto run) { run(stream, o, lse, q, k, v, scale, shape); };
            small ? with(run<D, true, Out>) : with(run<D, false, Out>);
        });
    }
}
template void forward(Stream, Heads<bf16>, float*, Heads<const bf16>, Heads<const bf16>, Heads<const bf16>, float,
                      const AttentionShape&);
template void forward(Stream, Heads<float>, float*, Heads<const bf16>, Heads<const bf16>, Heads<const bf16>, float,
                      const AttentionShape&);

} // namespace flash
