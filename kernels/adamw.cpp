#include "adamw.h"

#include <cmath>

#include "common.h"

void adamw_update(Stream, real* params, float* master, float* m, float* v, const float* grads, const float* scale,
                  int64_t n, const AdamW& opt) {
    require(opt.t >= 1, "adamw_update: t counts from 1");
    const float grad_scale = *scale;
    if (std::isnan(grad_scale)) return;

    // In double: 1 − β2ᵗ in float loses half its digits for β2 = 0.999 and small t.
    const float beta1 = opt.beta1, beta2 = opt.beta2, eps = opt.eps;
    const float step = float(opt.lr / (1 - std::pow(double(beta1), double(opt.t))));
    const float unbias_v = float(1 / (1 - std::pow(double(beta2), double(opt.t))));
    const float keep = float(1 - double(opt.lr) * opt.weight_decay);

    auto update = [&](auto* weights, int64_t i) {
        const float g = grad_scale * grads[i];
        const float m_new = beta1 * m[i] + (1 - beta1) * g;
        const float v_new = beta2 * v[i] + (1 - beta2) * (g * g);
        m[i] = m_new;
        v[i] = v_new;
        const float p = to_float(weights[i]) * keep - step * m_new / (std::sqrt(v_new * unbias_v) + eps);
        assign(weights[i], p);
        return p;
    };
    parallel_ranges(n, 64, [&](int64_t begin, int64_t end, int) {
        if (master)
#pragma omp simd
            for (int64_t i = begin; i < end; i++) assign(params[i], update(master, i));
        else
#pragma omp simd
            for (int64_t i = begin; i < end; i++) update(params, i);
    });
}
