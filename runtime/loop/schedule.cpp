#include "schedule.h"

#include <algorithm>
#include <cmath>

#include "../base/errors.h"

namespace {

// How far `step` has come from `from` to `to`, in [0, 1].
double progress(int64_t step, int64_t from, int64_t to) {
    if (step >= to) return 1;
    return std::clamp(static_cast<double>(step - from) / static_cast<double>(to - from), 0.0, 1.0);
}

} // namespace

double learning_rate(const Schedule& s, int64_t step) {
    if (step < s.warmup) return s.lr * static_cast<double>(step + 1) / static_cast<double>(s.warmup);
    double final = s.lr * s.final_lr, x = progress(step, s.warmup, s.steps);
    if (s.kind == "cosine") return final + (s.lr - final) * (1 + std::cos(M_PI * x)) / 2;
    if (s.kind == "linear") return s.lr + (final - s.lr) * x;
    if (s.kind == "constant") return s.lr;
    if (s.kind == "wsd") {
        if (s.decay_steps <= 0) return s.lr;
        return s.lr + (final - s.lr) * progress(step, s.steps - s.decay_steps, s.steps);
    }
    throw BadInput("--schedule: '" + s.kind + "' is not one of cosine, wsd, constant, linear");
}
