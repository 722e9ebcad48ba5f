// What the flash attention kernels are made of: the table of tiles, which columns a row sees, the order of blocks,
// swizzled tiles in shared memory, and the products of a warp.
//
// All kernels share one picture. A block owns `rows` of one axis and passes over the other in tiles of `columns`; row r
// sees the columns first(r) .. last(r), both never decreasing in r. Rows are queries and columns are keys, but for dK
// and dV, where rows are keys and columns are queries: S and P then come out transposed, which is how the next
// products want them, and never leave the registers.
//
// In fragments, lane l of a warp stands in group l / 4 as pair l % 4 (see ptx.h): of each 16×8 product it holds rows
// group and group + 8, columns 2·pair and 2·pair + 1.
#pragma once
#include "attention.h"
#include "launch.h"
#include "ptx.h"

namespace flash {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kInfinity = __builtin_huge_valf();

// ---- The table of tiles ----

struct Tile {
    int rows, columns; // of the score tile
    int warps;         // each takes rows / warps: 32 where registers allow, since each fragment of the other operand
                       // that a warp reads from shared memory then serves two products: with 16 rows, shared memory
                       // (128 bytes a cycle) would be the limit, not the tensor cores
    int slots;         // of the ring through which the other axis passes
    int sharing = 1;   // warps that share the same rows and divide their work

