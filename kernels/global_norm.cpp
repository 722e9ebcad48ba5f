#include "global_norm.h"

#include <cmath>

#include "common.h"
#include "math.h"
#include "scratch.h"

namespace {

using namespace scratch::global_norm;

// Σ x², where the product of two floats is exact in double.
template <class T> double sum_of_squares(const T* x, int64_t n) {
    typedef double Wide __attribute__((vector_size(8 * kLanes)));
    Wide sums[2] = {};
    int64_t i = 0;
    for (; i + 2 * kLanes <= n; i += 2 * kLanes)
        for (int u = 0; u < 2; u++) {
            Wide wide = __builtin_convertvector(load(x + i + u * kLanes), Wide);
            sums[u] += wide * wide;
        }
    double total = 0;
    for (int lane = 0; lane < kLanes; lane++) total += sums[0][lane] + sums[1][lane];
    for (; i < n; i++) total += double(to_float(x[i])) * to_float(x[i]);
    return total;
}

template <class T> void norm_of(float* norm, const T* grads, void* scratch, int64_t n) {
    const int64_t blocks = blocks_of(n);
    double* sums = static_cast<double*>(scratch); // (blocks)
    parallel_ranges(blocks, 1, [&](int64_t begin, int64_t end, int) {
        for (int64_t block = begin; block < end; block++)
            sums[block] = sum_of_squares(grads + block * kBlock, std::min(kBlock, n - block * kBlock));
    });
    double total = 0;
    for (int64_t block = 0; block < blocks; block++) total += sums[block];
    *norm = float(std::sqrt(total));
}

} // namespace

void global_norm(Stream, float* norm, const float* grads, void* scratch, int64_t n) {
    norm_of(norm, grads, scratch, n);
}
void global_norm(Stream, float* norm, const bf16* grads, void* scratch, int64_t n) { norm_of(norm, grads, scratch, n); }

void combine_norms(Stream, float* norm, const float* norms, int64_t n) {
    double sum = 0;
    for (int64_t i = 0; i < n; i++) sum += double(norms[i]) * norms[i];
    *norm = float(std::sqrt(sum));
}

void clip_scale(Stream, float* scale, const float* norm, const double* loss, float clip) {
    if (!std::isfinite(*norm) || !std::isfinite(*loss))
        *scale = NAN;
    else
        *scale = clip > 0 && *norm > clip ? clip / *norm : 1.f;
}
