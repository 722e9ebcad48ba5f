// What both trainers' models do alike around their blocks: a micro-batch from its tokens to the gradients, the
// unembedding with its loss a chunk of tokens at a time, the update, the weights file. A model adds its configuration,
// its tensors and activations, and the forward and backward pass between the tokens and the last LayerNorm.
//
// B sequences of T tokens, N = B·T; C channels, V tokens, padded to Vp; K tokens a classifier chunk.
#pragma once
#include <cstdint>
#include <string>

#include "../kernels/attention.h"
#include "../kernels/optimizer.h"
#include "arena.h"
#include "device.h"
#include "loop.h"
#include "recording.h"
#include "tensors.h"

struct ModelSizes {
    int64_t maxT, V, Vp, L, H, C; // entries 2 to 7 of a weights file's header, not in this order
    int64_t D() const { return C / H; }
};

// Rows of the token tables, a multiple of 128 as in llm.c, so that the logits' matmul has no ragged edge.
inline int64_t pad_vocab(int64_t V) { return (V + 127) / 128 * 128; }

// Refuses a head dim without kernels and a vocabulary that shards cannot hold; `where` opens the message.
void check_sizes(const ModelSizes& sizes, const std::string& where);

// Both families' headers begin alike: magic, version and the sizes. read_sizes() refuses another magic, `family` being
// what the file is not, and sizes that cannot be; it fills `header` for the entries that follow.
ModelSizes read_sizes(const MappedFile& file, int32_t magic, const char* family, Header& header);
Header make_header(int32_t magic, const ModelSizes& sizes, FileType type);

TrainingMemory training_memory(const Options& options);

class Transformer : public Model {
public:
    void accumulate(const int32_t* tokens, const int32_t* targets, int64_t B, double factor) override;
    void evaluate(const int32_t* tokens, const int32_t* targets, int64_t B, double factor) override;
    void clear_loss() override;
    void begin_step(int64_t step) override;
    void measure_gradients(double clip) override;
    void update(const Optimizer& options) override;
    double loss() override;
    double grad_norm() override;
    OptimizerCounts counts() override;
    int64_t non_finite_gradients() override;
    void next_logits(const int32_t* tokens, int64_t start, int64_t n, float* logits) override;

    int64_t vocab() const override { return V_; }
    int64_t context() const override { return T_; }
    Tensors& tensors() override { return params_; }
    uint64_t file_bytes() const override { return kHeaderBytes + weight_bytes(params_); }
    void write_file(FileWriter& file) override;

protected:
    // `unembedding` (Vp,C) is the tensor that makes logits of lnf_.
    Transformer(const Device& device, const ModelSizes& sizes, Tensors tensors, size_t unembedding, int64_t B,
                int64_t T, bool training, const TrainingMemory& memory);
    // Allocates, once the model has placed its own arrays in arena_. `scratch` bytes serve its layers' needs.
    void commit(size_t scratch);

    // tokens_ to lnf_: rows [start, start+T) of each sequence, written at the same rows of the activations, so that a
    // sequence can be continued: attention then finds the keys and values of the rows before. start > 0 needs B = 1.
    virtual void forward(int64_t B, int64_t start, int64_t T) = 0;
    // dlnf_ to the gradients of all parameters but the unembedding's product.
    virtual void backward(int64_t B) = 0;
    virtual Header header() const = 0;
    // backward() says so when it has made all gradients of a layer: those that are staged are then added to the bf16
    // ones, and their place is free for the next layer.
    void layer_done(int64_t l);
    // Attention of T tokens over their own and the `start` tokens before them.
    AttentionShape attention_shape(int64_t B, int64_t start, int64_t T) const;
    // A matrix (out, in) on N tokens, forward and backward.
    static Cost linear_cost(int64_t N, int64_t in, int64_t out);
    // FLOPs and bytes of the unembedding with its loss and gradients, for N tokens.
    Cost unembedding_cost(int64_t N) const;

    // Layer l's part of a parameter, of its gradient, and of an activation that has `width` elements a token; without
    // training all layers share one activation.
    real* w(size_t param, int64_t l = 0) const {
        return params_.list[param].param + l * params_.list[param].layer_count();
    }
    float* dw(size_t param, int64_t l = 0) const {
        const Tensor& t = params_.list[param];
        return t.grad ? t.grad + l * t.layer_count() : t.staged;
    }
    template <class T> T* at(T* activations, int64_t l, int64_t width) const {
        return activations + (training_ ? l : 0) * N_ * width;
    }

    const Device& device_;
    const int64_t B_, T_, N_; // largest batch, context, B·T
    const bool training_;
    Tensors params_;
    Arena arena_;
    void* scratch_ = nullptr;                        // shared by the layers, which need it one at a time
    int32_t *tokens_ = nullptr, *targets_ = nullptr; // (N)
    real *lnf_ = nullptr, *dlnf_ = nullptr;          // (N,C) the last LayerNorm's output and, in training, its gradient

private:
    const int64_t C_, H_, V_, Vp_, K_;
    const size_t unembedding_;
    Recording training_step_, evaluation_;
    real* logits_ = nullptr;  // (K,Vp)
    float* losses_ = nullptr; // (N)
    double* loss_ = nullptr;
    float *norm_ = nullptr, *norms_ = nullptr, *scale_ = nullptr; // norms_ (2): of float and of bf16 gradients
    OptimizerCounts* counts_ = nullptr;
    uint64_t draws_ = 0;       // micro-batches so far, which number the noise of bf16 gradients
    uint64_t* draw_ = nullptr; // the same on the device, for kernels that are replayed

    void losses(int64_t N, double factor, bool gradients);
};
