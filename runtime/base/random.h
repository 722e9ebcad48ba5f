// Random numbers without a state: the i-th number of a stream is a function of (seed, stream, i), so that a resumed run
// draws what it would have drawn, on any number of threads. Philox4x32-10 (Salmon et al. 2011).
#pragma once
#include <cmath>
#include <cstdint>

#include "../../kernels/types.h"

struct Philox {
    uint32_t word[4];
};

LONGHAND_HD inline Philox philox(uint64_t seed, uint64_t stream, uint64_t index) {
    uint32_t c0 = uint32_t(index), c1 = uint32_t(index >> 32), c2 = uint32_t(stream), c3 = uint32_t(stream >> 32);
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
    for (int round = 0; round < 10; round++) {
        uint64_t a = uint64_t(0xD2511F53u) * c0, b = uint64_t(0xCD9E8D57u) * c2;
        uint32_t d0 = uint32_t(b >> 32) ^ c1 ^ k0, d2 = uint32_t(a >> 32) ^ c3 ^ k1;
        c1 = uint32_t(b), c3 = uint32_t(a), c0 = d0, c2 = d2;
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    return {{c0, c1, c2, c3}};
}

// In [0, 1), 53 bits.
inline double random_uniform(uint64_t seed, uint64_t stream, uint64_t index) {
    Philox r = philox(seed, stream, index);
    return double((uint64_t(r.word[0]) << 32 | r.word[1]) >> 11) * 0x1p-53;
}

// Standard normal, by Box and Muller.
inline double random_normal(uint64_t seed, uint64_t stream, uint64_t index) {
    Philox r = philox(seed, stream, index);
    double u = (double(uint64_t(r.word[0]) << 32 | r.word[1]) + 0.5) * 0x1p-64; // never 0
    double angle = double(uint64_t(r.word[2]) << 32 | r.word[3]) * 0x1p-64 * 2 * M_PI;
    return std::sqrt(-2 * std::log(u)) * std::cos(angle);
}
