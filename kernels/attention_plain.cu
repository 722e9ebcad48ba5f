// Attention on the GPU's ordinary float units: the algorithm of FlashAttention without tensor cores, copies ahead of
// use or a layout for speed. The one to read first; it takes any head dim and any alignment.
//
// All three passes have one shape. A block owns kOwnRows rows of one head and walks along the rows of the other side,
// kMetRows at a time, which it copies to shared memory as floats:
//
//            owns        meets       each met tile                                       keeps in registers
//   forward  queries     keys        S = Q·Kᵀ, weights = exp(S − largest)                O += weights·V
//   dQ       queries     keys        S = Q·Kᵀ, dP = dO·Vᵀ, dS = P∘(dP − Δ)               dQ += dS·K
//   dK, dV   keys        queries     S = K·Qᵀ, dP = V·dOᵀ, dS = P∘(dP − Δ)               dV += P·dO, dK += dS·Q
//
// Each is two kinds of product, and a warp changes its lanes' roles between them. In a score product (dot_rows) a lane
// is a met row: it holds that row's scores with the warp's own rows, so that no sum crosses lanes. In a gathering
// product (add_rows) a lane is every 32nd column of the result. The weights pass from the one to the other through
// shared memory. Every sum has one order, whatever else runs, so results are the same bits in every run.
#include "attention_plain.h"

#include "common.h"
#include "device.h"
#include "launch.h"

