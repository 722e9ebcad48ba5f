// The Pythia trainer: what the model is, from its configuration to main, top to bottom. Layers are in kernels/, what it
// shares with GPT-2 around the blocks in runtime/transformer.h, the loop of steps and its habits in runtime/loop.h.
// Plain C++ in every build.
//
// Pythia (Biderman et al. 2023) is GPT-NeoX (Black et al. 2022): no position table but rotary positions, an unembedding
// of its own, and L blocks in which attention and MLP read the same x,
//
//   x = x + attproj(attention(rotary(qkv(ln1(x))))) + fcproj(gelu(fc(ln2(x))))
//
// or, in models without the parallel residual, one after the other as in GPT-2.
//
// B sequences of T tokens, N = B·T; C channels, H heads of D = C/H; V tokens, padded to Vp.

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdio>

#include "kernels/attention.h"
#include "kernels/embedding.h"
#include "kernels/gelu.h"
#include "kernels/layernorm.h"
#include "kernels/matmul.h"
#include "kernels/rotary.h"
#include "runtime/errors.h"
#include "runtime/random.h"
#include "runtime/rope.h"
#include "runtime/transformer.h"

// ---------------------------------------------------------------------------------------------------------------------
// Configuration

struct PythiaConfig : ModelSizes {
    bool parallel = true; // attention and MLP both read the block's input
    Gelu gelu = Gelu::erf;
    Rope rope;
};

const Family kPythiaFamily = {"train_pythia",
                              "Pythia",
                              "Trains Pythia (GPT-NeoX) from scratch or from a converted weights file "
                              "(scripts/convert_hf.py), on pre-tokenised shards.",
                              {{"14m", {6, 128, 4}},
                               {"31m", {6, 256, 8}},
                               {"70m", {6, 512, 8}},
                               {"160m", {12, 768, 12}},
                               {"410m", {24, 1024, 16}},
                               {"1b", {16, 2048, 8}},
                               {"1.4b", {24, 2048, 16}},
                               {"2.8b", {32, 2560, 32}},
                               {"6.9b", {32, 4096, 32}},
                               {"12b", {36, 5120, 40}}},
                              true};

constexpr int64_t kTrainedContext = 2048;

// The tokenizer has 50277 tokens; the published tables are padded for the GPUs that each size was split over.
int64_t published_vocab(const std::string& model) { return model == "12b" ? 50688 : model == "6.9b" ? 50432 : 50304; }

// What the options say of the rotary positions and the GELU, over what the weights file or the defaults say.
void apply_options(PythiaConfig& c, const Options& options, int64_t T) {
    Rope& rope = c.rope;
    if (!options.gelu.empty()) c.gelu = options.gelu == "tanh" ? Gelu::tanh : Gelu::erf;
    if (options.rope_base) rope.base = options.rope_base;
    if (!options.rope.empty()) {
        rope.mode = parse_rope_mode(options.rope);
        rope.scale = 1;
        if (rope.mode != RopeMode::none && rope.mode != RopeMode::dynamic)
            rope.scale = std::max(1.0, double(T) / rope.original);
    }
    if (options.rope_scale) {
        if (rope.mode == RopeMode::none) throw BadInput("--rope-scale needs --rope: there is no mode to scale");
        rope.scale = options.rope_scale;
    }
    if (!options.rope_temperature.empty()) {
        if (rope.mode != RopeMode::yarn) throw BadInput("--rope-temperature: only --rope yarn has a temperature");
        rope.softmax_temperature = options.rope_temperature == "softmax";
    }
    if (rope.mode != RopeMode::yarn) rope.softmax_temperature = false;
    check_rope(rope, "--rope");
    c.maxT = std::max(c.maxT, T);
}

// What was left to be chosen, as options.toml is to have it.
void resolve(Options& options, const PythiaConfig& c) {
    options.gelu = c.gelu == Gelu::tanh ? "tanh" : "erf";
    options.rope = rope_mode_name(c.rope.mode);
    options.rope_base = c.rope.base;
    if (c.rope.mode != RopeMode::none) options.rope_scale = c.rope.scale;
    if (c.rope.mode == RopeMode::yarn) options.rope_temperature = c.rope.softmax_temperature ? "softmax" : "rotary";
}

