#include "adamw.h"

#include <cmath>
#include <type_traits>

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

    // The new weight, not yet rounded; m and v are stored.
    auto updated = [&](float weight, int64_t i) {
        const float g = grad_scale * grads[i];
        const float m_new = beta1 * m[i] + (1 - beta1) * g;
        const float v_new = beta2 * v[i] + (1 - beta2) * (g * g);
        m[i] = m_new;
        v[i] = v_new;
        return weight * keep - step * m_new / (std::sqrt(v_new * unbias_v) + eps);
    };
    const uint64_t stream = adamw_stream(opt);
    parallel_ranges(n, 64, [&](int64_t begin, int64_t end, int) {
        if (master) {
#pragma omp simd
            for (int64_t i = begin; i < end; i++) {
                master[i] = updated(master[i], i);
                assign(params[i], master[i]);
            }
        } else if (std::is_same_v<real, float>) {
#pragma omp simd
            for (int64_t i = begin; i < end; i++) assign(params[i], updated(to_float(params[i]), i));
        } else {
            for (int64_t group = begin; group < end; group += 8) {
                const Philox noise = philox(opt.seed, stream, group / 8);
                for (int64_t i = group; i < std::min(group + 8, end); i++)
                    assign_stochastically(params[i], updated(to_float(params[i]), i), adamw_noise(noise, i - group));
            }
        }
    });
}
