// What both trainers' models do alike around their blocks: a micro-batch from its tokens to the gradients, the
// unembedding with its loss a chunk of tokens at a time, the update, the weights file. A model adds its configuration,
// its tensors and activations, and the forward and backward pass between the tokens and the last LayerNorm.
//
// B sequences of T tokens, N = B·T; C channels, V tokens, padded to Vp; K tokens a chunk, G heads a group.
#pragma once
#include <algorithm>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <type_traits>

#include "../../kernels/attention.h"
#include "../../kernels/optimizer.h"
#include "../device/arena.h"
#include "../device/device.h"
#include "../device/host_store.h"
#include "../device/recording.h"
#include "activations.h"
#include "costs.h"
#include "model.h"
#include "tensors.h"

// A block's own activations, beside the residual stream and attention's output (activations.h), by their width a token.
// Without recomputation each layer keeps them for its backward pass; else they are recomputed there, a chunk of tokens
// and a group of heads at a time.
struct Activations {
    Rows<real> qkv;                // 3·G·D of all tokens
    Rows<real> x1, ln2, fch, gelu; // C where the MLP reads what attention made, C, 4C, 4C; fch in training only
    Rows<real> branch;             // C, what a branch adds to the residual
    Statistics mean2, rstd2;
};

struct ActivationGradients {
    real *x, *ln1, *atty, *qkv; // (N,C) of the residual, (N,C), (N,C), (N,3·G·D)
    Rows<real> ln2, fch;        // C, 4C
};

enum class Pass { training, evaluation, sampling };

class Transformer : public Model {
public:
    void accumulate(const int32_t* tokens, const int32_t* targets, int64_t B, double factor, bool last) override;
    void evaluate(const int32_t* tokens, const int32_t* targets, int64_t B, double factor) override;
    void clear_loss() override;
    void sum_loss() override;
    void begin_step(int64_t step) override;
    void measure_gradients(double clip) override;
    void update(const Optimizer& options) override;
    double loss() override;
    double grad_norm() override;
    OptimizerCounts counts() override;
    int64_t non_finite_gradients() override;
    void next_logits(const int32_t* tokens, int64_t start, int64_t n, float* logits) override;
    int64_t cached_rows() const override { return setup_.cached_rows; }

    int64_t vocab() const override { return V_; }
    int64_t context() const override { return T_; }
    Tensors& tensors() override { return params_; }
    uint64_t file_bytes() const override { return kHeaderBytes + weight_bytes(params_); }
    std::string write_file(FileWriter& file) override;

    // Takes all memory, as arena() lays it out. Until then a model is a plan: its device may be a Device(target).
    void allocate() override;
    Arena& arena() { return arena_; }
    size_t host_bytes() const { return residuals_.host_bytes() + params_.host_bytes(); }
    const Setup& setup() const { return setup_; }
    int64_t heads() const { return H_; }
    // For tests: told of every phase that begins, so that they may spoil all that it does not find there by the arena's
    // word.
    std::function<void(Phases)> watch;
    virtual Work work(int64_t B) const = 0; // of a micro-batch of B sequences

protected:
    // Of the tensors the one that makes logits (Vp,C), and the gains of each block's first LayerNorm and of the last
    // one, whose biases follow them. Parallel: the MLP reads the block's input, as attention does.
    struct Anatomy {
        size_t unembedding, ln1w, lnfw;
        bool parallel;
    };
    Transformer(const Device& device, const ModelSizes& sizes, Tensors tensors, const Anatomy& anatomy,
                const Setup& setup);

    // tokens_ to the last block's output. `start` is the position of the first token, which in sampling continues a
    // sequence: attention then finds the keys and values of those before in the cache.
    virtual void forward(int64_t B, int64_t start, int64_t T, Pass pass) = 0;
    // d_.x, the gradient of the last block's output, to the gradients of all parameters but the unembedding's product
    // and the last LayerNorm.
    virtual void backward(int64_t B) = 0;
    virtual Header header() const = 0;

    void begin(Phases phase) const {
        if (watch) watch(phase);
    }
    // The block's first LayerNorm for tokens n … n+K: computed here, unless it was already (`made`) for all tokens and
    // there is a place for all of them.
    const real* ln1(int64_t l, int64_t n, int64_t K, bool made);
    void ln1_backward(int64_t l, int64_t N); // d_.ln1 into d_.x
    // Tokens n … n+K of x(l+1) := input + branch, and the LayerNorm that follows: the next block's first, or the last
    // one.
    void end_block(int64_t l, int64_t n, int64_t K, const real* input, const real* branch);
    // backward() says when it begins with a block and when all gradients of its layer are made: those that are staged
    // are then added to the bf16 ones, and their place is free for the next layer.
    void enter_backward(int64_t l) { residuals_.enter_backward(l); }
    void leave_backward(int64_t l);

