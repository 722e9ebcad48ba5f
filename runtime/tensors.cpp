#include "tensors.h"

#include <algorithm>

#include "errors.h"

// Elements that are staged on the host at a time: device memory need not be readable here.
constexpr int64_t kStage = 1 << 20;

void Tensors::add(const std::string& name, int64_t layers, int64_t layer_count, bool decay) {
    Tensor tensor;
    tensor.name = name;
    tensor.layers = layers;
    tensor.count = layers * layer_count;
    tensor.decay = decay;
    list.push_back(tensor);
    padded += (tensor.count + 63) / 64 * 64;
}

int64_t Tensors::count() const {
    int64_t sum = 0;
    for (const Tensor& t : list) sum += t.count;
    return sum;
}

void Tensors::place(Arena& arena, bool training) {
    bool with_masters = training && sizeof(real) < sizeof(float);
    arena.place(params, padded, "weights");
    arena.place(masters, with_masters ? padded : 0, "master weights");
    arena.place(grads, training ? padded : 0, "gradients");
    arena.place(ms, training ? padded : 0, "first moments");
    arena.place(vs, training ? padded : 0, "second moments");
}

void Tensors::link() {
    int64_t offset = 0;
    auto at = [&](float* run) { return run ? run + offset : nullptr; };
    for (Tensor& t : list) {
        t.param = params + offset;
        t.master = at(masters), t.grad = at(grads), t.m = at(ms), t.v = at(vs);
        offset += (t.count + 63) / 64 * 64;
    }
}

Header read_header(const MappedFile& file) {
    Header header;
    memcpy(header.data(), file.at(0, kHeaderBytes), kHeaderBytes);
    return header;
}

// Sets `count` weights from `first` on.
static void set_weights(const Device& device, Tensor& tensor, int64_t first, const float* values, int64_t count) {
    std::vector<real> rounded(count);
    for (int64_t i = 0; i < count; i++) assign(rounded[i], values[i]);
    upload(device, tensor.param + first, rounded.data(), count * sizeof(real));
    if (tensor.master) upload(device, tensor.master + first, values, count * sizeof(float));
}

FileType file_type(const MappedFile& file, const Header& header) {
    if (header[1] == 3) return FileType::fp32;
    if (header[1] == 5) return FileType::bf16;
    if (header[1] == 6) return FileType::fp16;
    throw BadInput(file.path() + ": version " + std::to_string(header[1]) +
                   "; 3 (fp32), 5 (bf16) and 6 (fp16) are read");
}

static size_t element_bytes(FileType type) { return type == FileType::fp32 ? sizeof(float) : sizeof(uint16_t); }

void check_weights_size(const MappedFile& file, FileType type, const Tensors& tensors) {
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
    size_t bytes = count * element_bytes(type_);
    const unsigned char* from = file_.at(offset_, bytes);
    offset_ += bytes;
    if (type_ == FileType::fp32) {
        memcpy(to, from, bytes);
        return;
    }
    for (int64_t i = 0; i < count; i++) {
        uint16_t bits;
        memcpy(&bits, from + i * sizeof bits, sizeof bits);
        to[i] = type_ == FileType::bf16 ? to_float(bf16{bits}) : half_to_float(bits);
    }
}

std::vector<float> WeightsReader::read_floats(int64_t count) {
    std::vector<float> values(count);
    read_floats(values.data(), count);
    return values;
}

void WeightsReader::read(const Device& device, Tensor& tensor) {
    std::vector<float> stage(std::min(kStage, tensor.count));
    for (int64_t first = 0; first < tensor.count; first += kStage) {
        int64_t n = std::min(kStage, tensor.count - first);
        read_floats(stage.data(), n);
        set_weights(device, tensor, first, stage.data(), n);
    }
}

// Values in device memory, as floats, to a file.
template <class T> static void write_floats(const Device& device, FileWriter& file, const T* from, int64_t count) {
    std::vector<T> stage(std::min(kStage, count));
    std::vector<float> wide(stage.size());
    for (int64_t first = 0; first < count; first += kStage) {
        int64_t n = std::min(kStage, count - first);
        download(device, stage.data(), from + first, n * sizeof(T));
        for (int64_t i = 0; i < n; i++) wide[i] = to_float(stage[i]);
        file.write(wide.data(), n * sizeof(float));
    }
}

void write_weights(const Device& device, FileWriter& file, const Tensors& tensors) {
    for (const Tensor& t : tensors.list) {
        if (t.master)
            write_floats(device, file, t.master, t.count);
        else
            write_floats(device, file, t.param, t.count);
    }
}

uint64_t weight_bytes(const Tensors& tensors) { return tensors.count() * sizeof(float); }

void write_state(const Device& device, FileWriter& file, const Tensors& tensors) {
    Header header{kStateMagic, 1, static_cast<int32_t>(tensors.list.size())};
    file.write(header.data(), kHeaderBytes);
    for (const Tensor& t : tensors.list) write_floats(device, file, t.m, t.count);
    for (const Tensor& t : tensors.list) write_floats(device, file, t.v, t.count);
}

void read_state(const Device& device, const MappedFile& file, Tensors& tensors) {
    Header header = read_header(file);
    if (header[0] != kStateMagic || header[1] != 1 || header[2] != static_cast<int32_t>(tensors.list.size()) ||
        file.size() != state_bytes(tensors))
        throw BadInput(file.path() + ": not the optimizer state of this model");
    size_t offset = kHeaderBytes;
    auto read = [&](float* to, int64_t count) {
        upload(device, to, file.at(offset, count * sizeof(float)), count * sizeof(float));
        offset += count * sizeof(float);
    };
    for (Tensor& t : tensors.list) read(t.m, t.count);
    for (Tensor& t : tensors.list) read(t.v, t.count);
}

uint64_t state_bytes(const Tensors& tensors) { return kHeaderBytes + 2 * tensors.count() * sizeof(float); }

void fill_weights(const Device& device, Tensor& tensor, const std::function<float(int64_t)>& value) {
    std::vector<float> stage(std::min(kStage, tensor.count));
    for (int64_t first = 0; first < tensor.count; first += kStage) {
        int64_t n = std::min(kStage, tensor.count - first);
#pragma omp parallel for schedule(static)
        for (int64_t i = 0; i < n; i++) stage[i] = value(first + i);
        set_weights(device, tensor, first, stage.data(), n);
    }
}
