// The GPT-2 trainer: what the model is, from its configuration to main, top to bottom. Layers are in kernels/, the loop
// of steps and its habits in runtime/loop.h. Plain C++ in every build.
//
// GPT-2 (Radford et al. 2019), L blocks of
//
//   x = x + attproj(attention(qkv(ln1(x))))
//   x = x + fcproj(gelu(fc(ln2(x))))
//
// then lnf and the unembedding, which is the token embedding wte again.
//
// B sequences of T tokens, N = B·T; C channels, H heads of D = C/H; V tokens, padded to Vp; K tokens a classifier
// chunk.

#include <algorithm>
#include <cmath>
#include <cstdio>

#include "kernels/adamw.h"
#include "kernels/attention.h"
#include "kernels/classifier.h"
#include "kernels/embedding.h"
#include "kernels/gelu.h"
#include "kernels/global_norm.h"
#include "kernels/layernorm.h"
#include "kernels/matmul.h"
#include "runtime/arena.h"
#include "runtime/device.h"
#include "runtime/errors.h"
#include "runtime/loop.h"
#include "runtime/options.h"
#include "runtime/random.h"
#include "runtime/recording.h"
#include "runtime/tensors.h"

// ---------------------------------------------------------------------------------------------------------------------
// Configuration

struct Gpt2Config {
    int64_t maxT, V, Vp, L, H, C;
    int64_t D() const { return C / H; }
};

constexpr int64_t kGpt2Vocab = 50257;

struct NamedSize {
    const char* name;
    ModelSize size;
};
constexpr NamedSize kSizes[] = {{"124M", {12, 768, 12}},
                                {"355M", {24, 1024, 16}},
                                {"774M", {36, 1280, 20}},
                                {"1558M", {48, 1600, 25}},
                                {"tiny", {2, 128, 2}}};

// Rows of wte, a multiple of 128 as in llm.c, so that the logits' matmul has no ragged edge.
int64_t pad_vocab(int64_t V) { return (V + 127) / 128 * 128; }

Gpt2Config config_from_options(const Options& options) {
    ModelSize size{};
    for (const NamedSize& named : kSizes)
        if (options.model == named.name) size = named.size;
    if (!size.L) size = parse_model_size(options.model);
    int64_t V = choose_vocab(options, kGpt2Vocab);
    return {options.context ? options.context : 1024, V, pad_vocab(V), size.L, size.H, size.C};
}

void check_config(const Gpt2Config& c, const std::string& where) {
    if (!attention_supports(c.D()))
        throw BadInput(where + ": head dim " + std::to_string(c.D()) + " (width " + std::to_string(c.C) + " over " +
                       std::to_string(c.H) + " heads) has no kernel; 32, 64, 80, 128 and 256 have");
    if (c.V > 65536)
        throw BadInput(where + ": vocabulary of " + std::to_string(c.V) + ", but shards hold 16-bit tokens");
}

// ---------------------------------------------------------------------------------------------------------------------
// Parameters

enum Param { wte, wpe, ln1w, ln1b, qkvw, qkvb, attprojw, attprojb, ln2w, ln2b, fcw, fcb, fcprojw, fcprojb, lnfw, lnfb };

Tensors gpt2_tensors(const Gpt2Config& c) {
    int64_t L = c.L, C = c.C;
    Tensors t;
    t.add("wte", c.Vp * C, true); // (Vp,C), rows >= V stay zero
    t.add("wpe", c.maxT * C, true);
    t.add("ln1w", L * C, false);
    t.add("ln1b", L * C, false);
    t.add("qkvw", L * 3 * C * C, true); // (L,3C,C)
    t.add("qkvb", L * 3 * C, false);
    t.add("attprojw", L * C * C, true);
    t.add("attprojb", L * C, false);
    t.add("ln2w", L * C, false);
    t.add("ln2b", L * C, false);
    t.add("fcw", L * 4 * C * C, true); // (L,4C,C)
    t.add("fcb", L * 4 * C, false);
    t.add("fcprojw", L * C * 4 * C, true); // (L,C,4C)
    t.add("fcprojb", L * C, false);
    t.add("lnfw", C, false);
    t.add("lnfb", C, false);
    return t;
}