PythiaConfig config_from_options(const Options& options) {
    ModelSize size = find_model_size(options.model, kPythiaFamily);
    int64_t V = choose_vocab(options, published_vocab(options.model));
    int64_t T = options.context ? options.context : kTrainedContext;
    PythiaConfig config;
    static_cast<ModelSizes&>(config) = {T, V, pad_vocab(V), size.L, size.H, size.C};
    config.rope.dims = config.D() / 4 / 2 * 2;
    bool stretched = !options.rope.empty() && options.rope != "none"; // as if the published models' window were its own
    config.rope.original = stretched ? std::min(T, kTrainedContext) : T;
    check_sizes(config, "--model " + options.model);
    apply_options(config, options, T);
    return config;
}

// ---------------------------------------------------------------------------------------------------------------------
// Parameters

enum Param {
    embedin,
    ln1w,
    ln1b,
    qkvw,
    qkvb,
    attprojw,
    attprojb,
    ln2w,
    ln2b,
    fcw,
    fcb,
    fcprojw,
    fcprojb,
    lnfw,
    lnfb,
    embedout
};

Tensors pythia_tensors(const PythiaConfig& c) {
    int64_t L = c.L, C = c.C;
    Tensors t;
    t.add("embedin", TensorKind::embedding, c.Vp * C); // (Vp,C), rows >= V stay zero
    t.add_layers("ln1w", TensorKind::vector, L, C);
    t.add_layers("ln1b", TensorKind::vector, L, C);
    t.add_layers("qkvw", TensorKind::matrix, L, 3 * C * C); // (L,H,3,D,C)
    t.add_layers("qkvb", TensorKind::vector, L, 3 * C);     // (L,H,3,D)
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
    t.add("embedout", TensorKind::embedding, c.Vp * C); // (Vp,C), rows >= V stay zero
    return t;
}

// ---------------------------------------------------------------------------------------------------------------------
// The weights file: 256 int32, then the tensors in order (data/FORMATS.md)

constexpr int32_t kPythiaMagic = 20261124;

double read_double(const Header& h, int at) {
    return std::bit_cast<double>(uint64_t(uint32_t(h[at])) | uint64_t(uint32_t(h[at + 1])) << 32);
}
void write_double(Header& h, int at, double x) {
    uint64_t bits = std::bit_cast<uint64_t>(x);
    h[at] = int32_t(uint32_t(bits)), h[at + 1] = int32_t(uint32_t(bits >> 32));
}

FileType read_config(const MappedFile& file, PythiaConfig& c) {
    Header h;
    static_cast<ModelSizes&>(c) = read_sizes(file, kPythiaMagic, "Pythia", h);
    auto refuse = [&](const std::string& what) { throw BadInput(file.path() + ": " + what); };
    if (h[8] < 0 || h[8] > c.D() || h[8] % 2)
        refuse(std::to_string(h[8]) + " rotated dimensions of a head of " + std::to_string(c.D()));
    if (h[9] < 0 || h[9] > 1) refuse("residual form " + std::to_string(h[9]) + "; 1 is parallel, 0 is not");
    if (h[10] != 1 && h[10] != 2) refuse("GELU " + std::to_string(h[10]) + "; 1 is the tanh form, 2 the erf form");
    if (h[11] < 0 || h[11] > int(RopeMode::yarn)) refuse("rotary mode " + std::to_string(h[11]) + " is none of 0 to 4");
    if (h[12] < 0 || h[12] > 1) refuse("temperature form " + std::to_string(h[12]) + " is neither 0 nor 1");
    c.parallel = h[9];
    c.gelu = h[10] == 1 ? Gelu::tanh : Gelu::erf;
    c.rope = {RopeMode(h[11]), h[8], h[13], read_double(h, 14), read_double(h, 16), h[12] == 1};
    check_rope(c.rope, file.path());
    FileType type = file_type(file, h);
    check_weights_size(file, type, pythia_tensors(c));
    return type;
}

