// FlashAttention's backward pass on tensor cores, with sm_80 instructions.
//
//   prepare      Δ = rowsum(dO∘O), and LSE in base 2
//   dk_dv        a block keeps a tile of keys; queries pass by. Sᵀ = K·Qᵀ and dPᵀ = V·dOᵀ are computed transposed, rows
//                being keys, so that Pᵀ and dSᵀ are left operands of dV += Pᵀ·dO and dK += dSᵀ·Q as they stand.
//   dq           a block keeps a tile of queries; keys pass by. S = Q·Kᵀ and dP = dO·Vᵀ once more, dQ += dS·K.
//
// P and dS are rounded to bf16 and never leave the registers, and every sum has one owner and one order: the same bits
// in each run. It is 7 products where 5 are needed (8 for D = 256, see the table of tiles). Where the caller lets the
// order be any, dk_dv also computes each tile's dQ from dSᵀ, which the block gathers in shared memory, and adds it to
// fp32 sums; `finish` rounds those. The scale is left out of dS and multiplies the finished sums.
#include <algorithm>
#include <bit>

#include "attention_flash.h"
#include "attention_tiles.h"

namespace flash {
namespace {

constexpr int kThreads = 256; // of the kernels without tiles

template <int D> constexpr int kRowLanes = static_cast<int>(std::bit_ceil(unsigned{D / 8}));

// For each query and head its statistics, LSE in base 2. A query that saw nothing gets +∞, which makes 2^(S − LSE) = 0
// of any score. D / 8 lanes share a row, 10 of 16 for D = 80. sums (B,H,Tq,D) or null, set to 0.
template <int D> __global__ void __launch_bounds__(kThreads)
    prepare_kernel(Statistics* statistics, float* sums, Heads<const bf16> dout, Heads<const bf16> o, const float* lse,
                   View s) {
    constexpr int kLanes = kRowLanes<D>;
    int64_t row = global_thread() / kLanes, head = row / s.Tq, i = row % s.Tq;
    int64_t b = head / s.H, h = head % s.H;
    int d = threadIdx.x % kLanes * 8;
    bool valid = head < s.heads && d < D;
    float delta = 0;
    if (valid) {
        Pack128<bf16> x = load128(dout.row(b, i, h) + d), y = load128(o.row(b, i, h) + d);
#pragma unroll
        for (int e = 0; e < 8; e++) delta += to_float(x[e]) * to_float(y[e]);
        if (sums) store128(sums + row * D + d, Pack<float, 4>{}), store128(sums + row * D + d + 4, Pack<float, 4>{});
    }
#pragma unroll
    for (int distance = kLanes / 2; distance > 0; distance /= 2) delta += __shfl_xor_sync(kFullWarp, delta, distance);
    if (valid && d == 0) {
        float own = load_global(lse + b * s.lse_batch + h * s.Tq + i);
        store_global(statistics + row, Statistics{own == -kInfinity ? kInfinity : own * kLog2e, delta});
    }
}

// dq = or += scale·sums (B,H,Tq,D), four elements a thread.
template <class Out> __global__ void __launch_bounds__(kThreads)
    finish_kernel(Heads<Out> dq, const float* sums, int D, View s) {
    int64_t at = global_thread() * 4, row = at / D, head = row / s.Tq;
    if (head >= s.heads) return;
    Pack<float, 4> x = load128(sums + at);
    Out* to = dq.row(head / s.H, row % s.Tq, head % s.H) + at % D;
    Pack<Out, 4> out;
#pragma unroll
    for (int e = 0; e < 4; e++) x[e] *= s.scale;
    if constexpr (std::is_same_v<Out, float>) {
        out = load_pack<4>(to);
#pragma unroll
        for (int e = 0; e < 4; e++) out[e] += x[e];
    } else {
#pragma unroll
        for (int e = 0; e < 4; e++) out[e] = to_bf16(x[e]);
    }
    store_pack(to, out);
}

// What one block of dk_dv and dq has in shared memory, in bytes from its start: the two operands that stay, the ring
// with two tiles of the others and the queries' statistics in each slot, the rows' bounds, and dSᵀ for dQ's sums.
template <int D, bool Small, bool WithDq> struct Layout {
    static constexpr Tile tile = backward_tile<D>(Small, WithDq);
    static constexpr int kRows = tile.rows, kColumns = tile.columns;
    static constexpr uint32_t kept = tile_bytes<D>(kRows), passing = tile_bytes<D>(kColumns);
    static constexpr uint32_t ring = 2 * kept, slot = 2 * passing + kColumns * sizeof(Statistics);
    static constexpr uint32_t bounds = ring + tile.slots * slot, dscores = bounds + kRows * sizeof(int);
    static constexpr uint32_t bytes = dscores + (WithDq ? kRows * kColumns * sizeof(bf16) : 0);
    static constexpr bool fits_small = bytes <= kSmallSharedBytes;
    static_assert(bytes <= kLargeSharedBytes && (fits_small || WithDq || !Small));
};

// A warp's place among those that share rows. The warps w, w + 4, … run on the same quarter of an SM, so that where two
// share rows, each quarter has one of either part.
template <int Warps, int Sharing> __device__ __forceinline__ int group_of_warp() {
    return Sharing == 1 ? warp_index() : warp_index() % (Warps / Sharing);
}
template <int Warps, int Sharing> __device__ __forceinline__ int part_of_warp() {
    return Sharing == 1 ? 0 : warp_index() / (Warps / Sharing);
}

// dSᵀ (keys,queries) in shared memory has rows of 32 queries.
using Dscores = Swizzle<32>;

// A warp's fragments of dSᵀ, the lane's rows from `row` on, to shared memory.
template <int M> __device__ __forceinline__ void store_dscores(char* to, const uint32_t (&p)[M][2][4], int row) {
#pragma unroll
    for (int chunk = 0; chunk < 4; chunk++) {
        char* at = to + Dscores::offset(row, chunk) + lane_index() % 4 * 4;
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int half = 0; half < 2; half++)
                store_shared(reinterpret_cast<uint32_t*>(at + (16 * m + 8 * half) * Dscores::row_bytes),
                             p[m][chunk / 2][chunk % 2 * 2 + half]);
    }
}

// sums += dS·K over the block's keys: a warp takes 16 columns at a time, and all 32 queries or, with warps enough, 16.
// With D = 80, 3 of 8 warps have nothing to do; 16 queries each would need a second turn. `to` is where the lane's own
// four of the first query and column lie; queries from left_queries on do not exist.
template <int D, int Keys, int Warps> __device__ __forceinline__ void add_dq(float* to, int left_queries,
                                                                             uint32_t dscores, uint32_t keys,
                                                                             const Lane<D>& lane) {
    constexpr int kAcross = D / 16, M = 2 * kAcross <= Warps ? 1 : 2; // M of 16 queries
    constexpr int kPieces = 2 / M * kAcross, kTurns = (kPieces + Warps - 1) / Warps;
    uint32_t row = lane_index() % 8 + lane_index() / 16 * 8, chunk = lane_index() / 8 % 2;
#pragma unroll 1
    for (int turn = 0; turn < kTurns; turn++) {
        int piece = turn * Warps + warp_index(), row16 = piece / kAcross * M, column16 = piece % kAcross;
        if (kPieces % Warps != 0 && piece >= kPieces) break;
        float out[M][2][4];
        clear(out);
#pragma unroll 2
        for (int k = 0; k < Keys / 16; k++) {
            uint32_t right[4];
            ldmatrix_x4_trans(right, lane.at(keys, lane.rows_first, k, column16));
#pragma unroll
            for (int m = 0; m < M; m++) {
                uint32_t left[4];
                ldmatrix_x4_trans(left, dscores + Dscores::offset(row, 2 * (row16 + m) + chunk) +
                                            16 * k * Dscores::row_bytes);
                mma_m16n8k16(out[m][0], left, right[0], right[1]);
                mma_m16n8k16(out[m][1], left, right[2], right[3]);
            }
        }
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                Pack<float, 4> x = four_columns(out[m][0][2 * half], out[m][0][2 * half + 1], out[m][1][2 * half],
                                                out[m][1][2 * half + 1]);
                int i = 16 * (row16 + m) + 8 * half;
                if (i + lane_index() / 4 < left_queries)
                    reduce_add(to + i * D + 16 * column16, float4{x[0], x[1], x[2], x[3]});
            }
    }
}