namespace plain {
namespace {

// Four rows a warp: each value read from shared memory then meets four others from registers. Eight would no longer fit
// two owned and two met tiles of D = 256 into the 99 KB that smaller cards have for a block.
constexpr int kWarps = 4, kWarpRows = 4, kThreads = kWarps * kWarpSize;
constexpr int kOwnRows = kWarps * kWarpRows;
constexpr int kMetRows = kWarpSize;

// A lane reads its met row 16 bytes at a time, eight lanes together. Rows 4 floats longer than a multiple of 16 floats
// put those eight on different banks.
template <int D> constexpr int kMetStride = D + 4;
template <int D> constexpr int kColumns = (D + kWarpSize - 1) / kWarpSize; // of the result, per lane

// Shared memory: two owned tiles (kOwnRows,D), two met ones (kMetRows,kMetStride), weights (kOwnRows,kMetRows).
template <int D> struct Tiles {
    static constexpr int own_size = kOwnRows * D, met_size = kMetRows * kMetStride<D>;
    static constexpr size_t bytes = (2 * own_size + 2 * met_size + kOwnRows * kMetRows) * sizeof(float);
    static_assert(bytes <= 99 * 1024, "more shared memory than cards of compute capability 8.6 and 8.9 have");

    float* base = reinterpret_cast<float*>(dynamic_shared());

    __device__ float* own(int which) const { return base + which * own_size; }
    __device__ float* met(int which) const { return base + 2 * own_size + which * met_size; }
    // The part of this warp's rows.
    __device__ const float* own_rows(int which) const { return own(which) + warp_index() * kWarpRows * D; }
    __device__ float* weights() const { return base + 2 * (own_size + met_size) + warp_index() * kWarpRows * kMetRows; }
};

// Blocks that should run on a multiprocessor at once, which bounds their registers: as many as find room in an A100's
// 164 KB of shared memory, but no more than four, which leave 128 registers to a thread. With five, 96 are too few.
template <int D> constexpr int kBlocks = Tiles<D>::bytes > 40 * 1024 ? 164 * 1024 / (Tiles<D>::bytes + 1024) : 4;

// The block's share of the work: the rows first .. first + kOwnRows of one head.
struct Work {
    int64_t b, h, first;
};

// Heads vary fastest, so that the first blocks are the heaviest tiles of all heads: what is left at the end is light.
// Causal rows grow along the queries and shrink along the keys.
__device__ __forceinline__ Work work_of_block(const AttentionShape& s, int64_t rows, bool last_first) {
    int64_t tiles = (rows + kOwnRows - 1) / kOwnRows, heads = s.B * s.H;
    int64_t tile = blockIdx.x / heads, head = blockIdx.x % heads;
    return {head / s.H, head % s.H, (last_first ? tiles - 1 - tile : tile) * kOwnRows};
}

// tile (rows,stride) := rows first .. of x as floats; zeros from row `end` on, which x does not have or nobody sees.
template <int D> __device__ __forceinline__ void load_tile(float* tile, int stride, int rows, Heads<const real> x,
                                                           const Work& work, int64_t first, int64_t end) {
    for (int r = warp_index(); r < rows; r += kWarps) {
        const real* row = x.row(work.b, first + r, work.h);
        bool exists = first + r < end;
        for (int d = lane_index(); d < D; d += kWarpSize)
            store_shared(tile + r * stride + d, exists ? to_float(load_global(row + d)) : 0.f);
    }
}

// sums[r] = own[r]·met over D columns. own: kWarpRows rows of D floats, the same for all lanes; met: this lane's row.
template <int D>
__device__ __forceinline__ void dot_rows(float (&sums)[kWarpRows], const float* own, const float* met) {
#pragma unroll
    for (int r = 0; r < kWarpRows; r++) sums[r] = 0;
#pragma unroll 4
    for (int d = 0; d < D; d += 4) {
        Pack128<float> y = load128_shared(met + d);
#pragma unroll
        for (int r = 0; r < kWarpRows; r++) {
            Pack128<float> x = load128_shared(own + r * D + d);
            // Four products meet the sum as one, which then rounds a quarter as often.
            sums[r] += x[0] * y[0] + x[1] * y[1] + x[2] * y[2] + x[3] * y[3];
        }
    }
}

// out[r][c] += Σ_j weights[r][j] · met[j][column], for this lane's columns lane + 32·c.
// weights (kWarpRows,kMetRows), met (kMetRows,kMetStride).
template <int D>
__device__ __forceinline__ void add_rows(float (&out)[kWarpRows][kColumns<D>], const float* weights, const float* met) {
#pragma unroll 1
    for (int j = 0; j < kMetRows; j += 4) {
        Pack128<float> w[kWarpRows];
#pragma unroll
        for (int r = 0; r < kWarpRows; r++) w[r] = load128_shared(weights + r * kMetRows + j);
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int c = 0; c < kColumns<D>; c++) {
                int column = lane_index() + c * kWarpSize;
                float x = column < D ? load_shared(met + (j + i) * kMetStride<D> + column) : 0.f;
#pragma unroll
                for (int r = 0; r < kWarpRows; r++) out[r][c] += w[r][i] * x;
            }
    }
}

// Row t of the head: `=` or `+=` factor · values, if there is such a row.
template <int D, class Out> __device__ __forceinline__ void write_row(Heads<Out> to, const Work& work, int64_t t,
                                                                      int64_t end, const float (&values)[kColumns<D>],
                                                                      float factor, bool add) {
    if (t >= end) return;
    Out* row = to.row(work.b, t, work.h);
#pragma unroll
    for (int c = 0; c < kColumns<D>; c++) {
        int column = lane_index() + c * kWarpSize;
        if (column >= D) continue;
        float before = add ? to_float(load_global(row + column)) : 0.f;
        Out rounded;
        assign(rounded, before + factor * values[c]);
        store_global(row + column, rounded);
    }
}

// The keys begin .. end − 1 that a query sees; none if end <= begin, or if the query does not exist.
struct Seen {
    int64_t begin, end;
    __device__ bool has(int64_t j) const { return j >= begin && j < end; }
};
__device__ __forceinline__ Seen seen_by(const AttentionShape& s, int64_t b, int64_t i) {
    if (i >= s.Tq) return {0, 0};
    int64_t begin = s.doc_start ? load_global(s.doc_start + b * s.Tq + i) - s.k_offset : 0;
    int64_t end = s.q_offset + i + 1 - s.k_offset;
    return {begin > 0 ? begin : 0, end < s.Tk ? end : s.Tk};
}

// The keys that any of the block's queries sees: documents never go back, so it is from the first query's first key to
// the last query's last.
__device__ __forceinline__ Seen seen_by_tile(const AttentionShape& s, const Work& work) {
    int64_t last = work.first + kOwnRows < s.Tq ? work.first + kOwnRows - 1 : s.Tq - 1;
    return {seen_by(s, work.b, work.first).begin, seen_by(s, work.b, last).end};
}

// Where (b,h,0) is in an array (B,H,Tq) whose sequences are `batch` elements apart.
__device__ __forceinline__ int64_t head_start(const AttentionShape& s, const Work& work, int64_t batch) {
    return work.b * batch + work.h * s.Tq;
}

// The softmax is taken online: weights are relative to the largest score so far, and when that grows, what has been
// summed is scaled down.
template <int D, class Out> __global__ void __launch_bounds__(kThreads, kBlocks<D>)
    forward_kernel(Heads<Out> o, float* lse, Heads<const real> q, Heads<const real> k, Heads<const real> v, float scale,
                   AttentionShape s) {
    Tiles<D> tiles;
    Work work = work_of_block(s, s.Tq, true);
    int64_t first = work.first + warp_index() * kWarpRows; // this warp's first query
    load_tile<D>(tiles.own(0), D, kOwnRows, q, work, work.first, s.Tq);

    Seen seen[kWarpRows];
    float largest[kWarpRows], sum[kWarpRows] /* over this lane's keys */, out[kWarpRows][kColumns<D>] = {};
#pragma unroll
    for (int r = 0; r < kWarpRows; r++) {
        seen[r] = seen_by(s, work.b, first + r);
        largest[r] = -INFINITY, sum[r] = 0;
    }

    Seen any = seen_by_tile(s, work);
    for (int64_t j = any.begin; j < any.end; j += kMetRows) {
        __syncthreads(); // all warps are done with the last tile
        load_tile<D>(tiles.met(0), kMetStride<D>, kMetRows, k, work, j, any.end);
        load_tile<D>(tiles.met(1), kMetStride<D>, kMetRows, v, work, j, any.end);
        __syncthreads();

        float score[kWarpRows];
        dot_rows<D>(score, tiles.own_rows(0), tiles.met(0) + lane_index() * kMetStride<D>);
#pragma unroll
        for (int r = 0; r < kWarpRows; r++) {
            float x = seen[r].has(j + lane_index()) ? scale * score[r] : -INFINITY;
            // A NaN loses this comparison, so that the maximum stays a number; its weight is NaN all the same.
            float grown = warp_max(x > largest[r] ? x : largest[r]);
            // Before the first visible key any finite number will do in its place: all weights are 0.
            float shift = grown == -INFINITY ? 0.f : grown;
            float weight = expf(x - shift), keep = expf(largest[r] - shift);
            largest[r] = grown;
            sum[r] = sum[r] * keep + weight;
#pragma unroll
            for (int c = 0; c < kColumns<D>; c++) out[r][c] *= keep;
            store_shared(tiles.weights() + r * kMetRows + lane_index(), weight);
        }
        __syncwarp();
        add_rows<D>(out, tiles.weights(), tiles.met(1));
    }

    float* head_lse = lse + head_start(s, work, s.lse_batch);
#pragma unroll
    for (int r = 0; r < kWarpRows; r++) {
        float total = warp_sum(sum[r]);
        bool nothing = total == 0;
        write_row<D>(o, work, first + r, s.Tq, out[r], nothing ? 0.f : 1 / total, false);
        if (lane_index() == 0 && first + r < s.Tq)
            store_global(head_lse + first + r, nothing ? -INFINITY : largest[r] + logf(total));
    }
}

// delta (B,H,Tq) = Σ_d dO·O, a warp for each row.
__global__ void __launch_bounds__(kThreads)
    delta_kernel(float* delta, Heads<const real> dout, Heads<const real> o, AttentionShape s) {
    int64_t n = global_thread() / kWarpSize; // index in (B,H,Tq)
    if (n >= s.B * s.H * s.Tq) return;
    int64_t t = n % s.Tq, h = n / s.Tq % s.H, b = n / s.Tq / s.H;
    const real *x = dout.row(b, t, h), *y = o.row(b, t, h);
    float sum = 0;
    for (int64_t d = lane_index(); d < s.D; d += kWarpSize)
        sum += to_float(load_global(x + d)) * to_float(load_global(y + d));
    sum = warp_sum(sum);
    if (lane_index() == 0) store_global(delta + n, sum);
}

template <int D, class Out> __global__ void __launch_bounds__(kThreads, kBlocks<D>)
    dq_kernel(Heads<Out> dq, Heads<const real> dout, Heads<const real> q, Heads<const real> k, Heads<const real> v,
              const float* lse, const float* delta, float scale, AttentionShape s, bool add) {
    Tiles<D> tiles;
    Work work = work_of_block(s, s.Tq, true);
    int64_t first = work.first + warp_index() * kWarpRows; // this warp's first query
    load_tile<D>(tiles.own(0), D, kOwnRows, q, work, work.first, s.Tq);
    load_tile<D>(tiles.own(1), D, kOwnRows, dout, work, work.first, s.Tq);

    const float* head_lse = lse + head_start(s, work, s.lse_batch);
    const float* head_delta = delta + head_start(s, work, s.H * s.Tq);
    Seen seen[kWarpRows];
    float row_lse[kWarpRows], row_delta[kWarpRows], out[kWarpRows][kColumns<D>] = {};
#pragma unroll
    for (int r = 0; r < kWarpRows; r++) {
        bool exists = first + r < s.Tq;
        seen[r] = seen_by(s, work.b, first + r);
        row_lse[r] = exists ? load_global(head_lse + first + r) : 0.f;
        row_delta[r] = exists ? load_global(head_delta + first + r) : 0.f;
    }

    Seen any = seen_by_tile(s, work);
    for (int64_t j = any.begin; j < any.end; j += kMetRows) {
        __syncthreads(); // all warps are done with the last tile
        load_tile<D>(tiles.met(0), kMetStride<D>, kMetRows, k, work, j, any.end);
        load_tile<D>(tiles.met(1), kMetStride<D>, kMetRows, v, work, j, any.end);
        __syncthreads();

        float score[kWarpRows], dp[kWarpRows];
        dot_rows<D>(score, tiles.own_rows(0), tiles.met(0) + lane_index() * kMetStride<D>);
        dot_rows<D>(dp, tiles.own_rows(1), tiles.met(1) + lane_index() * kMetStride<D>);
#pragma unroll
        for (int r = 0; r < kWarpRows; r++) {
            float p = expf(scale * score[r] - row_lse[r]);
            float ds = seen[r].has(j + lane_index()) ? p * (dp[r] - row_delta[r]) : 0.f;
            store_shared(tiles.weights() + r * kMetRows + lane_index(), ds);
        }
        __syncwarp();
        add_rows<D>(out, tiles.weights(), tiles.met(0));
    }
#pragma unroll
    for (int r = 0; r < kWarpRows; r++) write_row<D>(dq, work, first + r, s.Tq, out[r], scale, add);
}

template <int D, class Out> __global__ void __launch_bounds__(kThreads, kBlocks<D>)
    dkdv_kernel(Heads<Out> dk, Heads<Out> dv, Heads<const real> dout, Heads<const real> q, Heads<const real> k,
                Heads<const real> v, const float* lse, const float* delta, float scale, AttentionShape s, bool add) {
    Tiles<D> tiles;
    Work work = work_of_block(s, s.Tk, false);
    int64_t first = work.first + warp_index() * kWarpRows; // this warp's first key
    load_tile<D>(tiles.own(0), D, kOwnRows, k, work, work.first, s.Tk);
    load_tile<D>(tiles.own(1), D, kOwnRows, v, work, work.first, s.Tk);

    const float* head_lse = lse + head_start(s, work, s.lse_batch);
    const float* head_delta = delta + head_start(s, work, s.H * s.Tq);
    float dk_sum[kWarpRows][kColumns<D>] = {}, dv_sum[kWarpRows][kColumns<D>] = {};

    // The first query that sees one of these keys stands where the first of them does. From the multiple of kMetRows
    // before it, so that a document that begins at such a multiple begins a tile.
    int64_t begin = s.k_offset + work.first - s.q_offset;
    begin = begin > 0 ? begin - begin % kMetRows : 0;
    int64_t own_end = work.first + kOwnRows < s.Tk ? work.first + kOwnRows : s.Tk;
    for (int64_t i = begin; i < s.Tq; i += kMetRows) {
        if (seen_by(s, work.b, i).begin >= own_end) break; // this document and all later ones begin behind these keys
        __syncthreads();                                   // all warps are done with the last tile
        load_tile<D>(tiles.met(0), kMetStride<D>, kMetRows, q, work, i, s.Tq);
        load_tile<D>(tiles.met(1), kMetStride<D>, kMetRows, dout, work, i, s.Tq);
        __syncthreads();

        int64_t query = i + lane_index();
        Seen seen = seen_by(s, work.b, query);
        float lane_lse = query < s.Tq ? load_global(head_lse + query) : 0.f;
        float lane_delta = query < s.Tq ? load_global(head_delta + query) : 0.f;
        float score[kWarpRows], ds[kWarpRows];
        dot_rows<D>(score, tiles.own_rows(0), tiles.met(0) + lane_index() * kMetStride<D>);
        dot_rows<D>(ds, tiles.own_rows(1), tiles.met(1) + lane_index() * kMetStride<D>);
#pragma unroll
        for (int r = 0; r < kWarpRows; r++) {
            bool visible = seen.has(first + r);
            float p = visible ? expf(scale * score[r] - lane_lse) : 0.f;
            ds[r] = visible ? p * (ds[r] - lane_delta) : 0.f;
            store_shared(tiles.weights() + r * kMetRows + lane_index(), p);
        }
        __syncwarp();
        add_rows<D>(dv_sum, tiles.weights(), tiles.met(1));
        __syncwarp(); // P has been read, dS takes its place
#pragma unroll
        for (int r = 0; r < kWarpRows; r++) store_shared(tiles.weights() + r * kMetRows + lane_index(), ds[r]);
        __syncwarp();
        add_rows<D>(dk_sum, tiles.weights(), tiles.met(0));
    }
#pragma unroll
    for (int r = 0; r < kWarpRows; r++) {
        write_row<D>(dk, work, first + r, s.Tk, dk_sum[r], scale, add);
        write_row<D>(dv, work, first + r, s.Tk, dv_sum[r], 1, add);
    }
}

// body(std::integral_constant<int, D>) for the head dim at hand.
template <class Body> void with_head_dim(int64_t D, Body body) {
    if (D == 32) return body(std::integral_constant<int, 32>());
    if (D == 64) return body(std::integral_constant<int, 64>());
    if (D == 80) return body(std::integral_constant<int, 80>());
    if (D == 128) return body(std::integral_constant<int, 128>());
    if (D == 256) return body(std::integral_constant<int, 256>());
    require(false, "attention: no plain kernel for this head dim; it must be 32, 64, 80, 128 or 256");
}

unsigned blocks_of(const AttentionShape& s, int64_t rows) {
    return blocks_for((rows + kOwnRows - 1) / kOwnRows * s.B * s.H, 1);
}

template <class Out> void run_forward(Stream stream, Heads<Out> o, float* lse, Heads<const real> q, Heads<const real> k,
                                      Heads<const real> v, float scale, const AttentionShape& shape) {
    AttentionShape s = shape;
    s.lse_batch = shape.lse_stride();
    with_head_dim(s.D, [&](auto D) {
        if (s.B * s.H * s.Tq > 0)
            launch(forward_kernel<D, Out>, blocks_of(s, s.Tq), kThreads, Tiles<D>::bytes, stream, o, lse, q, k, v,
                   scale, s);
    });
}

template <class Out> void run_backward(Stream stream, Heads<Out> dq, Heads<Out> dk, Heads<Out> dv,
                                       Heads<const real> dout, Heads<const real> q, Heads<const real> k,
                                       Heads<const real> v, Heads<const real> o, const float* lse, float scale,
                                       void* scratch, const AttentionShape& shape, bool add) {
    AttentionShape s = shape;
    s.lse_batch = shape.lse_stride();
    float* delta = static_cast<float*>(scratch); // (B,H,Tq)
    with_head_dim(s.D, [&](auto D) {
        if (s.B * s.H * s.Tq > 0) {
            launch(delta_kernel, blocks_for(s.B * s.H * s.Tq, kWarps), kThreads, 0, stream, delta, dout, o, s);
            launch(dq_kernel<D, Out>, blocks_of(s, s.Tq), kThreads, Tiles<D>::bytes, stream, dq, dout, q, k, v, lse,
                   delta, scale, s, add);
        }
        if (s.B * s.H * s.Tk > 0)
            launch(dkdv_kernel<D, Out>, blocks_of(s, s.Tk), kThreads, Tiles<D>::bytes, stream, dk, dv, dout, q, k, v,
                   lse, delta, scale, s, add);
    });
}

} // namespace