// ---------------------------------------------------------------------------------------------------------------------
// Activations

// What forward leaves for backward. Arrays are over layers; without training only qkv is, as the KV cache of sampling.
struct Activations {
    real* x0;                                   // (N,C) embeddings
    real *ln1, *qkv, *atty;                     // (L,N,C), (L,N,H,3,D) with bias and rotated, (L,N,C)
    real *x1, *ln2, *fch, *gelu, *x2;           // (L,N,C) if not parallel, (L,N,C), (L,N,4C), (L,N,4C), (L,N,C)
    real* branch;                               // (N,C) what the branches add to the residual
    float *mean1, *rstd1, *mean2, *rstd2, *lse; // (L,N) … (L,B,H,T)
    float *meanf, *rstdf;                       // (N)
};

struct ActivationGradients {
    real *x, *ln1, *ln2, *qkv, *fch; // (N,C), (N,C), (N,C), (N,3C), (N,4C)
};

// ---------------------------------------------------------------------------------------------------------------------

class Pythia : public Transformer {
public:
    Pythia(const Device& device, const PythiaConfig& config, int64_t B, int64_t T, bool training,
           const TrainingMemory& memory = {});
    void init_weights(uint64_t seed);
    void read_file(const MappedFile& file, FileType type);

    Cost step_cost(int64_t B) const override;
    const Family& family() const override { return kPythiaFamily; }
    std::string describe() const override;

private:
    PythiaConfig c_;
    Rotary rotary_;
    float score_scale_; // what q·k is multiplied with
    Activations a_{};
    ActivationGradients d_{};

    RotaryShape rotary_shape(int64_t B, int64_t start, int64_t T) const;
    void forward(int64_t B, int64_t start, int64_t T) override;
    void backward(int64_t B) override;
    Header header() const override;
};

Pythia::Pythia(const Device& device, const PythiaConfig& config, int64_t B, int64_t T, bool training,
               const TrainingMemory& memory)
    : Transformer(device, config, pythia_tensors(config), embedout, B, T, training, memory), c_(config),
      rotary_(make_rotary(config.rope, T)),
      score_scale_(float(rope_score_factor(config.rope) / std::sqrt(double(config.D())))) {
    int64_t C = c_.C, L = training ? c_.L : 1, N = N_, G = training ? N_ : 0;
    arena_.place(a_.x0, N * C, "embeddings");
    arena_.place(a_.ln1, L * N * C, "ln1");
    arena_.place(a_.qkv, c_.L * N * 3 * C, "qkv");
    arena_.place(a_.atty, L * N * C, "attention");
    arena_.place(a_.lse, L * N * c_.H, "log-sum-exp");
    arena_.place(a_.x1, c_.parallel ? 0 : L * N * C, "residual after attention");
    arena_.place(a_.ln2, L * N * C, "ln2");
    arena_.place(a_.fch, training ? L * N * 4 * C : 0, "fc before GELU");
    arena_.place(a_.gelu, L * N * 4 * C, "fc after GELU");
    arena_.place(a_.x2, L * N * C, "residual after the block");
    for (float** stats : {&a_.mean1, &a_.rstd1, &a_.mean2, &a_.rstd2})
        arena_.place(*stats, L * N, "LayerNorm statistics");
    for (float** stats : {&a_.meanf, &a_.rstdf}) arena_.place(*stats, N, "LayerNorm statistics");
    arena_.place(a_.branch, N * C, "branch");
    arena_.place(d_.x, G * C, "gradient of the residual");
    for (real** ln : {&d_.ln1, &d_.ln2}) arena_.place(*ln, G * C, "gradient of a LayerNorm's output");
    arena_.place(d_.qkv, G * 3 * C, "gradient of qkv");
    arena_.place(d_.fch, G * 4 * C, "gradient of fc");
    AttentionShape shape = attention_shape(B, 0, T);
    size_t scratch = attention_forward_scratch(shape);
    if (training)
        scratch = std::max({scratch, attention_backward_scratch(shape), layernorm_backward_scratch(N, C),
                            embedding_backward_scratch({B, T, C})});
    commit(scratch);
}

