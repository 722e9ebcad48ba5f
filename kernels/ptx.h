// Every PTX instruction that kernels use, each an inline function: inline assembly under nvcc, dev/simt's model under
// g++. Nothing here needs more than sm_80. Shapes and layouts follow the PTX ISA; test/simt_ptx.cpp holds the models to
// its tables.
//
// Words: a lane is a thread's index in its warp (0..31), group = lane / 4, pair = lane % 4. A 32-bit register of a
// fragment holds two bf16, the lower index in the lower half. "Collective": all 32 lanes of the warp must arrive.
#pragma once
#include "device.h"

// ---- Addresses ----
// The 32-bit address that ldmatrix and cp.async take, for a pointer into dynamic_shared(). Plain byte arithmetic works
// on it, XOR swizzles included: dynamic_shared() itself is at a multiple of 1024 in dev/simt, of 16 at least on a GPU,
// so swizzle the offset and then add the base.
__device__ __forceinline__ uint32_t shared_address(const void* p) {
#ifdef LONGHAND_SIMT
    return simt::shared_address(p);
#else
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
#endif
}

// ---- ldmatrix: 8×8 tiles of bf16 from shared memory into fragments (collective) ----
//
// Lane l gives the address of row l % 8 of tile l / 8: 16 bytes, 16-byte aligned. x1 reads lanes 0..7, x2 lanes 0..15.
// Register i then holds of tile i: row `group`, columns 2·pair and 2·pair + 1. With trans: row 2·pair and 2·pair + 1 of
// column `group`, that is, the transposed tile.
// With volatile and a memory clobber, so that the compiler keeps it behind the barrier that makes the data visible.

__device__ __forceinline__ void ldmatrix_x1(uint32_t (&r)[1], uint32_t address) {
#ifdef LONGHAND_SIMT
    simt::ldmatrix(r, 1, false, address);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(address) : "memory");
#endif
}
__device__ __forceinline__ void ldmatrix_x2(uint32_t (&r)[2], uint32_t address) {
#ifdef LONGHAND_SIMT
    simt::ldmatrix(r, 2, false, address);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(address)
                 : "memory");
#endif
}
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], uint32_t address) {
#ifdef LONGHAND_SIMT
    simt::ldmatrix(r, 4, false, address);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
#endif
}
__device__ __forceinline__ void ldmatrix_x1_trans(uint32_t (&r)[1], uint32_t address) {
#ifdef LONGHAND_SIMT
    simt::ldmatrix(r, 1, true, address);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(address) : "memory");
#endif
}
__device__ __forceinline__ void ldmatrix_x2_trans(uint32_t (&r)[2], uint32_t address) {
#ifdef LONGHAND_SIMT
    simt::ldmatrix(r, 2, true, address);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(address)
                 : "memory");
#endif
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t address) {
#ifdef LONGHAND_SIMT
    simt::ldmatrix(r, 4, true, address);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
#endif
}

// ---- mma: c (16,8) += a (16,16) · b (16,8), bf16 in, float sums (collective) ----
//
//   a[0]: row group,     columns 2·pair, +1          a[2]: row group,     columns 2·pair + 8, +9
//   a[1]: row group + 8, columns 2·pair, +1          a[3]: row group + 8, columns 2·pair + 8, +9
//   b0:   rows 2·pair, +1 of column group            b1:   rows 2·pair + 8, +9 of column group
//   c[0], c[1]: row group, columns 2·pair, +1        c[2], c[3]: row group + 8, columns 2·pair, +1
//
// So ldmatrix_x4 of the four 8×8 quarters (top left, bottom left, top right, bottom right) of a row-major A gives a;
// ldmatrix (no trans) of Bᵀ stored row-major (column of B = row in memory) gives b0, b1, and ldmatrix with trans of B
// stored row-major too. Two c tiles side by side, rounded by pack_bf16, are the a of a following product.
__device__ __forceinline__ void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#ifdef LONGHAND_SIMT
    simt::mma_m16n8k16(c, a, b0, b1);
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

// ---- cp.async: global to shared memory past the registers ----
//
// The data is there for this thread after the cp_async_wait that covers its group, for others after a barrier behind
// that. Both addresses are multiples of the size. 16 bytes go past L1 (.cg), 4 and 8 through it (.ca).

template <int Bytes = 16> __device__ __forceinline__ void cp_async(uint32_t shared, const void* global) {
    static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16, "cp.async moves 4, 8 or 16 bytes");
#ifdef LONGHAND_SIMT
    simt::cp_async(shared, global, Bytes, Bytes);
#else
    size_t address = __cvta_generic_to_global(global);
    if constexpr (Bytes == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(address) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(shared), "l"(address), "n"(Bytes) : "memory");
