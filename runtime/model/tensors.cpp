#include "tensors.h"

#include <algorithm>
#include <cmath>

#include "../base/errors.h"
#include "../base/progress.h"

// Elements that are staged on the host at a time: device memory need not be readable here.
constexpr int64_t kStage = 1 << 20;

// Tensors, and the parts of their states, begin at multiples of this many elements and bytes.
static int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
constexpr int64_t kTensorUnit = 64, kStateUnit = 256;

void Tensors::add(const std::string& name, TensorKind kind, int64_t count) {
    Tensor tensor;
    tensor.name = name;
    tensor.kind = kind;
    tensor.layers = 0;
    tensor.count = count;
    list.push_back(tensor);
    padded += round_up(count, kTensorUnit);
}

void Tensors::add_layers(const std::string& name, TensorKind kind, int64_t layers, int64_t layer_count) {
    add(name, kind, layers * layer_count);
    list.back().layers = layers;
}

int64_t Tensors::count() const {
    int64_t sum = 0;
    for (const Tensor& t : list) sum += t.count;
    return sum;
}

StateType Tensors::state_type(const Tensor& t) const {
    constexpr int64_t kSmall = 4096; // below it 8 bits save nothing that counts
    if (memory.state != StateType::int8) return memory.state;
    bool narrow = t.kind == TensorKind::matrix || (t.kind == TensorKind::embedding && memory.int8_embeddings);
    return narrow && t.layer_count() >= kSmall ? StateType::int8 : StateType::fp32;
}

// The arrays of a tensor's states: where each pointer is and how many bytes belong there.
struct StateArray {
    void** pointer;
    size_t bytes;
};
static std::vector<StateArray> state_arrays(Tensor& t, Rule rule) {
    const int64_t each = t.states.type == StateType::fp32 ? 4 : t.states.type == StateType::bf16 ? 2 : 1;
    std::vector<StateArray> arrays = {{&t.states.m, size_t(t.count * each)}};
    if (rule == Rule::adamw) arrays.push_back({&t.states.v, size_t(t.count * each)});
    if (t.states.type != StateType::int8) return arrays;
    const size_t absmax = absmax_count(t.count) * sizeof(float);
    arrays.push_back({reinterpret_cast<void**>(&t.states.m_absmax), absmax});
    if (rule == Rule::adamw) arrays.push_back({reinterpret_cast<void**>(&t.states.v_absmax), absmax});
    return arrays;
}

size_t Tensors::states_bytes() const {
    size_t sum = 0;
    for (Tensor t : list) {
        t.states.type = state_type(t);
        for (const StateArray& array : state_arrays(t, memory.rule)) sum += round_up(array.bytes, kStateUnit);
    }
    return sum;
}

void Tensors::place(Arena& arena, bool training, const TrainingMemory& chosen) {
    memory = chosen;
    for (const Tensor& t : list) {
        const bool narrow = memory.bf16_grads && t.layers;
        (narrow ? grads_bf16_padded : grads_padded) += round_up(t.count, kTensorUnit);
        if (narrow) staged_padded += round_up(t.layer_count(), kTensorUnit);
    }
    arena.section("parameters");
    arena.place_reals(params, padded, "weights");
    if (!training) return;
    const bool has_masters = memory.master && arena.target().real_bytes < int64_t(sizeof(float));
    host_states_bytes = memory.host_states ? states_bytes() : 0;
    host_masters_bytes = memory.host_master && has_masters ? padded * sizeof(float) : 0;
    arena.section("gradients");
    arena.place(grads, grads_padded, "gradients");
    arena.place(grads_bf16, grads_bf16_padded, "gradients in bf16");
    arena.place(staging, staged_padded, "gradients of a layer");
    arena.section("master weights");
    arena.place(masters, has_masters && !memory.host_master ? padded : 0, "master weights");
    arena.section("optimizer states");
    arena.place(states, memory.host_states ? 0 : states_bytes(), "optimizer states");
}

void Tensors::link(char* host) {
    if (host_states_bytes) states = host;
    if (host_masters_bytes) masters = reinterpret_cast<float*>(host + host_states_bytes);
    auto take = [](auto*& run, int64_t count) { // the next `count` elements of a run that may not be there
        auto* begin = run;
        if (run) run += round_up(count, kTensorUnit);
        return begin;
    };
    real* param = params;
    float *master = masters, *grad = grads, *stage = staging;
    bf16* grad_bf16 = grads_bf16;
    char* state = states;
    for (Tensor& t : list) {
        t.master_waits = host_masters_bytes > 0, t.states_wait = host_states_bytes > 0;
        t.param = take(param, t.count);
        t.master = take(master, t.count);
        if (memory.bf16_grads && t.layers)
            t.grad_bf16 = take(grad_bf16, t.count), t.staged = take(stage, t.layer_count());
        else
            t.grad = take(grad, t.count);
        if (!states) continue;
        t.states.type = state_type(t);
        for (const StateArray& array : state_arrays(t, memory.rule)) {
            *array.pointer = state;
            state += round_up(array.bytes, kStateUnit);
        }
    }
}

