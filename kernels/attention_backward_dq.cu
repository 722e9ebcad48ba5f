// dQ of FlashAttention's backward pass, each element by one owner and in one order: a block keeps a tile of queries;
// keys pass by. S = Q·Kᵀ and dP = dO·Vᵀ once more, dQ += dS·K.
#include "attention_backward.h"

namespace flash {
namespace {

// Where two warps share rows, each takes half of a tile's columns.
template <int D, Room R, class Out> __global__ void __launch_bounds__(dq_tile<D>(R).threads(), dq_tile<D>(R).blocks())
    dq_kernel(Heads<Out> dq, Heads<const bf16> dout, Heads<const bf16> q, Heads<const bf16> k, Heads<const bf16> v,
              Statistics statistics, View s) {
    constexpr Tile T = dq_tile<D>(R);
    using At = Layout<D, T>;
    constexpr int kThreads = T.threads(), kColumns = T.columns, kSharing = T.sharing;
    constexpr int M = T.warp_rows() / 16, N = kColumns / kSharing / 8;
    if constexpr (!runs_here(R, dq_tile<D>)) return;

    Place place = place_of_block<true>(s);
    const int64_t* starts = s.doc_start ? s.doc_start + static_cast<int64_t>(place.b) * s.Tq : nullptr;
    int row0 = place.tile * T.rows, row_end = min(row0 + T.rows, s.Tq);
    Span span = {first_key(s, starts, row0), last_key(s, row_end - 1) + 1, first_key(s, starts, row_end - 1),
                 last_key(s, row0) + 1};

    int group = group_of_warp<T.warps, kSharing>(), part = part_of_warp<T.warps, kSharing>();
    int row = row0 + group * 16 * M + lane_index() / 4;
    float dquery[M][D / 8][4];
    clear(dquery);

    if (span.begin < span.end) {
        char* shared = dynamic_shared();
        uint32_t queries = shared_address(shared), douts = queries + At::kept, ring = queries + At::ring;
        int* first = reinterpret_cast<int*>(shared + At::bounds); // (rows)
        for (int r = threadIdx.x; r < T.rows; r += kThreads)
            store_shared(first + r, first_key(s, starts, min(row0 + r, s.Tq - 1)));
        int64_t head = (static_cast<int64_t>(place.b) * s.H + place.h) * s.Tq;
        float lse[M][2], delta[M][2];
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                int64_t query = head + min(row + 16 * m + 8 * half, s.Tq - 1);
                lse[m][half] = load_global(statistics.lse + query);
                delta[m][half] = load_global(statistics.delta + query);
            }

        Lane<D> lane;
        Rows<D, kThreads, kColumns> keys(k, place.b, place.h, span.begin), values(v, place.b, place.h, span.begin);
        auto start = [&](uint32_t slot, int column) {
            if (column < span.end) {
                keys.load(ring + slot, span.end - column);
                values.load(ring + slot + At::passing, span.end - column);
            }
            cp_async_commit();
        };
        Rows<D, kThreads, T.rows>(q, place.b, place.h, row0).load(queries, s.Tq - row0);
        Rows<D, kThreads, T.rows>(dout, place.b, place.h, row0).load(douts, s.Tq - row0);
        start(0, span.begin);
        uint32_t my_rows = tile_bytes<D>(16 * M) * group, slot = 0;
        uint32_t my_columns = tile_bytes<D>(8 * N) * part;
        float c = s.scale_log2;
        for (int column = span.begin; column < span.end; column += kColumns) {
            cp_async_wait<0>();
            __syncthreads(); // the slot is full, and everyone has left the other one
            if constexpr (T.slots == 2) start(slot ^ At::slot, column + kColumns);
            float p[M][N][4], ds[M][N][4];
            scores<D>(p, queries + my_rows, ring + slot + my_columns, lane);
            if (span.masked(column, kColumns))
                mask(
                    p, column + 8 * N * part + lane_index() % 4 * 2,
                    [&](int m, int half) { return load_shared(first + row - row0 + 16 * m + 8 * half); },
                    [&](int m, int half) { return last_key(s, row + 16 * m + 8 * half); });
            // Unrolled whole, addresses and fragments ahead of use would take registers from a dQ of 128 columns.
            scores < D,
                D == 128 ? 2 : D<256 ? D / 16 : 4>(ds, douts + my_rows, ring + slot + At::passing + my_columns, lane);
#pragma unroll
            for (int m = 0; m < M; m++)
#pragma unroll
                for (int n = 0; n < N; n++)
#pragma unroll
                    for (int e = 0; e < 4; e++)
                        ds[m][n][e] = exp2_approx(p[m][n][e] * c - lse[m][e / 2]) * (ds[m][n][e] - delta[m][e / 2]);
            uint32_t packed[M][N / 2][4];
            pack(packed, ds);
            accumulate<D>(dquery, packed, ring + slot + my_columns, lane);
            if constexpr (T.slots == 2) {
                slot ^= At::slot;
            } else {
                __syncthreads(); // everyone has left the only slot
                start(slot, column + kColumns);
            }
        }
        if constexpr (kSharing == 2) {
            static_assert(kThreads / 2 * M * D / 8 * 16 <= At::bounds, "the sums take the place of the tiles");
            float* other = reinterpret_cast<float*>(shared) + (group * M * D / 8 * kWarpSize + lane_index()) * 4;
            __syncthreads(); // everyone has left the tiles
#pragma unroll
            for (int m = 0; m < M; m++)
#pragma unroll
                for (int n = 0; n < D / 8; n++)
                    if (part == 1) {
                        const auto& c = dquery[m][n];
                        store128_shared(other + (m * D / 8 + n) * kWarpSize * 4,
                                        Pack<float, 4>{c[0], c[1], c[2], c[3]});
                    }
            __syncthreads();
#pragma unroll
            for (int m = 0; m < M; m++)
#pragma unroll
                for (int n = 0; n < D / 8; n++)
                    if (part == 0) {
                        Pack<float, 4> x = load128_shared(other + (m * D / 8 + n) * kWarpSize * 4);
#pragma unroll
                        for (int e = 0; e < 4; e++) dquery[m][n][e] += x[e];
                    }
        }
    }

