// The part of CUDA C++ that kernels use, as g++ can compile it: what nvcc knows by heart. Only kernels/device.h
// includes this. Everything that needs to know which thread runs is a function of scheduler.cpp, collectives.cpp or
// memory.cpp.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <math.h>
#include <type_traits>

#include "copies.h"
#include "include/vector_types.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
// __shared__ stays undefined, so that a static array does not compile: dynamic_shared() is the way.

namespace simt {

// A fiber never changes its place, so the compiler may keep what these return.
__attribute__((const)) uint3 thread_index();
__attribute__((const)) uint3 block_index();
__attribute__((const)) dim3 block_size();
__attribute__((const)) dim3 grid_size();
__attribute__((const)) char* shared_memory();
__attribute__((const)) uint32_t shared_address(const void* p);

// count < 0: all threads of the block. Waits unless this is only an arrival.
void barrier(int id, int count, bool wait);

enum class Shuffle { index, up, down, exclusive_or };
uint64_t shuffle(unsigned mask, uint64_t bits, Shuffle mode, int argument, int width);
unsigned ballot(unsigned mask, bool vote);
enum class Reduction { add, min, max, bit_and, bit_or, bit_xor };
uint32_t reduce(unsigned mask, uint32_t value, Reduction how, bool is_signed);
void sync_warp(unsigned mask);

void ldmatrix(uint32_t* registers, int tiles, bool transposed, uint32_t address);
void mma_m16n8k16(float* c, const uint32_t* a, uint32_t b0, uint32_t b1);

// Copies the first `from` of `bytes` from `global`, zeros for the rest.
void cp_async(uint32_t shared, const void* global, int bytes, int from);
void cp_async_commit();
void cp_async_wait(int groups_left);

float exp2_approx(float x);
float log2_approx(float x);
float tanh_approx(float x);

template <class T> T atomic_add(T* p, T value);
template <class T> T atomic_max(T* p, T value);
template <class T> T atomic_min(T* p, T value);
template <class T> T atomic_exchange(T* p, T value);
template <class T> T atomic_compare_exchange(T* p, T expected, T value);
template <class T> T atomic_or(T* p, T value);
template <class T> T atomic_and(T* p, T value);

void check_aligned(const void* p, size_t bytes);

// The explicit accesses of kernels/device.h, whole: left to the instrumentation, a load of 16 bytes of which one word
// is used would be checked as a load of 4.
enum class Space { global, shared };
using Quad = uint32_t __attribute__((vector_size(16)));
uint8_t load1(const void* p, Space space);
uint16_t load2(const void* p, Space space);
uint32_t load4(const void* p, Space space);
uint64_t load8(const void* p, Space space);
Quad load16(const void* p, Space space);
void store1(void* p, uint8_t value, Space space);
void store2(void* p, uint16_t value, Space space);
void store4(void* p, uint32_t value, Space space);
void store8(void* p, uint64_t value, Space space);
void store16(void* p, Quad value, Space space);

template <class T> inline __attribute__((always_inline)) T load(const T* p, Space space) {
    if constexpr (sizeof(T) == 1)
        return __builtin_bit_cast(T, load1(p, space));
    else if constexpr (sizeof(T) == 2)
        return __builtin_bit_cast(T, load2(p, space));
    else if constexpr (sizeof(T) == 4)
        return __builtin_bit_cast(T, load4(p, space));
    else if constexpr (sizeof(T) == 8)
        return __builtin_bit_cast(T, load8(p, space));
    else
        return __builtin_bit_cast(T, load16(p, space));
}
template <class T> inline __attribute__((always_inline)) void store(T* p, const T& value, Space space) {
    if constexpr (sizeof(T) == 1)
        store1(p, __builtin_bit_cast(uint8_t, value), space);
    else if constexpr (sizeof(T) == 2)
        store2(p, __builtin_bit_cast(uint16_t, value), space);
    else if constexpr (sizeof(T) == 4)
        store4(p, __builtin_bit_cast(uint32_t, value), space);
    else if constexpr (sizeof(T) == 8)
        store8(p, __builtin_bit_cast(uint64_t, value), space);
    else
        store16(p, __builtin_bit_cast(Quad, value), space);
}

} // namespace simt

