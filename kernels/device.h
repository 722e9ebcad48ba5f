// The one header of every kernel source: the CUDA language, real under nvcc and modelled by dev/simt under g++, and the
// few words that all kernels share.
//
// Kernels keep to a part of the language that both can see through:
//   - shared memory is dynamic only, and comes from dynamic_shared(); no static __shared__, so that dev/simt can poison
//     it, put red zones around it and watch every access;
//   - global memory moves through load128, load_global, store128, ... and shared memory through load_shared,
//     store_shared, ... Single elements may also be read and written in plain C++ (dev/simt checks those too), but only
//     the named functions are counted as traffic;
//   - instructions without a C++ spelling are in ptx.h, launches go through launch() in launch.h;
//   - a block never waits for another block, except in the way of "the last block to finish does the rest".
#pragma once
#ifdef LONGHAND_SIMT
#include "../dev/simt/language.h"
#else
#include <cuda_runtime.h>
#endif

#include <type_traits>

#include "types.h"

constexpr int kWarpSize = 32;
constexpr unsigned kFullWarp = 0xffffffffu;

// Is this compiled for an architecture with only 99 KB of shared memory a block, or for one with more? dev/simt is
// either. Kernels that are never launched there may leave their bodies empty.
#ifdef __CUDA_ARCH__
constexpr bool kSmallShared = __CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ == 1200;
constexpr bool kLargeShared = !kSmallShared;
#else
constexpr bool kSmallShared = false, kLargeShared = false;
#endif

// The block's shared memory, 128-byte aligned: as many bytes as launch() was given, and undefined until written.
__device__ __forceinline__ char* dynamic_shared() {
#ifdef LONGHAND_SIMT
    return simt::shared_memory();
#else
    extern __shared__ __align__(128) char longhand_dynamic_shared[];
    return longhand_dynamic_shared;
#endif
}

// N elements that move as one access. Index it with constants only (unrolled loops), or it leaves the registers.
template <class T, int N> struct alignas(sizeof(T) * N) Pack {
    static constexpr int size = N;
    T data[N];

    LONGHAND_HD T& operator[](int i) { return data[i]; }
    LONGHAND_HD const T& operator[](int i) const { return data[i]; }
};
template <class T> using Pack128 = Pack<T, 16 / static_cast<int>(sizeof(T))>;

// One access of 1, 2, 4, 8 or 16 bytes. The pointer must be aligned to the whole access.
template <class T> __device__ __forceinline__ T load_global(const T* p) {
#ifdef LONGHAND_SIMT
    return simt::load(p, simt::Space::global);
#else
    return *p;
#endif
}
template <class T> __device__ __forceinline__ void store_global(T* p, std::type_identity_t<T> value) {
#ifdef LONGHAND_SIMT
    simt::store(p, value, simt::Space::global);
#else
    *p = value;
#endif
}
template <class T> __device__ __forceinline__ T load_shared(const T* p) {
#ifdef LONGHAND_SIMT
    return simt::load(p, simt::Space::shared);
#else
    return *p;
#endif
}
template <class T> __device__ __forceinline__ void store_shared(T* p, std::type_identity_t<T> value) {
#ifdef LONGHAND_SIMT
    simt::store(p, value, simt::Space::shared);
#else
    *p = value;
#endif
}

// N consecutive elements of T at p as one access; p a multiple of N elements. 128 bits is the widest and the fastest.
template <int N, class T> __device__ __forceinline__ Pack<T, N> load_pack(const T* p) {
    return load_global(reinterpret_cast<const Pack<T, N>*>(p));
}
template <class T, int N> __device__ __forceinline__ void store_pack(T* p, const Pack<T, N>& value) {
    store_global(reinterpret_cast<Pack<T, N>*>(p), value);
}
template <int N, class T> __device__ __forceinline__ Pack<T, N> load_pack_shared(const T* p) {
    return load_shared(reinterpret_cast<const Pack<T, N>*>(p));
}
template <class T, int N> __device__ __forceinline__ void store_pack_shared(T* p, const Pack<T, N>& value) {
    store_shared(reinterpret_cast<Pack<T, N>*>(p), value);
}

template <class T> __device__ __forceinline__ Pack128<T> load128(const T* p) { return load_pack<Pack128<T>::size>(p); }
template <class T> __device__ __forceinline__ void store128(T* p, const Pack128<T>& value) { store_pack(p, value); }
template <class T> __device__ __forceinline__ Pack128<T> load128_shared(const T* p) {
    return load_pack_shared<Pack128<T>::size>(p);
}
template <class T> __device__ __forceinline__ void store128_shared(T* p, const Pack128<T>& value) {
    store_pack_shared(p, value);
}

// Four neighbours from element i on, zeros past the end. `whole`: all four exist and move as one access.
template <class T> __device__ __forceinline__ Pack<T, 4> load_quad(const T* p, int64_t i, int64_t n, bool whole) {
    if (whole) return load_pack<4>(p + i);
    Pack<T, 4> x = {};
#pragma unroll
    for (int j = 0; j < 4; j++)
        if (i + j < n) x[j] = load_global(p + i + j);
    return x;
}
template <class T>
__device__ __forceinline__ void store_quad(T* p, const Pack<T, 4>& x, int64_t i, int64_t n, bool whole) {
    if (whole) return store_pack(p + i, x);
#pragma unroll
    for (int j = 0; j < 4; j++)
        if (i + j < n) store_global(p + i + j, x[j]);
}

// Position of this thread, in blocks of one dimension; 64-bit, since a product with the block size can pass 2^31.
__device__ __forceinline__ int64_t global_thread() {
    return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}
__device__ __forceinline__ int64_t global_threads() { return static_cast<int64_t>(gridDim.x) * blockDim.x; }
__device__ __forceinline__ int lane_index() { return static_cast<int>(threadIdx.x) % kWarpSize; }
__device__ __forceinline__ int warp_index() { return static_cast<int>(threadIdx.x) / kWarpSize; }

// Over the 32 lanes of a whole warp; every lane gets the result. Butterflies, so the order of the sum is fixed.
template <class T> __device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
    for (int distance = kWarpSize / 2; distance > 0; distance /= 2)
        value += __shfl_xor_sync(kFullWarp, value, distance);
    return value;
}
template <class T> __device__ __forceinline__ T warp_max(T value) {
#pragma unroll
    for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
        T other = __shfl_xor_sync(kFullWarp, value, distance);
        value = other > value ? other : value;
    }
    return value;
}

// Over the block (one dimension, whole warps); every thread gets the result, summed in a fixed order. scratch: 32
// elements of shared memory, free again after the next __syncthreads(). One barrier inside.
template <class T> __device__ __forceinline__ T block_sum(T value, T* scratch) {
    value = warp_sum(value);
    if (lane_index() == 0) store_shared(scratch + warp_index(), value);
    __syncthreads();
    int warps = static_cast<int>(blockDim.x) / kWarpSize;
    return warp_sum(lane_index() < warps ? load_shared(scratch + lane_index()) : T(0));
}
template <class T> __device__ __forceinline__ T block_max(T value, T* scratch) {
    value = warp_max(value);
    if (lane_index() == 0) store_shared(scratch + warp_index(), value);
    __syncthreads();
    int warps = static_cast<int>(blockDim.x) / kWarpSize;
    return warp_max(load_shared(scratch + (lane_index() < warps ? lane_index() : 0)));
}
