// FlashAttention's backward pass on tensor cores, with sm_80 instructions.
//
//   prepare      Δ = rowsum(dO∘O), and LSE in base 2
//   dk_dv        a block keeps a tile of keys; queries pass by. Sᵀ = K·Qᵀ and dPᵀ = V·dOᵀ are computed transposed, rows
//                being keys, so that Pᵀ and dSᵀ are left operands of dV += Pᵀ·dO and dK += dSᵀ·Q as they stand.
//   dq           a block keeps a tile of queries; keys pass by (attention_backward_dq.cu).
//
// P and dS are rounded to bf16, and every sum has one owner and one order: the same bits in each run. It is 7 products
// where 5 are needed (8 for D = 256, see the table of tiles). Where the caller lets the order be any, and D = 64, dk_dv
// also computes each tile's dQ from dSᵀ, which the block gathers in shared memory, and adds it to fp32 sums; `finish`
// rounds those. The scale is left out of dS and multiplies the finished sums.
#include <algorithm>
#include <bit>

#include "attention_backward.h"

namespace flash {
namespace {

constexpr int kThreads = 256; // of the kernels without tiles

template <int D> constexpr int kRowLanes = static_cast<int>(std::bit_ceil(unsigned{D / 8}));

// For each query and head its statistics, LSE in base 2. A query that saw nothing gets +∞, which makes 2^(S − LSE) = 0
// of any score. D / 8 lanes share a row, 10 of 16 for D = 80. sums (B,H,Tq,D) or null, set to 0.
template <int D> __global__ void __launch_bounds__(kThreads)
    prepare_kernel(Statistics statistics, float* sums, Heads<const bf16> dout, Heads<const bf16> o, const float* lse,
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
        store_global(statistics.lse + row, own == -kInfinity ? kInfinity : own * kLog2e);
        store_global(statistics.delta + row, delta);
    }
}

// dq = scale·sums (B,H,Tq,D), four elements a thread.
template <int D> __global__ void __launch_bounds__(kThreads) finish_kernel(Heads<bf16> dq, const float* sums, View s) {
    int64_t at = global_thread() * 4, row = at / D, head = row / s.Tq;
    if (head >= s.heads) return;
    Pack<float, 4> x = load128(sums + at);
    Pack<bf16, 4> out;
#pragma unroll
    for (int e = 0; e < 4; e++) out[e] = to_bf16(x[e] * s.scale);
    store_pack(dq.row(head / s.H, row % s.Tq, head % s.H) + at % D, out);
}

// A warp's fragments of Pᵀ or dSᵀ, the lane's rows from `row` on and columns from 8·`chunk` on, to a tile of rows of
// `Columns` queries. 8 rows' stores meet the banks as an ldmatrix does.
template <int Columns, int M, int K>
__device__ __forceinline__ void store_scores(char* to, const uint32_t (&p)[M][K][4], int row, int chunk) {
#pragma unroll
    for (int c = 0; c < 2 * K; c++) {
        char* at = to + Swizzle<Columns>::offset(row, chunk + c) + lane_index() % 4 * 4;
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int half = 0; half < 2; half++)
                store_shared(reinterpret_cast<uint32_t*>(at + (16 * m + 8 * half) * Swizzle<Columns>::row_bytes),
                             p[m][c / 2][c % 2 * 2 + half]);
    }
}

// out (16·M,8·N) += P·B with all columns of P, which lies in shared memory, the warp's rows first. b: tile of rows of
// D, from the first column that is meant.
template <int D, int Columns, int M, int N>
__device__ __forceinline__ void accumulate_shared(float (&out)[M][N][4], uint32_t p, uint32_t b,
                                                  const Lane<Columns>& p_lane, const Lane<D>& lane) {
#pragma unroll
    for (int k = 0; k < Columns / 16; k++) {
        uint32_t left[M][4];
#pragma unroll
        for (int m = 0; m < M; m++) ldmatrix_x4(left[m], p_lane.at(p, p_lane.rows_first, m, k));
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            uint32_t right[4];
            ldmatrix_x4_trans(right, lane.at(b, lane.rows_first, k, n / 2));
#pragma unroll
            for (int m = 0; m < M; m++) {
                mma_m16n8k16(out[m][n], left[m], right[0], right[1]);
                mma_m16n8k16(out[m][n + 1], left[m], right[2], right[3]);
            }
        }
    }
}

