// How host code talks to the device: launches and checked calls of the CUDA runtime (dev/simt's stand-in in the simt
// build).
#pragma once
#include <cstdlib>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#include <cuda_runtime.h>
#include <cxxabi.h>

#include "../runtime/base/errors.h"
#include "types.h"

// Throws RunFailed unless the call succeeded. `what` says what was tried: "copying the weights to the device".
inline void check_cuda(cudaError_t status, const char* what) {
    if (status != cudaSuccess) throw RunFailed(std::string(what) + ": " + cudaGetErrorString(status));
}

inline cudaStream_t cuda_stream(Stream stream) { return reinterpret_cast<cudaStream_t>(stream); }

// Blocks that cover n elements at `per_block` each. Throws if a grid cannot have that many.
inline unsigned blocks_for(int64_t n, int64_t per_block) {
    int64_t blocks = (n + per_block - 1) / per_block;
    if (n <= 0 || blocks > 0x7fffffff)
        throw RunFailed("cannot launch " + std::to_string(blocks) + " blocks for " + std::to_string(n) + " elements");
    return static_cast<unsigned>(blocks);
}

// Whether an array can be moved 16 bytes at a time from its first element on.
inline bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

inline std::string kernel_name(const void* kernel) {
#if CUDART_VERSION < 12030 // which do not know it
    return "a kernel";
#else
    const char* mangled = nullptr;
    if (cudaFuncGetName(&mangled, kernel) != cudaSuccess || !mangled) return "a kernel";
    int status = 0;
    char* plain = abi::__cxa_demangle(mangled, nullptr, nullptr, &status);
    std::string name = status == 0 ? plain : mangled;
    std::free(plain);
    return name;
#endif
}

constexpr size_t kSharedWithoutAsking = 48 * 1024; // a kernel may use more only after setting an attribute

// Runs kernel(args...) on grid × block threads with `shared_bytes` of dynamic shared memory each block; arguments are
// converted to the kernel's parameter types. Throws RunFailed with the kernel's name if it cannot be launched; what
// goes wrong while it runs is told by the next call that waits for the stream.
template <class... Params, class... Args>
void launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, Stream stream, Args&&... args) {
    static_assert(sizeof...(Params) == sizeof...(Args), "the kernel takes another number of arguments");
    std::tuple<std::decay_t<Params>...> values(static_cast<Params>(std::forward<Args>(args))...);
    const void* function = reinterpret_cast<const void*>(kernel);
    cudaError_t status = cudaSuccess;
    if (shared_bytes > kSharedWithoutAsking)
        status =
            cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (status == cudaSuccess) {
#ifdef LONGHAND_SIMT
        status = simt::launch(
            function, grid, block, shared_bytes, cuda_stream(stream),
            [](const void* all) {
                const auto& tuple = *static_cast<const decltype(values)*>(all);
                std::apply(reinterpret_cast<void (*)(Params...)>(simt::running_kernel()), tuple);
            },
            &values, sizeof values);
#else
        status = std::apply(
            [&](auto&... value) {
                void* pointers[] = {&value..., nullptr};
                return cudaLaunchKernel(function, grid, block, pointers, shared_bytes, cuda_stream(stream));
            },
            values);
#endif
    }
    if (status != cudaSuccess) {
        cudaGetLastError(); // an error of this launch must not be found again by a later call
        auto size = [](dim3 d) { return std::to_string(d.x) + "x" + std::to_string(d.y) + "x" + std::to_string(d.z); };
        throw RunFailed("cannot launch " + kernel_name(function) + " on grid " + size(grid) + ", block " + size(block) +
                        ", " + std::to_string(shared_bytes) + " bytes of shared memory: " + cudaGetErrorString(status));
    }
}
