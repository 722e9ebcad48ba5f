// Watches a figure of the steps (loss, gradient norm) and says how unusual the newest is: its z-score against a sliding
// window of the last 128 accepted values. The window is part of a checkpoint.
#pragma once
#include <cstdint>
#include <deque>

#include <nlohmann/json_fwd.hpp>

class OutlierWindow {
public:
    // z-score of `value` against the window; 0 until the window is full or if it does not vary. A value that is not
    // finite scores infinity.
    double score(double value) const;
    void accept(double value); // one that is not finite is left out

    nlohmann::json state() const;
    void restore(const nlohmann::json& state); // throws BadInput unless it came from state()

private:
    static constexpr size_t kWindow = 128;
    std::deque<double> values_;
};