// dSᵀ (keys,queries) for dQ has rows of 32 queries.
using Dscores = Swizzle<32>;

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

// sums (B,H,Tq,D) is null where dQ is left to dq_kernel. How two warps share rows: see the table of tiles.
template <int D, Room R, bool WithDq, class Out>
__global__ void __launch_bounds__(dk_dv_tile<D, WithDq>(R).threads(), dk_dv_tile<D, WithDq>(R).blocks())
    dk_dv_kernel(Heads<Out> dk, Heads<Out> dv, float* sums, Heads<const bf16> dout, Heads<const bf16> q,
                 Heads<const bf16> k, Heads<const bf16> v, Statistics statistics, View s) {
    constexpr Tile T = dk_dv_tile<D, WithDq>(R);
    constexpr bool kExchange = exchanges<D>(T), kOneEach = T.sharing == 2 && !kExchange;
    using At = Layout<D, T, kExchange ? 2 : WithDq>;
    constexpr int kThreads = T.threads(), kColumns = T.columns;
    constexpr int M = T.warp_rows() / 16, N = kColumns / 8 / (kExchange ? 2 : 1);
    constexpr int kSums = kOneEach ? 1 : 2, kWidth = kExchange ? D / 2 : D;
    if constexpr (!runs_here(R, dk_dv_tile<D, WithDq>)) return;

    Place place = place_of_block<false>(s); // the first keys are seen by the most queries
    const int64_t* starts = s.doc_start ? s.doc_start + static_cast<int64_t>(place.b) * s.Tq : nullptr;
    int row0 = place.tile * T.rows, row_end = min(row0 + T.rows, s.Tk);
    // A tile with keys past the end has only masked columns: their P must be 0, since dQ's sums run over them.
    Span span = {first_query(s, row0), last_query(s, starts, row_end - 1) + 1, first_query(s, row0 + T.rows - 1),
                 row0 + T.rows <= s.Tk ? last_query(s, starts, row0) + 1 : 0};

    // Neighbours exchange: the two warps of each quarter of an SM then belong to two pairs, and one has work while the
    // other waits.
    int group = kExchange ? warp_index() / 2 : group_of_warp<T.warps, T.sharing>();
    int part = kExchange ? warp_index() % 2 : part_of_warp<T.warps, T.sharing>();
    int row = row0 + group * 16 * M + lane_index() / 4;
    float sum[kSums][M][kWidth / 8][4]; // dV and dK, or one of them
#pragma unroll
    for (int which = 0; which < kSums; which++) clear(sum[which]);

    if (span.begin < span.end) {
        char* shared = dynamic_shared();
        uint32_t keys = shared_address(shared), values = keys + At::kept, ring = keys + At::ring;
        int* last = reinterpret_cast<int*>(shared + At::bounds); // (rows)
        for (int r = threadIdx.x; r < T.rows; r += kThreads)
            store_shared(last + r, row0 + r < s.Tk ? last_query(s, starts, row0 + r) : -1);
        int64_t head = static_cast<int64_t>(place.b) * s.H + place.h;
        // The threads that copy statistics take one element of LSE or of Δ each.
        const float* statistic = (static_cast<int>(threadIdx.x) < kColumns ? statistics.lse : statistics.delta) +
                                 head * s.Tq + span.begin + threadIdx.x % kColumns;
        if constexpr (WithDq) sums += (head * s.Tq + span.begin + lane_index() / 4) * D + first_of_four();

        Lane<D> lane;
        Rows<D, kThreads, kColumns> queries(q, place.b, place.h, span.begin), douts(dout, place.b, place.h, span.begin);
        auto start = [&](uint32_t slot, int column) {
            if (column < span.end) {
                queries.load(ring + slot, span.end - column);
                douts.load(ring + slot + At::passing, span.end - column);
                if (static_cast<int>(threadIdx.x) < 2 * kColumns)
                    cp_async_or_zero<4>(ring + slot + 2 * At::passing + threadIdx.x * sizeof(float), statistic,
                                        column + static_cast<int>(threadIdx.x) % kColumns < span.end);
                statistic += kColumns;
            }
            cp_async_commit();
        };
        Rows<D, kThreads, T.rows>(k, place.b, place.h, row0).load(keys, s.Tk - row0);
        Rows<D, kThreads, T.rows>(v, place.b, place.h, row0).load(values, s.Tk - row0);
        start(0, span.begin);
        uint32_t my_rows = tile_bytes<D>(16 * M) * group, slot = 0;
        int first_column = kExchange ? 8 * N * part : 0; // of the tile's
        float c = s.scale_log2;
        for (int column = span.begin; column < span.end; column += kColumns) {
            cp_async_wait<0>();
            __syncthreads(); // the slot is full, and everyone has left the other one
            if constexpr (T.slots == 2) start(slot ^ At::slot, column + kColumns);
            float p[M][N][4];
            scores<D>(p, keys + my_rows, ring + slot + tile_bytes<D>(1) * first_column, lane);
            if (span.masked(column, kColumns))
                mask(
                    p, column + first_column + lane_index() % 4 * 2,
                    [&](int m, int half) { return first_query(s, row + 16 * m + 8 * half); },
                    [&](int m, int half) { return load_shared(last + row - row0 + 16 * m + 8 * half); });
            const auto* lse = reinterpret_cast<const float*>(shared + At::ring + slot + 2 * At::passing) +
                              first_column + lane_index() % 4 * 2;
#pragma unroll
            for (int n = 0; n < N; n++) {
                Pack<float, 2> two = load_pack_shared<2>(lse + 8 * n);
#pragma unroll
                for (int m = 0; m < M; m++)
#pragma unroll
                    for (int e = 0; e < 4; e++) p[m][n][e] = exp2_approx(p[m][n][e] * c - two[e % 2]);
            }
            // dV before dP: P in bf16 and dP take turns in the registers.
            uint32_t packed[M][N / 2][4];
            pack(packed, p);
            uint32_t passed = keys + At::passed;
            [[maybe_unused]] Lane<kColumns> passed_lane;
            [[maybe_unused]] uint32_t my_passed = tile_bytes<kColumns>(16 * M) * group;
            [[maybe_unused]] uint32_t my_width = kWidth * sizeof(bf16) * part;
            if constexpr (kExchange) {
                store_scores<kColumns>(shared + At::passed, packed, row - row0, first_column / 8);
                barrier_sync(1 + group, 2 * kWarpSize);
                accumulate_shared(sum[0], passed + my_passed, ring + slot + At::passing + my_width, passed_lane, lane);
            } else if (!kOneEach) {
                accumulate<D>(sum[0], packed, ring + slot + At::passing, lane);
            }
            if (!kOneEach || part == 1) {
                float ds[M][N][4];
                // Unrolled whole, addresses and fragments ahead of use would take the registers that P needs.
                scores<D, 2>(ds, values + my_rows, ring + slot + At::passing + tile_bytes<D>(1) * first_column, lane);
#pragma unroll
                for (int n = 0; n < N; n++) {
                    Pack<float, 2> two = load_pack_shared<2>(lse + kColumns + 8 * n);
#pragma unroll
                    for (int m = 0; m < M; m++)
#pragma unroll
                        for (int e = 0; e < 4; e++) ds[m][n][e] = p[m][n][e] * (ds[m][n][e] - two[e % 2]);
                }
                pack(packed, ds);
            }
            if constexpr (kExchange) {
                store_scores<kColumns>(shared + At::passed + At::scores, packed, row - row0, first_column / 8);
                barrier_sync(1 + group, 2 * kWarpSize);
                accumulate_shared(sum[1], passed + At::scores + my_passed, ring + slot + my_width, passed_lane, lane);
            } else {
                if constexpr (WithDq) store_scores<kColumns>(shared + At::passed, packed, row - row0, 0);
                accumulate<D>(sum[kSums - 1], packed, ring + slot + (kOneEach && part == 0 ? At::passing : 0), lane);
            }
            if constexpr (WithDq) {
                __syncthreads(); // all of dSᵀ is there; it is read before the next turn's barrier
                add_dq<D, T.rows, T.warps>(sums, span.end - column, passed, keys, lane);
                sums += kColumns * D;
            }
            if constexpr (T.slots == 2) {
                slot ^= At::slot;
            } else {
                __syncthreads(); // everyone has left the only slot
                start(slot, column + kColumns);
            }
        }
    }

    int first = kExchange ? kWidth * part : 0; // of the columns of dV and dK
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int j = row + 16 * m + 8 * half;
            constexpr bool kAdd = std::is_same_v<Out, float>;
            if (!kOneEach || part == 0)
                store_row<kAdd>(dv.row(place.b, j, place.h) + first, sum[0][m], half, 1, j < s.Tk);
            if (!kOneEach || part == 1)
                store_row<kAdd>(dk.row(place.b, j, place.h) + first, sum[kSums - 1][m], half, s.scale, j < s.Tk);
        }
}

