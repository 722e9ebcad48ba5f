// The Pythia trainer: what the model is, from its configuration to main, top to bottom. Layers are in kernels/, what it
// shares with GPT-2 around the blocks in runtime/model/transformer.h, the loop of steps and its habits in
// runtime/loop/training.h. Plain C++ in every build.
//
// Pythia (Biderman et al. 2023) is GPT-NeoX (Black et al. 2022): no position table but rotary positions, an unembedding
// of its own, and L blocks in which attention and MLP read the same x,
//
//   x = x + attproj(attention(rotary(qkv(ln1(x))))) + fcproj(gelu(fc(ln2(x))))
//
// or, in models without the parallel residual, one after the other as in GPT-2.
//
// B sequences of T tokens, N = B·T; C channels, H heads of D = C/H; V tokens, padded to Vp; K tokens a chunk, G
// heads a group.

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
#include "runtime/base/errors.h"
#include "runtime/base/random.h"
#include "runtime/loop/loop.h"
#include "runtime/loop/process.h"
#include "runtime/model/rope.h"
#include "runtime/model/transformer.h"
#include "runtime/plan/plan.h"

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

FileType read_config(const FileReader& file, PythiaConfig& c) {
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

class Pythia : public Transformer {
public:
    Pythia(const Device& device, const PythiaConfig& config, const Setup& setup);
    void init_weights(uint64_t seed);
    void read_file(const FileReader& file, FileType type);

    Cost step_cost(int64_t B) const override;
    Work work(int64_t B) const override;
    const Family& family() const override { return kPythiaFamily; }
    std::string describe() const override;

private:
    PythiaConfig c_;
    Rotary rotary_;
    float score_scale_; // what q·k is multiplied with

    RotaryShape rotary_shape(int64_t B, int64_t start, int64_t T, int64_t H) const;
    void forward(int64_t B, int64_t start, int64_t T, Pass pass) override;
    void backward(int64_t B) override;
    void project_qkv(real* qkv, int64_t l, int64_t h, const RotaryShape& shape, bool ln1_made);
    void attention(int64_t l, int64_t B, int64_t start, int64_t T, Pass pass, bool ln1_made);
    void attention_branch(int64_t l, int64_t n, int64_t K);
    const real* mlp_hidden(int64_t l, int64_t n, int64_t K);
    void mlp(int64_t l, int64_t N);
    void mlp_backward(int64_t l, int64_t N);
    void attention_gradients(int64_t l, int64_t B);
    Header header() const override;
};

Pythia::Pythia(const Device& device, const PythiaConfig& config, const Setup& setup)
    : Transformer(device, config, pythia_tensors(config), {embedout, ln1w, lnfw, config.parallel}, setup), c_(config),
      rotary_(make_rotary(config.rope, setup.T)),
      score_scale_(float(rope_score_factor(config.rope) / std::sqrt(double(config.D())))) {}

// Pythia's, up to 2.8b: normal(sqrt(2/5C)), the two projections into the residual stream normal(2/(L·sqrt C)), the
// "small init" of Nguyen & Salazar (2019) and Wang's of GPT-NeoX. 6.9b and 12b name none and got the framework's:
// normal(0.02), projections scaled down by sqrt(2L). Biases 0, LayerNorm 1.
struct InitStd {
    double projections, others;
};
InitStd init_std(const PythiaConfig& c) {
    if (c.C < 4096) return {2.0 / (c.L * std::sqrt(double(c.C))), std::sqrt(2.0 / (5.0 * c.C))};
    return {0.02 / std::sqrt(2.0 * c.L), 0.02};
}

void Pythia::init_weights(uint64_t seed) {
    const InitStd std = init_std(c_);
    for (size_t i = 0; i < params_.list.size(); i++) {
        Tensor& t = params_.list[i];
        bool is_gain = i == ln1w || i == ln2w || i == lnfw, is_projection = i == attprojw || i == fcprojw;
        int64_t end = i == embedin || i == embedout ? c_.V * c_.C : t.count;
        fill_weights(device_, t, [&](int64_t k) -> float {
            if (is_gain) return 1;
            return t.decay() && k < end ? (is_projection ? std.projections : std.others) * random_normal(seed, i, k)
                                        : 0;
        });
    }
}

void Pythia::read_file(const FileReader& file, FileType type) {
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

RotaryShape Pythia::rotary_shape(int64_t B, int64_t start, int64_t T, int64_t H) const {
    return {B, T, H, c_.D(), start};
}

void Pythia::forward(int64_t B, int64_t start, int64_t T, Pass pass) {
    embedding_forward(device_.stream, x(0), tokens_, w(embedin), nullptr, {B, T, C_});
    for (int64_t l = 0; l < L_; l++) {
        residuals_.enter_forward(l, pass == Pass::training);
        attention(l, B, start, T, pass, l > 0); // the block before has made ln1
        residuals_.made_attention(l, pass == Pass::training);
        mlp(l, B * T);
    }
}

void Pythia::backward(int64_t B) {
    for (int64_t l = L_ - 1; l >= 0; l--) {
        enter_backward(l);
        if (!keeps_attention()) {
            begin(kAttentionBackward);
            attention(l, B, 0, T_, Pass::training, false);
        }
        begin(kMlpBackward);
        mlp_backward(l, B * T_);
        begin(kAttentionBackward);
        attention_gradients(l, B);
        leave_backward(l);
    }
    embedding_backward(device_.stream, dw(embedin), nullptr, d_.x, tokens_, scratch_, {B, T_, C_});
}

// qkv := queries, keys and values of the shape's heads, from head h on. They get their bias and are rotated where the
// product left them.
void Pythia::project_qkv(real* qkv, int64_t l, int64_t h, const RotaryShape& shape, bool ln1_made) {
    const int64_t width = 3 * shape.H * c_.D(), row = 3 * h * c_.D(); // of the weights
    for_chunks(shape.B * shape.T, [&](int64_t n, int64_t K) {
        matmul_forward(device_.matmul, qkv + n * width, nullptr, ln1(l, n, K, ln1_made), w(qkvw, l) + row * C_, nullptr,
                       K, C_, width);
    });
    rotary_forward(device_.stream, rotary_part(qkv, 0, shape), rotary_part(qkv, 1, shape), rotary_part(qkv, 2, shape),
                   qkv, w(qkvb, l) + row, rotary_, shape);
}

// x(l) to O and LSE. In sampling keys and values of the tokens before `start` are in the cache.
void Pythia::attention(int64_t l, int64_t B, int64_t start, int64_t T, Pass pass, bool ln1_made) {
    auto group = [&](real* rows, int64_t h, int64_t G) {
        const RotaryShape shape = rotary_shape(B, start, T, G);
        real* own = rows + start * 3 * C_;
        project_qkv(own, l, h, shape, ln1_made || h > 0);
        auto part = [&](const real* qkv, int part) { return rotary_part(qkv, part, shape); };
        attention_forward(device_.stream, {atty(l) + h * c_.D(), T * C_, C_, c_.D()}, lse(l) + h * T, part(own, 0),
                          part(rows, 1), part(rows, 2), score_scale_, attention_scratch_,
                          attention_shape(B, start, T, G));
    };
    if (pass == Pass::sampling)
        group(cache_.at(l, 0), 0, H_);
    else
        for_head_groups([&](int64_t h, int64_t G) { group(a_.qkv.at(l, 0), h, G); });
}

// branch := O through attention's projection, for tokens n … n+K.
void Pythia::attention_branch(int64_t l, int64_t n, int64_t K) {
    matmul_forward(device_.matmul, a_.branch.at(0, n), nullptr, atty(l) + n * C_, w(attprojw, l), w(attprojb, l), K, C_,
                   C_);
}

// To what fcproj takes, for tokens n … n+K: of the block's input beside attention, or of what attention made of it.
// Returns what the MLP's LayerNorm took.
const real* Pythia::mlp_hidden(int64_t l, int64_t n, int64_t K) {
    Matmul* mm = device_.matmul;
    const real* input = x(l) + n * C_;
    real *x1 = a_.x1.at(l, n), *ln2 = a_.ln2.at(l, n);
    float *mean2 = a_.mean2.at(l, n), *rstd2 = a_.rstd2.at(l, n);
    if (c_.parallel) {
        layernorm_forward(device_.stream, ln2, mean2, rstd2, input, w(ln2w, l), w(ln2b, l), K, C_);
    } else {
        attention_branch(l, n, K);
        residual_layernorm_forward(device_.stream, x1, ln2, mean2, rstd2, input, a_.branch.at(0, n), w(ln2w, l),
                                   w(ln2b, l), K, C_);
    }
    matmul_forward(mm, a_.gelu.at(l, n), a_.fch.at(l, n), ln2, w(fcw, l), w(fcb, l), K, C_, 4 * C_, c_.gelu);
    return c_.parallel ? input : x1;
}

// O and the MLP to x(l+1), and the LayerNorm that follows the block: the next block's first, or the last one.
void Pythia::mlp(int64_t l, int64_t N) {
    Matmul* mm = device_.matmul;
    for_chunks(N, [&](int64_t n, int64_t K) {
        real *branch = a_.branch.at(0, n), *gelu = a_.gelu.at(l, n);
        const real* input = mlp_hidden(l, n, K);
        if (c_.parallel) {
            attention_branch(l, n, K);
            matmul_forward_add(mm, branch, gelu, w(fcprojw, l), w(fcprojb, l), K, 4 * C_, C_);
        } else {
            matmul_forward(mm, branch, nullptr, gelu, w(fcprojw, l), w(fcprojb, l), K, 4 * C_, C_);
        }
        end_block(l, n, K, input, branch);
    });
}

// From the gradient of x(l+1), in d_.x, to that of O, and through the MLP into d_.x. With the parallel residual d_.x is
// the gradient of both branches' outputs until both have been gone through.
void Pythia::mlp_backward(int64_t l, int64_t N) {
    Matmul* mm = device_.matmul;
    for_chunks(N, [&](int64_t n, int64_t K) {
        const real* input = c_.parallel ? x(l) + n * C_ : a_.x1.at(l, n);
        if (!keeps_all_) mlp_hidden(l, n, K);
        real *dx = d_.x + n * C_, *dfch = d_.fch.at(0, n), *dln2 = d_.ln2.at(0, n);
        matmul_backward_weight(mm, dw(fcprojw, l), dw(fcprojb, l), dx, a_.gelu.at(l, n), K, 4 * C_, C_);
        matmul_backward_input(mm, dfch, dx, w(fcprojw, l), a_.fch.at(l, n), K, 4 * C_, C_, c_.gelu);
        matmul_backward_weight(mm, dw(fcw, l), dw(fcb, l), dfch, a_.ln2.at(l, n), K, C_, 4 * C_);
        matmul_backward_input(mm, dln2, dfch, w(fcw, l), nullptr, K, C_, 4 * C_);
        auto through_ln2 = [&] {
            layernorm_backward(device_.stream, dx, dw(ln2w, l), dw(ln2b, l), dln2, input, w(ln2w, l), a_.mean2.at(l, n),
                               a_.rstd2.at(l, n), scratch_, K, C_);
        };
        if (!c_.parallel) through_ln2();
        matmul_backward_weight(mm, dw(attprojw, l), dw(attprojb, l), dx, atty(l) + n * C_, K, C_, C_);
        matmul_backward_input(mm, d_.atty + n * C_, dx, w(attprojw, l), nullptr, K, C_, C_);
        if (c_.parallel) through_ln2();
    });
}

// From the gradient of O to that of x(l).
void Pythia::attention_gradients(int64_t l, int64_t B) {
    const int64_t N = B * T_, D = c_.D(), batch = T_ * C_;
    Matmul* mm = device_.matmul;
    for_head_groups([&](int64_t h, int64_t G) {
        const RotaryShape shape = rotary_shape(B, 0, T_, G);
        const int64_t width = 3 * G * D, row = 3 * h * D; // of the weights
        real* qkv = a_.qkv.at(l, 0);
        if (!keeps_all_) project_qkv(qkv, l, h, shape, h > 0);
        auto in = [&](int part) { return rotary_part<const real>(qkv, part, shape); };
        auto out = [&](int part) { return rotary_part(d_.qkv, part, shape); };
        auto dout = [&](int part) { return rotary_part<const real>(d_.qkv, part, shape); };
        attention_backward(device_.stream, out(0), out(1), out(2), {d_.atty + h * D, batch, C_, D}, in(0), in(1), in(2),
                           {atty(l) + h * D, batch, C_, D}, lse(l) + h * T_, score_scale_, attention_backward_scratch_,
                           attention_shape(B, 0, T_, G));
        rotary_backward(device_.stream, d_.qkv, dout(0), dout(1), dout(2), rotary_, shape);
        for_chunks(N, [&](int64_t n, int64_t K) {
            real* dinput = d_.ln1 + n * C_;
            const real *dqkv = d_.qkv + n * width, *weights = w(qkvw, l) + row * C_;
            matmul_backward_weight(mm, dw(qkvw, l) + row * C_, dw(qkvb, l) + row, dqkv, ln1(l, n, K, true), K, C_,
                                   width);
            if (h == 0)
                matmul_backward_input(mm, dinput, dqkv, weights, nullptr, K, C_, width);
            else
                matmul_backward_input_add(mm, dinput, dqkv, weights, K, C_, width);
        });
    });
    ln1_backward(l, N);
}

Cost Pythia::step_cost(int64_t B) const {
    int64_t C = c_.C, N = B * T_;
    AttentionShape attention = attention_shape(B, 0, T_, H_);
    RotaryShape rotary = rotary_shape(B, 0, T_, H_);
    Cost norms = layernorm_forward_cost(N, C) + layernorm_backward_cost(N, C);
    Cost block = linear_cost(N, C, 3 * C) + rotary_forward_cost(rotary, c_.rope.dims) +
                 rotary_backward_cost(rotary, c_.rope.dims, true) + attention_forward_cost(attention) +
                 attention_backward_cost(attention) + linear_cost(N, C, C) + linear_cost(N, C, 4 * C) +
                 linear_cost(N, 4 * C, C) + 2 * norms + gelu_forward_cost(N * 4 * C) + gelu_backward_cost(N * 4 * C);
    return c_.L * block + norms + unembedding_cost(c_, N) + embedding_forward_cost({B, T_, C}, false) +
           embedding_backward_cost({B, T_, C}, false);
}

Work Pythia::work(int64_t B) const {
    const RotaryShape rotary = rotary_shape(B, 0, T_, H_);
    const EmbeddingShape embedding{B, T_, C_};
    Work work =
        blocks_work(B, rotary_forward_cost(rotary, c_.rope.dims), rotary_backward_cost(rotary, c_.rope.dims, true));
    work.other = work.other + embedding_forward_cost(embedding, false);
    if (training_) work.other = work.other + embedding_backward_cost(embedding, false);
    return work;
}

// ---------------------------------------------------------------------------------------------------------------------

void run_pythia(Options& options, Ranks& ranks) {
    Origin<PythiaConfig> origin(options, ranks);
    auto configure = [&](const Options& o) {
        if (origin.from_scratch()) return config_from_options(o);
        PythiaConfig config = origin.config;
        apply_options(config, o, o.context ? o.context : config.maxT);
        return config;
    };
    auto make = [&](const Device& device, const Options& o) {
        const PythiaConfig config = configure(o);
        return std::make_unique<Pythia>(device, config, make_setup(o, o.context ? o.context : config.maxT));
    };
    if (ranks.first() && plan_memory(options, make)) return;
    if (ranks.first() && origin.from_scratch()) options.known_vocab = config_from_options(options).V;
    share_options(options, kPythiaFamily, ranks);
    resolve(options, configure(options));
    run(options, ranks, origin.start, make, [&](Pythia& model) {
        if (origin.from_scratch())
            model.init_weights(options.seed);
        else
            model.read_file(*origin.file, origin.type);
        origin.file.reset();
    });
}

int main(int argc, char** argv) {
    return run_program("train_pythia", [&] { run_ranks(argc, argv, kPythiaFamily, plan_target, run_pythia); });
}