// Pythia's, up to 2.8b: normal(sqrt(2/5C)), the two projections into the residual stream normal(2/(L·sqrt C)), the
// "small init" of Nguyen & Salazar (2019) and Wang's of GPT-NeoX. 6.9b and 12b name none and got the framework's:
// normal(0.02), projections scaled down by sqrt(2L). Biases 0, LayerNorm 1.
void Pythia::init_weights(uint64_t seed) {
    bool small = c_.C < 4096;
    double std = small ? std::sqrt(2.0 / (5.0 * c_.C)) : 0.02;
    double projection_std = small ? 2.0 / (c_.L * std::sqrt(double(c_.C))) : 0.02 / std::sqrt(2.0 * c_.L);
    for (size_t i = 0; i < params_.list.size(); i++) {
        Tensor& t = params_.list[i];
        bool is_gain = i == ln1w || i == ln2w || i == lnfw, is_projection = i == attprojw || i == fcprojw;
        int64_t end = i == embedin || i == embedout ? c_.V * c_.C : t.count;
        fill_weights(device_, t, [&](int64_t k) -> float {
            if (is_gain) return 1;
            return t.decay() && k < end ? (is_projection ? projection_std : std) * random_normal(seed, i, k) : 0;
        });
    }
}

void Pythia::read_file(const MappedFile& file, FileType type) {
    WeightsReader reader(file, type);
    for (Tensor& tensor : params_.list) reader.read(device_, tensor);
}

Header Pythia::header() const {
    Header h = make_header(kPythiaMagic, c_, weights_type(params_));
    const Rope& rope = c_.rope;
    int64_t values[] = {
        rope.dims, c_.parallel, c_.gelu == Gelu::tanh ? 1 : 2, int(rope.mode), rope.softmax_temperature, rope.original};
    for (int i = 0; i < 6; i++) h[8 + i] = static_cast<int32_t>(values[i]);
    write_double(h, 14, rope.base);
    write_double(h, 16, rope.scale);
    return h;
}

std::string Pythia::describe() const {
    char line[320];
    snprintf(line, sizeof line,
             "Pythia, %.1fM parameters: L %lld, C %lld, H %lld, V %lld, context %lld, trained at %lld, rope %s of %g%s",
             params_.count() / 1e6, (long long)c_.L, (long long)c_.C, (long long)c_.H, (long long)c_.V, (long long)T_,
             (long long)c_.rope.original, rope_mode_name(c_.rope.mode), c_.rope.scale,
             c_.parallel ? "" : ", sequential residual");
    return line;
}

RotaryShape Pythia::rotary_shape(int64_t B, int64_t start, int64_t T) const { return {B, T, c_.H, c_.D(), start}; }