// ---------------------------------------------------------------------------------------------------------------------
// llm.c's model file: 256 int32, then the tensors in order (data/FORMATS.md)

constexpr int32_t kModelMagic = 20240326;

FileType read_config(const MappedFile& file, Gpt2Config& config) {
    Header h = read_header(file);
    auto refuse = [&](const std::string& what) { throw BadInput(file.path() + ": " + what); };
    if (h[0] != kModelMagic) refuse("not a GPT-2 weights file (magic " + std::to_string(h[0]) + ")");
    if (h[1] != 3 && h[1] != 5) refuse("version " + std::to_string(h[1]) + "; 3 (fp32) and 5 (bf16) are read");
    config = {h[2], h[3], h[7], h[4], h[5], h[6]};
    const Gpt2Config& c = config;
    for (int64_t size : {c.maxT, c.V, c.Vp, c.L, c.H, c.C})
        if (size < 1) refuse("a size of " + std::to_string(size) + " in its header");
    // Bounds far beyond any model, so that no product of a lying header overflows.
    if (c.L > 10000 || c.C > 1000000 || c.Vp > 10000000) refuse("absurd sizes in its header");
    if (c.V > c.Vp) refuse("V " + std::to_string(c.V) + " > padded V " + std::to_string(c.Vp));
    if (c.C % c.H) refuse(std::to_string(c.H) + " heads do not divide width " + std::to_string(c.C));
    check_config(c, file.path());
    FileType type = h[1] == 3 ? FileType::fp32 : FileType::bf16;
    check_weights_size(file, type, gpt2_tensors(c));
    return type;
}

// ---------------------------------------------------------------------------------------------------------------------
// Activations

// What forward leaves for backward. Arrays are over layers; without training only qkv is, as the KV cache of sampling.
struct Activations {
    real* x0;                                   // (N,C) embeddings
    real *ln1, *qkv, *atty;                     // (L,N,C), (L,N,3C), (L,N,C)
    real *x1, *ln2, *fch, *gelu, *x2;           // (L,N,C), (L,N,C), (L,N,4C), (L,N,4C), (L,N,C)
    real *branch, *lnf;                         // (N,C) what a branch adds to the residual; (N,C)
    float *mean1, *rstd1, *mean2, *rstd2, *lse; // (L,N) … (L,B,H,T)
    float *meanf, *rstdf, *losses;              // (N)
    real* logits;                               // (K,Vp)
    int32_t *tokens, *targets;                  // (N)
};

struct ActivationGradients {
    real *x, *ln, *qkv, *fch, *lnf; // (N,C), (N,C), (N,3C), (N,4C), (N,C)
};

// ---------------------------------------------------------------------------------------------------------------------

// Tokens of logits held at a time: enough for the matmul's full rate, few enough to stay small beside the activations.
constexpr int64_t kClassifierChunk = 512;

class Gpt2 : public Model {
public:
    Gpt2(const Device& device, const Gpt2Config& config, int64_t B, int64_t T, bool training);
    void init_weights(uint64_t seed);
    void read_file(const MappedFile& file, FileType type);

    void accumulate(const int32_t* tokens, const int32_t* targets, int64_t B, double factor) override;
    void evaluate(const int32_t* tokens, const int32_t* targets, int64_t B, double factor) override;
    void clear(bool gradients) override;
    void measure_gradients(double clip) override;
    void update(const AdamW& options) override;
    double loss() override;
    double grad_norm() override;
    void next_logits(const int32_t* tokens, int64_t start, int64_t n, float* logits) override;