    bool operator==(const Tile&) const = default;
    constexpr int threads() const { return warps * kWarpSize; }
    constexpr int blocks() const { return 8 / warps; } // of an SM: 8 warps of 255 registers fill it
    constexpr int warp_rows() const { return rows * sharing / warps; }
};

// Forward: Q stays, K and V tiles take turns in the ring.                                   shared memory, blocks an SM
//   D = 32    128×128  4 warps  3 slots   a wide tile rescales O half as often               33 KB, 2 by registers
//   D = 64    128×128  4 warps  3 slots   the same                                           65 KB, 2 by registers
//   D = 80    128×64   4 warps  3 slots   O has 80 registers, so S cannot have 128           51 KB, 2 by registers
//   D = 128   128×64   4 warps  3 slots   O has 128 registers, so S can have 64              81 KB, 2 in A100's 164 KB
//   D = 256   128×64   8 warps  3 slots   16 rows a warp, since O has 128 registers         161 KB, 1
// Where an SM has 100 KB, tiles of which two blocks still fit: one computes while the other waits. They also leave
// registers free, which those architectures' compilers need more of.
//   D = 32    128×64   4 warps  3 slots                                                      21 KB, 2
//   D = 64    128×64   4 warps  3 slots                                                      41 KB, 2
//   D = 80    128×64   4 warps  2 slots                                                      41 KB, 2
//   D = 128   64×64    4 warps  2 slots                                                      49 KB, 2
//   D = 256   128×32   8 warps  2 slots   two blocks would have 32 rows each, and 4 warps    97 KB, 1
template <int D> constexpr Tile forward_tile(bool small) {
    if (D <= 64) return {128, small ? 64 : 128, 4, 3};
    if (D == 80) return {128, 64, 4, small ? 2 : 3};
    if (D == 128) return small ? Tile{64, 64, 4, 2} : Tile{128, 64, 4, 3};
    return small ? Tile{128, 32, 8, 2} : Tile{128, 64, 8, 3};
}

constexpr int kSmallSharedBytes = 99 * 1024;   // of a block, on cards of compute capability 8.6, 8.9 and 12.0
constexpr int kMediumSharedBytes = 163 * 1024; // on all others, or more
constexpr int kLargeSharedBytes = 227 * 1024;  // on cards of compute capability 9.0 and 10.0

inline size_t shared_per_block() {
    int device = 0, bytes = 0;
    check_cuda(cudaGetDevice(&device), "finding the current device");
    check_cuda(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
               "asking for the device's shared memory");
    return static_cast<size_t>(bytes);
}

template <int D> constexpr int tile_bytes(int rows) { return rows * D * static_cast<int>(sizeof(bf16)); }

// f(std::integral_constant<int, D>) for the head dim at hand.
template <class F> void with_head_dim(int64_t D, F f) {
    if (D == 32) f(std::integral_constant<int, 32>());
    if (D == 64) f(std::integral_constant<int, 64>());
    if (D == 80) f(std::integral_constant<int, 80>());
    if (D == 128) f(std::integral_constant<int, 128>());
    if (D == 256) f(std::integral_constant<int, 256>());
}

// ---- Shapes and blocks, as kernels see them ----

struct View {
    int Tq, Tk, H;
    int diagonal;             // query i sees keys up to i + diagonal
    int64_t k_offset;         // of doc_start's positions
    const int64_t* doc_start; // (B,Tq) or null
    int64_t lse_batch;
    float scale, scale_log2;      // of the scores, and for scores in base 2
    unsigned tiles, heads, group; // blocks: tiles of the row axis, B·H heads, heads that run side by side
};

// A wave of blocks should leave its heavy tiles first and also share keys and values in L2. So heads come in groups
// whose keys and values fill about 16 MB (of 40 and more), and within a group all heads' heaviest tiles come first.
inline View view_of(const AttentionShape& s, float scale, int64_t rows, int tile_rows) {
    int64_t diagonal = s.q_offset - s.k_offset;
    diagonal = diagonal < -s.Tq ? -s.Tq : diagonal > s.Tk ? s.Tk : diagonal; // beyond, none or all are seen
    int64_t heads = s.B * s.H, bytes = (s.Tq > s.Tk ? s.Tq : s.Tk) * s.D * 2 * static_cast<int64_t>(sizeof(bf16));
    int64_t group = (int64_t(16) << 20) / (bytes ? bytes : 1);
    group = group < 1 ? 1 : group > heads ? heads : group;
    return {static_cast<int>(s.Tq),
            static_cast<int>(s.Tk),
            static_cast<int>(s.H),
            static_cast<int>(diagonal),
            s.k_offset,
            s.doc_start,
            s.lse_stride(),
            scale,
            scale * kLog2e,
            static_cast<unsigned>((rows + tile_rows - 1) / tile_rows),
            static_cast<unsigned>(heads),
            static_cast<unsigned>(group)};
}
inline dim3 grid_of(const View& s) { return dim3(blocks_for(static_cast<int64_t>(s.tiles) * s.heads, 1)); }

struct Place {
    int tile, b, h;
};
template <bool LastFirst> __device__ __forceinline__ Place place_of_block(const View& s) {
    unsigned in_group = s.tiles * s.group, first = blockIdx.x / in_group * s.group;
    unsigned size = s.heads - first < s.group ? s.heads - first : s.group, rest = blockIdx.x % in_group;
    unsigned tile = rest / size, head = first + rest % size;
    return {static_cast<int>(LastFirst ? s.tiles - 1 - tile : tile), static_cast<int>(head / s.H),
            static_cast<int>(head % s.H)};
}

// ---- Who sees whom ----
//
// One end of a row's interval follows from the row, the other one from the documents. That one is found once, by one
// thread, and waits in shared memory for the tiles that need a mask: in registers it would cost what S needs.

// starts (Tq): this sequence's doc_start, or null.
__device__ __forceinline__ int first_key(const View& s, const int64_t* starts, int i) {
    if (!starts) return 0;
    int64_t first = load_global(starts + i) - s.k_offset;
    return static_cast<int>(first < 0 ? 0 : first > s.Tk ? s.Tk : first);
}
__device__ __forceinline__ int last_key(const View& s, int i) { return min(i + s.diagonal, s.Tk - 1); }

__device__ __forceinline__ int first_query(const View& s, int j) { return max(j - s.diagonal, 0); }
// A key's queries end where a document begins that starts after it.
__device__ __forceinline__ int last_query(const View& s, const int64_t* starts, int j) {
    int low = 0, end = s.Tq;
    while (starts && low < end) {
        int middle = (low + end) / 2;
        if (load_global(starts + middle) > s.k_offset + j)
            end = middle;
        else
            low = middle + 1;
    }
    return end - 1;
}

// The columns begin .. end that any row of a tile sees, and the columns that all of them see.
struct Span {
    int begin, end, full_begin, full_end;