void Pythia::forward(int64_t B, int64_t start, int64_t T) {
    int64_t C = c_.C, N = B * T, S = start;
    Stream s = device_.stream;
    Matmul* mm = device_.matmul;
    embedding_forward(s, a_.x0 + S * C, tokens_ + S, w(embedin), nullptr, {B, T, C});
    layernorm_forward(s, at(a_.ln1, 0, C) + S * C, at(a_.mean1, 0, 1) + S, at(a_.rstd1, 0, 1) + S, a_.x0 + S * C,
                      w(ln1w), w(ln1b), N, C);
    const real* x = a_.x0 + S * C;
    for (int64_t l = 0; l < c_.L; l++) {
        // Attention. Queries, keys and values get their bias and are rotated where the product left them.
        real *ln1 = at(a_.ln1, l, C) + S * C, *atty = at(a_.atty, l, C) + S * C;
        real *cache = a_.qkv + l * N_ * 3 * C, *qkv = cache + S * 3 * C; // keys and values of all rows so far
        matmul_forward(mm, qkv, nullptr, ln1, w(qkvw, l), nullptr, N, C, 3 * C);
        RotaryShape shape = rotary_shape(B, S, T);
        rotary_forward(s, rotary_part(qkv, 0, shape), rotary_part(qkv, 1, shape), rotary_part(qkv, 2, shape), qkv,
                       w(qkvb, l), rotary_, shape);
        const real *queries = qkv, *rows = cache;
        attention_forward(s, {atty, T * C, C, c_.D()}, at(a_.lse, l, c_.H), rotary_part(queries, 0, shape),
                          rotary_part(rows, 1, shape), rotary_part(rows, 2, shape), score_scale_, scratch_,
                          attention_shape(B, S, T));
        matmul_forward(mm, a_.branch, nullptr, atty, w(attprojw, l), w(attprojb, l), N, C, C);

        // The MLP, of the block's input beside attention, or of what attention made of it.
        real *ln2 = at(a_.ln2, l, C) + S * C, *gelu = at(a_.gelu, l, 4 * C) + S * 4 * C;
        real* fch = training_ ? at(a_.fch, l, 4 * C) + S * 4 * C : nullptr;
        float *mean2 = at(a_.mean2, l, 1) + S, *rstd2 = at(a_.rstd2, l, 1) + S;
        if (c_.parallel) {
            layernorm_forward(s, ln2, mean2, rstd2, x, w(ln2w, l), w(ln2b, l), N, C);
        } else {
            real* x1 = at(a_.x1, l, C) + S * C;
            residual_layernorm_forward(s, x1, ln2, mean2, rstd2, x, a_.branch, w(ln2w, l), w(ln2b, l), N, C);
            x = x1;
        }
        matmul_forward(mm, gelu, fch, ln2, w(fcw, l), w(fcb, l), N, C, 4 * C, c_.gelu);
        if (c_.parallel)
            matmul_forward_add(mm, a_.branch, gelu, w(fcprojw, l), w(fcprojb, l), N, 4 * C, C);
        else
            matmul_forward(mm, a_.branch, nullptr, gelu, w(fcprojw, l), w(fcprojb, l), N, 4 * C, C);

        // The sum, and the LayerNorm that follows the block: the next block's first, or the last one.
        bool last = l + 1 == c_.L;
        real *x2 = at(a_.x2, l, C) + S * C, *next = (last ? lnf_ : at(a_.ln1, l + 1, C)) + S * C;
        float *mean = last ? a_.meanf : at(a_.mean1, l + 1, 1), *rstd = last ? a_.rstdf : at(a_.rstd1, l + 1, 1);
        residual_layernorm_forward(s, x2, next, mean + S, rstd + S, x, a_.branch, last ? w(lnfw) : w(ln1w, l + 1),
                                   last ? w(lnfb) : w(ln1b, l + 1), N, C);
        x = x2;
    }
}

