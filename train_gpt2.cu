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

#include "kernels/attention.h"
#include "kernels/embedding.h"
#include "kernels/gelu.h"
#include "kernels/layernorm.h"
#include "kernels/matmul.h"
#include "runtime/errors.h"
#include "runtime/random.h"
#include "runtime/transformer.h"

// ---------------------------------------------------------------------------------------------------------------------
// Configuration

struct Gpt2Config : ModelSizes {
    int64_t tied = 0; // context of a run whose positions repeat: p has row p mod maxT of wpe. 0: they do not
};

constexpr int64_t kGpt2Vocab = 50257, kGpt2Positions = 1024;

const Family kGpt2Family = {
    "train_gpt2",
    "GPT-2",
    "Trains GPT-2 from scratch or from an llm.c weights file, on pre-tokenised shards.",
    {{"124M", {12, 768, 12}}, {"355M", {24, 1024, 16}}, {"774M", {36, 1280, 20}}, {"1558M", {48, 1600, 25}}},
    false};

Gpt2Config config_from_options(const Options& options) {
    ModelSize size = find_model_size(options.model, kGpt2Family);
    int64_t V = choose_vocab(options, kGpt2Vocab), T = options.context ? options.context : kGpt2Positions;
    Gpt2Config config{{T, V, pad_vocab(V), size.L, size.H, size.C}};
    if (options.positions == "tied" && T > kGpt2Positions) config.maxT = kGpt2Positions, config.tied = T;
    if (options.positions == "tile" || options.positions == "interpolate")
        throw BadInput("--positions " + options.positions + " stretches trained positions: it needs --init");
    check_sizes(config, "--model " + options.model);
    return config;
}

// The model that goes on from `file` at context T: with a longer position table, or with positions that repeat.
Gpt2Config stretch(const Gpt2Config& file, const Options& options, int64_t T, const std::string& path) {
    if (T <= file.maxT) return file;
    Gpt2Config config = file;
    const std::string& positions = options.positions;
    if (positions == "tied" || (positions.empty() && file.tied)) {
        config.tied = T;
        return config;
    }
    if (positions.empty())
        throw BadInput("--context " + std::to_string(T) + " is longer than the position table of " + path + ", " +
                       std::to_string(file.maxT) +
                       " rows; say how it is to grow: --positions tile, tied, interpolate or fresh");
    config.maxT = T, config.tied = 0;
    return config;
}

// ---------------------------------------------------------------------------------------------------------------------
// Parameters

enum Param { wte, wpe, ln1w, ln1b, qkvw, qkvb, attprojw, attprojb, ln2w, ln2b, fcw, fcb, fcprojw, fcprojb, lnfw, lnfb };

Tensors gpt2_tensors(const Gpt2Config& c) {
    int64_t L = c.L, C = c.C;
    Tensors t;
    t.add("wte", TensorKind::embedding, c.Vp * C); // (Vp,C), rows >= V stay zero
    t.add("wpe", TensorKind::embedding, c.maxT * C);
    t.add_layers("ln1w", TensorKind::vector, L, C);
    t.add_layers("ln1b", TensorKind::vector, L, C);
    t.add_layers("qkvw", TensorKind::matrix, L, 3 * C * C); // (L,3C,C)
    t.add_layers("qkvb", TensorKind::vector, L, 3 * C);
    t.add_layers("attprojw", TensorKind::matrix, L, C * C);
    t.add_layers("attprojb", TensorKind::vector, L, C);
    t.add_layers("ln2w", TensorKind::vector, L, C);
    t.add_layers("ln2b", TensorKind::vector, L, C);
    t.add_layers("fcw", TensorKind::matrix, L, 4 * C * C); // (L,4C,C)
    t.add_layers("fcb", TensorKind::vector, L, 4 * C);
    t.add_layers("fcprojw", TensorKind::matrix, L, C * 4 * C); // (L,C,4C)
    t.add_layers("fcprojb", TensorKind::vector, L, C);
    t.add("lnfw", TensorKind::vector, C);
    t.add("lnfb", TensorKind::vector, C);
    return t;
}

// ---------------------------------------------------------------------------------------------------------------------
// llm.c's model file: 256 int32, then the tensors in order (data/FORMATS.md)

constexpr int32_t kModelMagic = 20240326;

FileType read_config(const MappedFile& file, Gpt2Config& config) {
    Header header;
    static_cast<ModelSizes&>(config) = read_sizes(file, kModelMagic, "GPT-2", header);
    config.tied = header[8] ? header[9] : 0;
    if (header[8] < 0 || header[8] > 1 || (header[8] && header[9] < 1))
        throw BadInput(file.path() + ": no position rule " + std::to_string(header[8]) + " of " +
                       std::to_string(header[9]) + " tokens is known");
    FileType type = file_type(file, header);
    check_weights_size(file, type, gpt2_tensors(config));
    return type;
}