    __device__ bool masked(int column, int columns) const { return column < full_begin || column + columns > full_end; }
};

// ---- Tiles in shared memory ----
//
// A tile is rows of D bf16, cut into chunks of 16 bytes. The banks serve 128 bytes at once: 8 chunks whose places
// differ mod 8. Three kinds of access ask for 8 chunks, or parts of them, together:
//   - each 8×8 matrix of an ldmatrix, with trans or without: the same chunk of rows 8n .. 8n + 7;
//   - 8 neighbouring lanes of a cp.async: 8 chunks of a row, 4 of two rows or 2 of four;
//   - the stores of Pᵀ and dSᵀ (rows of 32 or 64 queries), 4 bytes a lane: the same chunk of rows 8n .. 8n + 7.
// Row r starts at place r·D/8, so that the same chunk of 8 rows would meet itself mod 8. Chunk c therefore lies at
// place c XOR bits(r) of its row, where bits tell apart the rows that start at the same place mod 8:
//   D = 64, 128, 256   all rows start at 0: r % 8
//   D = 32             rows start at 0, 4, 0, 4, …: r / 2 % 4
//   D = 80             rows start at 0, 2, 4, 6, 0, …: r / 4 % 2 moves four of eight to the odd places
// An XOR permutes the chunks of an aligned pair, four or eight, so what a cp.async writes together stays together: no
// conflicts, and the compiler checks it (static_asserts below). All bits are the same 8 rows further on, so that
// offsets from there on are constants.
//
// The main loops' other accesses need none of this. Statistics are 8 bytes for each of the 4 pairs, the same for all
// groups; a row's bound is a word for each of 8 neighbouring rows, the same for the pairs: 64 and 32 bytes in a row.
template <int D> struct Swizzle {
    static constexpr uint32_t row_bytes = D * sizeof(bf16);
    static constexpr LONGHAND_HD uint32_t bits(uint32_t row) {
        return D == 32 ? row / 2 % 4 : D == 80 ? row / 4 % 2 : row % 8;
    }
    static constexpr LONGHAND_HD uint32_t offset(uint32_t row, uint32_t chunk) {
        return row * row_bytes + 16 * (chunk ^ bits(row));
    }
    // Do 8 lanes reach 8 places, if lane l takes row `row` + l / across and chunk `chunk` + l % across?
    static constexpr bool apart(uint32_t row, uint32_t chunk, uint32_t across) {
        uint32_t places = 0;
        for (uint32_t l = 0; l < 8; l++) places |= 1u << offset(row + l / across, chunk + l % across) / 16 % 8;
        return places == 0xff;
    }
    static constexpr bool apart_in_ldmatrix() {
        bool all = true;
        for (uint32_t chunk = 0; chunk < D / 8; chunk++) all = all && apart(0, chunk, 1);
        return all;
    }
    static constexpr bool apart_in_copies(uint32_t first, uint32_t chunks) {
        bool all = true;
        for (uint32_t lane = 0; lane < 8 * chunks; lane += 8)
            all = all && apart(lane / chunks, first + lane % chunks, chunks);
        return all;
    }
};

// A lane's offset into a tile for ldmatrix_x4 of 16 rows and 2 chunks, from any multiple of 16 rows on. The four 8×8
// matrices come in the order
//   rows_first:    0 2      columns_first:   0 1      0 is rows 0..7 of the first chunk
//                  1 3                       2 3
// Chunk pairs 2s, 2s + 1 of the first 128 bytes lie where the first pair's offset is XORed with 32·s: the lane's own
// bits and s's are apart. What comes after 128 bytes is a constant. With D = 80, whose rows do not start at multiples
// of 128 bytes, the swizzle stays within a pair, and pairs are 32 bytes apart.
template <int D> struct Lane {
    static constexpr uint32_t row_bytes = Swizzle<D>::row_bytes;
    uint32_t rows_first, columns_first;
    static_assert(Swizzle<D>::apart_in_ldmatrix());

    __device__ Lane() {
        uint32_t lane = lane_index(), row = lane % 8, low = lane / 8 % 2, high = lane / 16;
        rows_first = Swizzle<D>::offset(row + 8 * low, high);
        columns_first = Swizzle<D>::offset(row + 8 * high, low);
    }
    // 16 rows from 16·row16 on, chunks 2·pair and 2·pair + 1.
    static __device__ __forceinline__ uint32_t at(uint32_t tile, uint32_t lane, int row16, int pair) {
        uint32_t rows = row16 * 16u * row_bytes;
        if constexpr (D == 80)
            return tile + lane + pair * 32u + rows;
        else
            return tile + (lane ^ (pair % 4 * 32u)) + pair / 4 * 128u + rows;
    }
};

// One thread's part in copying `Chunks` chunks of each row, from `First` on, of rows of a head to tiles of Count rows.
template <int D, int Threads, int Count, int First, int Chunks> class Columns {
public:
    // Row `first` of the head is the first to load.
    __device__ Columns(const Heads<const bf16>& x, int b, int h, int first)
        : step_(kStep * x.token), row_(static_cast<int>(threadIdx.x) / Chunks) {
        uint32_t chunk = First + threadIdx.x % Chunks;
        from_ = x.row(b, first + row_, h) + 8 * chunk;
        to_ = Swizzle<D>::offset(row_, chunk);
    }
    // The next Count rows to `tile`, as part of the current cp.async group; zeros after the first `left`.
    __device__ __forceinline__ void load(uint32_t tile, int left) {
        if (kStep * Chunks < Threads && row_ >= kStep) return;
        uint32_t to = tile + to_;
        // Not unrolled whole: the compiler would compute every address from the first, and keep a register pair of
        // step_'s multiples for each, until accumulators spill.
        if (left >= Count) {
#pragma unroll 4
            for (int r = 0; r < Count; r += kStep, from_ += step_) cp_async(to + r * kRowBytes, from_);
        } else {
#pragma unroll 1
            for (int r = 0; r < Count; r += kStep, from_ += step_)
                cp_async_or_zero(to + r * kRowBytes, from_, r + row_ < left);
        }
    }

private:
    static constexpr int kStep = Threads / Chunks < Count ? Threads / Chunks : Count;
    static constexpr int kRowBytes = Swizzle<D>::row_bytes;
    static_assert(kStep % 8 == 0, "the swizzle of a thread's rows must not change from step to step");
    static_assert(Count % kStep == 0);
    static_assert(Swizzle<D>::apart_in_copies(First, Chunks));

    const bf16* from_; // of row row_
    int64_t step_;
    uint32_t to_;
    int row_;
};
// Whole rows.
template <int D, int Threads, int Count> class Rows : public Columns<D, Threads, Count, 0, D / 8> {
    using Columns<D, Threads, Count, 0, D / 8>::Columns;
};
// 10 chunks do not divide a block's threads: 8, then 2.
template <int Threads, int Count> class Rows<80, Threads, Count> {
public:
    __device__ Rows(const Heads<const bf16>& x, int b, int h, int first)
        : eight_(x, b, h, first), two_(x, b, h, first) {}
    __device__ __forceinline__ void load(uint32_t tile, int left) {
        eight_.load(tile, left);
        two_.load(tile, left);
    }

private:
    Columns<80, Threads, Count, 0, 8> eight_;
    Columns<80, Threads, Count, 8, 2> two_;
};

// ---- Products of a warp ----

template <int M, int N> __device__ __forceinline__ void clear(float (&c)[M][N][4]) {
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) c[m][n][e] = 0;
}

