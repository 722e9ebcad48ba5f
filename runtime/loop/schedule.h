// Learning rate over the steps of a run.
//
//   warmup   lr·(step+1)/warmup while step < warmup; then, with x = (step − warmup) / (steps − warmup) in [0, 1]:
//   cosine   final + (lr − final)·(1 + cos πx)/2          linear   lr + (final − lr)·x          constant   lr
//   wsd      lr until the last decay_steps, then linear to final          final = lr·final_lr
//
// x stays 1 past the end, and is 1 from the start if warmup leaves no steps.
#pragma once
#include <cstdint>
#include <string>

struct Schedule {
    std::string kind; // cosine, wsd, constant, linear
    double lr, final_lr;
    int64_t steps, warmup, decay_steps;
};

double learning_rate(const Schedule& schedule, int64_t step);
