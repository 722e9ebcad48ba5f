// Causal attention on the CPU: tiles, online softmax, and one register-blocked product that all seven products of the
// two passes are made of.
//
// Each score tile is kept transposed to what the next product needs, so that nothing is ever transposed in the inner
// loops and no sum runs across the lanes of a register:
//   forward:  lanes hold queries.  Sᵀ (keys × queries) = K · Qᵀ     row maxima and sums are plain vector operations
//                                  O += (Sᵀ)ᵀ · V                   Qᵀ is packed once a query tile
//   backward: lanes hold keys.     S, dP (queries × keys) = Q · Kᵀ, dO · Vᵀ      Kᵀ, Vᵀ are packed once a key tile
//                                  dV += Pᵀ·dO, dK += dSᵀ·Q, dQ += dS·K
// Scores are in base 2 (scale·log2 e goes into the packed operand), since 2^x needs no reduction by ln 2.
#include "attention.h"

#include <cmath>
#include <limits>

#include "common.h"
#include "math.h"
#include "scratch.h"

namespace {

using namespace scratch::attention;

constexpr double kLn2 = 0.69314718055994531;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Register blocks, rows × vectors. 8×3 and 6×4 use 24 of AVX-512's 32 registers as accumulators, 6×2 uses 12 of the 16
// that other machines have; the rest hold one row of the right operand and a broadcast. For scores, 8×3 rather than
// 4×6: a strip of 3 vectors keeps 12 KiB of the packed operand in L1 while the rows pass by, where 6 would stream 24
// KiB from L2 for every 4 rows (98 against 83 GFLOP/s with the exponential, of 118, on one Zen 4 core).
constexpr bool kManyRegisters = kLanes == 16;
constexpr int kScoreVecs = kManyRegisters ? 3 : 2, kScoreRows = kManyRegisters ? 8 : 6;

// Operands with D columns are stored as panels of `width` columns, each (rows, width), so that a product streams one
// panel without gaps: rows 512 bytes apart would land in half of the L1's sets.
template <int D> struct Panel {
    static constexpr int vecs = !kManyRegisters ? 2 : D == 32 ? 2 : D == 80 ? 5 : 4;
    static constexpr int rows = !kManyRegisters ? 6 : D == 32 ? 12 : D == 80 ? 4 : 6;
    static constexpr int width = vecs * kLanes;
    static constexpr int count = D / width;
    static_assert(count * width == D && kRows % rows == 0 && kLaneCount % rows == 0);
};
static_assert(kRows % 12 == 0 && kLaneCount % (kScoreVecs * kLanes) == 0 && kRows % kScoreRows == 0);

// 2^x for x <= 127 within 1.5 ulp: n = round(x), a degree-5 polynomial for 2^(x−n) that is 1 at 0 (minimax, 9.1e-8),
// and 2^n through the exponent bits. Below −100 it stays at 2^-100, which no sum beside the row's maximum can notice;
// going on to 0 would make subnormal products, which some machines handle a hundred times slower. NaN stays NaN.
inline Vec exp2_clamped(Vec x) {
    const float kRound = 12582912.f + 127; // adding it leaves n + 127 in the low bits
    Vec floor = splat(-100.f);
    x = floor > x ? floor : x;
    Vec shifted = x + kRound;
    Vec r = x - (shifted - kRound);
    Vec p = splat(1.3264727e-3f);
    p = p * r + 9.6715126e-3f;
    p = p * r + 5.5507337e-2f;
    p = p * r + 2.4022242e-1f;
    p = p * r + 6.9314698e-1f;
    p = p * r + 1.f;
    return p * (Vec)((VecBits)shifted << 23);
}

// acc[r][c] += Σ_k a[r·a_row + k·a_step] · b[k·b_step + c·kLanes], the one inner loop of this file.
template <int R, int N> [[gnu::always_inline]] inline void multiply(Vec (&acc)[R][N], const float* a, int64_t a_row,
                                                                    int64_t a_step, const float* b, int64_t b_step,
                                                                    int64_t n) {
    for (int64_t k = 0; k < n; k++) {
        Vec right[N];
#pragma GCC unroll 8
        for (int c = 0; c < N; c++) right[c] = load(b + k * b_step + c * kLanes);
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) {
            Vec left = splat(a[r * a_row + k * a_step]);
#pragma GCC unroll 8
            for (int c = 0; c < N; c++) acc[r][c] += left * right[c];
        }
    }
}