// ---------------------------------------------------------------------------------------------------------------------
// Activations

// What forward leaves for backward. Arrays are over layers; without training only qkv is, as the KV cache of sampling.
struct Activations {
    int32_t* positions;                         // (N) rows of wpe, where positions are tied
    real* x0;                                   // (N,C) embeddings
    real *ln1, *qkv, *atty;                     // (L,N,C), (L,N,3C), (L,N,C)
    real *x1, *ln2, *fch, *gelu, *x2;           // (L,N,C), (L,N,C), (L,N,4C), (L,N,4C), (L,N,C)
    real* branch;                               // (N,C) what a branch adds to the residual
    float *mean1, *rstd1, *mean2, *rstd2, *lse; // (L,N) … (L,B,H,T)
    float *meanf, *rstdf;                       // (N)
};

struct ActivationGradients {
    real *x, *ln, *qkv, *fch; // (N,C), (N,C), (N,3C), (N,4C)
};

// ---------------------------------------------------------------------------------------------------------------------

class Gpt2 : public Transformer {
public:
    Gpt2(const Device& device, const Gpt2Config& config, int64_t B, int64_t T, bool training,
         const TrainingMemory& memory = {});
    void init_weights(uint64_t seed);
    // `from` is the file's own configuration; a longer wpe than its is filled as `positions` says.
    void read_file(const MappedFile& file, FileType type, const Gpt2Config& from, const Options& options);

    Cost step_cost(int64_t B) const override;
    const Family& family() const override { return kGpt2Family; }
    std::string describe() const override;

private:
    Gpt2Config c_;
    Activations a_{};
    ActivationGradients d_{};

    EmbeddingShape embedding_shape(int64_t B, int64_t start, int64_t T) const;
    void forward(int64_t B, int64_t start, int64_t T) override;
    void backward(int64_t B) override;
    Header header() const override;
};

Gpt2::Gpt2(const Device& device, const Gpt2Config& config, int64_t B, int64_t T, bool training,
           const TrainingMemory& memory)
    : Transformer(device, config, gpt2_tensors(config), wte, B, T, training, memory), c_(config) {
    int64_t C = c_.C, L = training ? c_.L : 1, N = N_, G = training ? N_ : 0;
    arena_.place(a_.positions, c_.tied ? N : 0, "positions");
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
    arena_.place(d_.x, G * C, "gradient of the residual");
    arena_.place(d_.ln, G * C, "gradient of LayerNorm outputs");
    arena_.place(d_.qkv, G * 3 * C, "gradient of qkv");
    arena_.place(d_.fch, G * 4 * C, "gradient of fc");
    AttentionShape shape = attention_shape(B, 0, T);
    size_t scratch = attention_forward_scratch(shape);
    if (training)
        scratch = std::max({scratch, attention_backward_scratch(shape), layernorm_backward_scratch(N, C),
                            embedding_backward_scratch(embedding_shape(B, 0, T))});
    commit(scratch);
    if (!c_.tied) return;
    std::vector<int32_t> positions(N);
    for (int64_t n = 0; n < N; n++) positions[n] = int32_t(n % T % c_.maxT);
    upload(device, a_.positions, positions.data(), N * sizeof(int32_t));
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
            return t.decay() && k < end ? std * random_normal(seed, i, k) : 0;
        });
    }
}

// Rows of a position table that has `from` of them, for one of `to`. Interpolation maps ends to ends.
struct Stretch {
    const std::string& kind;
    const std::vector<float>& table; // (from,C)
    int64_t from, to, C;
    uint64_t seed;

    float operator()(int64_t i) const {
        int64_t row = i / C, c = i % C;
        if (kind == "interpolate") return between(row, c);
        if (kind == "tile" || row < from) return table[row % from * C + c];
        return 0.02 * random_normal(seed, wpe, i);
    }
    float between(int64_t row, int64_t c) const {
        double x = double(row) * double(from - 1) / double(to - 1);
        int64_t low = int64_t(x), high = std::min(low + 1, from - 1);
        return (low + 1 - x) * table[low * C + c] + (x - low) * table[high * C + c];
    }
};

void Gpt2::read_file(const MappedFile& file, FileType type, const Gpt2Config& from, const Options& options) {
    WeightsReader reader(file, type);
    for (size_t i = 0; i < params_.list.size(); i++) {
        if (i != wpe || from.maxT == c_.maxT) {
            reader.read(device_, params_.list[i]);
            continue;
        }
        std::vector<float> table = reader.read_floats(from.maxT * c_.C);
        fill_weights(device_, params_.list[i],
                     Stretch{options.positions, table, from.maxT, c_.maxT, c_.C, options.seed});
    }
}

