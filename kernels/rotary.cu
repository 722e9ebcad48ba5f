// Rotary positions on the GPU: one pass over queries, keys and values, 16 bytes an access, bound by memory.
//
// The two halves of a pair lie dims/2 elements apart, in other packs of 16 bytes, and rows may be rotated in place. So
// a thread owns a unit: packs that hold whole pairs and nothing of another unit's. It then needs no other thread's
// values, and nobody waits between reading and writing. With packs of N elements:
//
//   dims/2 a multiple of N   the packs at d and d + dims/2     dims = 16, 32, 64, ... in bf16
//   4 pairs in bf16          one pack                          D = 32: aaaabbbb
//   10 pairs in bf16         three packs                       D = 80: aaaaaaaa aabbbbbb bbbb.... (four to spare)
//
// All other packs of a row, and all of v, are units of one pack that take the bias and nothing else. Other numbers of
// pairs, odd strides and unaligned arrays go element by element.
//
// A block takes a few tokens: it puts their sines and cosines, each computed once, into shared memory; then a thread
// keeps its unit's place and angles, and walks over the heads.
//
// Tried and dropped on paper: a pack a lane with the partner's values by shuffles, which for D = 80 needs 16 of them a
// pack and leaves lanes idle; whole rows through shared memory, which puts a barrier between every read and its write.
#include "rotary.h"

#include <algorithm>

#include "common.h"
#include "device.h"
#include "launch.h"
#include "ptx.h"

