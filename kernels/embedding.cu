// Embeddings on the GPU: rows gathered and scattered by warps, 16 bytes a lane, bound by memory.
//
// Backward must add rows of one token in token order, whatever blocks run first, so it does not add with atomics. It
// sorts (token, index) stably by token; then one warp a run of equal tokens adds the run's rows in order, and nobody
// else touches that row of the table. The sort moves 8 bytes a token where a row has C elements: it is small change.
#include "embedding.h"

#include "common.h"
#include "device.h"
#include "launch.h"
#include "ptx.h"
#include "scratch.h"

namespace {

using namespace scratch::embedding;

constexpr int kThreads = 256, kWarps = kThreads / kWarpSize;

// ---- Forward ----

// A warp a token.
template <int N> __global__ void __launch_bounds__(kThreads)
    forward(real* out, const int32_t* tokens, const int32_t* positions, const real* wte, const real* wpe, int64_t n,
            int64_t T, int64_t C, int64_t position0) {
    int64_t token = global_thread() / kWarpSize;
    if (token >= n) return;
    const real* a = wte + load_global(tokens + token) * C; // (C)
    const real* b = nullptr;                               // (C) or null
    if (wpe) b = wpe + (positions ? load_global(positions + token) : position0 + token % T) * C;
#pragma unroll 4
    for (int64_t c = lane_index() * N; c < C; c += kWarpSize * N) {
        Pack<real, N> x = load_pack<N>(a + c);
        if (b) {
            Pack<real, N> y = load_pack<N>(b + c);
            float sum[N];
#pragma unroll
            for (int i = 0; i < N; i++) sum[i] = to_float(x[i]) + to_float(y[i]);
            x = round_pack<real>(sum);
        }
        store_pack(out + token * C + c, x);
    }
}

// ---- The sort: least significant digit first, each pass stable, so that equal keys keep their order ----
//
// A pair is a key in the upper half of 64 bits and the index of its token in the lower. A pass counts the digits in
// each tile of pairs, scans the counts, and moves every pair to its place. A tile belongs to one warp, which walks it
// in order, 32 pairs a round: that is what makes the pass stable, and no warp needs to know more of another than its
// counts. Four passes sort any 32 bits; the two that a vocabulary of 50257 leaves idle cost less than knowing better.

constexpr int kPasses = 32 / kDigitBits, kRounds = kTile / kWarpSize;
constexpr size_t kDigitsBytes = kWarps * kDigits * sizeof(int32_t);

__device__ __forceinline__ int digit_of(uint64_t pair, int pass) {
    return static_cast<int>(pair >> (32 + pass * kDigitBits)) & (kDigits - 1);
}
__device__ __forceinline__ int32_t* warp_digits() { // (kDigits) of shared memory, this warp's own
    return reinterpret_cast<int32_t*>(dynamic_shared()) + warp_index() * kDigits;
}

// x of this lane and all lanes before it.
__device__ __forceinline__ int32_t sum_up_to_here(int32_t x) {
#pragma unroll
    for (int distance = 1; distance < kWarpSize; distance *= 2) {
        int32_t before = __shfl_up_sync(kFullWarp, x, distance);
        if (lane_index() >= distance) x += before;
    }
    return x;
}

// pairs (n) = keys (n) with their indices.
__global__ void __launch_bounds__(kThreads) make_pairs(uint64_t* pairs, const int32_t* keys, int64_t n) {
    int64_t i = global_thread();
    if (i >= n) return;
    uint64_t key = static_cast<uint32_t>(load_global(keys + i));
    store_global(pairs + i, key << 32 | static_cast<uint64_t>(i));
}

// counts (kDigits,tiles) = how often each digit occurs in each tile of pairs (n).
__global__ void __launch_bounds__(kThreads)
    count_digits(int32_t* counts, const uint64_t* pairs, int64_t n, int64_t tiles, int pass) {
    const int64_t tile = global_thread() / kWarpSize;
    if (tile >= tiles) return;
    int32_t* count = warp_digits();
    for (int digit = lane_index(); digit < kDigits; digit += kWarpSize) store_shared(count + digit, 0);
    __syncwarp();
    for (int round = 0; round < kRounds; round++) {
        int64_t i = tile * kTile + round * kWarpSize + lane_index();
        if (i < n) atomicAdd(count + digit_of(load_global(pairs + i), pass), 1);
    }
    __syncwarp();
    for (int digit = lane_index(); digit < kDigits; digit += kWarpSize)
        store_global(counts + digit * tiles + tile, load_shared(count + digit));
}

// Each digit's counts (kDigits,tiles) become sums over the tiles before; totals (kDigits) = over all. A warp a digit.
__global__ void __launch_bounds__(kThreads) scan_digits(int32_t* counts, int32_t* totals, int64_t tiles) {
    const int64_t digit = global_thread() / kWarpSize;
    int32_t* row = counts + digit * tiles;
    int32_t before = 0;
    for (int64_t first = 0; first < tiles; first += kWarpSize) {
        const int64_t tile = first + lane_index();
        int32_t count = tile < tiles ? load_global(row + tile) : 0, up_to_here = sum_up_to_here(count);
        if (tile < tiles) store_global(row + tile, before + up_to_here - count);
        before += __shfl_sync(kFullWarp, up_to_here, kWarpSize - 1);
    }
    if (lane_index() == 0) store_global(totals + digit, before);
}

// to (n) = from (n), each pair behind those of smaller digits, of the same digit in tiles before, and of the same digit
// before it in its tile.
__global__ void __launch_bounds__(kThreads) move_pairs(uint64_t* to, const uint64_t* from, const int32_t* counts,
                                                       const int32_t* totals, int64_t n, int64_t tiles, int pass) {
    const int64_t tile = global_thread() / kWarpSize;
    if (tile >= tiles) return;
    const int lane = lane_index();
    int32_t* next = warp_digits(); // where this tile's next pair of each digit goes
    constexpr int kEach = kDigits / kWarpSize;
    int32_t total[kEach], sum = 0;
#pragma unroll
    for (int i = 0; i < kEach; i++) sum += total[i] = load_global(totals + lane * kEach + i);
    int32_t smaller = sum_up_to_here(sum) - sum;
#pragma unroll
    for (int i = 0; i < kEach; i++) {
        int64_t digit = lane * kEach + i;
        store_shared(next + digit, smaller + load_global(counts + digit * tiles + tile));
        smaller += total[i];
    }
    __syncwarp();
    for (int round = 0; round < kRounds; round++) {
        int64_t i = tile * kTile + round * kWarpSize + lane;
        bool here = i < n;
        uint64_t pair = here ? load_global(from + i) : 0;
        int digit = digit_of(pair, pass);
        // Lanes with the same digit agree in each of its bits.
        unsigned same = __ballot_sync(kFullWarp, here);
#pragma unroll
        for (int bit = 0; bit < kDigitBits; bit++) {
            bool one = digit >> bit & 1;
            unsigned ones = __ballot_sync(kFullWarp, one);
            same &= one ? ones : ~ones;
        }
        int rank = __popc(same & ((1u << lane) - 1));
        int32_t start = load_shared(next + digit);
        __syncwarp();
        if (here) store_global(to + start + rank, pair);
        if (here && rank == 0) store_shared(next + digit, start + __popc(same));
        __syncwarp();
    }
}

// ---- Adding up sorted rows ----
//
// One token may be the whole batch, and one warp adds its rows no faster than they arrive. So a long run is cut: at
// every multiple of kPiece that has at least kPiece pairs of the run before it. The first piece goes to the table row
// by row, as short runs do; each later one is summed apart into a row of `partial`, and those are added to the table in
// order. So runs of up to kPiece rows are summed exactly in token order, and where a run is cut depends on the tokens
// alone. Each warp takes a strip of 32·N columns.

__device__ __forceinline__ uint32_t key_at(const uint64_t* pairs, int64_t i) {
    return static_cast<uint32_t>(load_global(pairs + i) >> 32);
}
__device__ __forceinline__ bool cut_at(const uint64_t* pairs, int64_t i, uint32_t key) {
    return i % kPiece == 0 && i >= kPiece && key_at(pairs, i - kPiece) == key;
}

// sum += what lies at p
template <int N, class T> __device__ __forceinline__ void add(float (&sum)[N], const T* p) {
    constexpr int kWide = N < Pack128<T>::size ? N : Pack128<T>::size;
#pragma unroll
    for (int from = 0; from < N; from += kWide) {
        Pack<T, kWide> x = load_pack<kWide>(p + from);
#pragma unroll
        for (int i = 0; i < kWide; i++) sum[from + i] += to_float(x[i]);
    }
}
template <int N> __device__ __forceinline__ void store_floats(float* p, const float (&value)[N]) {
    constexpr int kWide = N < 4 ? N : 4;
#pragma unroll
    for (int from = 0; from < N; from += kWide) {
        Pack<float, kWide> x;
#pragma unroll
        for (int i = 0; i < kWide; i++) x[i] = value[from + i];
        store_pack(p + from, x);
    }
}

// table (rows,C) += the first piece of every run, partial (n/kPiece,C) = the others. dout (n,C), pairs (n) sorted. A
// warp at every pair and strip; only the warp at a piece's first pair has work.
template <int N> __global__ void __launch_bounds__(kThreads)
    add_rows(float* table, float* partial, const real* dout, const uint64_t* pairs, int64_t n, int64_t C) {
    const int64_t first = global_thread() / kWarpSize;
    if (first >= n) return;
    const uint32_t key = key_at(pairs, first);
    const bool run_begins = first == 0 || key_at(pairs, first - 1) != key;
    if (!run_begins && !cut_at(pairs, first, key)) return;

    const int64_t column = (int64_t{blockIdx.y} * kWarpSize + lane_index()) * N;
    float* to = run_begins ? table + key * C + column : partial + first / kPiece * C + column;
    float sum[N] = {};
    if (run_begins && column < C) add(sum, static_cast<const float*>(to));
    for (int64_t base = first;; base += kWarpSize) {
        const int64_t i = base + lane_index();
        uint64_t pair = i < n ? load_global(pairs + i) : 0;
        bool inside = i < n && pair >> 32 == key && (i == first || !cut_at(pairs, i, key));
        unsigned outside = ~__ballot_sync(kFullWarp, inside);
        const int rows = outside ? __ffs(static_cast<int>(outside)) - 1 : kWarpSize;
#pragma unroll 4
        for (int row = 0; row < rows; row++) {
            int64_t index = __shfl_sync(kFullWarp, static_cast<uint32_t>(pair), row);
            if (column < C) add(sum, dout + index * C + column);
        }
        if (rows < kWarpSize) break;
    }
    if (column < C) store_floats(to, sum);
}

// table (rows,C) += the partial sums of every run that was cut, in order. A warp at every place for a cut and strip;
// only the warp at a run's first cut has work.
template <int N> __global__ void __launch_bounds__(kThreads)
    add_partials(float* table, const float* partial, const uint64_t* pairs, int64_t n, int64_t C) {
    const int64_t first = global_thread() / kWarpSize * kPiece;
    if (first >= n) return;
    const uint32_t key = key_at(pairs, first);
    if (!cut_at(pairs, first, key) || cut_at(pairs, first - kPiece, key)) return;
    const int64_t column = (int64_t{blockIdx.y} * kWarpSize + lane_index()) * N;
    if (column >= C) return;
    float* to = table + key * C + column;
    float sum[N] = {};
    add(sum, static_cast<const float*>(to));
#pragma unroll 4
    for (int64_t cut = first; cut < n && key_at(pairs, cut) == key; cut += kPiece)
        add(sum, partial + cut / kPiece * C + column);
    store_floats(to, sum);
}

// dwpe (n) += Σ_b dout (B,n), n = T·C: positions that are the same in every sequence need no sort.
template <int N> __global__ void __launch_bounds__(kThreads)
    add_sequences(float* dwpe, const real* dout, int64_t B, int64_t n) {
    const int64_t i = global_thread() * N;
    if (i >= n) return;
    float sum[N] = {};
    add(sum, static_cast<const float*>(dwpe + i));
#pragma unroll 4
    for (int64_t b = 0; b < B; b++) add(sum, dout + b * n + i);
    store_floats(dwpe + i, sum);
}

// scratch.pairs (N) = keys (N) and their indices, sorted.
void sort(Stream stream, const Scratch& scratch, const int32_t* keys, int64_t N) {
    launch(make_pairs, blocks_for(N, kThreads), kThreads, 0, stream, scratch.pairs, keys, N);
    uint64_t *from = scratch.pairs, *to = scratch.other;
    const unsigned tile_blocks = blocks_for(scratch.tiles, kWarps);
    for (int pass = 0; pass < kPasses; pass++, std::swap(from, to)) {
        launch(count_digits, tile_blocks, kThreads, kDigitsBytes, stream, scratch.counts, from, N, scratch.tiles, pass);
        launch(scan_digits, kDigits / kWarps, kThreads, 0, stream, scratch.counts, scratch.totals, scratch.tiles);
        launch(move_pairs, tile_blocks, kThreads, kDigitsBytes, stream, to, from, scratch.counts, scratch.totals, N,
               scratch.tiles, pass);
    }
    static_assert(kPasses % 2 == 0, "the last pass must end in scratch.pairs");
}

template <int N>
void run_add(Stream stream, float* table, const Scratch& scratch, const real* dout, int64_t n, int64_t C) {
    const unsigned strips = blocks_for(C, kWarpSize * N);
    launch(add_rows<N>, dim3(blocks_for(n, kWarps), strips), kThreads, 0, stream, table, scratch.partial, dout,
           scratch.pairs, n, C);
    if (n > kPiece)
        launch(add_partials<N>, dim3(blocks_for(n, int64_t{kPiece} * kWarps), strips), kThreads, 0, stream, table,
               scratch.partial, scratch.pairs, n, C);
}

// table (rows,C) += dout (N,C), row n to row keys[n].
void scatter(Stream stream, float* table, const Scratch& scratch, const real* dout, const int32_t* keys, int64_t N,
             int64_t C) {
    constexpr int kWide = Pack128<real>::size;
    sort(stream, scratch, keys, N);
    bool wide = aligned(table) && aligned(dout) && C % kWide == 0;
    (wide ? run_add<kWide> : run_add<1>)(stream, table, scratch, dout, N, C);
}

} // namespace

