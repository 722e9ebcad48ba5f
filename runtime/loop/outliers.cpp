#include "outliers.h"

#include <cmath>
#include <string>

#include <nlohmann/json.hpp>

#include "../base/errors.h"

double OutlierWindow::score(double value) const {
    if (!std::isfinite(value)) return INFINITY;
    if (values_.size() < kWindow) return 0;
    // Two passes, so that a large mean costs no digits of the variance. In long double the sum of a window of equal
    // values is exact, so that they vary by exactly 0, and squares of figures beyond 1e154 do not overflow.
    const long double n = kWindow;
    long double mean = 0, squares = 0;
    for (double v : values_) mean += v / n;
    for (double v : values_) squares += (v - mean) * (v - mean);
    if (squares == 0) return 0;
    return static_cast<double>((value - mean) / std::sqrt(squares / (n - 1)));
}

void OutlierWindow::accept(double value) {
    if (!std::isfinite(value)) return;
    values_.push_back(value);
    if (values_.size() > kWindow) values_.pop_front();
}

nlohmann::json OutlierWindow::state() const { return values_; }

void OutlierWindow::restore(const nlohmann::json& state) {
    if (!state.is_array() || state.size() > kWindow)
        throw BadInput("a checkpoint's window of losses or norms is not a list of at most " + std::to_string(kWindow) +
                       " numbers");
    std::deque<double> values;
    for (const nlohmann::json& v : state) {
        if (!v.is_number() || !std::isfinite(v.get<double>()))
            throw BadInput("a checkpoint's window of losses or norms holds " + v.dump() + " in place of a number");
        values.push_back(v.get<double>());
    }
    values_ = std::move(values);
}