#define threadIdx (::simt::thread_index())
#define blockIdx (::simt::block_index())
#define blockDim (::simt::block_size())
#define gridDim (::simt::grid_size())
constexpr int warpSize = 32;

// ---- Synchronisation and votes
// ---------------------------------------------------------------------------------------

__forceinline__ void __syncthreads() { simt::barrier(0, -1, true); }
__forceinline__ void __syncwarp(unsigned mask = 0xffffffffu) { simt::sync_warp(mask); }
// Fibers change only where they wait, and their memory is the machine's: a fence has nothing to add.
__forceinline__ void __threadfence() { __atomic_signal_fence(__ATOMIC_SEQ_CST); }
__forceinline__ void __threadfence_block() { __atomic_signal_fence(__ATOMIC_SEQ_CST); }

__forceinline__ unsigned __ballot_sync(unsigned mask, int vote) { return simt::ballot(mask, vote != 0); }
__forceinline__ int __any_sync(unsigned mask, int vote) { return simt::ballot(mask, vote != 0) != 0; }
__forceinline__ int __all_sync(unsigned mask, int vote) { return simt::ballot(mask, vote == 0) == 0; }

template <class T> __forceinline__ T simt_shuffle(unsigned mask, T value, simt::Shuffle mode, int argument, int width) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 4 or 8 bytes");
    using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
    Bits bits = static_cast<Bits>(simt::shuffle(mask, __builtin_bit_cast(Bits, value), mode, argument, width));
    return __builtin_bit_cast(T, bits);
}
template <class T> __forceinline__ T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
    return simt_shuffle(mask, value, simt::Shuffle::index, lane, width);
}
template <class T> __forceinline__ T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32) {
    return simt_shuffle(mask, value, simt::Shuffle::up, static_cast<int>(by), width);
}
template <class T> __forceinline__ T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32) {
    return simt_shuffle(mask, value, simt::Shuffle::down, static_cast<int>(by), width);
}
template <class T> __forceinline__ T __shfl_xor_sync(unsigned mask, T value, int with, int width = 32) {
    return simt_shuffle(mask, value, simt::Shuffle::exclusive_or, with, width);
}

template <class T> __forceinline__ T simt_reduce(unsigned mask, T value, simt::Reduction how) {
    static_assert(sizeof(T) == 4 && std::is_integral_v<T>, "warp reductions take 32-bit integers");
    return static_cast<T>(simt::reduce(mask, static_cast<uint32_t>(value), how, std::is_signed_v<T>));
}
template <class T> __forceinline__ T __reduce_add_sync(unsigned mask, T value) {
    return simt_reduce(mask, value, simt::Reduction::add);
}
template <class T> __forceinline__ T __reduce_min_sync(unsigned mask, T value) {
    return simt_reduce(mask, value, simt::Reduction::min);
}
template <class T> __forceinline__ T __reduce_max_sync(unsigned mask, T value) {
    return simt_reduce(mask, value, simt::Reduction::max);
}
__forceinline__ unsigned __reduce_and_sync(unsigned mask, unsigned value) {
    return simt_reduce(mask, value, simt::Reduction::bit_and);
}
__forceinline__ unsigned __reduce_or_sync(unsigned mask, unsigned value) {
    return simt_reduce(mask, value, simt::Reduction::bit_or);
}
__forceinline__ unsigned __reduce_xor_sync(unsigned mask, unsigned value) {
    return simt_reduce(mask, value, simt::Reduction::bit_xor);
}

// ---- Atomics: float, double, int, unsigned, unsigned long long
// ---------------------------------------------------------

template <class T> __forceinline__ T atomicAdd(T* p, std::type_identity_t<T> value) {
    return simt::atomic_add(p, value);
}
template <class T> __forceinline__ T atomicSub(T* p, std::type_identity_t<T> value) {
    return simt::atomic_add(p, static_cast<T>(0 - value));
}
template <class T> __forceinline__ T atomicMax(T* p, std::type_identity_t<T> value) {
    return simt::atomic_max(p, value);
}
template <class T> __forceinline__ T atomicMin(T* p, std::type_identity_t<T> value) {
    return simt::atomic_min(p, value);
}
template <class T> __forceinline__ T atomicExch(T* p, std::type_identity_t<T> value) {
    return simt::atomic_exchange(p, value);
}
template <class T> __forceinline__ T atomicCAS(T* p, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
    return simt::atomic_compare_exchange(p, expected, value);
}
template <class T> __forceinline__ T atomicOr(T* p, std::type_identity_t<T> value) { return simt::atomic_or(p, value); }
template <class T> __forceinline__ T atomicAnd(T* p, std::type_identity_t<T> value) {
    return simt::atomic_and(p, value);
}