// One strip of N vectors of lanes, R rows at a time; finish(acc, row, lane) takes each block of results.
// a (rows,D) in panels of a_rows, b (D,kLaneCount).
template <int D, int R, int N, class Finish>
[[gnu::always_inline]] inline void score_strip(const float* a, int64_t a_rows, const float* b, int rows, int lane,
                                               Finish finish) {
    using P = Panel<D>;
    for (int row = 0; row < rows; row += R) {
        Vec acc[R][N] = {};
        for (int p = 0; p < P::count; p++)
            multiply<R, N>(acc, a + p * a_rows * P::width + row * P::width, P::width, 1,
                           b + int64_t(p) * P::width * kLaneCount + lane, kLaneCount, P::width);
        finish(acc, row, lane);
    }
}

// rows × lanes of a · b. Rows round up to the register block, lanes to whole vectors: what lies beyond is never read.
template <int D, class Finish> inline void scores(const float* a, const float* b, int rows, int lanes, Finish finish) {
    int lane = 0;
    for (; lane + (kScoreVecs - 1) * kLanes < lanes; lane += kScoreVecs * kLanes)
        score_strip<D, kScoreRows, kScoreVecs>(a, kRows, b, rows, lane, finish);
    if constexpr (kScoreVecs > 2)
        for (; lane + kLanes < lanes; lane += 2 * kLanes) score_strip<D, 12, 2>(a, kRows, b, rows, lane, finish);
    for (; lane < lanes; lane += kLanes) score_strip<D, 12, 1>(a, kRows, b, rows, lane, finish);
}

// out[r][:] = keep(r)·out[r][:] + Σ_k a[r·a_row + k·a_step] · b[k][:] for `rows` rows, rounded up to the register
// block. The sum of a tile is finished before it meets the running sum, so that errors grow with the number of tiles.
// out (rows,D) in panels of out_rows, b (n,D) in panels of b_rows.
template <int D, int64_t a_row, int64_t a_step, class Keep>
inline void accumulate(float* out, int64_t out_rows, const float* a, const float* b, int64_t b_rows, int rows, int n,
                       Keep keep) {
    using P = Panel<D>;
    for (int p = 0; p < P::count; p++) {
        float* out_panel = out + p * out_rows * P::width;
        const float* b_panel = b + p * b_rows * P::width;
        for (int row = 0; row < rows; row += P::rows) {
            Vec acc[P::rows][P::vecs] = {};
            multiply<P::rows, P::vecs>(acc, a + row * a_row, a_row, a_step, b_panel, P::width, n);
            for (int r = 0; r < P::rows; r++)
                for (int c = 0; c < P::vecs; c++) {
                    float* at = out_panel + (row + r) * P::width + c * kLanes;
                    store(at, load(at) * keep(row + r) + acc[r][c]);
                }
        }
    }
}

// Row r, column d of a panelled array.
template <int D> inline int64_t panel_offset(int64_t rows, int64_t r, int d) {
    using P = Panel<D>;
    return d / P::width * rows * P::width + r * P::width + d % P::width;
}

// out (n,D) in panels of panel_rows := rows t .. t+n of x.
template <int D, class T>
inline void pack_rows(float* out, int64_t panel_rows, Heads<const T> x, int64_t b, int64_t t, int64_t h, int n) {
    for (int r = 0; r < n; r++) {
        const T* row = x.row(b, t + r, h);
        for (int d = 0; d < D; d += kLanes) store(out + panel_offset<D>(panel_rows, r, d), load(row + d));
    }
}

// out (D,kLaneCount) := factor · rows t .. t+n of x, transposed; lanes up to the next whole vector are zero.
template <int D, class T>
inline void pack_lanes(float* out, Heads<const T> x, int64_t b, int64_t t, int64_t h, int n, float factor) {
    for (int lane = 0; lane < kLaneCount && lane < n + kLanes; lane++) {
        const T* row = x.row(b, t + (lane < n ? lane : 0), h);
        float f = lane < n ? factor : 0;
        for (int d = 0; d < D; d++) out[int64_t(d) * kLaneCount + lane] = lane < n ? f * to_float(row[d]) : 0;
    }
}

