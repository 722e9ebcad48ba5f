// Device memory that goes with its scope, for the tests of dev/simt.
#pragma once
#include <vector>

#include "../kernels/launch.h"

template <class T> struct Buffer {
    T* data = nullptr;
    size_t n;

    explicit Buffer(const std::vector<T>& all) : n(all.size()) {
        check_cuda(cudaMalloc(&data, n * sizeof(T)), "allocating");
        check_cuda(cudaMemcpy(data, all.data(), n * sizeof(T), cudaMemcpyHostToDevice), "filling");
    }
    explicit Buffer(size_t n, T value = T(0)) : Buffer(std::vector<T>(n, value)) {}
    ~Buffer() { cudaFree(data); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    std::vector<T> host() const {
        std::vector<T> all(n);
        check_cuda(cudaMemcpy(all.data(), data, n * sizeof(T), cudaMemcpyDeviceToHost), "reading back");
        return all;
    }
};