void Pythia::backward(int64_t B) {
    int64_t C = c_.C, T = T_, N = B * T;
    Stream s = device_.stream;
    Matmul* mm = device_.matmul;
    fill_zero(device_, d_.x, N * C * sizeof(real));
    layernorm_backward(s, d_.x, dw(lnfw), dw(lnfb), dlnf_, at(a_.x2, c_.L - 1, C), w(lnfw), a_.meanf, a_.rstdf,
                       scratch_, N, C);
    for (int64_t l = c_.L - 1; l >= 0; l--) {
        const real* x = l ? at(a_.x2, l - 1, C) : a_.x0; // the block's input
        auto through_ln2 = [&](const real* input) {
            layernorm_backward(s, d_.x, dw(ln2w, l), dw(ln2b, l), d_.ln2, input, w(ln2w, l), at(a_.mean2, l, 1),
                               at(a_.rstd2, l, 1), scratch_, N, C);
        };

        // d_.x is the gradient of both branches' outputs: with the parallel residual it must stay that until both have
        // been gone through.
        matmul_backward_weight(mm, dw(fcprojw, l), dw(fcprojb, l), d_.x, at(a_.gelu, l, 4 * C), N, 4 * C, C);
        matmul_backward_input(mm, d_.fch, d_.x, w(fcprojw, l), at(a_.fch, l, 4 * C), N, 4 * C, C, c_.gelu);
        matmul_backward_weight(mm, dw(fcw, l), dw(fcb, l), d_.fch, at(a_.ln2, l, C), N, C, 4 * C);
        matmul_backward_input(mm, d_.ln2, d_.fch, w(fcw, l), nullptr, N, C, 4 * C);
        if (!c_.parallel) through_ln2(at(a_.x1, l, C));

        const real *qkv = a_.qkv + l * N_ * 3 * C, *atty = at(a_.atty, l, C), *dqkv = d_.qkv;
        matmul_backward_weight(mm, dw(attprojw, l), dw(attprojb, l), d_.x, atty, N, C, C);
        matmul_backward_input(mm, d_.ln1, d_.x, w(attprojw, l), nullptr, N, C, C);
        auto part = [&](auto* qkv, int s) { return rotary_part(qkv, s, rotary_shape(B, 0, T)); };
        attention_backward(s, part(d_.qkv, 0), part(d_.qkv, 1), part(d_.qkv, 2), {d_.ln1, T * C, C, c_.D()},
                           part(qkv, 0), part(qkv, 1), part(qkv, 2), {atty, T * C, C, c_.D()}, at(a_.lse, l, c_.H),
                           score_scale_, scratch_, attention_shape(B, 0, T));
        rotary_backward(s, d_.qkv, part(dqkv, 0), part(dqkv, 1), part(dqkv, 2), rotary_, rotary_shape(B, 0, T));
        matmul_backward_weight(mm, dw(qkvw, l), dw(qkvb, l), d_.qkv, at(a_.ln1, l, C), N, C, 3 * C);
        matmul_backward_input(mm, d_.ln1, d_.qkv, w(qkvw, l), nullptr, N, C, 3 * C);
        if (c_.parallel) through_ln2(x);
        layernorm_backward(s, d_.x, dw(ln1w, l), dw(ln1b, l), d_.ln1, x, w(ln1w, l), at(a_.mean1, l, 1),
                           at(a_.rstd1, l, 1), scratch_, N, C);
        layer_done(l);
    }
    embedding_backward(s, dw(embedin), nullptr, d_.x, tokens_, scratch_, {B, T, C});
}

Cost Pythia::step_cost(int64_t B) const {
    int64_t C = c_.C, N = B * T_;
    AttentionShape attention = attention_shape(B, 0, T_);
    RotaryShape rotary = rotary_shape(B, 0, T_);
    Cost norms = layernorm_forward_cost(N, C) + layernorm_backward_cost(N, C);
    Cost block = linear_cost(N, C, 3 * C) + rotary_forward_cost(rotary, c_.rope.dims) +
                 rotary_backward_cost(rotary, c_.rope.dims, true) + attention_forward_cost(attention) +
                 attention_backward_cost(attention) + linear_cost(N, C, C) + linear_cost(N, C, 4 * C) +
                 linear_cost(N, 4 * C, C) + 2 * norms + gelu_forward_cost(N * 4 * C) + gelu_backward_cost(N * 4 * C);
    return c_.L * block + norms + unembedding_cost(N) + embedding_forward_cost({B, T_, C}, false) +
           embedding_backward_cost({B, T_, C}, false);
}

// ---------------------------------------------------------------------------------------------------------------------

void run_pythia(int argc, char** argv) {
    Options options = parse_options(argc, argv, kPythiaFamily);
    Start start = find_start(options);
    PythiaConfig config;
    std::optional<MappedFile> file;
    FileType type = FileType::fp32;
    int64_t T = options.context;
    if (start.weights.empty()) {
        config = config_from_options(options);
        T = config.maxT;
    } else {
        type = read_config(file.emplace(start.weights), config);
        check_vocab(options, config.V, start.weights);
        if (!T) T = config.maxT;
        apply_options(config, options, T);
    }
    resolve(options, config);
    Device device(options.threads);
    Pythia model(device, config, options.batch, T, options.eval.empty(), training_memory(options));
    if (file)
        model.read_file(*file, type);
    else
        model.init_weights(options.seed);
    file.reset();
    run(options, device, model, start);
}

int main(int argc, char** argv) {
    return run_program("train_pythia", [&] { run_pythia(argc, argv); });
}