// ---- Memory and arithmetic
// ---------------------------------------------------------------------------------------------

template <class T> __forceinline__ T __ldg(const T* p) { return *p; }
template <class T> __forceinline__ T __ldcs(const T* p) { return *p; }
template <class T> __forceinline__ T __ldcg(const T* p) { return *p; }
template <class T> __forceinline__ void __stcs(T* p, T value) { *p = value; }
template <class T> __forceinline__ void __stcg(T* p, T value) { *p = value; }

template <class A, class B> __forceinline__ constexpr std::common_type_t<A, B> min(A a, B b) {
    using T = std::common_type_t<A, B>;
    if constexpr (std::is_floating_point_v<T>)
        return std::fmin(static_cast<T>(a), static_cast<T>(b));
    else
        return static_cast<T>(b) < static_cast<T>(a) ? static_cast<T>(b) : static_cast<T>(a);
}
template <class A, class B> __forceinline__ constexpr std::common_type_t<A, B> max(A a, B b) {
    using T = std::common_type_t<A, B>;
    if constexpr (std::is_floating_point_v<T>)
        return std::fmax(static_cast<T>(a), static_cast<T>(b));
    else
        return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(b) : static_cast<T>(a);
}

__forceinline__ float rsqrtf(float x) { return 1.0f / sqrtf(x); }
__forceinline__ double rsqrt(double x) { return 1.0 / sqrt(x); }
__forceinline__ float normcdff(float x) { return static_cast<float>(0.5 * erfc(-x * M_SQRT1_2)); }
__forceinline__ float __expf(float x) { return expf(x); }
__forceinline__ float __logf(float x) { return logf(x); }
__forceinline__ float __log2f(float x) { return log2f(x); }
__forceinline__ float __fdividef(float a, float b) { return a / b; }
__forceinline__ float __frcp_rn(float x) { return 1.0f / x; }
__forceinline__ float __fsqrt_rn(float x) { return sqrtf(x); }
__forceinline__ float __fdiv_rn(float a, float b) { return a / b; }
__forceinline__ float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
// Through volatile, so that neither is contracted into an FMA: that is what these two are for.
__forceinline__ float __fadd_rn(float a, float b) {
    volatile float sum = a + b;
    return sum;
}
__forceinline__ float __fmul_rn(float a, float b) {
    volatile float product = a * b;
    return product;
}
__forceinline__ float __saturatef(float x) { return fminf(fmaxf(x, 0.0f), 1.0f); }

__forceinline__ unsigned __float_as_uint(float x) { return __builtin_bit_cast(unsigned, x); }
__forceinline__ float __uint_as_float(unsigned x) { return __builtin_bit_cast(float, x); }
__forceinline__ int __float_as_int(float x) { return __builtin_bit_cast(int, x); }
__forceinline__ float __int_as_float(int x) { return __builtin_bit_cast(float, x); }
__forceinline__ int __float2int_rn(float x) { return static_cast<int>(nearbyintf(x)); }
__forceinline__ int __float2int_rz(float x) { return static_cast<int>(x); }
__forceinline__ int __popc(unsigned x) { return __builtin_popcount(x); }
__forceinline__ int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
__forceinline__ int __ffs(int x) { return __builtin_ffs(x); }
__forceinline__ int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
__forceinline__ unsigned __umulhi(unsigned a, unsigned b) {
    return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32);
}
__forceinline__ unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}
__forceinline__ unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
    uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
    unsigned result = 0;
    for (int i = 0; i < 4; i++)
        result |= static_cast<unsigned>(bytes >> (8 * (selector >> (4 * i) & 7)) & 0xff) << 8 * i;
    return result;
}
