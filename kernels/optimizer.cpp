// A thread walks its range in blocks of 256 elements. Of a block, what is not float already is unpacked to floats on
// the stack, the rule runs over plain float arrays, and what was unpacked is packed again: all in the L1 cache, so
// memory sees one pass, and the rule is written once for all types.
#include "optimizer.h"

#include <bit>

#include "math.h"
#include "optimizer_codes.h"

namespace {

// ---- The code books ----

typedef uint8_t VecByte __attribute__((vector_size(kLanes), may_alias));

struct Tables {
    // code → value, −0.993 to 1 or 0 to 1
    float values[2][256];
    // r → the largest float not above the middle of magnitudes r − 1 and r: what is above it is nearer to r.
    float borders[2][256];

    Tables() {
        for (Book book : {Book::signed_values, Book::unsigned_values}) {
            float* value = values[int(book)];
            float* border = borders[int(book)];
            for (int k = 0; k <= largest_magnitude(book); k++) {
                const float magnitude = code_magnitude(book, k);
                if (book == Book::unsigned_values) {
                    value[k] = magnitude;
                } else {
                    value[kZeroCode + k] = magnitude;
                    if (k > 0 && k <= kZeroCode) value[kZeroCode - k] = -magnitude;
                }
                if (k == 0) continue;
                // The sum of two magnitudes is exact in double: both lie within 2^-22 and 1.
                const double middle = (double(code_magnitude(book, k - 1)) + magnitude) / 2;
                border[k] = float(middle);
                if (border[k] > middle) border[k] = std::nextafter(border[k], 0.f);
            }
        }
    }
};
const Tables kTables;

Vec gather(const float* table, VecInt at) {
#if defined(__AVX512F__)
    return (Vec)_mm512_mask_i32gather_ps(__m512(), 0xffff, (__m512i)at, table, 4);
#else
    Vec v;
    for (int lane = 0; lane < kLanes; lane++) v[lane] = table[at[lane]];
    return v;
#endif
}
// g++ 12 makes eight instructions of either conversion.
VecInt widen_bytes(const uint8_t* p) {
    VecByte bytes;
    memcpy(&bytes, p, sizeof bytes);
#if defined(__AVX512F__)
    return (VecInt)_mm512_maskz_cvtepu8_epi32(0xffff, (__m128i)bytes);
#else
    return __builtin_convertvector(bytes, VecInt);
#endif
}
void narrow_bytes(uint8_t* p, VecInt v) {
#if defined(__AVX512F__)
    const VecByte bytes = (VecByte)_mm512_maskz_cvtepi32_epi8(0xffff, (__m512i)v);
#else
    const VecByte bytes = __builtin_convertvector(v, VecByte);
#endif
    memcpy(p, &bytes, sizeof bytes);
}

// x (256) from codes (256) of a block.
template <Book book> void dequantise(float* x, const uint8_t* codes, float absmax) {
    for (int i = 0; i < kCodeBlock; i += kLanes)
        store(x + i, gather(kTables.values[int(book)], widen_bytes(codes + i)) * absmax);
}

bool any(VecInt mask) {
#if defined(__AVX512F__)
    return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#else
    bool found = false;
    for (int lane = 0; lane < kLanes; lane++) found |= mask[lane] != 0;
    return found;
#endif
}

struct BlockCounts {
    int vanished = 0; // would be code 0 without a floor
    bool saturated = false;
};

// What few blocks need: the last word on values that are nearest to 0, and the counts. x (256) and its codes (256).
template <Book book> BlockCounts settle_small(uint8_t* codes, const float* x, bool floor) {
    constexpr bool kUnsigned = book == Book::unsigned_values;
    VecInt positive = {}, low = {}, vanished = {}; // minus the number of elements, by lane: a comparison is −1
    for (int i = 0; i < kCodeBlock; i += kLanes) {
        const Vec value = load(x + i);
        const VecInt code = widen_bytes(codes + i), down = kZeroCode - code;
        const VecInt k = kUnsigned ? code : down > -down ? down : -down;
        const VecInt some = (VecInt)(value != 0.f), gone = some & (k == 0);
        positive += some, low += some & (k <= 1);
        if (kUnsigned) vanished += gone;
        if (kUnsigned && floor) narrow_bytes(codes + i, code - gone);
        if (!kUnsigned) narrow_bytes(codes + i, code + (gone & (value < 0.f)));
    }
    auto total = [](VecInt v) {
        int sum = 0;
        for (int lane = 0; lane < kLanes; lane++) sum -= v[lane];
        return sum;
    };
    return {total(vanished), 2 * total(low) > total(positive)};
}

// codes (256) and absmax of x (256).
template <Book book> BlockCounts quantise(uint8_t* codes, float* absmax, const float* x, bool floor) {
    // Floats that are not negative are ordered as their bits are; two runs, so that neither waits for the other.
    VecInt largest[2] = {};
    for (int i = 0; i < kCodeBlock; i += 2 * kLanes)
        for (int u = 0; u < 2; u++) {
            const VecInt bits = (VecInt)abs(load(x + i + u * kLanes));
            largest[u] = bits > largest[u] ? bits : largest[u];
        }
    *absmax = std::max(max(max((Vec)largest[0], (Vec)largest[1])), kSmallestAbsmax);
    const float inverse = 1 / *absmax;

    constexpr int kLargest = largest_magnitude(book);
    VecInt smallest = VecInt{} + kLargest;
    for (int i = 0; i < kCodeBlock; i += kLanes) {
        const Vec value = load(x + i), a = abs(value) * inverse;
        // All lines for all: to leave those of small values to vectors that have some costs more in missed branches.
        const Vec position = code_position<book>(a, splat(kLargest), [](Vec p, Vec q) { return min(p, q); });
        const VecInt r = (VecInt)(position + kRoundToInteger) & kIntegerBits;
        // A comparison is −1 where it holds.
        VecInt k = r - 1 - (VecInt)(a > gather(kTables.borders[int(book)], r));
        const VecInt other = value == 0.f ? VecInt{} + kLargest : k;
        smallest = other < smallest ? other : smallest;
        if (book == Book::signed_values) {
            const VecInt sign = (VecInt)value >> 31; // −1 below zero, where the largest magnitude is missing
            const VecInt most = sign + kLargest;
            k = k < most ? k : most;
            k = (k ^ sign) - sign + kZeroCode;
        }
        narrow_bytes(codes + i, k);
    }
    return any((VecInt)(smallest <= 1)) ? settle_small<book>(codes, x, floor) : BlockCounts();
}

// ---- Unpacking and packing ----

// Each returns where the `count` floats are: in place, or in `stage`, where all 256 are set, zero past the end.
[[maybe_unused]] float* unpack(float* p, float*, int) { return p; }
float* unpack(const bf16* p, float* stage, int count) {
    for (int i = 0; i < count; i++) stage[i] = to_float(p[i]);
    return stage;
}
template <Book book> float* unpack(const uint8_t* p, float absmax, float* stage, int count) {
    if (count == kCodeBlock) {
        dequantise<book>(stage, p, absmax);
        return stage;
    }
    uint8_t codes[kCodeBlock] = {};
    memcpy(codes, p, count);
    dequantise<book>(stage, codes, absmax);
    std::fill(stage + count, stage + kCodeBlock, 0.f);
    return stage;
}
template <Book book> BlockCounts pack(uint8_t* p, float* absmax, const float* from, int count, bool floor) {
    if (count == kCodeBlock) return quantise<book>(p, absmax, from, floor);
    uint8_t codes[kCodeBlock];
    const BlockCounts counts = quantise<book>(codes, absmax, from, floor);
    memcpy(p, codes, count);
    return counts;
}

[[maybe_unused]] void pack_weights(float*, const float*, int64_t, int, const OptimizerFactors&) {} // they are in place

// Words of `blocks` Philox blocks from `first` on, four after four: in memory, 16 bits each, the noise of neighbours in
// their order.
void fill_noise(uint32_t* words, int blocks, const OptimizerFactors& f, uint64_t first) {
    static_assert(std::endian::native == std::endian::little);
#pragma omp simd
    for (int i = 0; i < blocks; i++) {
        const Philox noise = philox(f.seed, f.stream, first + i);
        words[4 * i] = noise.word[0], words[4 * i + 1] = noise.word[1];
        words[4 * i + 2] = noise.word[2], words[4 * i + 3] = noise.word[3];
    }
}
void round_by_noise(bf16* to, const float* from, const uint32_t* words, int count) {
    alignas(64) uint16_t noise[kCodeBlock];
    memcpy(noise, words, sizeof noise);
#pragma omp simd
    for (int i = 0; i < count; i++) to[i] = round_stochastically(from[i], noise[i]);
}
// The 256 elements from `begin` on.
[[maybe_unused]] void pack_weights(bf16* p, const float* from, int64_t begin, int count, const OptimizerFactors& f) {
    alignas(64) uint32_t words[kCodeBlock / 2];
    fill_noise(words, kCodeBlock / 8, f, begin / 8);
    round_by_noise(p, from, words, count);
}
void pack_states(bf16* m, bf16* v, const float* m_from, const float* v_from, int64_t begin, int count,
                 const OptimizerFactors& f) {
    alignas(64) uint32_t words[kCodeBlock], m_words[kCodeBlock / 2], v_words[kCodeBlock / 2];
    fill_noise(words, kCodeBlock / 4, f, kStateNoise + begin / 4);
    for (int i = 0; i < kCodeBlock / 4; i++) {
        m_words[2 * i] = words[4 * i], m_words[2 * i + 1] = words[4 * i + 1];
        v_words[2 * i] = words[4 * i + 2], v_words[2 * i + 1] = words[4 * i + 3];
    }
    round_by_noise(m, m_from, m_words, count);
    if (v) round_by_noise(v, v_from, v_words, count);
}

// Elements passed over. The factors come by value: behind a reference, any store of a float might change them, and the
// loop would not become vectors.
template <Rule rule> __attribute__((noinline)) int step(float* p, float* m, float* v, const float* grads, float scale,
                                                        int count, OptimizerFactors f) {
    int non_finite = 0;
#pragma omp simd reduction(+ : non_finite)
    for (int i = 0; i < count; i++) {
        float unused = 0;
        non_finite += !optimizer_step<rule>(p[i], m[i], rule == Rule::adamw ? v[i] : unused, scale * grads[i], f);
    }
    return non_finite;
}

} // namespace

