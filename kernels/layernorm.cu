// LayerNorm on the GPU, bound by memory: what a pass needs of a row is read from global memory once, 16 bytes an
// access.
//
// Narrow rows belong to one warp each, which needs no barrier; wider ones to a whole block. Either way a row stays in
// registers, as packs of N neighbours: thread `rank` of the row's threads holds packs rank, rank + width, ... Rows that
// are wider still, unaligned or of an odd length are read again in each sweep, which then finds them in the caches.
#include "layernorm.h"

#include <algorithm>

#include "common.h"
#include "device.h"
#include "launch.h"
#include "ptx.h"
#include "scratch.h"

namespace {

using namespace scratch::layernorm;

constexpr int kWide = Pack128<real>::size;

// use(pack index, held) for each pack of a row that belongs to thread `rank` of the row's `width` threads. kPacks > 0:
// `held` is the pack's place in the thread's registers; 0: any number of packs, and held is 0.
template <int kPacks, class Use>
__device__ __forceinline__ void each_pack(int rank, int width, int64_t packs, Use use) {
    if constexpr (kPacks > 0) {
#pragma unroll
        for (int held = 0; held < kPacks; held++) {
            const int i = rank + held * width;
            if (i < packs) use(static_cast<int64_t>(i), held);
        }
    } else {
        for (int64_t i = rank; i < packs; i += width) use(i, 0);
    }
}

// ---- Forward ----

struct ForwardArrays {
    real *residual, *out; // (N,C) each; residual only with kResidual
    float *mean, *rstd;   // (N) each
    const real *x, *y;    // (N,C) each; y only with kResidual
    const real *w, *b;    // (C) each
    int64_t N, C;
    float eps;
};

// x, or x + y rounded to real.
template <bool kResidual, int N> __device__ __forceinline__ Pack<real, N> load_row(const ForwardArrays& a, int64_t at) {
    Pack<real, N> x = load_pack<N>(a.x + at);
    if constexpr (kResidual) {
        Pack<real, N> y = load_pack<N>(a.y + at);
        float sum[N];
#pragma unroll
        for (int j = 0; j < N; j++) sum[j] = to_float(x[j]) + to_float(y[j]);
        x = round_pack<real>(sum);
    }
    return x;
}

constexpr int kForwardWarps = 4; // rows of a block, where each has a warp: short blocks, so that an SM is never idle
constexpr int kForwardHeld = 4;  // packs of a thread, where a row has a block

template <bool kResidual, int N, int kPacks, bool kWarp>
__global__ void __launch_bounds__(kWarp ? kForwardWarps* kWarpSize : 1024) forward(ForwardArrays a) {
    const int64_t n = kWarp ? int64_t(blockIdx.x) * kForwardWarps + warp_index() : int64_t(blockIdx.x);
    if (kWarp && n >= a.N) return;
    const int64_t packs = a.C / N, row = n * a.C;
    const int rank = kWarp ? lane_index() : static_cast<int>(threadIdx.x);
    const int width = kWarp ? kWarpSize : static_cast<int>(blockDim.x);
    float* scratch = kWarp ? nullptr : reinterpret_cast<float*>(dynamic_shared()); // (3,32)

    auto row_sum = [&](float x, int place) {
        if constexpr (kWarp) return warp_sum(x);
        return block_sum(x, scratch + 32 * place);
    };

    // All loads of the row are under way before the first is waited for.
    Pack<real, N> held_row[std::max(kPacks, 1)];
    if constexpr (kPacks > 0)
        each_pack<kPacks>(rank, width, packs,
                          [&](int64_t i, int p) { held_row[p] = load_row<kResidual, N>(a, row + i * N); });
    auto sweep = [&](auto use) {
        each_pack<kPacks>(rank, width, packs, [&](int64_t i, int p) {
            if constexpr (kPacks == 0) held_row[0] = load_row<kResidual, N>(a, row + i * N);
            use(i * N, held_row[p]);
        });
    };

    float sum = 0;
    sweep([&](int64_t, const Pack<real, N>& x) {
#pragma unroll
        for (int j = 0; j < N; j++) sum += to_float(x[j]);
    });
    const float mean = row_sum(sum, 0) / a.C;

    // Exact arithmetic would make Σ (x − mean) zero: what rounding left of it corrects mean and variance (Chan, Golub &
    // LeVeque 1983).
    float d1 = 0, d2 = 0;
    sweep([&](int64_t, const Pack<real, N>& x) {
#pragma unroll
        for (int j = 0; j < N; j++) {
            float d = to_float(x[j]) - mean;
            d1 += d;
            d2 += d * d;
        }
    });
    const float correction = row_sum(d1, 1) / a.C;
    const float variance = row_sum(d2, 2) / a.C - correction * correction;
    const float center = mean + correction, rstd = 1 / sqrtf(variance + a.eps);
    if (rank == 0) store_global(a.mean + n, center), store_global(a.rstd + n, rstd);

    sweep([&](int64_t c, const Pack<real, N>& x) {
        Pack<real, N> w = load_pack<N>(a.w + c), b = load_pack<N>(a.b + c);
        float y[N];
#pragma unroll
        for (int j = 0; j < N; j++) y[j] = (to_float(x[j]) - center) * rstd * to_float(w[j]) + to_float(b[j]);
        if constexpr (kResidual) store_pack(a.residual + row + c, x);
        store_pack(a.out + row + c, round_pack<real>(y));
    });
}

// Threads that hold `packs` packs, `each` apiece, in whole warps.
unsigned threads_for(int64_t packs, int64_t each) {
    int64_t threads = (packs + each - 1) / each;
    return static_cast<unsigned>((threads + kWarpSize - 1) / kWarpSize * kWarpSize);
}

template <bool kResidual> void run_forward(Stream stream, const ForwardArrays& a) {
    if (a.N == 0) return;
    constexpr size_t kScratch = 3 * 32 * sizeof(float);
    bool wide = a.C % kWide == 0 && aligned(a.out) && aligned(a.x) && aligned(a.w) && aligned(a.b);
    if (kResidual) wide = wide && aligned(a.residual) && aligned(a.y);
    const int64_t packs = a.C / kWide;
    auto a_warp_each = [&](auto kernel) {
        launch(kernel, blocks_for(a.N, kForwardWarps), kForwardWarps * kWarpSize, 0, stream, a);
    };
    if (!wide)
        launch(forward<kResidual, 1, 0, false>, blocks_for(a.N, 1), std::min(threads_for(a.C, 4), 512u), kScratch,
               stream, a);
    else if (packs <= kWarpSize)
        a_warp_each(forward<kResidual, kWide, 1, true>);
    else if (packs <= 2 * kWarpSize)
        a_warp_each(forward<kResidual, kWide, 2, true>);
    else if (packs <= 4 * kWarpSize) // 1024 columns of bf16
        a_warp_each(forward<kResidual, kWide, 4, true>);
    else if (packs <= 8 * kWarpSize)
        a_warp_each(forward<kResidual, kWide, 8, true>);
    else if (packs <= 1024 * kForwardHeld) // 32768 columns of bf16, 16384 of floats
        launch(forward<kResidual, kWide, kForwardHeld, false>, blocks_for(a.N, 1), threads_for(packs, kForwardHeld),
               kScratch, stream, a);
    else
        launch(forward<kResidual, kWide, 0, false>, blocks_for(a.N, 1), 1024, kScratch, stream, a);
}

// ---- Backward ----
//
// With norm = (x − mean)·rstd and dnorm = dout·w:
//   dinp += rstd · (dnorm − Σ_c dnorm / C − norm · Σ_c dnorm·norm / C)       dw += Σ_n dout·norm      db += Σ_n dout
//
// A fixed number of blocks goes over the rows, and each thread adds up dw and db of its columns: in registers, or, of
// rows too wide for that, in the block's part of scratch. A second kernel adds the blocks' parts. Blocks and rows are
// dealt out by N and C alone, never by the card, so that every card computes the same bits.

struct BackwardArrays {
    real* dinp;               // (N,C)
    const real *dout, *inp;   // (N,C) each
    const real* w;            // (C)
    const float *mean, *rstd; // (N) each
    float* parts;             // (blocks,2,stride): dw and db of each block
    int64_t N, C, stride;
    int row_warps; // threads of a row / 32
};

// A warp takes no rows of 4 packs: with their sums, floats of x and dout that the compiler keeps from the first sweep
// to the second, and dinp, they need more than the 128 registers that let two such blocks be there.
constexpr int kWarpFormWarps = 8;   // of a block where each row has one warp: 128 registers a thread
constexpr int kGroupFormWarps = 16; // of a block where a row has more, in whole rows: 64 registers a thread
constexpr int64_t kWarpColumns = 3 * kWarpSize * kWide; // the widest row for a warp: GPT-2's 768 of bf16
constexpr int64_t kGroupColumns = 1024 * kWide;         // the widest row for a block with one pack a thread

template <int N> __device__ __forceinline__ void store_sums(float* to, const float (&sums)[N]) {
    if constexpr (N == 1) {
        store_global(to, sums[0]);
    } else {
#pragma unroll
        for (int j = 0; j < N; j += 4) {
            Pack<float, 4> four;
#pragma unroll
            for (int k = 0; k < 4; k++) four[k] = sums[j + k];
            store_pack(to + j, four);
        }
    }
}

// Both sums over the `warps` warps of a group, at one barrier of its own. scratch: 64 floats.
__device__ __forceinline__ void group_sums(float& s1, float& s2, float* scratch, int group, int warps) {
    s1 = warp_sum(s1), s2 = warp_sum(s2);
    const int warp = warp_index() - group * warps, lane = lane_index();
    if (lane == 0) store_shared(scratch + warp, s1), store_shared(scratch + 32 + warp, s2);
    barrier_sync(1 + group, warps * kWarpSize);
    s1 = warp_sum(lane < warps ? load_shared(scratch + lane) : 0);
    s2 = warp_sum(lane < warps ? load_shared(scratch + 32 + lane) : 0);
}

// A row to each warp (kWarp) or each group of row_warps warps, its packs in registers. `groups` stands for warps too.
template <int kPacks, bool kWarp>
__global__ void __launch_bounds__(kWarp ? kWarpFormWarps* kWarpSize : 1024, kWarp ? 2 : 1) backward(BackwardArrays a) {
    constexpr int N = kWide;
    const int row_warps = kWarp ? 1 : a.row_warps, width = row_warps * kWarpSize;
    const int group = warp_index() / row_warps, rank = static_cast<int>(threadIdx.x) - group * width;
    const int groups = static_cast<int>(blockDim.x) / width;
    const int64_t packs = a.C / N;
    float* group_scratch = reinterpret_cast<float*>(dynamic_shared()) + group * 128; // (groups,2,64), unless kWarp
    float* block_sums = reinterpret_cast<float*>(dynamic_shared()) + (kWarp ? 0 : groups * 128); // (2,stride)
    float dw[kPacks][N] = {}, db[kPacks][N] = {};

    int parity = 0;
    for (int64_t n = blockIdx.x + int64_t(gridDim.x) * group; n < a.N; n += int64_t(gridDim.x) * groups) {
        const int64_t row = n * a.C;
        Pack<real, N> x[kPacks], g[kPacks], dx[kPacks];
        each_pack<kPacks>(rank, width, packs, [&](int64_t i, int p) {
            x[p] = load_pack<N>(a.inp + row + i * N);
            g[p] = load_pack<N>(a.dout + row + i * N);
            dx[p] = load_pack<N>(a.dinp + row + i * N);
        });
        const float mean = load_global(a.mean + n), rstd = load_global(a.rstd + n);
        float s1 = 0, s2 = 0;
        each_pack<kPacks>(rank, width, packs, [&](int64_t i, int p) {
            Pack<real, N> w = load_pack<N>(a.w + i * N);
#pragma unroll
            for (int j = 0; j < N; j++) {
                float norm = (to_float(x[p][j]) - mean) * rstd, d = to_float(g[p][j]);
                dw[p][j] += d * norm;
                db[p][j] += d;
                float dnorm = d * to_float(w[j]);
                s1 += dnorm;
                s2 += dnorm * norm;
            }
        });
        if constexpr (kWarp) {
            s1 = warp_sum(s1), s2 = warp_sum(s2);
        } else {
            // Two places in turn: the next row's barrier lies between this row's reads and the next but one's writes.
            group_sums(s1, s2, group_scratch + parity * 64, group, row_warps);
            parity ^= 1;
        }
        const float mean1 = s1 / a.C, mean2 = s2 / a.C;
        each_pack<kPacks>(rank, width, packs, [&](int64_t i, int p) {
            Pack<real, N> w = load_pack<N>(a.w + i * N);
            float sum[N];
#pragma unroll
            for (int j = 0; j < N; j++) {
                float norm = (to_float(x[p][j]) - mean) * rstd;
                sum[j] = to_float(dx[p][j]) + (to_float(g[p][j]) * to_float(w[j]) - mean1 - norm * mean2) * rstd;
            }
            store_pack(a.dinp + row + i * N, round_pack<real>(sum));
        });
    }

    // One group after the other adds its sums to the block's, so that the order is fixed.
    for (int turn = 0; turn + 1 < groups; turn++) {
        if (turn == group)
            each_pack<kPacks>(rank, width, packs, [&](int64_t i, int p) {
                float *dw_at = block_sums + i * N, *db_at = dw_at + a.stride;
#pragma unroll
                for (int j = 0; j < N; j++) {
                    store_shared(dw_at + j, dw[p][j] + (turn ? load_shared(dw_at + j) : 0));
                    store_shared(db_at + j, db[p][j] + (turn ? load_shared(db_at + j) : 0));
                }
            });
        __syncthreads();
    }
    if (group + 1 < groups) return;
    float* part = a.parts + int64_t(blockIdx.x) * 2 * a.stride;
    each_pack<kPacks>(rank, width, packs, [&](int64_t i, int p) {
#pragma unroll
        for (int j = 0; j < N; j++) {
            if (groups > 1) dw[p][j] += load_shared(block_sums + i * N + j);
            if (groups > 1) db[p][j] += load_shared(block_sums + a.stride + i * N + j);
        }
        store_sums(part + i * N, dw[p]);
        store_sums(part + a.stride + i * N, db[p]);
    });
}

// A row to the block, any width: the second sweep finds the row in the caches, and the block's sums lie in its part of
// scratch, where each element has one thread.
template <int N> __global__ void __launch_bounds__(1024) backward_any(BackwardArrays a) {
    const int64_t packs = a.C / N;
    const int rank = static_cast<int>(threadIdx.x), width = static_cast<int>(blockDim.x);
    float* shared = reinterpret_cast<float*>(dynamic_shared()); // (2,64)
    float *dw_part = a.parts + int64_t(blockIdx.x) * 2 * a.stride, *db_part = dw_part + a.stride;

    int parity = 0;
    for (int64_t n = blockIdx.x; n < a.N; n += gridDim.x) {
        const int64_t row = n * a.C;
        const bool first = n == blockIdx.x;
        const float mean = load_global(a.mean + n), rstd = load_global(a.rstd + n);
        float s1 = 0, s2 = 0;
        each_pack<0>(rank, width, packs, [&](int64_t i, int) {
            Pack<real, N> x = load_pack<N>(a.inp + row + i * N), g = load_pack<N>(a.dout + row + i * N);
            Pack<real, N> w = load_pack<N>(a.w + i * N);
            float dw[N], db[N];
#pragma unroll
            for (int j = 0; j < N; j++) {
                float norm = (to_float(x[j]) - mean) * rstd, d = to_float(g[j]);
                dw[j] = d * norm + (first ? 0 : dw_part[i * N + j]);
                db[j] = d + (first ? 0 : db_part[i * N + j]);
                float dnorm = d * to_float(w[j]);
                s1 += dnorm;
                s2 += dnorm * norm;
            }
            store_sums(dw_part + i * N, dw);
            store_sums(db_part + i * N, db);
        });
        float* scratch = shared + parity * 64;
        parity ^= 1;
        group_sums(s1, s2, scratch, 0, width / kWarpSize);
        const float mean1 = s1 / a.C, mean2 = s2 / a.C;
        each_pack<0>(rank, width, packs, [&](int64_t i, int) {
            Pack<real, N> x = load_pack<N>(a.inp + row + i * N), g = load_pack<N>(a.dout + row + i * N);
            Pack<real, N> w = load_pack<N>(a.w + i * N), dx = load_pack<N>(a.dinp + row + i * N);
            float sum[N];
#pragma unroll
            for (int j = 0; j < N; j++) {
                float norm = (to_float(x[j]) - mean) * rstd;
                sum[j] = to_float(dx[j]) + (to_float(g[j]) * to_float(w[j]) - mean1 - norm * mean2) * rstd;
            }
            store_pack(a.dinp + row + i * N, round_pack<real>(sum));
        });
    }
}

constexpr int kAddWarps = 16;

// dw (C) += Σ over the blocks' parts, db (C) likewise: block x takes 32 columns of dw (y = 0) or db (y = 1); its warps
// take every kAddWarps-th part, and their sums are added in order.
__global__ void __launch_bounds__(kAddWarps* kWarpSize)
    add_parts(float* dw, float* db, const float* parts, int blocks, int64_t C, int64_t stride) {
    float* shared = reinterpret_cast<float*>(dynamic_shared()); // (kAddWarps,32)
    const int64_t c = int64_t(blockIdx.x) * kWarpSize + lane_index();
    float sum = 0;
    if (c < C) {
        const float* column = parts + blockIdx.y * stride + c; // of part 0
#pragma unroll 8
        for (int block = warp_index(); block < blocks; block += kAddWarps)
            sum += load_global(column + block * 2 * stride);
    }
    store_shared(shared + threadIdx.x, sum);
    __syncthreads();
    if (warp_index() != 0 || c >= C) return;
    for (int warp = 1; warp < kAddWarps; warp++) sum += load_shared(shared + warp * kWarpSize + lane_index());
    float* to = (blockIdx.y == 0 ? dw : db) + c;
    store_global(to, load_global(to) + sum);
}

} // namespace