// sums (B,H,Tq,D) is null where dQ is left to dq_kernel. Where two warps share rows, both compute P; the first keeps
// dV, the second goes on to dS and keeps dK.
template <int D, bool Small, class Out, bool WithDq>
__global__ void __launch_bounds__(backward_tile<D>(Small, WithDq).threads(), backward_tile<D>(Small, WithDq).blocks())
    dk_dv_kernel(Heads<Out> dk, Heads<Out> dv, float* sums, Heads<const bf16> dout, Heads<const bf16> q,
                 Heads<const bf16> k, Heads<const bf16> v, const Statistics* statistics, View s) {
    using At = Layout<D, Small, WithDq>;
    constexpr int kThreads = At::tile.threads(), kColumns = At::kColumns, kSharing = At::tile.sharing;
    constexpr int M = At::tile.warp_rows() / 16, N = kColumns / 8;
    if constexpr (kSmallShared && !At::fits_small) return;

    Place place = place_of_block<false>(s); // the first keys are seen by the most queries
    const int64_t* starts = s.doc_start ? s.doc_start + static_cast<int64_t>(place.b) * s.Tq : nullptr;
    int row0 = place.tile * At::kRows, row_end = min(row0 + At::kRows, s.Tk);
    // A tile with keys past the end has only masked columns: their P must be 0, since dQ's sums run over them.
    Span span = {first_query(s, row0), last_query(s, starts, row_end - 1) + 1, first_query(s, row0 + At::kRows - 1),
                 row0 + At::kRows <= s.Tk ? last_query(s, starts, row0) + 1 : 0};

    int group = group_of_warp<At::tile.warps, kSharing>(), part = part_of_warp<At::tile.warps, kSharing>();
    int row = row0 + group * 16 * M + lane_index() / 4;
    float sum[2 / kSharing][M][D / 8][4]; // dV and dK, or one of them
#pragma unroll
    for (int which = 0; which < 2 / kSharing; which++) clear(sum[which]);

    if (span.begin < span.end) {
        char* shared = dynamic_shared();
        uint32_t keys = shared_address(shared), values = keys + At::kept, ring = keys + At::ring;
        int* last = reinterpret_cast<int*>(shared + At::bounds); // (rows)
        for (int r = threadIdx.x; r < At::kRows; r += kThreads)
            store_shared(last + r, row0 + r < s.Tk ? last_query(s, starts, row0 + r) : -1);
        int64_t head = static_cast<int64_t>(place.b) * s.H + place.h;
        statistics += head * s.Tq + span.begin + threadIdx.x;
        if constexpr (WithDq) sums += (head * s.Tq + span.begin + lane_index() / 4) * D + first_of_four();

        Lane<D> lane;
        Rows<D, kThreads, kColumns> queries(q, place.b, place.h, span.begin), douts(dout, place.b, place.h, span.begin);
        auto start = [&](uint32_t slot, int column) {
            if (column < span.end) {
                queries.load(ring + slot, span.end - column);
                douts.load(ring + slot + At::passing, span.end - column);
                if (static_cast<int>(threadIdx.x) < kColumns)
                    cp_async_or_zero<8>(ring + slot + 2 * At::passing + threadIdx.x * sizeof(Statistics), statistics,
                                        column + static_cast<int>(threadIdx.x) < span.end);
                statistics += kColumns;
            }
            cp_async_commit();
        };
        Rows<D, kThreads, At::kRows>(k, place.b, place.h, row0).load(keys, s.Tk - row0);
        Rows<D, kThreads, At::kRows>(v, place.b, place.h, row0).load(values, s.Tk - row0);
        start(0, span.begin);
        uint32_t my_rows = tile_bytes<D>(16 * M) * group, slot = 0;
        float c = s.scale_log2;
        for (int column = span.begin; column < span.end; column += kColumns) {
            cp_async_wait<0>();
            __syncthreads(); // the slot is full, and everyone has left the other one
            if constexpr (At::tile.slots == 2) start(slot ^ At::slot, column + kColumns);
            float p[M][N][4];
            scores<D>(p, keys + my_rows, ring + slot, lane);
            if (span.masked(column, kColumns))
                mask(
                    p, column + lane_index() % 4 * 2,
                    [&](int m, int half) { return first_query(s, row + 16 * m + 8 * half); },
                    [&](int m, int half) { return load_shared(last + row - row0 + 16 * m + 8 * half); });
            const auto* of_column =
                reinterpret_cast<const Statistics*>(shared + At::ring + slot + 2 * At::passing) + lane_index() % 4 * 2;
            uint32_t packed[M][N / 2][4], packed_ds[M][N / 2][4];
#pragma unroll
            for (int n = 0; n < N; n++) {
                Pack<Statistics, 2> two = load_pack_shared<2>(of_column + 8 * n);
#pragma unroll
                for (int m = 0; m < M; m++)
#pragma unroll
                    for (int e = 0; e < 4; e++) p[m][n][e] = exp2_approx(p[m][n][e] * c - two[e % 2].lse);
            }
            pack(packed, p);
            // dP by 16 queries: all at once, beside P, would not fit the registers.
            if (kSharing == 1 || part == 1) {
#pragma unroll
                for (int n = 0; n < N; n += 2) {
                    float ds[M][2][4];
                    scores<D>(ds, values + my_rows, ring + slot + At::passing + tile_bytes<D>(8 * n), lane);
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        Pack<Statistics, 2> two = load_pack_shared<2>(of_column + 8 * (n + i));
#pragma unroll
                        for (int m = 0; m < M; m++)
#pragma unroll
                            for (int e = 0; e < 4; e++) ds[m][i][e] = p[m][n + i][e] * (ds[m][i][e] - two[e % 2].delta);
                    }
#pragma unroll
                    for (int m = 0; m < M; m++) pack(packed_ds[m][n / 2], ds[m][0], ds[m][1]);
                }
                if constexpr (WithDq) store_dscores(shared + At::dscores, packed_ds, row - row0);
            }
            if constexpr (kSharing == 1) {
                accumulate<D>(sum[0], packed, ring + slot + At::passing, lane);
                accumulate<D>(sum[1], packed_ds, ring + slot, lane);
            } else {
#pragma unroll
                for (int k = 0; k < N / 2; k++)
#pragma unroll
                    for (int e = 0; e < 4; e++) packed[0][k][e] = part == 0 ? packed[0][k][e] : packed_ds[0][k][e];
                accumulate<D>(sum[0], packed, ring + slot + (part == 0 ? At::passing : 0), lane);
            }
            if constexpr (WithDq) {
                __syncthreads(); // all of dSᵀ is there; it is read before the next turn's barrier
                add_dq<D, At::kRows, At::tile.warps>(sums, span.end - column, shared_address(shared + At::dscores),
                                                     keys, lane);
                sums += kColumns * D;
            }
            if constexpr (At::tile.slots == 2) {
                slot ^= At::slot;
            } else {
                __syncthreads(); // everyone has left the only slot
                start(slot, column + kColumns);
            }
        }
    }