void optimizer_update(Stream, real* params, float* master, const States& states, Gradients grads, const float* scale,
                      OptimizerCounts* counts, int64_t n, const Optimizer& opt) {
    check_optimizer(states, opt);
    const float grad_scale = *scale;
    if (std::isnan(grad_scale)) return;
    const OptimizerFactors factors(opt);
    const bool adamw = opt.rule == Rule::adamw;

    uint64_t non_finite = 0, vanished = 0, saturated = 0;
    auto update = [&](int64_t begin, int count) {
        alignas(64) float weights[kCodeBlock], gradients[kCodeBlock], m_stage[kCodeBlock], v_stage[kCodeBlock];
        float* p = master ? master + begin : unpack(params + begin, weights, count);
        const float* g = grads.is_bf16 ? unpack(static_cast<const bf16*>(grads.data) + begin, gradients, count)
                                       : static_cast<const float*>(grads.data) + begin;
        float *m = m_stage, *v = v_stage;
        const int64_t block = begin / kCodeBlock;
        if (states.type == StateType::fp32) {
            m = static_cast<float*>(states.m) + begin;
            if (adamw) v = static_cast<float*>(states.v) + begin;
        } else if (states.type == StateType::bf16) {
            unpack(static_cast<const bf16*>(states.m) + begin, m, count);
            if (adamw) unpack(static_cast<const bf16*>(states.v) + begin, v, count);
        } else {
            unpack<Book::signed_values>(static_cast<const uint8_t*>(states.m) + begin, states.m_absmax[block], m,
                                        count);
            if (adamw)
                unpack<Book::unsigned_values>(static_cast<const uint8_t*>(states.v) + begin, states.v_absmax[block], v,
                                              count);
        }

        BlockCounts last; // of v, or of Lion's m
        const int passed_over = adamw ? step<Rule::adamw>(p, m, v, g, grad_scale, count, factors)
                                      : step<Rule::lion>(p, m, v, g, grad_scale, count, factors);

        if (master)
            for (int i = 0; i < count; i++) assign(params[begin + i], p[i]);
        else
            pack_weights(params + begin, p, begin, count, factors);
        if (states.type == StateType::bf16) {
            bf16* to_v = adamw ? static_cast<bf16*>(states.v) + begin : nullptr;
            pack_states(static_cast<bf16*>(states.m) + begin, to_v, m, v, begin, count, factors);
        } else if (states.type == StateType::int8) {
            last = pack<Book::signed_values>(static_cast<uint8_t*>(states.m) + begin, states.m_absmax + block, m, count,
                                             false);
            if (adamw)
                last = pack<Book::unsigned_values>(static_cast<uint8_t*>(states.v) + begin, states.v_absmax + block, v,
                                                   count, opt.floor_v);
        }
        return std::pair(passed_over, last);
    };

    parallel_ranges(n, kCodeBlock, [&](int64_t begin, int64_t end, int) {
        OptimizerCounts own = {};
        for (int64_t i = begin; i < end; i += kCodeBlock) {
            const auto [passed_over, block] = update(i, int(std::min<int64_t>(end - i, kCodeBlock)));
            own.non_finite += passed_over, own.vanished += block.vanished, own.saturated += block.saturated;
        }
#pragma omp critical
        non_finite += own.non_finite, vanished += own.vanished, saturated += own.saturated;
    });
    if (!counts) return;
    counts->non_finite += non_finite, counts->vanished += vanished, counts->saturated += saturated;
}