    Cost step_cost(int64_t B) const override;
    int64_t vocab() const override { return c_.V; }
    int64_t context() const override { return T_; }
    Tensors& tensors() override { return params_; }
    uint64_t file_bytes() const override { return kHeaderBytes + weight_bytes(params_); }
    void write_file(FileWriter& file) override;
    std::string describe() const override;

private:
    const Device& device_;
    Gpt2Config c_;
    int64_t B_, T_, N_, K_; // largest batch, context, B·T, classifier chunk
    bool training_;
    Tensors params_;
    Arena arena_;
    Activations a_{};
    ActivationGradients d_{};
    Recording training_step_, evaluation_;
    void* scratch_ = nullptr; // shared by the layers, which need it one at a time
    double* loss_ = nullptr;
    float *norm_ = nullptr, *scale_ = nullptr;

    // Layer l's part of a parameter, of its gradient, and of an activation that has `width` elements a token.
    real* w(Param p, int64_t l = 0) const { return params_.list[p].param + l * layer_size(p); }
    float* dw(Param p, int64_t l = 0) const { return params_.list[p].grad + l * layer_size(p); }
    int64_t layer_size(Param p) const {
        bool per_layer = p != wte && p != wpe && p != lnfw && p != lnfb;
        return per_layer ? params_.list[p].count / c_.L : 0;
    }
    template <class T> T* at(T* activations, int64_t l, int64_t width) const {
        return activations + (training_ ? l : 0) * N_ * width;
    }
    AttentionShape attention_shape(int64_t B, int64_t start, int64_t T) const;
    void forward(int64_t B, int64_t start, int64_t T);
    void backward(int64_t B);
    void losses(int64_t N, double factor, bool gradients);
};

Gpt2::Gpt2(const Device& device, const Gpt2Config& config, int64_t B, int64_t T, bool training)
    : device_(device), c_(config), B_(B), T_(T), N_(B * T), training_(training), params_(gpt2_tensors(config)) {
    int64_t C = c_.C, L = training ? c_.L : 1, N = N_, G = training ? N_ : 0;
    K_ = std::min(N, kClassifierChunk);
    params_.place(arena_, training);
    arena_.place(a_.x0, N * C, "embeddings");
    arena_.place(a_.ln1, L * N * C, "ln1");
    arena_.place(a_.qkv, c_.L * N * 3 * C, "qkv");
    arena_.place(a_.atty, L * N * C, "attention");
    arena_.place(a_.lse, L * N * c_.H, "log-sum-exp");
    arena_.place(a_.x1, L * N * C, "residual after attention");
    arena_.place(a_.ln2, L * N * C, "ln2");
    arena_.place(a_.fch, training ? L * N * 4 * C : 0, "fc before GELU");
    arena_.place(a_.gelu, L * N * 4 * C, "fc after GELU");
    arena_.place(a_.x2, L * N * C, "residual after MLP");
    for (float** stats : {&a_.mean1, &a_.rstd1, &a_.mean2, &a_.rstd2})
        arena_.place(*stats, L * N, "LayerNorm statistics");
    for (float** stats : {&a_.meanf, &a_.rstdf}) arena_.place(*stats, N, "LayerNorm statistics");
    arena_.place(a_.branch, N * C, "branch");
    arena_.place(a_.lnf, N * C, "lnf");
    arena_.place(a_.losses, N, "losses");
    arena_.place(a_.logits, K_ * c_.Vp, "logits");
    arena_.place(a_.tokens, N, "tokens");
    arena_.place(a_.targets, N, "targets");
    arena_.place(d_.x, G * C, "gradient of the residual");
    arena_.place(d_.ln, G * C, "gradient of LayerNorm outputs");
    arena_.place(d_.qkv, G * 3 * C, "gradient of qkv");
    arena_.place(d_.fch, G * 4 * C, "gradient of fc");
    arena_.place(d_.lnf, G * C, "gradient of lnf");
    AttentionShape shape = attention_shape(B, 0, T);
    size_t scratch = attention_forward_scratch(shape);
    if (training) {
        scratch = std::max({scratch, attention_backward_scratch(shape), layernorm_backward_scratch(N, C),
                            global_norm_scratch(params_.padded), embedding_backward_scratch({B, T, C})});
    }
    char* bytes = nullptr;
    arena_.place(bytes, scratch, "scratch");
    arena_.place(loss_, 1, "loss");
    arena_.place(norm_, 1, "norm");
    arena_.place(scale_, 1, "clip scale");
    arena_.commit();
    scratch_ = bytes;
    params_.link();
}

