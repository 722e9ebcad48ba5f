// The number types and small shared words of every layer. PRECISION is read here and nowhere else.
#pragma once
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define LONGHAND_HD __host__ __device__
#else
#define LONGHAND_HD
#endif

// The upper half of an IEEE float. A plain two-byte struct, so that no header needs a CUDA type.
struct bf16 {
    uint16_t bits;
};

LONGHAND_HD inline float to_float(float x) { return x; }

LONGHAND_HD inline float to_float(bf16 x) {
    uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

// Round to nearest, ties to even; NaN stays NaN (rounding its mantissa up could otherwise make it Inf).
LONGHAND_HD inline bf16 to_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return bf16{static_cast<uint16_t>((bits >> 16) | 0x40u)};
    return bf16{static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

LONGHAND_HD inline void assign(float& to, float from) { to = from; }
LONGHAND_HD inline void assign(bf16& to, float from) { to = to_bf16(from); }

// `real` is the type of weights, activations and activation gradients. Statistics and losses are float in every build;
// so are parameter gradients and optimizer states, unless a run asks for less.
#if PRECISION_BF16
using real = bf16;
constexpr const char* kPrecision = "bf16";
constexpr float kRealEpsilon = 7.8125e-3f; // 2^-7: distance from 1 to the next bf16
#else
using real = float;
constexpr const char* kPrecision = "fp32";
constexpr float kRealEpsilon = 1.1920929e-7f; // 2^-23
#endif

// A CUDA stream in the cuda build, null in the cpu build.
using Stream = struct StreamOpaque*;

// What a plan is made for: a backend, its type of weights and activations, and the threads of a CPU. Every build knows
// the scratch of every layer for every target, linked or not (scratch.cpp).
struct Target {
    bool cuda;
    int64_t real_bytes;
    int64_t threads;
};
// This build's own, with as many threads as OpenMP would start now (runtime/device/device_cpu.cpp, device_cuda.cpp).
Target this_target();

// What one call of a layer costs at best: every input byte read once, every output byte written once (`+=` counts as
// both). Benches, the step line's percent of peak and the memory planner read these, so they are code.
struct Cost {
    double read = 0, written = 0; // bytes
    double flops = 0;             // a multiply-add is two

    double bytes() const { return read + written; }
};

inline Cost operator+(Cost a, Cost b) { return {a.read + b.read, a.written + b.written, a.flops + b.flops}; }
inline Cost operator*(double n, Cost a) { return {n * a.read, n * a.written, n * a.flops}; }
