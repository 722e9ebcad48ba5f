// A thread walks its range in blocks of 256 elements. Of a block, what is not float already is unpacked to floats on
// the stack, the rule runs over plain float arrays, and what was unpacked is packed again: all in the L1 cache, so
// memory sees one pass, and the rule is written once for all types.
#include "optimizer.h"

#include "math.h"
#include "optimizer_codes.h"

namespace {

// ---- The code books ----

typedef uint8_t VecByte __attribute__((vector_size(kLanes), may_alias));

struct Tables {
    // code → the bits of its value, −0.993 to 1 or 0 to 1
    uint32_t values[2][256];
    // The upper half of a float x's bits → what, added to them, makes byte 2 the code nearest to x. No two borders
    // between codes agree in their upper halves, so the lower half of x tells only on which side of one border x lies:
    // beyond it the sum carries into the code. For that, codes below zero must grow with the magnitude: they are
    // mirrored, 126 − code. Any x finds a cell, 0 and NaN too; the few that occur stay in the L1 cache.
    uint32_t cells[2][1 << 16];

    Tables() {
        for (Book book : {Book::signed_values, Book::unsigned_values}) {
            uint32_t* value = values[int(book)];
            const int largest = largest_magnitude(book);
            // r → the largest float not above the middle of magnitudes r − 1 and r: what is above it is nearer to r.
            uint32_t borders[256] = {};
            for (int k = 0; k <= largest; k++) {
                const float magnitude = code_magnitude(book, k);
                const int zero = book == Book::signed_values ? kZeroCode : 0;
                value[zero + k] = std::bit_cast<uint32_t>(magnitude);
                if (k > 0 && k <= zero) value[zero - k] = std::bit_cast<uint32_t>(-magnitude);
                if (k == 0) continue;
                // The sum of two magnitudes is exact in double: both lie within 2^-22 and 1.
                const double middle = (double(code_magnitude(book, k - 1)) + magnitude) / 2;
                float border = float(middle);
                if (border > middle) border = std::nextafter(border, 0.f);
                borders[k] = std::bit_cast<uint32_t>(border);
            }
            if (book == Book::unsigned_values) {
                fill_cells(cells[int(book)], borders, 0, largest, 0);
            } else {
                fill_cells(cells[int(book)], borders, 0, largest, kZeroCode);
                fill_cells(cells[int(book)] + 0x8000, borders, 1, kZeroCode, -1); // never 0
            }
        }
    }