// s (16·M,8·N) := A·Bᵀ. a: tile whose first 16·M rows are the warp's; b: tile of 8·N rows.
template <int D, int Unroll = D<256 ? D / 16 : 4, int M, int N> __device__ __forceinline__ void scores(
                     float (&s)[M][N][4], uint32_t a, uint32_t b, const Lane<D>& lane) {
    clear(s);
    // Unrolled whole, D = 256 holds so many addresses and fragments ahead of use that sums spill.
#pragma unroll(Unroll)
    for (int k = 0; k < D / 16; k++) {
        uint32_t left[M][4];
#pragma unroll
        for (int m = 0; m < M; m++) ldmatrix_x4(left[m], lane.at(a, lane.rows_first, m, k));
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            uint32_t right[4];
            ldmatrix_x4(right, lane.at(b, lane.columns_first, n / 2, k));
#pragma unroll
            for (int m = 0; m < M; m++) {
                mma_m16n8k16(s[m][n], left[m], right[0], right[1]);
                mma_m16n8k16(s[m][n + 1], left[m], right[2], right[3]);
            }
        }
    }
}

// 16 columns of s, rounded to bf16, as the left operand of the next product; then all columns of 16·M rows.
__device__ __forceinline__ void pack(uint32_t (&p)[4], const float (&left)[4], const float (&right)[4]) {
    p[0] = pack_bf16(left[0], left[1]), p[1] = pack_bf16(left[2], left[3]);
    p[2] = pack_bf16(right[0], right[1]), p[3] = pack_bf16(right[2], right[3]);
}
template <int M, int N> __device__ __forceinline__ void pack(uint32_t (&p)[M][N / 2][4], const float (&s)[M][N][4]) {
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int n = 0; n < N; n += 2) pack(p[m][n / 2], s[m][n], s[m][n + 1]);
}

// out (16·M,D) += P·B with P (16·M,16·K). b: tile whose first 16·K rows are meant.
template <int D, int M, int K> __device__ __forceinline__ void accumulate(float (&out)[M][D / 8][4],
                                                                          const uint32_t (&p)[M][K][4], uint32_t b,
                                                                          const Lane<D>& lane) {
#pragma unroll
    for (int k = 0; k < K; k++)
#pragma unroll
        for (int d = 0; d < D / 8; d += 2) {
            uint32_t right[4];
            ldmatrix_x4_trans(right, lane.at(b, lane.rows_first, k, d / 2));
#pragma unroll
            for (int m = 0; m < M; m++) {
                mma_m16n8k16(out[m][d], p[m][k], right[0], right[1]);
                mma_m16n8k16(out[m][d + 1], p[m][k], right[2], right[3]);
            }
        }
}

