// Rotary positions as Pythia has them, a quarter of each head: from 70M's heads of 64 to 2.8B's of 80.
#include "bench.h"

#include "../../kernels/rotary.h"

void bench::run(const std::string&) {
    bench::Table table;
    struct Model {
        int64_t H, D;
    };
    const int64_t T = 2048;
    for (Model m : {Model{8, 64}, Model{16, 128}, Model{8, 256}, Model{32, 80}}) {
        const RotaryShape shape{1, T, m.H, m.D};
        const int64_t C = m.H * m.D, values = T * 3 * C;
        bench::Buffer qkv(values * sizeof(real)), out(values * sizeof(real)), bias(3 * C * sizeof(real));
        qkv.fill(values, [](int64_t i) { return float(i % 1021) / 128 - 4; });
        out.fill(values, [](int64_t i) { return float(i % 509) / 256 - 1; });
        bias.fill(3 * C, [](int64_t i) { return float(i % 101) / 512; });
        Rotary rotary;
        rotary.dims = m.D / 4;
        for (int64_t i = 0; i < rotary.dims / 2; i++) rotary.turns[i] = (uint64_t(1) << 61) >> i;
        auto part = [&](int s) { return Heads<real>{out.reals() + s * T * C, T * C, C, m.D}; };
        auto read = [&](int s) { return Heads<const real>{out.reals() + s * T * C, T * C, C, m.D}; };
        auto own = [&](int s) { return rotary_part(static_cast<const real*>(qkv.reals()), s, shape); };
        const std::string size = std::to_string(T) + "x" + std::to_string(m.H) + "x" + std::to_string(m.D);
        table.run("rotary forward", size, rotary_forward_cost(shape, rotary.dims), [&] {
            rotary_forward(nullptr, part(0), part(1), part(2), qkv.reals(), bias.reals(), rotary, shape);
        });
        table.run("rotary backward", size, rotary_backward_cost(shape, rotary.dims),
                  [&] { rotary_backward(nullptr, qkv.reals(), read(0), read(1), read(2), rotary, shape); });
        table.run("rotary backward in place", size, rotary_backward_cost(shape, rotary.dims, true),
                  [&] { rotary_backward(nullptr, qkv.reals(), own(0), own(1), own(2), rotary, shape); });
    }
}