    // For the floats of one sign: magnitude k, from smallest to largest, is code k + offset. borders: their bits.
    static void fill_cells(uint32_t* cells, const uint32_t* borders, int smallest, int largest, int offset) {
        const uint32_t sign = offset < 0 ? 0x80000000u : 0;
        int k = smallest;
        for (uint32_t upper = 0; upper < 0x8000; upper++) {
            const uint32_t bits = upper << 16;
            while (k < largest && borders[k + 1] < bits) k++;
            const bool holds_border = k < largest && borders[k + 1] >> 16 == upper;
            const uint32_t rest = holds_border ? 0xffff - (borders[k + 1] & 0xffff) : 0;
            cells[upper] = (uint32_t(k + offset) << 16 | rest) - (sign | bits);
        }
    }
};
const Tables kTables;

VecInt gather(const uint32_t* table, VecInt at) {
#if defined(__AVX512F__)
    return (VecInt)_mm512_mask_i32gather_epi32(__m512i(), 0xffff, (__m512i)at, table, 4);
#else
    VecInt v;
    for (int lane = 0; lane < kLanes; lane++) v[lane] = int32_t(table[at[lane]]);
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

// Of the lanes of counters that went down: a comparison is −1 where it holds.
int total(VecInt v) {
    int sum = 0;
    for (int lane = 0; lane < kLanes; lane++) sum -= v[lane];
    return sum;
}

// to (64) = byte 2 of each of 64 words.
constexpr int kPack = 64 / kLanes;
void pack_third_bytes(uint8_t* to, const VecInt (&words)[kPack]) {
#if defined(__AVX512VBMI__)
    const __m512i at = _mm512_maskz_broadcast_i32x4(
        0xffff, _mm_setr_epi8(2, 6, 10, 14, 18, 22, 26, 30, 34, 38, 42, 46, 50, 54, 58, 62));
    __m512i bytes = {};
    for (int q = 0; q < kPack; q++)
        bytes = _mm512_mask_permutexvar_epi8(bytes, uint64_t(0xffff) << (16 * q), at, (__m512i)words[q]);
    memcpy(to, &bytes, sizeof bytes);
#else
    for (int q = 0; q < kPack; q++) narrow_bytes(to + q * kLanes, words[q] >> 16 & 0xff);
#endif
}

// codes (256) of x (256), of which none is −0 and absmax is the largest magnitude.
template <Book book> void quantise(uint8_t* codes, float absmax, const float* x) {
    const float inverse = 1 / absmax;
    for (int i = 0; i < kCodeBlock; i += kPack * kLanes) {
        VecInt words[kPack];
        for (int q = 0; q < kPack; q++) {
            const VecInt bits = (VecInt)(load(x + i + q * kLanes) * inverse);
            words[q] = bits + gather(kTables.cells[int(book)], (VecInt)((VecBits)bits >> 16));
        }
        pack_third_bytes(codes + i, words);
    }
    if (book == Book::unsigned_values) return;
#pragma omp simd
    for (int i = 0; i < kCodeBlock; i++) codes[i] = codes[i] < kZeroCode ? kZeroCode - 1 - codes[i] : codes[i];
}

struct BlockCounts {
    int vanished = 0; // would be code 0 without a floor
    bool saturated = false;
};

// What few blocks need: the floor of v's code, and the counts. x (256) and its codes (256).
template <Book book> BlockCounts settle_small(uint8_t* codes, const float* x, bool floor) {
    constexpr bool kUnsigned = book == Book::unsigned_values;
    uint8_t small = 0;
#pragma omp simd reduction(| : small)
    for (int i = 0; i < kCodeBlock; i++) small |= kUnsigned ? codes[i] <= 1 : uint8_t(codes[i] - (kZeroCode - 1)) <= 2;
    if (!small) return {};

    VecInt positive = {}, low = {}, vanished = {};
    for (int i = 0; i < kCodeBlock; i += kLanes) {
        const Vec value = load(x + i);
        const VecInt code = widen_bytes(codes + i), down = kZeroCode - code;
        const VecInt k = kUnsigned ? code : down > -down ? down : -down;
        // A comparison is −1 where it holds.
        const VecInt some = (VecInt)(value != 0.f), gone = some & (k == 0);
        positive += some, low += some & (k <= 1);
        if (kUnsigned) vanished += gone;
        if (kUnsigned && floor) narrow_bytes(codes + i, code - gone);
    }
    return {total(vanished), 2 * total(low) > total(positive)};
}

// ---- Unpacking and packing ----

// Both return where the `count` floats are: in place, or in `stage`.
[[maybe_unused]] float* unpack(float* p, float*, int) { return p; }
float* unpack(const bf16* p, float* stage, int count) {
    for (int i = 0; i < count; i++) stage[i] = to_float(p[i]);
    return stage;
}
[[maybe_unused]] void pack_weights(float*, const float*, int64_t, int, const OptimizerFactors&) {} // they are in place

// The 256 elements from `begin` on.
[[maybe_unused]] void pack_weights(bf16* p, const float* from, int64_t begin, int count, const OptimizerFactors& f) {
    alignas(64) uint32_t words[kCodeBlock / 2];
    fill_noise(words, kCodeBlock / 8, f.seed, f.stream, (f.first + begin) / 8);
    round_by_noise<kCodeBlock>(p, from, words, count);
}
void pack_states(bf16* m, bf16* v, const float* m_from, const float* v_from, int64_t begin, int count,
                 const OptimizerFactors& f) {
    alignas(64) uint32_t words[kCodeBlock], m_words[kCodeBlock / 2], v_words[kCodeBlock / 2];
    fill_noise(words, kCodeBlock / 4, f.seed, f.stream, kStateNoise + (f.first + begin) / 4);
    for (int i = 0; i < kCodeBlock / 4; i++) {
        m_words[2 * i] = words[4 * i], m_words[2 * i + 1] = words[4 * i + 1];
        v_words[2 * i] = words[4 * i + 2], v_words[2 * i + 1] = words[4 * i + 3];
    }
    round_by_noise<kCodeBlock>(m, m_from, m_words, count);
    if (v) round_by_noise<kCodeBlock>(v, v_from, v_words, count);
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

// ---- A block of 8-bit states ----

struct VectorRoot {
    static Vec of(Vec x) {
#if defined(__AVX512F__)
        return (Vec)_mm512_maskz_sqrt_ps(0xffff, (__m512)x);
#else
        for (int lane = 0; lane < kLanes; lane++) x[lane] = std::sqrt(x[lane]);
        return x;
#endif
    }
};

struct CodedBlock {
    float* p;                   // (256)
    const float* grads;         // (256)
    uint8_t *m, *v;             // (256)
    float *m_absmax, *v_absmax; // (1)
};

// The step of 256 elements. Looked up, stepped and measured in one loop, so that gathers run beside the divider.
// Returns the elements passed over, and the counts of v's codes, or of Lion's m's.
template <Rule rule> std::pair<int, BlockCounts> step_coded(const CodedBlock& block, float scale,
                                                            const OptimizerFactors& factors, bool floor_v) {
    const OptimizerFactors f = factors; // by value, as in step()
    const float m_unit = *block.m_absmax, v_unit = rule == Rule::adamw ? *block.v_absmax : 0;
    alignas(64) float m_new[kCodeBlock], v_new[kCodeBlock];
    // Floats that are not negative are ordered as their bits are.
    VecInt m_largest = {}, v_largest = {}, stepped = {};
    for (int i = 0; i < kCodeBlock; i += kLanes) {
        Vec p = load(block.p + i), m = (Vec)gather(kTables.values[0], widen_bytes(block.m + i)) * m_unit, v = {};
        if (rule == Rule::adamw) v = (Vec)gather(kTables.values[1], widen_bytes(block.v + i)) * v_unit;
        const VecInt finite = (VecInt)optimizer_step<rule, VectorRoot>(p, m, v, load(block.grads + i) * scale, f);
        stepped += finite;
        const VecInt m_bits = (VecInt)abs(m), v_bits = (VecInt)v;
        m_largest = m_bits > m_largest ? m_bits : m_largest;
        v_largest = v_bits > v_largest ? v_bits : v_largest;
        store(block.p + i, p), store(m_new + i, m + 0.f), store(v_new + i, v); // −0 + 0 is 0
    }
    *block.m_absmax = std::max(max((Vec)m_largest), kSmallestAbsmax);
    quantise<Book::signed_values>(block.m, *block.m_absmax, m_new);
    const int passed_over = kCodeBlock - total(stepped);
    if (rule == Rule::lion) return {passed_over, settle_small<Book::signed_values>(block.m, m_new, false)};
    *block.v_absmax = std::max(max((Vec)v_largest), kSmallestAbsmax);
    quantise<Book::unsigned_values>(block.v, *block.v_absmax, v_new);
    return {passed_over, settle_small<Book::unsigned_values>(block.v, v_new, floor_v)};
}

// A last block of fewer elements, among zeros that stay zeros.
template <Rule rule> std::pair<int, BlockCounts> step_coded_part(const CodedBlock& block, int count, float scale,
                                                                 const OptimizerFactors& f, bool floor_v) {
    float p[kCodeBlock] = {}, grads[kCodeBlock] = {};
    uint8_t m[kCodeBlock], v[kCodeBlock] = {};
    std::fill_n(m, kCodeBlock, uint8_t(kZeroCode));
    std::copy_n(block.p, count, p), std::copy_n(block.grads, count, grads), std::copy_n(block.m, count, m);
    if (rule == Rule::adamw) std::copy_n(block.v, count, v);
    const auto outcome = step_coded<rule>({p, grads, m, v, block.m_absmax, block.v_absmax}, scale, f, floor_v);
    std::copy_n(p, count, block.p), std::copy_n(m, count, block.m);
    if (rule == Rule::adamw) std::copy_n(v, count, block.v);
    return outcome;
}

// A block takes longer than its memory; fetched two blocks ahead, that memory is there: a tenth to a sixth of the time.
void prefetch(const CodedBlock& block, bool v) {
    constexpr int kAhead = 2 * kCodeBlock;
    for (int i = 0; i < kCodeBlock; i += 16)
        __builtin_prefetch(block.p + kAhead + i, 1), __builtin_prefetch(block.grads + kAhead + i);
    for (int i = 0; i < kCodeBlock; i += 64) {
        __builtin_prefetch(block.m + kAhead + i, 1);
        if (v) __builtin_prefetch(block.v + kAhead + i, 1);
    }
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
        std::pair<int, BlockCounts> outcome;
        if (states.type == StateType::int8) {
            const int64_t block = begin / kCodeBlock;
            const CodedBlock coded{p,
                                   g,
                                   static_cast<uint8_t*>(states.m) + begin,
                                   adamw ? static_cast<uint8_t*>(states.v) + begin : nullptr,
                                   states.m_absmax + block,
                                   adamw ? states.v_absmax + block : nullptr};
            prefetch(coded, adamw);
            if (count == kCodeBlock)
                outcome = adamw ? step_coded<Rule::adamw>(coded, grad_scale, factors, opt.floor_v)
                                : step_coded<Rule::lion>(coded, grad_scale, factors, false);
            else
                outcome = adamw ? step_coded_part<Rule::adamw>(coded, count, grad_scale, factors, opt.floor_v)
                                : step_coded_part<Rule::lion>(coded, count, grad_scale, factors, false);
        } else {
            if (states.type == StateType::fp32) {
                m = static_cast<float*>(states.m) + begin;
                if (adamw) v = static_cast<float*>(states.v) + begin;
            } else {
                unpack(static_cast<const bf16*>(states.m) + begin, m, count);
                if (adamw) unpack(static_cast<const bf16*>(states.v) + begin, v, count);
            }
            outcome.first = adamw ? step<Rule::adamw>(p, m, v, g, grad_scale, count, factors)
                                  : step<Rule::lion>(p, m, v, g, grad_scale, count, factors);
            bf16* to_v = adamw ? static_cast<bf16*>(states.v) + begin : nullptr;
            if (states.type == StateType::bf16)
                pack_states(static_cast<bf16*>(states.m) + begin, to_v, m, v, begin, count, factors);
        }

        if (master)
            for (int i = 0; i < count; i++) assign(params[begin + i], p[i]);
        else
            pack_weights(params + begin, p, begin, count, factors);
        return outcome;
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