// s[m] := −∞ in columns outside first(m, half) .. last(m, half); `column` is that of s[..][0][0]. Only tiles that need
// it come here, by a branch that the whole block takes together, so that one loop serves both kinds of tiles.
template <int M, int N, class First, class Last>
__device__ __forceinline__ void mask(float (&s)[M][N][4], int column, First first, Last last) {
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int from = first(m, half) - column, to = last(m, half) - column;
#pragma unroll
            for (int n = 0; n < N; n++)
#pragma unroll
                for (int e = 0; e < 2; e++)
                    if (8 * n + e < from || 8 * n + e > to) s[m][n][2 * half + e] = -kInfinity;
        }
}

// ---- Fragments to memory ----

// Two neighbouring lanes exchange halves of two products, so that each holds 4 consecutive columns of one row: the even
// lane of `left`, from 2·pair on, the odd lane of `right`, from 2·pair − 2 on.
__device__ __forceinline__ Pack<float, 4> four_columns(float left0, float left1, float right0, float right1) {
    bool odd = lane_index() % 2;
    float low = __shfl_xor_sync(kFullWarp, odd ? left0 : right0, 1);
    float high = __shfl_xor_sync(kFullWarp, odd ? left1 : right1, 1);
    return odd ? Pack<float, 4>{low, high, right0, right1} : Pack<float, 4>{left0, left1, low, high};
}
// Where they start, counted from column 0 of `left`.
__device__ __forceinline__ int first_of_four() {
    int pair = lane_index() % 4;
    return pair % 2 ? 8 + 2 * pair - 2 : 2 * pair;
}

// factor·(row `half` of c) to `row` in 16-byte pieces: float adds to what is there if Add. Rows that are not `valid`
// only take part in the exchange between lanes.
template <bool Add, int N>
__device__ __forceinline__ void store_row(float* row, const float (&c)[N][4], int half, float factor, bool valid) {
#pragma unroll
    for (int n = 0; n < N; n += 2) {
        Pack<float, 4> x = four_columns(c[n][2 * half] * factor, c[n][2 * half + 1] * factor,
                                        c[n + 1][2 * half] * factor, c[n + 1][2 * half + 1] * factor);
        float* to = row + 8 * n + first_of_four();
        if (!valid) continue;
        if constexpr (Add) {
            Pack<float, 4> old = load128(to);
#pragma unroll
            for (int e = 0; e < 4; e++) x[e] += old[e];
        }
        store128(to, x);
    }
}
// The four lanes of a group hold 2 columns each of four products; they exchange, in two steps, until each holds the 8
// columns of one.
template <bool Add, int N>
__device__ __forceinline__ void store_row(bf16* row, const float (&c)[N][4], int half, float factor, bool valid) {
    static_assert(!Add, "sums are kept in float");
    int pair = lane_index() % 4;
#pragma unroll
    for (int n = 0; n + 4 <= N; n += 4) {
        Pack<uint32_t, 4> x;
#pragma unroll
        for (int e = 0; e < 4; e++) x[e] = pack_bf16(c[n + e][2 * half] * factor, c[n + e][2 * half + 1] * factor);
#pragma unroll
        for (int step = 1; step <= 2; step *= 2)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                if (e & step) continue;
                bool high = pair & step;
                uint32_t kept = high ? x[e + step] : x[e];
                uint32_t got = __shfl_xor_sync(kFullWarp, high ? x[e] : x[e + step], step);
                x[e] = high ? got : kept, x[e + step] = high ? kept : got;
            }
        if (valid) store_pack(reinterpret_cast<uint32_t*>(row + 8 * (n + pair)), x);
    }
    if constexpr (N % 4 == 2) { // two products are left, and one step: 4 columns each
        constexpr int n = N - 2;
        Pack<float, 4> x = four_columns(c[n][2 * half] * factor, c[n][2 * half + 1] * factor,
                                        c[n + 1][2 * half] * factor, c[n + 1][2 * half + 1] * factor);
        Pack<uint32_t, 2> packed = {pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3])};
        if (valid) store_pack(reinterpret_cast<uint32_t*>(row + 8 * n + first_of_four()), packed);
    }
}

} // namespace flash
