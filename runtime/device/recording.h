// A sequence of launches that comes again and again, as one launch: a CUDA graph. A micro-batch of GPT-2 124M is some
// 300 kernels; launched one by one, the gaps between them show as soon as they are short.
#pragma once
#include <functional>
#include <memory>
#include <vector>

#include "device.h"

class Recording {
public:
    Recording();
    ~Recording();
    Recording(const Recording&) = delete;
    Recording& operator=(const Recording&) = delete;

    // Does what `launches` does. `key` is all that the sequence depends on beyond the memory it works on: with the same
    // key the first run launches (libraries choose their kernels then), the second one records, all later ones replay.
    // `launches` must not wait, allocate, or touch host memory. On a CPU it simply runs each time.
    void run(const Device& device, const std::vector<double>& key, const std::function<void()>& launches);

private:
    struct Graph;
    std::unique_ptr<Graph> graph_;
};