    if (part != 0) return;
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int i = row + 16 * m + 8 * half;
            store_row<std::is_same_v<Out, float>>(dq.row(place.b, i, place.h), dquery[m], half, s.scale, i < s.Tq);
        }
}

} // namespace

template <class Out> void launch_dq(Stream stream, Heads<Out> dq, Heads<const bf16> dout, Heads<const bf16> q,
                                    Heads<const bf16> k, Heads<const bf16> v, Statistics statistics, float scale,
                                    const AttentionShape& shape) {
    if constexpr (std::is_same_v<real, bf16>)
        with_head_dim(shape.D, [&](auto dim) {
            with_room([&](auto room) {
                constexpr int D = dim;
                constexpr Room alike = first_alike(room, dq_tile<D>);
                constexpr Tile tile = dq_tile<D>(alike);
                using At = Layout<D, tile>;
                static_assert(At::bytes <= bytes_of(room));
                View view = view_of(shape, scale, shape.Tq, tile.rows);
                launch(dq_kernel<D, alike, Out>, grid_of(view), dim3(tile.threads()), At::bytes, stream, dq, dout, q, k,
                       v, statistics, view);
            });
        });
}
template void launch_dq(Stream, Heads<bf16>, Heads<const bf16>, Heads<const bf16>, Heads<const bf16>, Heads<const bf16>,
                        Statistics, float, const AttentionShape&);
template void launch_dq(Stream, Heads<float>, Heads<const bf16>, Heads<const bf16>, Heads<const bf16>,
                        Heads<const bf16>, Statistics, float, const AttentionShape&);

} // namespace flash
