#include "layernorm.h"

#include <cmath>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "common.h"
#include "math.h"
#include "scratch.h"

namespace {

using namespace scratch::layernorm;

// A row to be normalised: x (C) as it is, or x + y rounded to real, computed anew in each sweep since both are in L1.
struct Row {
    const real* x; // (C)
    Vec lanes(int64_t c) const { return load(x + c); }
    float one(int64_t c) const { return to_float(x[c]); }
};

struct RowOfSums {
    const real *x, *y; // (C)
    Vec lanes(int64_t c) const {
        real rounded[kLanes];
        store(rounded, load(x + c) + load(y + c));
        return load(rounded);
    }
    float one(int64_t c) const {
        real rounded;
        assign(rounded, to_float(x[c]) + to_float(y[c]));
        return to_float(rounded);
    }
};

constexpr int kUnroll = 4; // independent sums, so that no addition waits for the one before it

// Lanes, then the elements that fill no vector: at(c) for each whole vector, tail(c) for each element after them.
template <class At, class Tail> void sweep(int64_t C, At at, Tail tail) {
    int64_t c = 0;
    for (; c + kUnroll * kLanes <= C; c += kUnroll * kLanes)
        for (int u = 0; u < kUnroll; u++) at(c + u * kLanes, u);
    for (; c + kLanes <= C; c += kLanes) at(c, 0);
    for (; c < C; c++) tail(c);
}

float sum_of(const Vec (&v)[kUnroll]) { return sum((v[0] + v[1]) + (v[2] + v[3])); }

struct Statistics {
    float mean, rstd;
};

// The second sweep also sums x − mean, which exact arithmetic would make zero: what rounding left of it corrects the
// mean and the variance (Chan, Golub & LeVeque 1983).
template <class AnyRow> Statistics statistics(const AnyRow& row, int64_t C, float eps) {
    Vec x[kUnroll] = {}, d1[kUnroll] = {}, d2[kUnroll] = {};
    float x_tail = 0, d1_tail = 0, d2_tail = 0;
    sweep(
        C, [&](int64_t c, int u) { x[u] += row.lanes(c); }, [&](int64_t c) { x_tail += row.one(c); });
    const float mean = (sum_of(x) + x_tail) / C;
    sweep(
        C,
        [&](int64_t c, int u) {
            Vec d = row.lanes(c) - mean;
            d1[u] += d;
            d2[u] += d * d;
        },
        [&](int64_t c) {
            float d = row.one(c) - mean;
            d1_tail += d;
            d2_tail += d * d;
        });
    const float correction = (sum_of(d1) + d1_tail) / C;
    const float variance = (sum_of(d2) + d2_tail) / C - correction * correction;
    return {mean + correction, 1 / std::sqrt(variance + eps)};
}

// An output this large is gone from the cache before the next layer reads its beginning, so it is better written past
// the cache, which spares reading each line before overwriting it: 2.4 times as fast at (32768,768) floats, and no
// gain below. Such stores need whole aligned vectors.
bool write_past_cache(const real* out, int64_t N, int64_t C) {
    constexpr int64_t kLargeOutput = 16 << 20; // bytes: half of a usual last-level cache, since the input is there too
    const int64_t vector = kLanes * sizeof(real);
    return N * C * int64_t(sizeof(real)) > kLargeOutput && C % kLanes == 0 &&
           reinterpret_cast<uintptr_t>(out) % vector == 0;
}

template <bool kPastCache> void put(real* p, Vec v) {
#if defined(__SSE2__)
    if constexpr (kPastCache) {
        real lanes[kLanes];
        store(lanes, v);
        for (size_t byte = 0; byte < sizeof lanes; byte += sizeof(__m128i))
            _mm_stream_si128(reinterpret_cast<__m128i*>(reinterpret_cast<char*>(p) + byte),
                             _mm_loadu_si128(reinterpret_cast<__m128i*>(reinterpret_cast<char*>(lanes) + byte)));
        return;
    }
#endif
    store(p, v);
}

// out (C) and, unless null, residual (C), which holds the row itself.
template <bool kPastCache, class AnyRow>
void normalise(real* out, real* residual, const AnyRow& row, const real* w, const real* b, Statistics s, int64_t C) {
    auto affine = [&](auto x, auto w, auto b) { return (x - s.mean) * s.rstd * w + b; };
    sweep(
        C,
        [&](int64_t c, int) {
            Vec x = row.lanes(c);
            if (residual) put<kPastCache>(residual + c, x);
            put<kPastCache>(out + c, affine(x, load(w + c), load(b + c)));
        },
        [&](int64_t c) {
            float x = row.one(c);
            if (residual) assign(residual[c], x);
            assign(out[c], affine(x, to_float(w[c]), to_float(b[c])));
        });
}

} // namespace