Header Gpt2::header() const {
    Header header = make_header(kModelMagic, c_, weights_type(params_));
    if (c_.tied) header[8] = 1, header[9] = int32_t(c_.tied);
    return header;
}

std::string Gpt2::describe() const {
    char line[256];
    snprintf(line, sizeof line, "GPT-2, %.1fM parameters: L %lld, C %lld, H %lld, V %lld, context %lld of %lld%s",
             params_.count() / 1e6, (long long)c_.L, (long long)c_.C, (long long)c_.H, (long long)c_.V, (long long)T_,
             (long long)c_.maxT, c_.tied ? " positions, repeated" : "");
    return line;
}

EmbeddingShape Gpt2::embedding_shape(int64_t B, int64_t start, int64_t T) const {
    EmbeddingShape shape{B, T, c_.C};
    shape.position0 = start;
    if (c_.tied) shape.positions = a_.positions + start;
    return shape;
}

void Gpt2::forward(int64_t B, int64_t start, int64_t T) {
    int64_t C = c_.C, N = B * T, S = start;
    Stream s = device_.stream;
    Matmul* mm = device_.matmul;
    embedding_forward(s, a_.x0 + S * C, tokens_ + S, w(wte), w(wpe), embedding_shape(B, start, T));
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
        real* next = (last ? lnf_ : at(a_.ln1, l + 1, C)) + S * C;
        float* mean = (last ? a_.meanf : at(a_.mean1, l + 1, 1)) + S;
        float* rstd = (last ? a_.rstdf : at(a_.rstd1, l + 1, 1)) + S;
        residual_layernorm_forward(s, x2, next, mean, rstd, x1, a_.branch, last ? w(lnfw) : w(ln1w, l + 1),
                                   last ? w(lnfb) : w(ln1b, l + 1), N, C);
        x = x2;
    }
}

void Gpt2::backward(int64_t B) {
    int64_t C = c_.C, T = T_, N = B * T, D = c_.D();
    Stream s = device_.stream;
    Matmul* mm = device_.matmul;
    fill_zero(device_, d_.x, N * C * sizeof(real));
    layernorm_backward(s, d_.x, dw(lnfw), dw(lnfb), dlnf_, at(a_.x2, c_.L - 1, C), w(lnfw), a_.meanf, a_.rstdf,
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
        layer_done(l);
    }
    embedding_backward(s, dw(wte), dw(wpe), d_.x, tokens_, scratch_, embedding_shape(B, 0, T));
}

Cost Gpt2::step_cost(int64_t B) const {
    int64_t C = c_.C, N = B * T_;
    AttentionShape shape = attention_shape(B, 0, T_);
    Cost norms = layernorm_forward_cost(N, C) + layernorm_backward_cost(N, C);
    Cost block = linear_cost(N, C, 3 * C) + linear_cost(N, C, C) + linear_cost(N, C, 4 * C) + linear_cost(N, 4 * C, C) +
                 attention_forward_cost(shape) + attention_backward_cost(shape) + 2 * norms +
                 gelu_forward_cost(N * 4 * C) + gelu_backward_cost(N * 4 * C);
    EmbeddingShape embedding = embedding_shape(B, 0, T_);
    return c_.L * block + norms + unembedding_cost(N) + embedding_forward_cost(embedding, true) +
           embedding_backward_cost(embedding, true);
}

// ---------------------------------------------------------------------------------------------------------------------

void run_gpt2(int argc, char** argv) {
    Options options = parse_options(argc, argv, kGpt2Family);
    Start start = find_start(options);
    Gpt2Config config, from; // the model's, its weights file's
    std::optional<MappedFile> file;
    FileType type = FileType::fp32;
    int64_t T = options.context;
    if (start.weights.empty()) {
        config = config_from_options(options);
    } else {
        type = read_config(file.emplace(start.weights), from);
        check_vocab(options, from.V, start.weights);
        config = stretch(from, options, T ? T : std::max(from.maxT, from.tied), start.weights);
    }
    if (!T) T = std::max(config.maxT, config.tied);
    Device device(options.threads);
    Gpt2 model(device, config, options.batch, T, options.eval.empty(), training_memory(options));
    if (!file)
        model.init_weights(options.seed);
    else
        model.read_file(*file, type, from, options);
    file.reset();
    run(options, device, model, start);
}

int main(int argc, char** argv) {
    return run_program("train_gpt2", [&] { run_gpt2(argc, argv); });
}