#endif
}
// Copies if `valid`, else writes zeros and does not touch `global`: the rows past a ragged end.
template <int Bytes = 16>
__device__ __forceinline__ void cp_async_or_zero(uint32_t shared, const void* global, bool valid) {
    static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16, "cp.async moves 4, 8 or 16 bytes");
#ifdef LONGHAND_SIMT
    simt::cp_async(shared, global, Bytes, valid ? Bytes : 0);
#else
    size_t address = __cvta_generic_to_global(global);
    uint32_t from = valid ? Bytes : 0;
    if constexpr (Bytes == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(address), "r"(from) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared), "l"(address), "n"(Bytes), "r"(from)
                     : "memory");
#endif
}
// Closes a group: the copies since the last commit (possibly none).
__device__ __forceinline__ void cp_async_commit() {
#ifdef LONGHAND_SIMT
    simt::cp_async_commit();
#else
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Waits until at most the N youngest groups of this thread are still under way.
template <int N> __device__ __forceinline__ void cp_async_wait() {
#ifdef LONGHAND_SIMT
    simt::cp_async_wait(N);
#else
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

// ---- Barriers among some warps ----
// Barrier `id` (1..15; 0 is __syncthreads) for `threads` threads, a multiple of 32; all lanes of a warp call it
// together. barrier_arrive counts without waiting: a producer's half.
__device__ __forceinline__ void barrier_sync(int id, int threads) {
#ifdef LONGHAND_SIMT
    simt::barrier(id, threads, true);
#else
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}
__device__ __forceinline__ void barrier_arrive(int id, int threads) {
#ifdef LONGHAND_SIMT
    simt::barrier(id, threads, false);
#else
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}

// ---- Arithmetic ----
// 2^x with a relative error of 2^-22; −∞ gives 0, results below 2^-126 too.
__device__ __forceinline__ float exp2_approx(float x) {
#ifdef LONGHAND_SIMT
    return simt::exp2_approx(x);
#else
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}
// log2 x with an absolute error of 2^-22 near 1, relative 2^-22 elsewhere; 0 gives −∞.
__device__ __forceinline__ float log2_approx(float x) {
#ifdef LONGHAND_SIMT
    return simt::log2_approx(x);
#else
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}
// tanh x with a relative error of 2^-11: enough where the result is rounded to bf16, too little for fp32.
__device__ __forceinline__ float tanh_approx(float x) {
#ifdef LONGHAND_SIMT
    return simt::tanh_approx(x);
#else
    float y;
    asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}
// Two floats rounded to bf16 (nearest even) in one register, `low` in the lower half.
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
#ifdef LONGHAND_SIMT
    return to_bf16(low).bits | static_cast<uint32_t>(to_bf16(high).bits) << 16;
#else
    uint32_t r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
#endif
}
// N floats as one access of T, bf16 rounded two at a time.
template <class T, int N> __device__ __forceinline__ Pack<T, N> round_pack(const float (&x)[N]) {
    Pack<T, N> packed;
    if constexpr (std::is_same_v<T, bf16> && N % 2 == 0) {
#pragma unroll
        for (int i = 0; i < N; i += 2) {
            uint32_t pair = pack_bf16(x[i], x[i + 1]);
            packed[i].bits = static_cast<uint16_t>(pair), packed[i + 1].bits = static_cast<uint16_t>(pair >> 16);
        }
    } else {
#pragma unroll
        for (int i = 0; i < N; i++) assign(packed[i], x[i]);
    }
    return packed;
}
__device__ __forceinline__ float unpack_bf16_low(uint32_t r) { return __uint_as_float(r << 16); }
__device__ __forceinline__ float unpack_bf16_high(uint32_t r) { return __uint_as_float(r & 0xffff0000u); }

// ---- Memory ----
// *p += x without the old value coming back: cheaper than atomicAdd where the compiler cannot see that it is unused.
__device__ __forceinline__ void reduce_add(float* p, float x) {
#ifdef LONGHAND_SIMT
    atomicAdd(p, x);
#else
    asm volatile("red.global.add.f32 [%0], %1;" ::"l"(__cvta_generic_to_global(p)), "f"(x) : "memory");
#endif
}
// The same for four neighbours, p 16-byte aligned: one instruction from sm_90 on, four before.
__device__ __forceinline__ void reduce_add(float* p, float4 x) {
#if defined(LONGHAND_SIMT)
    simt::check_aligned(p, sizeof x);
    atomicAdd(p, x.x), atomicAdd(p + 1, x.y), atomicAdd(p + 2, x.z), atomicAdd(p + 3, x.w);
#elif __CUDA_ARCH__ >= 900
    asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)), "f"(x.x), "f"(x.y),
                 "f"(x.z), "f"(x.w)
                 : "memory");
#else
    reduce_add(p, x.x), reduce_add(p + 1, x.y), reduce_add(p + 2, x.z), reduce_add(p + 3, x.w);
#endif
}
