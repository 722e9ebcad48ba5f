// A model's parameters with all that training keeps for each, and how they travel to and from files.
#pragma once
#include <array>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "../../kernels/optimizer.h"
#include "../device/arena.h"
#include "../device/device.h"
#include "../files/files.h"

// What training keeps beside each weight.
struct TrainingMemory {
    Rule rule = Rule::adamw;
    StateType state = StateType::fp32;
    bool int8_embeddings = false; // else embeddings keep fp32 states where the others are int8
    bool master = true;           // float weights beside bf16 ones
    bool bf16_grads = false;      // of what layers own; a layer's are made in float, then added with this seed's noise
    bool host_states = false;     // optimizer states are offloaded
    bool host_master = false;     // master weights are offloaded
    uint64_t seed = 0;
};

enum class TensorKind { matrix, embedding, vector }; // vectors: biases, LayerNorm; they do not decay

struct Tensor {
    std::string name;
    TensorKind kind;
    int64_t layers;            // 0: no layer owns it
    int64_t count;             // of all layers together
    real* param = nullptr;     // (count) what the layers read
    float* master = nullptr;   // (count) the float weights; null where param is all there is
    float* grad = nullptr;     // (count) in training, unless a layer owns it and its gradients are bf16; then
    bf16* grad_bf16 = nullptr; // (count), to which a layer's part is added from
    float* staged = nullptr;   // (layer_count()), all zero between two layers
    States states{StateType::fp32, nullptr, nullptr}; // in training
    bool master_waits = false, states_wait = false;   // on the host

    bool decay() const { return kind != TensorKind::vector; }
    int64_t layer_count() const { return layers ? count / layers : count; }
};

// All parameters of a model, each kind of number in one run of memory, so that the norm and the zeroing are one call.
struct Tensors {
    std::vector<Tensor> list;
    TrainingMemory memory;
    real* params = nullptr;
    float *masters = nullptr, *grads = nullptr, *staging = nullptr;
    bf16* grads_bf16 = nullptr;
    char* states = nullptr;
    // Elements in each run; a tensor begins at a multiple of 64, the gaps stay 0. Gradients are in one of two runs.
    int64_t padded = 0, grads_padded = 0, grads_bf16_padded = 0, staged_padded = 0;
    size_t host_states_bytes = 0, host_masters_bytes = 0;

    void add(const std::string& name, TensorKind kind, int64_t count);
    void add_layers(const std::string& name, TensorKind kind, int64_t layers, int64_t layer_count);
    // Notes the runs in the arena, but for those that are offloaded; call link() after arena.commit(), `host` being
    // host_bytes() of host memory.
    void place(Arena& arena, bool training, const TrainingMemory& memory);
    void link(char* host);
    int64_t count() const; // parameters
    size_t host_bytes() const { return host_states_bytes + host_masters_bytes; }
    bool float_weights() const { return sizeof(real) == sizeof(float) || masters; }
    // Blocks of 8-bit states never span two layers: a layer's matrix is a multiple of 256.
    StateType state_type(const Tensor& tensor) const;
    size_t states_bytes() const;
};

Header read_header(const FileReader& file);

enum class FileType { fp32, bf16, fp16 }; // versions 3, 5 and 6 of a weights file

// Throws BadInput for any other version.
FileType file_type(const FileReader& file, const Header& header);

// A weights file is its header and the tensors, no byte more or less. Throws BadInput naming both sizes: to be asked
// before anything is allocated on the header's word.
void check_weights_size(const FileReader& file, FileType type, const Tensors& tensors);

// Reads a weights file's tensors one after another, converting to what the build holds. Throws BadInput naming the file
// and the tensor for a weight that is not finite: nothing can be computed with it.
class WeightsReader {
public:
    WeightsReader(const FileReader& file, FileType type) : file_(file), type_(type) {}
    void read(const Device& device, Tensor& tensor);
    std::vector<float> read_floats(const std::string& name, int64_t count); // the next `count` values, of this tensor

private:
    const FileReader& file_;
    FileType type_;
    size_t offset_ = kHeaderBytes;
    void read_floats(float* to, int64_t count);
    void check_finite(const std::string& name, int64_t first, const std::vector<float>& values, int64_t count) const;
};

// Writes every tensor in order: float from the master weights, where the weights are float, else bf16 as they are.
// Returns the name of the first tensor that is not finite, or nothing.
std::string write_weights(const Device& device, FileWriter& file, const Tensors& tensors);
FileType weights_type(const Tensors& tensors);
uint64_t weight_bytes(const Tensors& tensors);

// The optimizer's state: header (kStateMagic, 2, number of tensors, rule, then each tensor's StateType), then for each
// tensor its m, v and their absmax, whichever it has, as they are in memory.
constexpr int32_t kStateMagic = 20261123;
void write_state(const Device& device, FileWriter& file, const Tensors& tensors);
void read_state(const Device& device, const FileReader& file, Tensors& tensors);
uint64_t state_bytes(const Tensors& tensors);

// A hash of each tensor's weights, master weights and states as they are in memory.
std::vector<uint64_t> tensor_hashes(const Device& device, const Tensors& tensors);

// Sets a tensor's weights from a function of the element's index, on all threads.
void fill_weights(const Device& device, Tensor& tensor, const std::function<float(int64_t)>& value);