// GPT-2's: normal(0.02); the two projections into the residual stream scaled down by sqrt(2L); biases 0, LayerNorm 1.
void Gpt2::init_weights(uint64_t seed) {
    for (size_t i = 0; i < params_.list.size(); i++) {
        Tensor& t = params_.list[i];
        bool is_gain = i == ln1w || i == ln2w || i == lnfw, is_projection = i == attprojw || i == fcprojw;
        double std = is_projection ? 0.02 / std::sqrt(2.0 * c_.L) : 0.02;
        int64_t end = i == wte ? c_.V * c_.C : t.count;
        fill_weights(device_, t, [&](int64_t k) -> float {
            if (is_gain) return 1;
            return t.decay && k < end ? std * random_normal(seed, i, k) : 0;
        });
    }
}

void Gpt2::read_file(const MappedFile& file, FileType type) { read_weights(device_, file, type, params_); }

void Gpt2::write_file(FileWriter& file) {
    Header h{};
    int64_t values[] = {kModelMagic, 3, c_.maxT, c_.V, c_.L, c_.H, c_.C, c_.Vp};
    for (int i = 0; i < 8; i++) h[i] = static_cast<int32_t>(values[i]);
    file.write(h.data(), kHeaderBytes);
    write_weights(device_, file, params_);
}

std::string Gpt2::describe() const {
    char line[256];
    snprintf(line, sizeof line, "GPT-2, %.1fM parameters: L %lld, C %lld, H %lld, V %lld, context %lld of %lld",
             params_.count() / 1e6, (long long)c_.L, (long long)c_.C, (long long)c_.H, (long long)c_.V, (long long)T_,
             (long long)c_.maxT);
    return line;
}

AttentionShape Gpt2::attention_shape(int64_t B, int64_t start, int64_t T) const {
    AttentionShape shape{};
    shape.B = B, shape.Tq = T, shape.Tk = start + T, shape.H = c_.H, shape.D = c_.D();
    shape.q_offset = start;
    return shape;
}