void layernorm_forward(Stream, real* out, float* mean, float* rstd, const real* inp, const real* w, const real* b,
                       int64_t N, int64_t C, float eps) {
    const bool past_cache = write_past_cache(out, N, C);
    parallel_ranges(N, 1, [&](int64_t begin, int64_t end, int) {
        for (int64_t n = begin; n < end; n++) {
            Row row{inp + n * C};
            Statistics s = statistics(row, C, eps);
            mean[n] = s.mean, rstd[n] = s.rstd;
            (past_cache ? normalise<true, Row> : normalise<false, Row>)(out + n * C, nullptr, row, w, b, s, C);
        }
    });
}

void residual_layernorm_forward(Stream, real* residual, real* out, float* mean, float* rstd, const real* x,
                                const real* y, const real* w, const real* b, int64_t N, int64_t C, float eps) {
    const bool past_cache = write_past_cache(out, N, C) && write_past_cache(residual, N, C);
    parallel_ranges(N, 1, [&](int64_t begin, int64_t end, int) {
        for (int64_t n = begin; n < end; n++) {
            RowOfSums row{x + n * C, y + n * C};
            Statistics s = statistics(row, C, eps);
            mean[n] = s.mean, rstd[n] = s.rstd;
            (past_cache ? normalise<true, RowOfSums> : normalise<false, RowOfSums>)(out + n * C, residual + n * C, row,
                                                                                    w, b, s, C);
        }
    });
}

// With norm = (x − mean)·rstd and dnorm = dout·w:
//   dinp += rstd · (dnorm − Σ_c dnorm / C − norm · Σ_c dnorm·norm / C)       dw += Σ_n dout·norm      db += Σ_n dout
void layernorm_backward(Stream, real* dinp, float* dw, float* db, const real* dout, const real* inp, const real* w,
                        const float* mean, const float* rstd, void* scratch, int64_t N, int64_t C) {
    const int64_t stride = part_stride(C);
    float* partials = static_cast<float*>(scratch); // (threads,2,stride)
#pragma omp parallel
    {
        const int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
        float *dw_part = partials + thread * 2 * stride, *db_part = dw_part + stride;
        memset(dw_part, 0, 2 * stride * sizeof(float));

        const Range rows = split_range(N, threads, thread);
        for (int64_t n = rows.begin; n < rows.end; n++) {
            const real *x = inp + n * C, *g = dout + n * C;
            real* dx = dinp + n * C;
            const float m = mean[n], r = rstd[n];
            Vec s1[kUnroll] = {}, s2[kUnroll] = {};
            float s1_tail = 0, s2_tail = 0;
            sweep(
                C,
                [&](int64_t c, int u) {
                    Vec norm = (load(x + c) - m) * r, d = load(g + c);
                    store(dw_part + c, load(dw_part + c) + d * norm);
                    store(db_part + c, load(db_part + c) + d);
                    Vec dnorm = d * load(w + c);
                    s1[u] += dnorm;
                    s2[u] += dnorm * norm;
                },
                [&](int64_t c) {
                    float norm = (to_float(x[c]) - m) * r, d = to_float(g[c]);
                    dw_part[c] += d * norm;
                    db_part[c] += d;
                    float dnorm = d * to_float(w[c]);
                    s1_tail += dnorm;
                    s2_tail += dnorm * norm;
                });
            const float mean1 = (sum_of(s1) + s1_tail) / C, mean2 = (sum_of(s2) + s2_tail) / C;
            auto added = [&](auto dx, auto x, auto d, auto w) {
                return dx + (d * w - mean1 - (x - m) * r * mean2) * r;
            };
            sweep(
                C, [&](int64_t c, int) { store(dx + c, added(load(dx + c), load(x + c), load(g + c), load(w + c))); },
                [&](int64_t c) {
                    assign(dx[c], added(to_float(dx[c]), to_float(x[c]), to_float(g[c]), to_float(w[c])));
                });
        }

#pragma omp barrier
        const Range channels = split_range(C, threads, thread, 16);
        for (int64_t c = channels.begin; c < channels.end; c++) {
            float dw_sum = 0, db_sum = 0;
            for (int64_t t = 0; t < threads; t++) {
                dw_sum += partials[t * 2 * stride + c];
                db_sum += partials[(t * 2 + 1) * stride + c];
            }
            dw[c] += dw_sum;
            db[c] += db_sum;
        }
    }
}