inline void write(float* out, Vec v) { store(out, v); }
inline void write(bf16* out, Vec v) { store(out, v); }

// The keys first .. last of a tile (counted from its first key, last excluded) that query i sees.
struct Seen {
    int32_t first, last;
};
inline Seen seen_keys(const AttentionShape& s, int64_t b, int64_t i, int64_t j, int n) {
    int64_t tile = s.k_offset + j, position = s.q_offset + i;
    int64_t last = position < tile ? 0 : std::min<int64_t>(position - tile + 1, n);
    int64_t start = s.doc_start ? std::max(s.doc_start[b * s.Tq + i], tile) : tile;
    return {int32_t(std::min<int64_t>(start - tile, n)), int32_t(last)};
}

// Do queries i .. i+m all see keys j .. j+n?
inline bool all_seen(const AttentionShape& s, int64_t b, int64_t i, int m, int64_t j, int n) {
    return s.q_offset + i >= s.k_offset + j + n - 1 &&
           (!s.doc_start || s.doc_start[b * s.Tq + i + m - 1] <= s.k_offset + j);
}

// --- Forward -------------------------------------------------------------------------------------------------------

// Scores of one key tile to weights: s (n,kLaneCount) holds base-2 scores and gets 2^(s − m), m and sum (lanes) are the
// running maximum and sum, keep (lanes) gets what the earlier tiles' O is multiplied by. `tile_max` has the maxima of
// an unmasked tile; a masked one finds its own among the visible keys.
template <bool Masked> inline void softmax_tile(float* s, int n, int lanes, float* m, float* sum, float* keep,
                                                const float* tile_max, const int32_t* first, const int32_t* last) {
    for (int lane = 0; lane < lanes; lane += kLanes) {
        Vec old = load(m + lane), largest = old, total = {};
        VecInt from, to;
        if constexpr (Masked) {
            memcpy(&from, first + lane, sizeof from);
            memcpy(&to, last + lane, sizeof to);
            for (int j = 0; j < n; j++) {
                Vec score = load(s + j * kLaneCount + lane);
                score = (from <= j) & (to > j) ? score : splat(-kInfinity);
                largest = largest > score ? largest : score;
            }
        } else {
            Vec found = load(tile_max + lane);
            largest = largest > found ? largest : found;
        }
        // A query that has seen nothing yet has no maximum; any finite one will do, its weights are all masked.
        Vec shift = largest == -kInfinity ? Vec{} : largest;
        for (int j = 0; j < n; j++) {
            Vec weight = exp2_clamped(load(s + j * kLaneCount + lane) - shift);
            if constexpr (Masked) weight = (from <= j) & (to > j) ? weight : Vec{};
            store(s + j * kLaneCount + lane, weight);
            total += weight;
        }
        Vec factor = exp2_clamped(old - shift);
        store(keep + lane, factor);
        store(m + lane, largest);
        store(sum + lane, load(sum + lane) * factor + total);
    }
}