template <class T> Heads<T> group_of(Heads<T> x, int64_t first) {
    return {x.row(0, 0, first), x.batch, x.token, x.head};
}

} // namespace

template <class Out> void backward(Stream stream, Heads<Out> dq, Heads<Out> dk, Heads<Out> dv, Heads<const bf16> dout,
                                   Heads<const bf16> q, Heads<const bf16> k, Heads<const bf16> v, Heads<const bf16> o,
                                   const float* lse, float scale, void* scratch, const AttentionShape& whole) {
    if constexpr (std::is_same_v<real, bf16>) {
        const bool any_order = adds_in_any_order(whole) && std::is_same_v<Out, bf16>;
        const int64_t at_once = any_order ? heads_at_once(whole) : whole.H;
        auto run = [&](auto dim, auto room, int64_t h) {
            constexpr int D = dim;
            const AttentionShape shape = group_of(whole, std::min(at_once, whole.H - h));
            Heads<Out> dq_here = group_of(dq, h);
            Heads<const bf16> dout_here = group_of(dout, h), q_here = group_of(q, h), k_here = group_of(k, h),
                              v_here = group_of(v, h);
            const int64_t rows = shape.B * shape.H * shape.Tq;
            float* floats = static_cast<float*>(scratch);
            Statistics statistics{floats, floats + rows_of(shape)};
            float* sums = any_order ? floats + 2 * rows_of(shape) : nullptr;
            if (rows > 0)
                launch(prepare_kernel<D>, dim3(blocks_for(rows * kRowLanes<D>, kThreads)), dim3(kThreads), 0, stream,
                       statistics, sums, dout_here, group_of(o, h), lse + h * shape.Tq,
                       view_of(shape, scale, shape.Tq, 1));
            auto dk_dv = [&](auto with_dq) {
                if (shape.B * shape.H * shape.Tk == 0) return;
                constexpr bool kWithDq = with_dq;
                constexpr Room alike = first_alike(room, dk_dv_tile<D, kWithDq>);
                constexpr Tile tile = dk_dv_tile<D, kWithDq>(alike);
                using At = Layout<D, tile, exchanges<D>(tile) ? 2 : kWithDq>;
                static_assert(At::bytes <= bytes_of(room));
                View view = view_of(shape, scale, shape.Tk, tile.rows);
                launch(dk_dv_kernel<D, alike, kWithDq, Out>, grid_of(view), dim3(tile.threads()), At::bytes, stream,
                       group_of(dk, h), group_of(dv, h), sums, dout_here, q_here, k_here, v_here, statistics, view);
            };
            if constexpr (D == 64 && std::is_same_v<Out, bf16>)
                if (any_order) {
                    dk_dv(std::true_type());
                    if (rows > 0)
                        launch(finish_kernel<D>, dim3(blocks_for(rows * D, 4 * kThreads)), dim3(kThreads), 0, stream,
                               dq_here, sums, view_of(shape, scale, shape.Tq, 1));
                    return;
                }
            dk_dv(std::false_type());
            if (rows > 0) launch_dq(stream, dq_here, dout_here, q_here, k_here, v_here, statistics, scale, shape);
        };
        with_head_dim(whole.D, [&](auto dim) {
            with_room([&](auto room) {
                for (int64_t h = 0; h < whole.H; h += at_once) run(dim, room, h);
            });
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