void embedding_forward(Stream stream, real* out, const int32_t* tokens, const real* wte, const real* wpe,
                       const EmbeddingShape& shape) {
    const int64_t N = shape.B * shape.T, C = shape.C;
    if (N == 0) return;
    constexpr int kWide = Pack128<real>::size;
    bool wide = aligned(out) && aligned(wte) && aligned(wpe) && C % kWide == 0;
    launch(wide ? forward<kWide> : forward<1>, blocks_for(N, kWarps), kThreads, 0, stream, out, tokens, shape.positions,
           wte, wpe, N, shape.T, C, shape.position0);
}

void embedding_backward(Stream stream, float* dwte, float* dwpe, const real* dout, const int32_t* tokens, void* scratch,
                        const EmbeddingShape& shape) {
    const int64_t N = shape.B * shape.T, C = shape.C;
    require(N <= INT32_MAX, "embedding_backward: more than 2^31 tokens at once");
    if (N == 0) return;
    Scratch memory(scratch, N, C);
    scatter(stream, dwte, memory, dout, tokens, N, C);
    if (!dwpe) return;
    if (shape.positions) {
        scatter(stream, dwpe, memory, dout, shape.positions, N, C);
        return;
    }
    constexpr int kWide = Pack128<real>::size;
    float* rows = dwpe + shape.position0 * C; // (T,C)
    const int64_t n = shape.T * C;
    bool wide = aligned(rows) && aligned(dout) && n % kWide == 0;
    launch(wide ? add_sequences<kWide> : add_sequences<1>, blocks_for(n, kThreads * (wide ? kWide : 1)), kThreads, 0,
           stream, rows, dout, shape.B, n);
}