// One query tile: rows i .. i+m of sequence b, head h.
template <int D, class Out> void forward_tile(Heads<Out> o, float* lse, Heads<const real> q, Heads<const real> k,
                                              Heads<const real> v, float scale, float* scratch, const AttentionShape& s,
                                              int64_t b, int64_t h, int64_t i, int m) {
    float* qt = scratch;                 // (D,kLaneCount)
    float* acc = qt + D * kLaneCount;    // (kLaneCount,D) panels
    float* keys = acc + D * kLaneCount;  // (kRows,D) panels
    float* values = keys + kRows * D;    // (kRows,D) panels
    float* weights = values + kRows * D; // (kRows,kLaneCount)
    alignas(64) float largest[kLaneCount], sum[kLaneCount], keep[kLaneCount], tile_max[kLaneCount];
    alignas(64) int32_t first[kLaneCount], last[kLaneCount];

    pack_lanes<D>(qt, q, b, i, h, m, scale * kLog2e);
    std::fill_n(acc, D * kLaneCount, 0.f);
    std::fill_n(largest, kLaneCount, -kInfinity);
    std::fill_n(sum, kLaneCount, 0.f);

    // Keys outside [begin, end) are seen by no query of this tile.
    int64_t end = std::clamp<int64_t>(s.q_offset + i + m - s.k_offset, 0, s.Tk), begin = 0;
    if (s.doc_start && s.doc_start[b * s.Tq + i] > s.k_offset)
        begin = std::min(s.doc_start[b * s.Tq + i] - s.k_offset, end) / kRows * kRows;
    for (int64_t j = begin; j < end; j += kRows) {
        int n = int(std::min<int64_t>(kRows, end - j));
        pack_rows<D>(keys, kRows, k, b, j, h, n);
        pack_rows<D>(values, kRows, v, b, j, h, n);
        bool masked = n < kRows || !all_seen(s, b, i, m, j, n);
        if (masked) {
            scores<D>(keys, qt, n, m, [&](auto& block, int row, int lane) {
                for (size_t r = 0; r < std::size(block); r++)
                    for (size_t c = 0; c < std::size(block[0]); c++)
                        store(weights + (row + r) * kLaneCount + lane + c * kLanes, block[r][c]);
            });
            for (int lane = 0; lane < m; lane++) {
                Seen seen = seen_keys(s, b, i + lane, j, n);
                first[lane] = seen.first, last[lane] = seen.last;
            }
            std::fill(first + m, first + kLaneCount, 0);
            std::fill(last + m, last + kLaneCount, 0);
            softmax_tile<true>(weights, n, m, largest, sum, keep, nullptr, first, last);
        } else {
            std::fill_n(tile_max, kLaneCount, -kInfinity);
            scores<D>(keys, qt, n, m, [&](auto& block, int row, int lane) {
                for (size_t c = 0; c < std::size(block[0]); c++) {
                    Vec found = load(tile_max + lane + c * kLanes);
                    for (size_t r = 0; r < std::size(block); r++) {
                        store(weights + (row + r) * kLaneCount + lane + c * kLanes, block[r][c]);
                        found = found > block[r][c] ? found : block[r][c];
                    }
                    store(tile_max + lane + c * kLanes, found);
                }
            });
            softmax_tile<false>(weights, n, m, largest, sum, keep, tile_max, nullptr, nullptr);
        }
        accumulate<D, 1, kLaneCount>(acc, kLaneCount, weights, values, kRows, m, n, [&](int r) { return keep[r]; });
    }

    for (int r = 0; r < m; r++) {
        Out* row = o.row(b, i + r, h);
        bool nothing = sum[r] == 0;
        float inverse = nothing ? 0 : 1 / sum[r];
        for (int d = 0; d < D; d += kLanes) write(row + d, load(acc + panel_offset<D>(kLaneCount, r, d)) * inverse);
        lse[b * s.lse_stride() + h * s.Tq + i + r] =
            nothing ? -kInfinity : float(largest[r] * kLn2 + std::log(double(sum[r])));
    }
}

template <int D, class Out> void forward(Heads<Out> o, float* lse, Heads<const real> q, Heads<const real> k,
                                         Heads<const real> v, float scale, void* scratch, const AttentionShape& s) {
    int64_t per_row = tiles(s.Tq, kLaneCount), items = s.B * s.H * per_row;
    // Heavy tiles (the last queries) of each head first, so that what is left at the end is light.
#pragma omp parallel for schedule(dynamic)
    for (int64_t item = 0; item < items; item++) {
        int64_t tile = per_row - 1 - item % per_row, h = item / per_row % s.H, b = item / per_row / s.H;
        int64_t i = tile * kLaneCount;
        forward_tile<D>(o, lse, q, k, v, scale, (float*)scratch + omp_get_thread_num() * forward_floats(D), s, b, h, i,
                        int(std::min<int64_t>(kLaneCount, s.Tq - i)));
    }
}

// --- Backward ------------------------------------------------------------------------------------------------------

struct Team {
    int64_t size, member, groups;

    // A barrier of the whole parallel region, which is the team whenever it has more than one member.
    void wait() const {
        if (size > 1) {
#pragma omp barrier
        }
    }
};

template <class T> struct Gradients {
    Heads<T> dq, dk, dv;
    bool add; // `+=` instead of `=`
};