// Rows [start, start+T) of each sequence, written at the same rows of the activations, so that a sequence can be
// continued: attention then finds the keys and values of the rows before in qkv. start > 0 needs B = 1.
void Gpt2::forward(int64_t B, int64_t start, int64_t T) {
    int64_t C = c_.C, N = B * T, S = start;
    Stream s = device_.stream;
    Matmul* mm = device_.matmul;
    EmbeddingShape embedding{B, T, C};
    embedding.position0 = start;
    embedding_forward(s, a_.x0 + S * C, a_.tokens + S, w(wte), w(wpe), embedding);
    layernorm_forward(s, at(a_.ln1, 0, C) + S * C, at(a_.mean1, 0, 1) + S, at(a_.rstd1, 0, 1) + S, a_.x0 + S * C,
                      w(ln1w), w(ln1b), N, C);
    const real* x = a_.x0 + S * C;
    for (int64_t l = 0; l < c_.L; l++) {
        real *ln1 = at(a_.ln1, l, C) + S * C, *atty = at(a_.atty, l, C) + S * C, *x1 = at(a_.x1, l, C) + S * C;
        real *ln2 = at(a_.ln2, l, C) + S * C, *x2 = at(a_.x2, l, C) + S * C;
        real* gelu = at(a_.gelu, l, 4 * C) + S * 4 * C;
        real* fch = training_ ? at(a_.fch, l, 4 * C) + S * 4 * C : nullptr;
        real* qkv = a_.qkv + l * N_ * 3 * C; // from row 0: keys and values of all rows so far

        matmul_forward(mm, qkv + S * 3 * C, nullptr, ln1, w(qkvw, l), w(qkvb, l), N, C, 3 * C);
        int64_t D = c_.D(), batch = T * 3 * C;
        Heads<const real> q{qkv + S * 3 * C, batch, 3 * C, D}, k{qkv + C, batch, 3 * C, D},
            v{qkv + 2 * C, batch, 3 * C, D};
        attention_forward(s, {atty, T * C, C, D}, at(a_.lse, l, c_.H), q, k, v, 1 / std::sqrt(float(D)), scratch_,
                          attention_shape(B, start, T));
        matmul_forward(mm, a_.branch, nullptr, atty, w(attprojw, l), w(attprojb, l), N, C, C);
        residual_layernorm_forward(s, x1, ln2, at(a_.mean2, l, 1) + S, at(a_.rstd2, l, 1) + S, x, a_.branch, w(ln2w, l),
                                   w(ln2b, l), N, C);

        matmul_forward(mm, gelu, fch, ln2, w(fcw, l), w(fcb, l), N, C, 4 * C, Gelu::tanh);
        matmul_forward(mm, a_.branch, nullptr, gelu, w(fcprojw, l), w(fcprojb, l), N, 4 * C, C);
        // The LayerNorm that follows the block: the next block's first, or the last one.
        bool last = l + 1 == c_.L;
        real* next = (last ? a_.lnf : at(a_.ln1, l + 1, C)) + S * C;
        float* mean = (last ? a_.meanf : at(a_.mean1, l + 1, 1)) + S;
        float* rstd = (last ? a_.rstdf : at(a_.rstd1, l + 1, 1)) + S;
        residual_layernorm_forward(s, x2, next, mean, rstd, x1, a_.branch, last ? w(lnfw) : w(ln1w, l + 1),
                                   last ? w(lnfb) : w(ln1b, l + 1), N, C);
        x = x2;
    }
}

// Logits and losses of N tokens, a chunk at a time, so that no more than a chunk of logits exists. With gradients also
// their part of wte's gradient, and that of lnf's output.
void Gpt2::losses(int64_t N, double factor, bool gradients) {
    int64_t C = c_.C, Vp = c_.Vp;
    for (int64_t n = 0; n < N; n += K_) {
        int64_t K = std::min(K_, N - n);
        matmul_forward(device_.matmul, a_.logits, nullptr, a_.lnf + n * C, w(wte), nullptr, K, C, Vp);
        if (!gradients) {
            classifier_forward(device_.stream, a_.losses + n, a_.logits, a_.targets + n, K, c_.V, Vp);
            continue;
        }
        classifier_forward_backward(device_.stream, a_.losses + n, a_.logits, a_.targets + n, float(factor), K, c_.V,
                                    Vp);
        matmul_backward_weight(device_.matmul, dw(wte), nullptr, a_.logits, a_.lnf + n * C, K, C, Vp);
        matmul_backward_input(device_.matmul, d_.lnf + n * C, a_.logits, w(wte), nullptr, K, C, Vp);
    }
    classifier_add_losses(device_.stream, loss_, a_.losses, factor, N);
}

