// One optimizer step over arrays in a file, for scripts that compare it with others: scripts/check_bitsandbytes.py
// builds and runs it.
//
//   optimizer_raw FILE
//
// reads and overwrites FILE: Head, then float weights (n), float gradients (n), codes of m (n), codes of v (n), float
// absmax of m (blocks), of v (blocks).
#include "../kernels/optimizer.h"

#include <cstdio>
#include <vector>

struct Head {
    int64_t n, t, lion, floor_v;
    double lr, beta1, beta2, eps, weight_decay;
};

int main(int, char** argv) {
    static_assert(sizeof(real) == sizeof(float), "build it in fp32");
    FILE* file = argv[1] ? std::fopen(argv[1], "r+b") : nullptr;
    Head head;
    if (!file || std::fread(&head, sizeof head, 1, file) != 1) return std::fprintf(stderr, "cannot read FILE\n"), 1;
    const int64_t n = head.n, blocks = absmax_count(n);
    std::vector<float> weights(n), grads(n), m_absmax(blocks), v_absmax(blocks);
    std::vector<uint8_t> m(n), v(n);
    auto pass = [&](auto move) {
        for (auto* floats : {&weights, &grads})
            if (move(floats->data(), sizeof(float), floats->size(), file) != floats->size()) return false;
        for (auto* codes : {&m, &v})
            if (move(codes->data(), 1, codes->size(), file) != codes->size()) return false;
        for (auto* floats : {&m_absmax, &v_absmax})
            if (move(floats->data(), sizeof(float), floats->size(), file) != floats->size()) return false;
        return true;
    };
    if (!pass([](auto... a) { return std::fread(a...); })) return std::fprintf(stderr, "FILE is too short\n"), 1;

    const float scale = 1;
    const Optimizer opt{.lr = float(head.lr),
                        .beta1 = float(head.beta1),
                        .beta2 = float(head.beta2),
                        .eps = float(head.eps),
                        .weight_decay = float(head.weight_decay),
                        .t = head.t,
                        .rule = head.lion ? Rule::lion : Rule::adamw,
                        .floor_v = head.floor_v != 0};
    optimizer_update(nullptr, reinterpret_cast<real*>(weights.data()), nullptr,
                     {StateType::int8, m.data(), v.data(), m_absmax.data(), v_absmax.data()}, grads.data(), &scale,
                     nullptr, n, opt);

    std::fseek(file, sizeof head, SEEK_SET);
    const bool written = pass([](auto... a) { return std::fwrite(a...); });
    return std::fclose(file) == 0 && written ? 0 : 1;
}