void layernorm_forward(Stream stream, real* out, float* mean, float* rstd, const real* inp, const real* w,
                       const real* b, int64_t N, int64_t C, float eps) {
    run_forward<false>(stream, {nullptr, out, mean, rstd, inp, nullptr, w, b, N, C, eps});
}

void residual_layernorm_forward(Stream stream, real* residual, real* out, float* mean, float* rstd, const real* x,
                                const real* y, const real* w, const real* b, int64_t N, int64_t C, float eps) {
    run_forward<true>(stream, {residual, out, mean, rstd, x, y, w, b, N, C, eps});
}

void layernorm_backward(Stream stream, real* dinp, float* dw, float* db, const real* dout, const real* inp,
                        const real* w, const float* mean, const float* rstd, void* scratch, int64_t N, int64_t C) {
    if (N == 0) return;
    float* parts = static_cast<float*>(scratch);
    const unsigned blocks = static_cast<unsigned>(backward_blocks(N));
    BackwardArrays a{dinp, dout, inp, w, mean, rstd, parts, N, C, part_stride(C), 1};
    const bool wide = C % kWide == 0 && aligned(dinp) && aligned(dout) && aligned(inp) && aligned(w);
    const size_t block_sums = 2 * a.stride * sizeof(float);
    constexpr size_t kGroupScratch = 2 * 64 * sizeof(float);
    auto a_warp_each = [&](auto kernel) { launch(kernel, blocks, kWarpFormWarps * kWarpSize, block_sums, stream, a); };
    if (!wide) {
        launch(backward_any<1>, blocks, std::min(threads_for(C, 4), 512u), kGroupScratch, stream, a);
    } else if (C > kGroupColumns) {
        launch(backward_any<kWide>, blocks, 1024, kGroupScratch, stream, a);
    } else if (C > kWarpColumns) {
        const unsigned threads = threads_for(C / kWide, 1);
        a.row_warps = static_cast<int>(threads) / kWarpSize;
        const int groups = std::max(1, kGroupFormWarps / a.row_warps);
        launch(backward<1, false>, blocks, groups * threads, groups * kGroupScratch + (groups > 1 ? block_sums : 0),
               stream, a);
    } else if (C > 2 * kWarpSize * kWide) {
        a_warp_each(backward<3, true>);
    } else if (C > kWarpSize * kWide) {
        a_warp_each(backward<2, true>);
    } else {
        a_warp_each(backward<1, true>);
    }
    launch(add_parts, dim3(blocks_for(C, kWarpSize), 2), kAddWarps * kWarpSize, kAddWarps * kWarpSize * sizeof(float),
           stream, dw, db, parts, blocks, C, a.stride);
}