void Gpt2::backward(int64_t B) {
    int64_t C = c_.C, T = T_, N = B * T, D = c_.D();
    Stream s = device_.stream;
    Matmul* mm = device_.matmul;
    fill_zero(device_, d_.x, N * C * sizeof(real));
    layernorm_backward(s, d_.x, dw(lnfw), dw(lnfb), d_.lnf, at(a_.x2, c_.L - 1, C), w(lnfw), a_.meanf, a_.rstdf,
                       scratch_, N, C);
    for (int64_t l = c_.L - 1; l >= 0; l--) {
        const real* x = l ? at(a_.x2, l - 1, C) : a_.x0; // the block's input

        matmul_backward_weight(mm, dw(fcprojw, l), dw(fcprojb, l), d_.x, at(a_.gelu, l, 4 * C), N, 4 * C, C);
        matmul_backward_input(mm, d_.fch, d_.x, w(fcprojw, l), at(a_.fch, l, 4 * C), N, 4 * C, C, Gelu::tanh);
        matmul_backward_weight(mm, dw(fcw, l), dw(fcb, l), d_.fch, at(a_.ln2, l, C), N, C, 4 * C);
        matmul_backward_input(mm, d_.ln, d_.fch, w(fcw, l), nullptr, N, C, 4 * C);
        layernorm_backward(s, d_.x, dw(ln2w, l), dw(ln2b, l), d_.ln, at(a_.x1, l, C), w(ln2w, l), at(a_.mean2, l, 1),
                           at(a_.rstd2, l, 1), scratch_, N, C);

        const real *qkv = a_.qkv + l * N_ * 3 * C, *atty = at(a_.atty, l, C);
        matmul_backward_weight(mm, dw(attprojw, l), dw(attprojb, l), d_.x, atty, N, C, C);
        matmul_backward_input(mm, d_.ln, d_.x, w(attprojw, l), nullptr, N, C, C);
        int64_t batch = T * 3 * C;
        Heads<const real> q{qkv, batch, 3 * C, D}, k{qkv + C, batch, 3 * C, D}, v{qkv + 2 * C, batch, 3 * C, D};
        Heads<real> dq{d_.qkv, batch, 3 * C, D}, dk{d_.qkv + C, batch, 3 * C, D}, dv{d_.qkv + 2 * C, batch, 3 * C, D};
        attention_backward(s, dq, dk, dv, {d_.ln, T * C, C, D}, q, k, v, {atty, T * C, C, D}, at(a_.lse, l, c_.H),
                           1 / std::sqrt(float(D)), scratch_, attention_shape(B, 0, T));
        matmul_backward_weight(mm, dw(qkvw, l), dw(qkvb, l), d_.qkv, at(a_.ln1, l, C), N, C, 3 * C);
        matmul_backward_input(mm, d_.ln, d_.qkv, w(qkvw, l), nullptr, N, C, 3 * C);
        layernorm_backward(s, d_.x, dw(ln1w, l), dw(ln1b, l), d_.ln, x, w(ln1w, l), at(a_.mean1, l, 1),
                           at(a_.rstd1, l, 1), scratch_, N, C);
    }
    embedding_backward(s, dw(wte), dw(wpe), d_.x, a_.tokens, scratch_, {B, T, C});
}

void Gpt2::accumulate(const int32_t* tokens, const int32_t* targets, int64_t B, double factor) {
    upload(device_, a_.tokens, tokens, B * T_ * sizeof(int32_t));
    upload(device_, a_.targets, targets, B * T_ * sizeof(int32_t));
    training_step_.run(device_, {double(B), factor}, [&] {
        forward(B, 0, T_);
        losses(B * T_, factor, true);
        backward(B);
    });
}

void Gpt2::evaluate(const int32_t* tokens, const int32_t* targets, int64_t B, double factor) {
    upload(device_, a_.tokens, tokens, B * T_ * sizeof(int32_t));
    upload(device_, a_.targets, targets, B * T_ * sizeof(int32_t));
    evaluation_.run(device_, {double(B), factor}, [&] {
        forward(B, 0, T_);
        losses(B * T_, factor, false);
    });
}

void Gpt2::next_logits(const int32_t* tokens, int64_t start, int64_t n, float* logits) {
    upload(device_, a_.tokens + start, tokens, n * sizeof(int32_t));
    forward(1, start, n);
    matmul_forward(device_.matmul, a_.logits, nullptr, a_.lnf + (start + n - 1) * c_.C, w(wte), nullptr, 1, c_.C,
                   c_.Vp);
    std::vector<real> row(c_.V);
    download(device_, row.data(), a_.logits, c_.V * sizeof(real));
    for (int64_t v = 0; v < c_.V; v++) logits[v] = to_float(row[v]);
}