void forward(Stream stream, Heads<real> o, float* lse, Heads<const real> q, Heads<const real> k, Heads<const real> v,
             float scale, const AttentionShape& shape) {
    run_forward(stream, o, lse, q, k, v, scale, shape);
}
void forward_partial(Stream stream, Heads<float> o, float* lse, Heads<const real> q, Heads<const real> k,
                     Heads<const real> v, float scale, const AttentionShape& shape) {
    run_forward(stream, o, lse, q, k, v, scale, shape);
}

void backward(Stream stream, Heads<real> dq, Heads<real> dk, Heads<real> dv, Heads<const real> dout,
              Heads<const real> q, Heads<const real> k, Heads<const real> v, Heads<const real> o, const float* lse,
              float scale, void* scratch, const AttentionShape& shape) {
    run_backward(stream, dq, dk, dv, dout, q, k, v, o, lse, scale, scratch, shape, false);
}
void backward_partial(Stream stream, Heads<float> dq, Heads<float> dk, Heads<float> dv, Heads<const real> dout,
                      Heads<const real> q, Heads<const real> k, Heads<const real> v, Heads<const real> o,
                      const float* lse, float scale, void* scratch, const AttentionShape& shape) {
    run_backward(stream, dq, dk, dv, dout, q, k, v, o, lse, scale, scratch, shape, true);
}

} // namespace plain
