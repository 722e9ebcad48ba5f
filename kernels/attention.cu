// Attention on the GPU: the choice between the flash kernels (attention_forward.cu, attention_backward.cu) and the
// plain ones (attention_plain.cu), and the merge of partial results.
#include "attention.h"

#include "attention_flash.h"
#include "attention_plain.h"
#include "device.h"
#include "launch.h"
#include "scratch.h"

namespace {

// The flash kernels, if they take this call: true when it is done. T is `real`, a template parameter so that fp32
// builds, which have no flash kernels, do not compile the calls.
template <class T, class Out> bool flash_forward(Stream stream, Heads<Out> o, float* lse, Heads<const T> q,
                                                 Heads<const T> k, Heads<const T> v, float scale,
                                                 const AttentionShape& shape) {
    if constexpr (std::is_same_v<T, bf16>) {
        if (!flash::supports(shape, scale, o, q, k, v)) return false;
        flash::forward(stream, o, lse, q, k, v, scale, shape);
        return true;
    } else {
        return false;
    }
}
template <class T, class Out> bool flash_backward(Stream stream, Heads<Out> dq, Heads<Out> dk, Heads<Out> dv,
                                                  Heads<const T> dout, Heads<const T> q, Heads<const T> k,
                                                  Heads<const T> v, Heads<const T> o, const float* lse, float scale,
                                                  void* scratch, const AttentionShape& shape) {
    if constexpr (std::is_same_v<T, bf16>) {
        if (!flash::supports(shape, scale, dq, dk, dv, dout, q, k, v, o)) return false;
        flash::backward(stream, dq, dk, dv, dout, q, k, v, o, lse, scale, scratch, shape);
        return true;
    } else {
        return false;
    }
}

constexpr int kMergeThreads = 256;

// A warp for each row of (B,H,Tq).
__global__ void __launch_bounds__(kMergeThreads)
    merge_kernel(Heads<float> o, float* lse, Heads<const float> part, const float* part_lse, AttentionShape s) {
    int64_t n = global_thread() / kWarpSize;
    if (n >= s.B * s.H * s.Tq) return;
    int64_t t = n % s.Tq, h = n / s.Tq % s.H, b = n / s.Tq / s.H;
    int64_t at = b * s.lse_batch + h * s.Tq + t;
    float mine = load_global(lse + at), other = load_global(part_lse + at);
    if (other == -INFINITY) return;
    // other − mine is +Inf where this side saw nothing: the share is 1, and lse needs no special case.
    float apart = other - mine, share = 1 / (1 + expf(-apart));
    float* to = o.row(b, t, h);            // (D)
    const float* from = part.row(b, t, h); // (D)
    for (int64_t d = lane_index(); d < s.D; d += kWarpSize) {
        float x = load_global(to + d);
        store_global(to + d, x - share * (x - load_global(from + d)));
    }
    __syncwarp(); // all lanes have read lse
    float larger = other > mine ? other : mine;
    if (lane_index() == 0) store_global(lse + at, larger + log1pf(expf(-fabsf(apart))));
}

} // namespace

void attention_forward(Stream stream, Heads<real> o, float* lse, Heads<const real> q, Heads<const real> k,
                       Heads<const real> v, float scale, void*, const AttentionShape& shape) {
    require_head_dim(shape.D);
    if (!flash_forward(stream, o, lse, q, k, v, scale, shape)) plain::forward(stream, o, lse, q, k, v, scale, shape);
}

void attention_forward_partial(Stream stream, Heads<float> o, float* lse, Heads<const real> q, Heads<const real> k,
                               Heads<const real> v, float scale, void*, const AttentionShape& shape) {
    require_head_dim(shape.D);
    if (!flash_forward(stream, o, lse, q, k, v, scale, shape))
        plain::forward_partial(stream, o, lse, q, k, v, scale, shape);
}

void attention_merge(Stream stream, Heads<float> o, float* lse, Heads<const float> part, const float* part_lse,
                     const AttentionShape& shape) {
    AttentionShape s = shape;
    s.lse_batch = shape.lse_stride();
    int64_t rows = s.B * s.H * s.Tq;
    if (rows == 0) return;
    launch(merge_kernel, blocks_for(rows, kMergeThreads / kWarpSize), kMergeThreads, 0, stream, o, lse, part, part_lse,
           s);
}

void attention_backward(Stream stream, Heads<real> dq, Heads<real> dk, Heads<real> dv, Heads<const real> dout,
                        Heads<const real> q, Heads<const real> k, Heads<const real> v, Heads<const real> o,
                        const float* lse, float scale, void* scratch, const AttentionShape& shape) {
    require_head_dim(shape.D);
    if (!flash_backward(stream, dq, dk, dv, dout, q, k, v, o, lse, scale, scratch, shape))
        plain::backward(stream, dq, dk, dv, dout, q, k, v, o, lse, scale, scratch, shape);
}

void attention_backward_partial(Stream stream, Heads<float> dq, Heads<float> dk, Heads<float> dv,
                                Heads<const real> dout, Heads<const real> q, Heads<const real> k, Heads<const real> v,
                                Heads<const real> o, const float* lse, float scale, void* scratch,
                                const AttentionShape& shape) {
    require_head_dim(shape.D);
    if (!flash_backward(stream, dq, dk, dv, dout, q, k, v, o, lse, scale, scratch, shape))
        plain::backward_partial(stream, dq, dk, dv, dout, q, k, v, o, lse, scale, scratch, shape);
}