namespace {

constexpr int kWide = Pack128<real>::size;
constexpr int kThreads = 256; // of a block, or those of one head where it has more: D = 256 in narrow packs
constexpr int most_threads(int N) { return std::max(kThreads, int(3 * 2 * kMostRotaryPairs) / N); }
constexpr int kTogether = 2; // heads whose loads a thread has under way

struct Arrays {
    Heads<real> out[3]; // (B,T,H,D) each: queries, keys, values
    Heads<const real> in[3];
    bool copied[3];           // do the dims that are not rotated go to another place, or get a bias?
    const real* bias;         // (H,3,D) or null
    const int32_t* positions; // (B,T) or null
    int64_t position0, T;
    int H, D, half;
    int tokens;      // of a block
    unsigned blocks; // of a sequence
    float sign;      // of the sine: −1 transposes
};

// Block (units of a head, heads, tokens). A unit is `kPacks` packs of N elements with `kPairs` pairs: elements i and
// i + kPairs of it.
template <int N, int kPacks, int kPairs> __global__ void __launch_bounds__(most_threads(N))
    rotate(Arrays a, Rotary rotary) {
    const int64_t b = blockIdx.x / a.blocks, first_token = int64_t(blockIdx.x % a.blocks) * a.tokens;
    const int units = a.half / kPairs; // of a row, that are rotated

    // angles (tokens,kPairs,units): cosine and sine of each pair, those of neighbouring units beside each other, since
    // neighbouring threads read them.
    float* angles = reinterpret_cast<float*>(dynamic_shared());
    const int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    for (int i = thread; i < a.tokens * a.half; i += blockDim.x * blockDim.y * blockDim.z) {
        const int token = i / a.half, place = i % a.half, pair = place % units * kPairs + place / units;
        const int64_t t = first_token + token;
        if (t >= a.T) break;
        const int64_t p = a.positions ? load_global(a.positions + b * a.T + t) : a.position0 + t;
        const CosSin angle = cos_sin_of_turns(rotary_angle(rotary, p, pair));
        const Pack<float, 2> scaled = {rotary.factor * angle.cos, rotary.factor * a.sign * angle.sin};
        store_pack_shared(angles + 2 * i, scaled);
    }
    __syncthreads();

    const int row_units = a.D / N - (kPacks - 1) * units; // of a query or a key
    const int unit = threadIdx.x;
    const int s = unit < row_units ? 0 : unit < 2 * row_units ? 1 : 2;
    const int column = unit - s * row_units;
    const bool rotated = s < 2 && column < units;
    const int64_t t = first_token + threadIdx.z;
    if (t >= a.T || !(rotated || a.copied[s])) return;

    const float* own = angles + 2 * (threadIdx.z * a.half + column); // (kPairs,units), of which this thread's unit
    const int d = (rotated || s == 2 ? column : column + (kPacks - 1) * units) * N;
    const int next = kPairs == N ? a.half : N; // elements from a pack of the unit to the next
    const real* in = a.in[s].row(b, t, threadIdx.y) + d;
    real* out = a.out[s].row(b, t, threadIdx.y) + d;
    const real* bias = a.bias ? a.bias + (int64_t(threadIdx.y) * 3 + s) * a.D + d : nullptr;
    const int64_t step = blockDim.y, in_step = step * a.in[s].head, out_step = step * a.out[s].head;

    for (int h = threadIdx.y; h < a.H; h += kTogether * step) {
        Pack<real, N> x[kTogether][kPacks];
#pragma unroll
        for (int g = 0; g < kTogether; g++) {
            if (h + g * step >= a.H) break;
#pragma unroll
            for (int p = 0; p < kPacks; p++)
                if (p == 0 || rotated) x[g][p] = load_pack<N>(in + g * in_step + p * next);
        }
#pragma unroll
        for (int g = 0; g < kTogether; g++) {
            if (h + g * step >= a.H) break;
            float y[kPacks * N];
#pragma unroll
            for (int p = 0; p < kPacks; p++) {
                if (p > 0 && !rotated) break;
#pragma unroll
                for (int j = 0; j < N; j++) y[p * N + j] = to_float(x[g][p][j]);
                if (!bias) continue;
                Pack<real, N> c = load_pack<N>(bias + g * step * 3 * a.D + p * next);
#pragma unroll
                for (int j = 0; j < N; j++) y[p * N + j] += to_float(c[j]);
            }
            if (rotated) {
#pragma unroll
                for (int i = 0; i < kPairs; i++) {
                    const Pack<float, 2> angle = load_pack_shared<2>(own + 2 * i * units);
                    const float cos = angle[0], sin = angle[1], x1 = y[i], x2 = y[i + kPairs];
                    y[i] = x1 * cos - x2 * sin;
                    y[i + kPairs] = x2 * cos + x1 * sin;
                }
            }
#pragma unroll
            for (int p = 0; p < kPacks; p++) {
                if (p > 0 && !rotated) break;
                float rounded[N];
#pragma unroll
                for (int j = 0; j < N; j++) rounded[j] = y[p * N + j];
                store_pack(out + g * out_step + p * next, round_pack<real>(rounded));
            }
        }
        in += kTogether * in_step, out += kTogether * out_step;
        if (bias) bias += kTogether * step * 3 * a.D;
    }
}

template <int N, int kPacks, int kPairs> void run(Stream stream, Arrays a, const Rotary& rotary, int64_t B) {
    const int units = 3 * (a.D / N) - 2 * (kPacks - 1) * (a.half / kPairs); // of a head
    // Heads side by side: as many as a block has room for, and of these numbers the smallest that needs no more rounds.
    const int most = std::clamp(kThreads / units, 1, a.H), rounds = (a.H + most - 1) / most;
    const int heads = (a.H + rounds - 1) / rounds;
    a.tokens = int(std::min<int64_t>(std::clamp(kThreads / (units * heads), 1, 64), a.T));
    a.blocks = blocks_for(a.T, a.tokens);
    launch(rotate<N, kPacks, kPairs>, blocks_for(B * a.blocks, 1), dim3(units, heads, a.tokens),
           2 * a.tokens * a.half * sizeof(float), stream, a, rotary);
}

void rotate_all(Stream stream, Arrays a, const Rotary& rotary, const RotaryShape& shape) {
    const int64_t half = rotary.dims / 2;
    require(shape.D <= 2 * kMostRotaryPairs && rotary.dims <= shape.D && rotary.dims % 2 == 0,
            "rotary: dims must be even, at most D <= 256");
    if (shape.B * shape.T * shape.H * shape.D == 0) return;
    a.positions = shape.positions, a.position0 = shape.position0;
    a.T = shape.T, a.H = int(shape.H), a.D = int(shape.D), a.half = int(half);

    auto even = [](const auto& heads, int64_t N) {
        return reinterpret_cast<uintptr_t>(heads.data) % (N * sizeof(real)) == 0 && heads.batch % N == 0 &&
               heads.token % N == 0 && heads.head % N == 0;
    };
    bool wide = shape.D % kWide == 0 && aligned(a.bias);
    for (int s = 0; s < 3; s++) {
        wide = wide && even(a.in[s], kWide) && even(a.out[s], kWide);
        a.copied[s] = a.bias || a.in[s].data != a.out[s].data;
    }
    if (wide && half % kWide == 0) return run<kWide, 2, kWide>(stream, a, rotary, shape.B);
    if constexpr (kWide == 8) {
        if (wide && half == 4) return run<8, 1, 4>(stream, a, rotary, shape.B);
        if (wide && half == 10) return run<8, 3, 10>(stream, a, rotary, shape.B);
    } else {
        if (wide && half % 2 == 0) return run<2, 2, 2>(stream, a, rotary, shape.B);
    }
    run<1, 2, 1>(stream, a, rotary, shape.B);
}

} // namespace

void rotary_forward(Stream stream, Heads<real> q, Heads<real> k, Heads<real> v, const real* qkv, const real* bias,
                    const Rotary& rotary, const RotaryShape& shape) {
    Arrays a{};
    const Heads<real> out[3] = {q, k, v};
    for (int s = 0; s < 3; s++) a.out[s] = out[s], a.in[s] = rotary_part(qkv, s, shape);
    a.bias = bias, a.sign = 1;
    rotate_all(stream, a, rotary, shape);
}

void rotary_backward(Stream stream, real* dqkv, Heads<const real> dq, Heads<const real> dk, Heads<const real> dv,
                     const Rotary& rotary, const RotaryShape& shape) {
    Arrays a{};
    const Heads<const real> in[3] = {dq, dk, dv};
    for (int s = 0; s < 3; s++) a.out[s] = rotary_part(dqkv, s, shape), a.in[s] = in[s];
    a.sign = -1;
    rotate_all(stream, a, rotary, shape);
}
