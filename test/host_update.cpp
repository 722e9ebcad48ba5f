// A tensor that is updated from the host, piece by piece, has the bits of one that lies on the device.
#include "../runtime/model/host_update.h"

#include <random>

#include "../runtime/device/host_store.h"
#include "../runtime/model/tensors.h"
#include "asynchronous.h"
#include "check.h"
#include "scratch.h"

namespace {

// Two pieces of 2^20 elements and a part of a third in two layers; a vector of less than a piece and no round length.
// dev/simt, which takes its time, has a little more than a piece.
Tensors two_tensors() {
    Tensors tensors;
    constexpr int64_t kPiece = 1 << 20;
    tensors.add_layers("matrix", TensorKind::matrix, 2, check::kSimulated ? kPiece / 2 + 256 : kPiece + kPiece / 4);
    tensors.add("vector", TensorKind::vector, 777);
    return tensors;
}

constexpr int64_t kSteps = 2;

// Weights, master weights and states after the updates.
std::string updated(const Device& device, const TrainingMemory& memory) {
    ScratchFolder folder;
    Tensors tensors = two_tensors();
    Arena arena(device.target);
    tensors.place(arena, true, memory);
    char* pieces = nullptr;
    float* scale = nullptr;
    OptimizerCounts* counts = nullptr;
    arena.place(pieces, host_update_bytes(memory), "pieces");
    arena.place(scale, 1, "scale");
    arena.place(counts, 1, "counts");
    arena.commit();
    HostStore store(device, folder.path(), tensors.host_bytes());
    tensors.link(store.data());

    std::mt19937_64 rng(5);
    auto random = [&] { return float(int64_t(rng() >> 40) - (1 << 23)) * 0x1p-23f; };
    std::vector<float> weights(tensors.padded);
    for (float& w : weights) w = random();
    for (Tensor& t : tensors.list) fill_weights(device, t, [&](int64_t k) { return weights[k]; });
    const float one = 1;
    upload(device, scale, &one, sizeof one);
    for (int64_t step = 1; step <= kSteps; step++) {
        for (size_t i = 0; i < tensors.list.size(); i++) {
            const Tensor& t = tensors.list[i];
            std::vector<float> gradient(t.count);
            for (float& g : gradient) g = random();
            upload(device, t.grad, gradient.data(), t.count * sizeof(float));
            Optimizer o{1e-3f};
            o.t = step, o.rule = memory.rule, o.tensor = uint32_t(i), o.seed = 3;
            if (tensors.host_bytes())
                update_from_host(device, store, pieces, memory, t, t.grad, scale, counts, o);
            else
                optimizer_update(device.stream, t.param, t.master, t.states, t.grad, scale, counts, t.count, o);
        }
        store.finish();
    }

    std::vector<real> params(tensors.padded);
    download(device, params.data(), tensors.params, params.size() * sizeof(real));
    FileWriter writer(folder / "state");
    write_weights(device, writer, tensors);
    write_state(device, writer, tensors);
    writer.close();
    return get_file(folder / "state") +
           std::string(reinterpret_cast<char*>(params.data()), params.size() * sizeof(real));
}

} // namespace

TEST_CASE("pieces of an update from the host" * doctest::skip(!check::first_seed())) {
    Device device(0);
    for (Rule rule : {Rule::adamw, Rule::lion})
        for (StateType type : {StateType::fp32, StateType::bf16, StateType::int8})
            for (bool master : {true, false}) {
                if (type != StateType::int8 && (check::kSimulated || rule == Rule::lion)) continue;
                const bool masters = master && sizeof(real) < sizeof(float);
                if (check::kSimulated && master && !masters) continue; // as without
                TrainingMemory memory;
                memory.rule = rule, memory.state = type, memory.master = master;
                const std::string want = updated(device, memory);
                for (int where = 1; where < 4; where++) {
                    if (check::kSimulated && (where & 2) && !masters) continue; // nothing more waits
                    CAPTURE(int(rule));
                    CAPTURE(int(type));
                    CAPTURE(where);
                    memory.host_states = where & 1, memory.host_master = where & 2;
                    CHECK((updated(device, memory) == want));
                }
            }
}