template <int D, class T>
inline void write_gradient(T* row, const float* from, int64_t rows, int64_t r, float factor, bool add) {
    for (int d = 0; d < D; d += kLanes) {
        Vec value = load(from + panel_offset<D>(rows, r, d)) * factor;
        write(row + d, add ? load(row + d) + value : value);
    }
}

// One head's backward pass by the members of a team. Member t takes key tiles t, t + size, …, whose dK and dV it keeps
// to itself. dQ is shared: the query tiles form groups (tile i in group i mod groups), and the members pass through
// them one step behind each other, a barrier after each step. Two members, two groups:
//
//   step       0       1       2       3       4
//   member 0   k0 g0   k0 g1   k2 g0   k2 g1           key tile k meets query group g
//   member 1           k1 g0   k1 g1   k3 g0   k3 g1
//
// No two members are in one group at once (there are at least as many groups as members), so dQ needs neither locks nor
// copies. Each query meets the key tiles in ascending order, and each key the query tiles group by group: the sums
// depend on the number of groups, not on who computes them. With one group for each thread that OpenMP may start, the
// result is the same bit for bit in each run, whether heads are shared or not.
template <int D> struct BackwardHead {
    Heads<const real> dout, q, k, v, o;
    const float* lse;
    float scale;
    const AttentionShape& s;
    int64_t b, h;
    float* dq;    // tiles of (kRows,D) panels
    float* delta; // (padded Tq)
    float* lse2;  // (padded Tq)
    // One thread's own.
    float* kt;      // (D,kLaneCount)
    float* vt;      // (D,kLaneCount)
    float* keys;    // (kLaneCount,D) panels
    float* dk;      // (kLaneCount,D) panels
    float* dv;      // (kLaneCount,D) panels
    float* queries; // (kRows,D) panels
    float* douts;   // (kRows,D) panels
    float* weights; // (kRows,kLaneCount): P
    float* dscores; // (kRows,kLaneCount): dS

    BackwardHead(Heads<const real> dout, Heads<const real> q, Heads<const real> k, Heads<const real> v,
                 Heads<const real> o, const float* lse, float scale, const AttentionShape& s, float* shared, float* own)
        : dout(dout), q(q), k(k), v(v), o(o), lse(lse), scale(scale), s(s), b(0), h(0), dq(shared),
          delta(dq + padded_rows(s.Tq) * D), lse2(delta + padded_rows(s.Tq)), kt(own), vt(kt + D * kLaneCount),
          keys(vt + D * kLaneCount), dk(keys + D * kLaneCount), dv(dk + D * kLaneCount), queries(dv + D * kLaneCount),
          douts(queries + kRows * D), weights(douts + kRows * D), dscores(weights + kRows * kLaneCount) {}

    // dQ = 0 and the rows' Δ and LSE, for one query tile.
    void prepare(int64_t i, int m) {
        std::fill_n(dq + i * D, kRows * D, 0.f);
        for (int r = 0; r < m; r++) {
            const real *x = dout.row(b, i + r, h), *y = o.row(b, i + r, h);
            Vec dot = {};
            for (int d = 0; d < D; d += kLanes) dot += load(x + d) * load(y + d);
            delta[i + r] = sum(dot);
            lse2[i + r] = lse[b * s.lse_stride() + h * s.Tq + i + r] * kLog2e;
        }
    }

    template <bool Masked> void tile(int64_t i, int m, int64_t j, int n) {
        pack_rows<D>(queries, kRows, q, b, i, h, m);
        pack_rows<D>(douts, kRows, dout, b, i, h, m);
        Seen seen[kRows] = {};
        if (Masked)
            for (int r = 0; r < m; r++) seen[r] = seen_keys(s, b, i + r, j, n);
        VecInt lane_index;
        for (int l = 0; l < kLanes; l++) lane_index[l] = l;
        auto visible = [&](int row, int lane) {
            return (lane_index >= seen[row].first - lane) & (lane_index < seen[row].last - lane);
        };
        scores<D>(queries, kt, m, n, [&](auto& block, int row, int lane) {
            for (int r = 0; r < int(std::size(block)); r++)
                for (int c = 0; c < int(std::size(block[0])); c++) {
                    Vec weight = exp2_clamped(block[r][c] - lse2[i + row + r]);
                    if (Masked) weight = visible(row + r, lane + c * kLanes) ? weight : Vec{};
                    store(weights + (row + r) * kLaneCount + lane + c * kLanes, weight);
                }
        });
        scores<D>(douts, vt, m, n, [&](auto& block, int row, int lane) {
            for (int r = 0; r < int(std::size(block)); r++)
                for (int c = 0; c < int(std::size(block[0])); c++) {
                    int64_t at = (row + r) * kLaneCount + lane + c * kLanes;
                    store(dscores + at, load(weights + at) * (block[r][c] - delta[i + row + r]));
                }
        });
        auto keep = [](int) { return 1.f; };
        accumulate<D, 1, kLaneCount>(dv, kLaneCount, weights, douts, kRows, n, m, keep);
        accumulate<D, 1, kLaneCount>(dk, kLaneCount, dscores, queries, kRows, n, m, keep);
        accumulate<D, kLaneCount, 1>(dq + i * D, kRows, dscores, keys, kLaneCount, m, n, keep);
    }

    // Kᵀ, Vᵀ, K and empty sums for keys j .. j+n.
    void begin_keys(int64_t j, int n) {
        pack_lanes<D>(kt, k, b, j, h, n, scale * kLog2e);
        pack_lanes<D>(vt, v, b, j, h, n, 1);
        pack_rows<D>(keys, kLaneCount, k, b, j, h, n);
        std::fill_n(dk, D * kLaneCount, 0.f);
        std::fill_n(dv, D * kLaneCount, 0.f);
    }

    // Keys j .. j+n against the query tiles group, group + groups, … that see any of them.
    void meet_queries(int64_t j, int n, int64_t group, int64_t groups) {
        int64_t begin = std::clamp<int64_t>(s.k_offset + j - s.q_offset, 0, s.Tq), end = s.Tq;
        if (s.doc_start) {
            const int64_t* starts = s.doc_start + b * s.Tq;
            end = std::upper_bound(starts, starts + s.Tq, s.k_offset + j + n - 1) - starts;
        }
        int64_t first = begin / kRows;
        first += (group - first % groups + groups) % groups;
        for (int64_t i = first * kRows; i < end; i += groups * kRows) {
            int m = int(std::min<int64_t>(kRows, s.Tq - i));
            all_seen(s, b, i, m, j, n) ? tile<false>(i, m, j, n) : tile<true>(i, m, j, n);
        }
    }

    template <class T> void run(const Gradients<T>& gradients, int64_t sequence, int64_t head, Team team) {
        b = sequence, h = head;
        auto each_own_query_tile = [&](auto body) {
            for (int64_t i = team.member * kRows; i < s.Tq; i += team.size * kRows)
                body(i, int(std::min<int64_t>(kRows, s.Tq - i)));
        };
        each_own_query_tile([&](int64_t i, int m) { prepare(i, m); });
        team.wait();
        int64_t turns = tiles(tiles(s.Tk, kLaneCount), team.size) * team.groups;
        for (int64_t step = 0; step < turns + team.size - 1; step++) {
            int64_t turn = step - team.member, group = turn % team.groups;
            int64_t j = (turn / team.groups * team.size + team.member) * kLaneCount;
            if (turn >= 0 && turn < turns && j < s.Tk) {
                int n = int(std::min<int64_t>(s.Tk - j, kLaneCount));
                if (group == 0) begin_keys(j, n);
                meet_queries(j, n, group, team.groups);
                for (int r = 0; group == team.groups - 1 && r < n; r++) {
                    write_gradient<D>(gradients.dk.row(b, j + r, h), dk, kLaneCount, r, scale, gradients.add);
                    write_gradient<D>(gradients.dv.row(b, j + r, h), dv, kLaneCount, r, 1, gradients.add);
                }
            }
            team.wait();
        }
        each_own_query_tile([&](int64_t i, int m) {
            for (int r = 0; r < m; r++)
                write_gradient<D>(gradients.dq.row(b, i + r, h), dq + i * D, kRows, r, scale, gradients.add);
        });
    }
};