void Gpt2::clear(bool gradients) {
    fill_zero(device_, loss_, sizeof(double));
    if (gradients) fill_zero(device_, params_.grads, params_.padded * sizeof(float));
}

void Gpt2::measure_gradients(double clip) {
    global_norm(device_.stream, norm_, params_.grads, scratch_, params_.padded);
    clip_scale(device_.stream, scale_, norm_, loss_, float(clip));
}

void Gpt2::update(const AdamW& options) {
    for (const Tensor& t : params_.list) {
        AdamW o = options;
        if (!t.decay) o.weight_decay = 0;
        adamw_update(device_.stream, t.param, t.master, t.m, t.v, t.grad, scale_, t.count, o);
    }
}

double Gpt2::loss() {
    double loss;
    download(device_, &loss, loss_, sizeof loss);
    return loss;
}

double Gpt2::grad_norm() {
    float norm;
    download(device_, &norm, norm_, sizeof norm);
    return norm;
}

Cost Gpt2::step_cost(int64_t B) const {
    int64_t C = c_.C, N = B * T_;
    auto linear = [&](int64_t in, int64_t out) {
        return matmul_forward_cost(N, in, out) + matmul_backward_input_cost(N, in, out) +
               matmul_backward_weight_cost(N, in, out);
    };
    AttentionShape shape = attention_shape(B, 0, T_);
    Cost norms = layernorm_forward_cost(N, C) + layernorm_backward_cost(N, C);
    Cost block = linear(C, 3 * C) + linear(C, C) + linear(C, 4 * C) + linear(4 * C, C) + attention_forward_cost(shape) +
                 attention_backward_cost(shape) + 2 * norms + gelu_forward_cost(N * 4 * C) +
                 gelu_backward_cost(N * 4 * C);
    EmbeddingShape embedding{B, T_, C};
    return c_.L * block + norms + linear(C, c_.Vp) + classifier_forward_backward_cost(N, c_.V, c_.Vp) +
           embedding_forward_cost(embedding, true) + embedding_backward_cost(embedding, true);
}

// ---------------------------------------------------------------------------------------------------------------------

const Family kGpt2Family = {"train_gpt2",
                            "Trains GPT-2 from scratch or from an llm.c weights file, on pre-tokenised shards.",
                            {"124M", "355M", "774M", "1558M"}};

void run_gpt2(int argc, char** argv) {
    Options options = parse_options(argc, argv, kGpt2Family);
    Start start = find_start(options);
    Gpt2Config config;
    std::optional<MappedFile> file;
    FileType type = FileType::fp32;
    if (start.weights.empty()) {
        config = config_from_options(options);
        check_config(config, "--model " + options.model);
    } else {
        type = read_config(file.emplace(start.weights), config);
        if (options.vocab && options.vocab != config.V)
            throw BadInput("--vocab " + std::to_string(options.vocab) + ", but " + start.weights + " has " +
                           std::to_string(config.V));
    }
    int64_t T = options.context ? options.context : config.maxT;
    if (T > config.maxT)
        throw BadInput("--context " + std::to_string(T) + " is longer than the position table of " + start.weights +
                       ", " + std::to_string(config.maxT));
    Device device(options.threads);
    Gpt2 model(device, config, options.batch, T, options.eval.empty());
    if (file)
        model.read_file(*file, type);
    else
        model.init_weights(options.seed);
    file.reset();
    if (options.eval.empty())
        train(options, device, model, start);
    else
        evaluate(options, model);
}

int main(int argc, char** argv) {
    return run_program("train_gpt2", [&] { run_gpt2(argc, argv); });
}