#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int j = row + 16 * m + 8 * half;
            constexpr bool kAdd = std::is_same_v<Out, float>;
            if (kSharing == 1 || part == 0) store_row<kAdd>(dv.row(place.b, j, place.h), sum[0][m], half, 1, j < s.Tk);
            if (kSharing == 1 || part == 1)
                store_row<kAdd>(dk.row(place.b, j, place.h), sum[2 / kSharing - 1][m], half, s.scale, j < s.Tk);
        }
}

// Where two warps share rows, each takes half of a tile's columns.
template <int D, bool Small, class Out>
__global__ void __launch_bounds__(backward_tile<D>(Small, false).threads(), backward_tile<D>(Small, false).blocks())
    dq_kernel(Heads<Out> dq, Heads<const bf16> dout, Heads<const bf16> q, Heads<const bf16> k, Heads<const bf16> v,
              const Statistics* statistics, View s) {
    using At = Layout<D, Small, false>;
    constexpr int kThreads = At::tile.threads(), kColumns = At::kColumns, kSharing = At::tile.sharing;
    constexpr int M = At::tile.warp_rows() / 16, N = kColumns / kSharing / 8;
    if constexpr (kSmallShared && !At::fits_small) return;

    Place place = place_of_block<true>(s);
    const int64_t* starts = s.doc_start ? s.doc_start + static_cast<int64_t>(place.b) * s.Tq : nullptr;
    int row0 = place.tile * At::kRows, row_end = min(row0 + At::kRows, s.Tq);
    Span span = {first_key(s, starts, row0), last_key(s, row_end - 1) + 1, first_key(s, starts, row_end - 1),
                 last_key(s, row0) + 1};

    int group = group_of_warp<At::tile.warps, kSharing>(), part = part_of_warp<At::tile.warps, kSharing>();
    int row = row0 + group * 16 * M + lane_index() / 4;
    float dquery[M][D / 8][4];
    clear(dquery);

    if (span.begin < span.end) {
        char* shared = dynamic_shared();
        uint32_t queries = shared_address(shared), douts = queries + At::kept, ring = queries + At::ring;
        int* first = reinterpret_cast<int*>(shared + At::bounds); // (rows)
        for (int r = threadIdx.x; r < At::kRows; r += kThreads)
            store_shared(first + r, first_key(s, starts, min(row0 + r, s.Tq - 1)));
        statistics += (static_cast<int64_t>(place.b) * s.H + place.h) * s.Tq;
        Statistics own[M][2];
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int half = 0; half < 2; half++)
                own[m][half] = load_global(statistics + min(row + 16 * m + 8 * half, s.Tq - 1));

        Lane<D> lane;
        Rows<D, kThreads, kColumns> keys(k, place.b, place.h, span.begin), values(v, place.b, place.h, span.begin);
        auto start = [&](uint32_t slot, int column) {
            if (column < span.end) {
                keys.load(ring + slot, span.end - column);
                values.load(ring + slot + At::passing, span.end - column);
            }
            cp_async_commit();
        };
        Rows<D, kThreads, At::kRows>(q, place.b, place.h, row0).load(queries, s.Tq - row0);
        Rows<D, kThreads, At::kRows>(dout, place.b, place.h, row0).load(douts, s.Tq - row0);
        start(0, span.begin);
        uint32_t my_rows = tile_bytes<D>(16 * M) * group, slot = 0;
        uint32_t my_columns = tile_bytes<D>(8 * N) * part;
        float c = s.scale_log2;
        for (int column = span.begin; column < span.end; column += kColumns) {
            cp_async_wait<0>();
            __syncthreads(); // the slot is full, and everyone has left the other one
            if constexpr (At::tile.slots == 2) start(slot ^ At::slot, column + kColumns);
            float p[M][N][4], ds[M][N][4];
            scores<D>(p, queries + my_rows, ring + slot + my_columns, lane);
            if (span.masked(column, kColumns))
                mask(
                    p, column + 8 * N * part + lane_index() % 4 * 2,
                    [&](int m, int half) { return load_shared(first + row - row0 + 16 * m + 8 * half); },
                    [&](int m, int half) { return last_key(s, row + 16 * m + 8 * half); });
            scores<D>(ds, douts + my_rows, ring + slot + At::passing + my_columns, lane);
#pragma unroll
            for (int m = 0; m < M; m++)
#pragma unroll
                for (int n = 0; n < N; n++)
#pragma unroll
                    for (int e = 0; e < 4; e++)
                        ds[m][n][e] =
                            exp2_approx(p[m][n][e] * c - own[m][e / 2].lse) * (ds[m][n][e] - own[m][e / 2].delta);
            uint32_t packed[M][N / 2][4];
            pack(packed, ds);
            accumulate<D>(dquery, packed, ring + slot + my_columns, lane);
            if constexpr (At::tile.slots == 2) {
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

template <class T> Heads<T> group_of(Heads<T> x, int64_t first) {
    return {x.row(0, 0, first), x.batch, x.token, x.head};
}

template <int D, bool Small, class Out> void run(Stream stream, Heads<Out> dq, Heads<Out> dk, Heads<Out> dv,
                                                 Heads<const bf16> dout, Heads<const bf16> q, Heads<const bf16> k,
                                                 Heads<const bf16> v, Heads<const bf16> o, const float* lse,
                                                 float scale, void* scratch, const AttentionShape& shape) {
    using At = Layout<D, Small, false>;
    View by_query = view_of(shape, scale, shape.Tq, At::kRows), by_key = view_of(shape, scale, shape.Tk, At::kRows);
    // Where a block cannot have the room for dSᵀ, the order that may be any is the fixed one.
    using WithDq = Layout<D, false, true>;
    bool any_order = !shape.deterministic && WithDq::bytes <= shared_per_block();
    auto* statistics = static_cast<Statistics*>(scratch);
    float* sums = any_order ? reinterpret_cast<float*>(statistics + rows_of(shape)) : nullptr;
    int64_t rows = shape.B * shape.H * shape.Tq;
    bool queries = rows > 0, keys = shape.B * shape.H * shape.Tk > 0;
    if (queries)
        launch(prepare_kernel<D>, dim3(blocks_for(rows * kRowLanes<D>, kThreads)), dim3(kThreads), 0, stream,
               statistics, sums, dout, o, lse, by_query);
    auto dk_dv = [&](auto kernel, int threads, size_t shared) {
        launch(kernel, grid_of(by_key), dim3(threads), shared, stream, dk, dv, sums, dout, q, k, v, statistics, by_key);
    };
    if (any_order) {
        if (keys) dk_dv(dk_dv_kernel<D, false, Out, true>, WithDq::tile.threads(), WithDq::bytes);
        if (queries)
            launch(finish_kernel<Out>, dim3(blocks_for(rows * D, 4 * kThreads)), dim3(kThreads), 0, stream, dq, sums, D,
                   by_query);
    } else {
        if (keys) dk_dv(dk_dv_kernel<D, Small, Out, false>, At::tile.threads(), At::bytes);
        if (queries)
            launch(dq_kernel<D, Small, Out>, grid_of(by_query), dim3(At::tile.threads()), At::bytes, stream, dq, dout,
                   q, k, v, statistics, by_query);
    }
}

} // namespace

template <class Out> void backward(Stream stream, Heads<Out> dq, Heads<Out> dk, Heads<Out> dv, Heads<const bf16> dout,
                                   Heads<const bf16> q, Heads<const bf16> k, Heads<const bf16> v, Heads<const bf16> o,
                                   const float* lse, float scale, void* scratch, const AttentionShape& shape) {
    if constexpr (std::is_same_v<real, bf16>) {
        const int64_t at_once = heads_at_once(shape);
        auto with = [&](auto run) {
            for (int64_t h = 0; h < shape.H; h += at_once)
                run(stream, group_of(dq, h), group_of(dk, h), group_of(dv, h), group_of(dout, h), group_of(q, h),
                    group_of(k, h), group_of(v, h), group_of(o, h), lse + h * shape.Tq, scale, scratch,
                    group_of(shape, std::min(at_once, shape.H - h)));
        };
        // One column of the table serves all cards up to D = 128.
        with_head_dim(shape.D, [&](auto D) {
            if constexpr (D == 256)
                shared_per_block() <= kSmallSharedBytes ? with(run<D, true, Out>) : with(run<D, false, Out>);
            else
                with(run<D, true, Out>);
        });
    }
}
template void backward(Stream, Heads<bf16>, Heads<bf16>, Heads<bf16>, Heads<const bf16>, Heads<const bf16>,
                       Heads<const bf16>, Heads<const bf16>, Heads<const bf16>, const float*, float, void*,
                       const AttentionShape&);
template void backward(Stream, Heads<float>, Heads<float>, Heads<float>, Heads<const bf16>, Heads<const bf16>,
                       Heads<const bf16>, Heads<const bf16>, Heads<const bf16>, const float*, float, void*,
                       const AttentionShape&);

} // namespace flash