template <int D, class T> void backward(const Gradients<T>& gradients, Heads<const real> dout, Heads<const real> q,
                                        Heads<const real> k, Heads<const real> v, Heads<const real> o, const float* lse,
                                        float scale, void* scratch, const AttentionShape& s) {
    // The choice must be the one that the scratch was sized for, so it asks for the same number of threads.
    int64_t groups = omp_get_max_threads();
    bool share = threads_share_heads(s, groups);
#pragma omp parallel
    {
        int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
        float* own = (float*)scratch + thread * backward_floats(D);
        float* shared = (float*)scratch + threads * backward_floats(D) + (share ? 0 : thread) * head_floats(s);
        BackwardHead<D> work(dout, q, k, v, o, lse, scale, s, shared, own);
        if (share) {
            for (int64_t item = 0; item < s.B * s.H; item++)
                work.run(gradients, item / s.H, item % s.H, Team{threads, thread, groups});
        } else {
#pragma omp for schedule(dynamic)
            for (int64_t item = 0; item < s.B * s.H; item++)
                work.run(gradients, item / s.H, item % s.H, Team{1, 0, groups});
        }
    }
}

// body(std::integral_constant<int, D>) for the head dim at hand.
template <class Body> void with_head_dim(int64_t D, Body body) {
    switch (D) {
    case 32:
        return body(std::integral_constant<int, 32>());
    case 64:
        return body(std::integral_constant<int, 64>());
    case 80:
        return body(std::integral_constant<int, 80>());
    case 128:
        return body(std::integral_constant<int, 128>());
    case 256:
        return body(std::integral_constant<int, 256>());
    default:
        require_head_dim(D);
    }
}

} // namespace