Header read_header(const FileReader& file) {
    Header header;
    file.read(0, header.data(), kHeaderBytes);
    return header;
}

// Sets `count` weights from `first` on.
static void set_weights(const Device& device, Tensor& tensor, int64_t first, const float* values, int64_t count) {
    std::vector<real> rounded(count);
    for (int64_t i = 0; i < count; i++) assign(rounded[i], values[i]);
    upload(device, tensor.param + first, rounded.data(), count * sizeof(real));
    if (tensor.master) upload(device, tensor.master + first, values, count * sizeof(float));
    if (tensor.master_waits) release_mapped(tensor.master + first, count * sizeof(float));
}

FileType file_type(const FileReader& file, const Header& header) {
    if (header[1] == 3) return FileType::fp32;
    if (header[1] == 5) return FileType::bf16;
    if (header[1] == 6) return FileType::fp16;
    throw BadInput(file.path() + ": version " + std::to_string(header[1]) +
                   "; 3 (fp32), 5 (bf16) and 6 (fp16) are read");
}

static size_t element_bytes(FileType type) { return type == FileType::fp32 ? sizeof(float) : sizeof(uint16_t); }

void check_weights_size(const FileReader& file, FileType type, const Tensors& tensors) {
    size_t want = kHeaderBytes + tensors.count() * element_bytes(type);
    if (file.size() != want)
        throw BadInput(file.path() + ": " + std::to_string(file.size()) + " bytes, but its header describes " +
                       std::to_string(want) + "; the file is torn or not of this model");
}

