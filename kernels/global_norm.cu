// The global norm on the GPU: a fixed number of blocks, each with a run of the gradients of its own and a partial sum
// in double, and one block that adds those. The order depends on n, type and alignment alone, so the norm is the same
// bits on every card. Data center cards do one double FMA for every two floats, which is plenty here; cards for the
// desk two a clock in an SM, about as many as memory brings it bf16 gradients.
#include "global_norm.h"

#include <algorithm>

#include "common.h"
#include "device.h"
#include "launch.h"
#include "scratch.h"

namespace {

using namespace scratch::global_norm;

// Exact: double has room for the product of two floats.
template <class T> __device__ __forceinline__ double square(T x) { return double(to_float(x)) * to_float(x); }

// sums (blocks) = Σ x² of each block's run.
template <class T, int N> __global__ void __launch_bounds__(kThreads)
    sum_squares(double* sums, const T* x, int64_t run, int64_t n) {
    const int64_t begin = blockIdx.x * run, end = min(begin + run, n);
    double sum[N] = {};
    int64_t i = begin + threadIdx.x * N;
    for (; i + (kUnroll - 1) * kThreads * N + N <= end; i += kUnroll * kThreads * N) {
        Pack<T, N> v[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; u++) v[u] = load_pack<N>(x + i + u * kThreads * N);
#pragma unroll
        for (int u = 0; u < kUnroll; u++)
#pragma unroll
            for (int j = 0; j < N; j++) sum[j] += square(v[u][j]);
    }
    // The ragged end: each thread's packs one by one, and the last pack's elements.
    for (; i < end; i += kThreads * N)
        for (int j = 0; j < N && i + j < end; j++) sum[0] += square(x[i + j]);
#pragma unroll
    for (int j = 1; j < N; j++) sum[0] += sum[j];
    const double total = block_sum(sum[0], reinterpret_cast<double*>(dynamic_shared()));
    if (threadIdx.x == 0) store_global(sums + blockIdx.x, total);
}

__global__ void __launch_bounds__(kThreads) root_of_sum(float* norm, const double* sums, int64_t blocks) {
    double sum = 0;
    for (int64_t i = threadIdx.x; i < blocks; i += kThreads) sum += load_global(sums + i);
    sum = block_sum(sum, reinterpret_cast<double*>(dynamic_shared()));
    if (threadIdx.x == 0) store_global(norm, static_cast<float>(sqrt(sum)));
}

__global__ void root_of_squares(float* norm, const float* norms, int64_t n) {
    double sum = 0;
    for (int64_t i = 0; i < n; i++) {
        const double x = load_global(norms + i);
        sum += x * x;
    }
    store_global(norm, static_cast<float>(sqrt(sum)));
}

__global__ void choose_scale(float* scale, const float* norm, const double* loss, float clip) {
    const float x = load_global(norm);
    const bool finite = isfinite(x) && isfinite(load_global(loss));
    store_global(scale, !finite ? NAN : clip > 0 && x > clip ? clip / x : 1.f);
}

template <class T> void norm_of(Stream stream, float* norm, const T* grads, void* scratch, int64_t n) {
    double* sums = static_cast<double*>(scratch); // (blocks)
    const int64_t blocks = blocks_of<T>(n);
    constexpr size_t kShared = 32 * sizeof(double);
    if (blocks > 0)
        launch(aligned(grads) ? sum_squares<T, Pack128<T>::size> : sum_squares<T, 1>, blocks_for(blocks, 1), kThreads,
               kShared, stream, sums, grads, run_of<T>(n), n);
    launch(root_of_sum, 1, kThreads, kShared, stream, norm, sums, blocks);
}

} // namespace

void global_norm(Stream stream, float* norm, const float* grads, void* scratch, int64_t n) {
    norm_of(stream, norm, grads, scratch, n);
}
void global_norm(Stream stream, float* norm, const bf16* grads, void* scratch, int64_t n) {
    norm_of(stream, norm, grads, scratch, n);
}

void combine_norms(Stream stream, float* norm, const float* norms, int64_t n) {
    launch(root_of_squares, 1, 1, 0, stream, norm, norms, n);
}

void clip_scale(Stream stream, float* scale, const float* norm, const double* loss, float clip) {
    launch(choose_scale, 1, 1, 0, stream, scale, norm, loss, clip);
}