void attention_forward(Stream, Heads<real> o, float* lse, Heads<const real> q, Heads<const real> k, Heads<const real> v,
                       float scale, void* scratch, const AttentionShape& shape) {
    with_head_dim(shape.D, [&](auto D) { forward<D>(o, lse, q, k, v, scale, scratch, shape); });
}

void attention_forward_partial(Stream, Heads<float> o, float* lse, Heads<const real> q, Heads<const real> k,
                               Heads<const real> v, float scale, void* scratch, const AttentionShape& shape) {
    with_head_dim(shape.D, [&](auto D) { forward<D>(o, lse, q, k, v, scale, scratch, shape); });
}

void attention_merge(Stream, Heads<float> o, float* lse, Heads<const float> part, const float* part_lse,
                     const AttentionShape& shape) {
    parallel_ranges(shape.B * shape.H * shape.Tq, 1, [&](int64_t begin, int64_t end, int) {
        for (int64_t row = begin; row < end; row++) {
            int64_t t = row % shape.Tq, h = row / shape.Tq % shape.H, b = row / shape.Tq / shape.H;
            int64_t at = b * shape.lse_stride() + h * shape.Tq + t;
            double mine = lse[at], other = part_lse[at];
            if (other == -INFINITY) continue;
            // other − mine is +Inf where this side saw nothing: s = 1, and the sum below needs no special case.
            double apart = other - mine, s = 1 / (1 + std::exp(-apart));
            float share = float(s);
            float* to = o.row(b, t, h);
            const float* from = part.row(b, t, h);
            for (int64_t d = 0; d < shape.D; d++) to[d] -= share * (to[d] - from[d]);
            lse[at] = float(std::max(mine, other) + std::log1p(std::exp(-std::abs(apart))));
        }
    });
}

void attention_backward(Stream, Heads<real> dq, Heads<real> dk, Heads<real> dv, Heads<const real> dout,
                        Heads<const real> q, Heads<const real> k, Heads<const real> v, Heads<const real> o,
                        const float* lse, float scale, void* scratch, const AttentionShape& shape) {
    with_head_dim(shape.D, [&](auto D) {
        backward<D>(Gradients<real>{dq, dk, dv, false}, dout, q, k, v, o, lse, scale, scratch, shape);
    });
}

void attention_backward_partial(Stream, Heads<float> dq, Heads<float> dk, Heads<float> dv, Heads<const real> dout,
                                Heads<const real> q, Heads<const real> k, Heads<const real> v, Heads<const real> o,
                                const float* lse, float scale, void* scratch, const AttentionShape& shape) {
    with_head_dim(shape.D, [&](auto D) {
        backward<D>(Gradients<float>{dq, dk, dv, true}, dout, q, k, v, o, lse, scale, scratch, shape);
    });
}
