// memcpy and memset as the simulator sees them: in kernels the instrumentation sees only small ones of constant size,
// and in host code nothing else sees who touches pinned memory.
#pragma once
#include <cstddef>
#include <cstring>
#include <source_location>

namespace simt {
void* copy_memory(void* to, const void* from, size_t bytes, std::source_location place);
void* set_memory(void* to, int value, size_t bytes, std::source_location place);
} // namespace simt

inline __attribute__((always_inline)) void* simt_memcpy(void* to, const void* from, size_t bytes,
                                                        std::source_location place = std::source_location::current()) {
    if (__builtin_constant_p(bytes) && (bytes == 1 || bytes == 2 || bytes == 4 || bytes == 8 || bytes == 16))
        return __builtin_memcpy(to, from, bytes);
    return simt::copy_memory(to, from, bytes, place);
}
inline __attribute__((always_inline)) void* simt_memset(void* to, int value, size_t bytes,
                                                        std::source_location place = std::source_location::current()) {
    return simt::set_memory(to, value, bytes, place);
}
namespace std {
using ::simt_memcpy;
using ::simt_memset;
} // namespace std
#define memcpy simt_memcpy
#define memset simt_memset
