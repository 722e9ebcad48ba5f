// A model's parameters with all that training keeps for each, and how they travel to and from files.
#pragma once
#include <array>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "arena.h"
#include "device.h"
#include "files.h"

struct Tensor {
    std::string name;
    int64_t layers, count;            // of all layers together; a tensor that no layer owns has one
    bool decay;                       // weight decay: matrices only
    real* param = nullptr;            // (count) what the layers read
    float* master = nullptr;          // (count) the float weights; null where param is float itself
    float* grad = nullptr;            // (count) in training
    float *m = nullptr, *v = nullptr; // (count) AdamW's moments, in training

    int64_t layer_count() const { return count / layers; }
};

// All parameters of a model, each kind in one run of memory, so that the norm and the zeroing are one call.
struct Tensors {
    std::vector<Tensor> list;
    real* params = nullptr;
    float *masters = nullptr, *grads = nullptr, *ms = nullptr, *vs = nullptr;
    int64_t padded = 0; // elements in each run; a tensor begins at a multiple of 64, the gaps stay 0

    void add(const std::string& name, int64_t layers, int64_t layer_count, bool decay);
    // Notes the runs in the arena; call link() after arena.commit().
    void place(Arena& arena, bool training);
    void link();
    int64_t count() const; // parameters
};

// Every model and shard file of llm.c's manner begins with 256 int32.
constexpr int kHeaderInts = 256;
using Header = std::array<int32_t, kHeaderInts>;
constexpr size_t kHeaderBytes = sizeof(Header);
Header read_header(const MappedFile& file);

enum class FileType { fp32, bf16, fp16 }; // versions 3, 5 and 6 of a weights file

// Throws BadInput for any other version.
FileType file_type(const MappedFile& file, const Header& header);

// A weights file is its header and the tensors, no byte more or less. Throws BadInput naming both sizes: to be asked
// before anything is allocated on the header's word.
void check_weights_size(const MappedFile& file, FileType type, const Tensors& tensors);

// Reads a weights file's tensors one after another, converting to what the build holds.
class WeightsReader {
public:
    WeightsReader(const MappedFile& file, FileType type) : file_(file), type_(type) {}
    void read(const Device& device, Tensor& tensor);
    std::vector<float> read_floats(int64_t count); // the next `count` values

private:
    const MappedFile& file_;
    FileType type_;
    size_t offset_ = kHeaderBytes;
    void read_floats(float* to, int64_t count);
};

// Writes every tensor in order, as float: from the master weights where they exist.
void write_weights(const Device& device, FileWriter& file, const Tensors& tensors);
uint64_t weight_bytes(const Tensors& tensors);

// The optimizer's state: header (kStateMagic, 1, number of tensors), then each tensor's m, then each tensor's v, float.
constexpr int32_t kStateMagic = 20261123;
void write_state(const Device& device, FileWriter& file, const Tensors& tensors);
void read_state(const Device& device, const MappedFile& file, Tensors& tensors);
uint64_t state_bytes(const Tensors& tensors);

// Sets a tensor's weights from a function of the element's index, on all threads.
void fill_weights(const Device& device, Tensor& tensor, const std::function<float(int64_t)>& value);