    // Attention of T tokens over their own and the `start` tokens before them, for H of the heads.
    AttentionShape attention_shape(int64_t B, int64_t start, int64_t T, int64_t H) const {
        return ::attention_shape(sizes_, setup_, B, start, T, H);
    }
    // f(n, K): tokens n … n+K, over all of N.
    template <class F> void for_chunks(int64_t N, F f) const {
        for (int64_t n = 0; n < N; n += K_) f(n, std::min(K_, N - n)), mark();
    }
    // f(h, G): heads h … h+G, over all of them.
    template <class F> void for_head_groups(F f) const {
        for (int64_t h = 0; h < H_; h += G_) f(h, std::min(G_, H_ - h)), mark();
    }
    void mark() const; // the end of a piece of work, where others wait for this rank

    real* x(int64_t l) const { return residuals_.x(l); }
    real* atty(int64_t l) const { return residuals_.atty(l); }
    float* lse(int64_t l) const { return residuals_.lse(l); }
    bool keeps_attention() const { return setup_.activations.recompute != Recompute::full; }

    // Of all but the embeddings; the costs of rotary are those of all heads.
    Work blocks_work(int64_t B, Cost rotary_forward, Cost rotary_backward) const;

    // Layer l's part of a parameter and of its gradient.
    real* w(size_t param, int64_t l = 0) const {
        return params_.list[param].param + l * params_.list[param].layer_count();
    }
    float* dw(size_t param, int64_t l = 0) const {
        const Tensor& t = params_.list[param];
        return t.grad ? t.grad + l * t.layer_count() : t.staged;
    }

    const Device& device_;
    const ModelSizes sizes_;
    const Setup setup_;
    const int64_t B_, T_, N_;          // largest batch, context, B·T
    const int64_t L_, C_, H_, V_, Vp_; // sizes
    const int64_t K_, G_;              // tokens of a chunk, heads of a group
    const bool training_, keeps_all_;
    Tensors params_;
    Arena arena_;
    Residuals residuals_;
    char *scratch_ = nullptr, *attention_scratch_ = nullptr, *attention_backward_scratch_ = nullptr;
    int32_t* tokens_ = nullptr; // (N)
    Rows<real> cache_;          // (L,cached_rows,3C) queries, keys and values of the sequence that is sampled
    Activations a_{};
    ActivationGradients d_{};

private:
    const Anatomy anatomy_;
    Recording training_step_, evaluation_;
    Rows<real> ln1_, lnf_, dlnf_; // outputs of the blocks' first and of the last LayerNorm
    Statistics mean1_, rstd1_, meanf_, rstdf_;
    int32_t* targets_ = nullptr; // (N)
    real* logits_ = nullptr;     // (logits_rows(),Vp)
    float* losses_ = nullptr;    // (N)
    double* loss_ = nullptr;
    float *norm_ = nullptr, *norms_ = nullptr, *scale_ = nullptr; // norms_ (2): of float and of bf16 gradients
    OptimizerCounts* counts_ = nullptr;
    bool last_ = false;        // the micro-batch is its step's last
    uint64_t draws_ = 0;       // micro-batches so far, which number the noise of bf16 gradients
    uint64_t* draw_ = nullptr; // the same on the device, for kernels that are replayed
    std::unique_ptr<HostStore> host_;
    char* pieces_ = nullptr; // of offloaded states, two that take turns

    void place_activations();
    // Launches of B sequences that come again and again.
    void repeat(Recording& recording, int64_t B, double factor, const std::function<void()>& launches);
    // Notes an activation in the arena: kept of all layers where nothing is recomputed, else a chunk of one layer or,
    // with `whole`, all of its tokens, for the time of `phases`.
    template <class R> void place_kept(R& rows, int64_t width, const char* name, Phases phases, bool whole = false) {
        place_rows(rows, width, keeps_all_ || whole ? N_ : K_, keeps_all_ ? L_ : 1, name,
                   keeps_all_ ? kAlways : phases);
    }
    // The same of what no layer keeps.
    template <class R> void place_work(R& rows, int64_t width, const char* name, Phases phases, bool whole = false) {
        place_rows(rows, width, whole ? N_ : K_, 1, name, phases);
    }
    template <class R>
    void place_rows(R& rows, int64_t width, int64_t tokens, int64_t slots, const char* name, Phases phases) {
        rows.width = width, rows.tokens = tokens, rows.slots = slots;
        arena_.section(keeps_all_ && phases == kAlways ? "kept activations" : "work space", phases);
        if constexpr (std::is_same_v<R, Statistics>)
            arena_.place(rows.data, slots * tokens * width, name);
        else
            arena_.place_reals(rows.data, slots * tokens * width, name);
    }
    void losses(int64_t N, double factor, bool gradients);
    void wait_for_micro_batch() const;
    void sum_layer(int64_t l);
    void sum_gradients();
};