// IEEE half precision, exactly: a half below 2^-14 is a multiple of 2^-24.
static float half_to_float(uint16_t half) {
    uint32_t sign = uint32_t(half & 0x8000) << 16, exponent = half >> 10 & 31, mantissa = half & 0x3ff, bits;
    if (exponent == 0) {
        float small = float(mantissa) * 0x1p-24f;
        return sign ? -small : small;
    }
    bits = sign | (exponent == 31 ? 0x7f800000 : (exponent + 112) << 23) | mantissa << 13;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

void WeightsReader::read_floats(float* to, int64_t count) {
    const size_t size = element_bytes(type_);
    if (type_ == FileType::fp32) {
        file_.read(offset_, to, count * size);
        offset_ += count * size;
        return;
    }
    std::vector<uint16_t> stage(std::min(kStage, count));
    for (int64_t first = 0; first < count; first += kStage) {
        const int64_t n = std::min(kStage, count - first);
        file_.read(offset_, stage.data(), n * size);
        offset_ += n * size;
        for (int64_t i = 0; i < n; i++)
            to[first + i] = type_ == FileType::bf16 ? to_float(bf16{stage[i]}) : half_to_float(stage[i]);
    }
}

void WeightsReader::check_finite(const std::string& name, int64_t first, const std::vector<float>& values,
                                 int64_t count) const {
    for (int64_t i = 0; i < count; i++)
        if (!std::isfinite(values[i]))
            throw BadInput(file_.path() + ": weight " + std::to_string(first + i) + " of " + name + " is " +
                           std::to_string(values[i]) +
                           "; such a model computes nothing, use another file or checkpoint");
}

std::vector<float> WeightsReader::read_floats(const std::string& name, int64_t count) {
    std::vector<float> values(count);
    read_floats(values.data(), count);
    check_finite(name, 0, values, count);
    return values;
}

void WeightsReader::read(const Device& device, Tensor& tensor) {
    std::vector<float> stage(std::min(kStage, tensor.count));
    for (int64_t first = 0; first < tensor.count; first += kStage) {
        int64_t n = std::min(kStage, tensor.count - first);
        read_floats(stage.data(), n);
        check_finite(tensor.name, first, stage, n);
        set_weights(device, tensor, first, stage.data(), n);
    }
}

using Look = std::function<void(const char* piece, size_t bytes)>;

// Memory as it is, a piece at a time. What `waits` on the host leaves no pages in the process.
static void look_at(const Device& device, const void* from, size_t bytes, bool waits, const Look& look) {
    std::vector<char> stage(std::min(size_t(kStage) * sizeof(float), bytes));
    for (size_t first = 0; first < bytes; first += stage.size()) {
        size_t n = std::min(stage.size(), bytes - first);
        const char* piece = static_cast<const char*>(from) + first;
        download(device, stage.data(), piece, n);
        if (waits) release_mapped(piece, n);
        look(stage.data(), n);
        sign_of_progress();
    }
}

// The same to a file, and to `look`.
static void write_bytes(const Device& device, FileWriter& file, const void* from, size_t bytes, bool waits,
                        const Look& look = {}) {
    look_at(device, from, bytes, waits, [&](const char* piece, size_t n) {
        if (look) look(piece, n);
        file.write(piece, n);
    });
}

// An exponent of ones only: Inf or NaN, in a float as in a bf16, whose bits are a float's upper half.
template <class Bits> static bool all_finite(const char* values, size_t bytes, Bits exponent) {
    bool finite = true;
    for (size_t i = 0; i < bytes; i += sizeof(Bits)) {
        Bits bits;
        memcpy(&bits, values + i, sizeof bits);
        finite &= (bits & exponent) != exponent;
    }
    return finite;
}

// write_bytes() backwards.
static void read_bytes(const Device& device, const FileReader& file, size_t offset, void* to, size_t bytes,
                       bool waits) {
    std::vector<char> stage(std::min(size_t(kStage) * sizeof(float), bytes));
    for (size_t first = 0; first < bytes; first += stage.size()) {
        size_t n = std::min(stage.size(), bytes - first);
        char* piece = static_cast<char*>(to) + first;
        file.read(offset + first, stage.data(), n);
        upload(device, piece, stage.data(), n);
        if (waits) release_mapped(piece, n);
    }
}

FileType weights_type(const Tensors& tensors) { return tensors.float_weights() ? FileType::fp32 : FileType::bf16; }

std::string write_weights(const Device& device, FileWriter& file, const Tensors& tensors) {
    const FileType type = weights_type(tensors);
    std::string not_finite;
    for (const Tensor& t : tensors.list)
        write_bytes(device, file, t.master ? static_cast<const void*>(t.master) : t.param,
                    t.count * element_bytes(type), t.master_waits, [&](const char* piece, size_t bytes) {
                        const bool finite = type == FileType::fp32 ? all_finite<uint32_t>(piece, bytes, 0x7f800000)
                                                                   : all_finite<uint16_t>(piece, bytes, 0x7f80);
                        if (!finite && not_finite.empty()) not_finite = t.name;
                    });
    return not_finite;
}

uint64_t weight_bytes(const Tensors& tensors) { return tensors.count() * element_bytes(weights_type(tensors)); }

static Header state_header(const Tensors& tensors) {
    Header header{kStateMagic, 2, static_cast<int32_t>(tensors.list.size()), int32_t(tensors.memory.rule)};
    for (size_t i = 0; i < tensors.list.size(); i++) header[4 + i] = int32_t(tensors.list[i].states.type);
    return header;
}

void write_state(const Device& device, FileWriter& file, const Tensors& tensors) {
    Header header = state_header(tensors);
    file.write(header.data(), kHeaderBytes);
    for (Tensor t : tensors.list)
        for (const StateArray& array : state_arrays(t, tensors.memory.rule))
            write_bytes(device, file, *array.pointer, array.bytes, t.states_wait);
}

void read_state(const Device& device, const FileReader& file, Tensors& tensors) {
    if (Header header = read_header(file); header[0] == kStateMagic && header[1] != 2)
        throw BadInput(file.path() + ": version " + std::to_string(header[1]) +
                       " of the optimizer's state, 2 is read; start a new run with --init");
    if (read_header(file) != state_header(tensors) || file.size() != state_bytes(tensors))
        throw BadInput(file.path() + ": not the optimizer state of this model, optimizer and --state");
    size_t offset = kHeaderBytes;
    for (Tensor& t : tensors.list)
        for (const StateArray& array : state_arrays(t, tensors.memory.rule)) {
            read_bytes(device, file, offset, *array.pointer, array.bytes, t.states_wait);
            offset += array.bytes;
        }
}

uint64_t state_bytes(const Tensors& tensors) {
    uint64_t sum = kHeaderBytes;
    for (Tensor t : tensors.list)
        for (const StateArray& array : state_arrays(t, tensors.memory.rule)) sum += array.bytes;
    return sum;
}

std::vector<uint64_t> tensor_hashes(const Device& device, const Tensors& tensors) {
    std::vector<uint64_t> hashes;
    for (Tensor t : tensors.list) {
        std::vector<uint64_t> pieces;
        auto add = [&](const char* piece, size_t n) { pieces.push_back(bytes_hash(piece, n)); };
        look_at(device, t.param, t.count * sizeof(real), false, add);
        if (t.master) look_at(device, t.master, t.count * sizeof(float), t.master_waits, add);
        for (const StateArray& array : state_arrays(t, tensors.memory.rule))
            look_at(device, *array.pointer, array.bytes, t.states_wait, add);
        hashes.push_back(bytes_hash(pieces.data(), pieces.size() * sizeof pieces[0]));
    }
    return hashes;
}

void fill_weights(const Device& device, Tensor& tensor, const std::function<float(int64_t)>& value) {
    std::vector<float> stage(std::min(kStage, tensor.count));
    for (int64_t first = 0; first < tensor.count; first += kStage) {
        int64_t n = std::min(kStage, tensor.count - first);
#pragma omp parallel for schedule(static)
        for (int64_t i = 0; i < n; i++) stage[i] = value(first + i);
        set_weights(device, tensor, first, stage.data(), n);
        sign_of_progress();
    }
}
