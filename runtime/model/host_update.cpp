#include "host_update.h"

#include <algorithm>

namespace {

// A piece: a multiple of the states' blocks, and large enough to copy at the full rate.
constexpr int64_t kBlock = 256, kPiece = 1 << 20;

struct Array {
    char* all; // of the tensor, on the host or the device; null: the tensor has none
    bool on_host;
    size_t block_bytes, bytes; // of kBlock elements; of the tensor
    size_t at = 0;             // in a piece's memory
};

} // namespace

// Of an element at most its master weight, m and v in float; an absmax is less than what 8 bits save.
static size_t piece_bytes(const TrainingMemory& memory) {
    return kPiece * sizeof(float) * ((memory.host_master ? 1 : 0) + (memory.host_states ? 2 : 0));
}
size_t host_update_bytes(const TrainingMemory& memory) { return 2 * piece_bytes(memory); }

void update_from_host(const Device& device, HostStore& store, char* pieces, const TrainingMemory& memory,
                      const Tensor& tensor, Gradients gradients, const float* scale, OptimizerCounts* counts,
                      Optimizer options) {
    const int64_t n = tensor.count;
    const States& states = tensor.states;
    const size_t each = states.type == StateType::fp32 ? 4 : states.type == StateType::bf16 ? 2 : 1;
    auto array = [](auto* all, bool on_host, size_t block_bytes, size_t bytes) {
        return Array{reinterpret_cast<char*>(all), all && on_host, block_bytes, bytes};
    };
    const size_t absmax_bytes = absmax_count(n) * sizeof(float);
    Array arrays[] = {array(tensor.master, memory.host_master, kBlock * sizeof(float), n * sizeof(float)),
                      array(states.m, memory.host_states, kBlock * each, n * each),
                      array(states.v, memory.host_states, kBlock * each, n * each),
                      array(states.m_absmax, memory.host_states, sizeof(float), absmax_bytes),
                      array(states.v_absmax, memory.host_states, sizeof(float), absmax_bytes)};
    size_t used = 0;
    for (Array& a : arrays)
        if (a.on_host) a.at = used, used += kPiece / kBlock * a.block_bytes;

    auto piece = [&](int64_t first, const Array& a) {
        return pieces + first / kPiece % 2 * piece_bytes(memory) + a.at;
    };
    // copy(offset in the store, device memory, bytes) of all that is offloaded for the piece from `first` on.
    auto for_waiting = [&](int64_t first, auto copy) {
        for (const Array& a : arrays) {
            if (!a.on_host) continue;
            const size_t begin = first / kBlock * a.block_bytes;
            const size_t bytes = std::min(kPiece / kBlock * a.block_bytes, a.bytes - begin);
            copy(a.all + begin - store.data(), piece(first, a), bytes);
        }
    };
    auto slot = [](int64_t first) { return static_cast<int>(first / kPiece % 2); };
    auto load = [&](int64_t first) {
        for_waiting(first, [&](size_t at, char* to, size_t bytes) { store.load(at, to, bytes, slot(first)); });
    };

    load(0);
    for (int64_t first = 0; first < n; first += kPiece) {
        if (first + kPiece < n) load(first + kPiece); // while this piece is updated
        store.wait(slot(first));
        auto here = [&](const Array& a) -> void* {
            return !a.all ? nullptr : a.on_host ? piece(first, a) : a.all + first / kBlock * a.block_bytes;
        };
        const States part{states.type, here(arrays[1]), here(arrays[2]), static_cast<float*>(here(arrays[3])),
                          static_cast<float*>(here(arrays[4]))};
        const Gradients slope = gradients.is_bf16 ? Gradients(static_cast<const bf16*>(gradients.data) + first)
                                                  : Gradients(static_cast<const float*>(gradients.data) + first);
        options.first = first;
        optimizer_update(device.stream, tensor.param + first, static_cast<float*>(here(arrays[0])), part, slope, scale,
                         counts, std::min(kPiece, n - first), options);
        for_waiting(first, [&](size_t at, char* from, size_t bytes) { store.save(at, from, bytes, slot(first)); });
    }
}
