// The GPT-2 trainer: what the model is, from its configuration to main, top to bottom. Layers are in kernels/, the loop
// of steps and its habits in runtime/loop/training.h. Plain C++ in every build.
//
// GPT-2 (Radford et al. 2019), L blocks of
//
//   x = x + attproj(attention(qkv(ln1(x))))
//   x = x + fcproj(gelu(fc(ln2(x))))
//
// then lnf and the unembedding, which is the token embedding wte again.
//
// B sequences of T tokens, N = B·T; C channels, H heads of D = C/H; V tokens, padded to Vp; K tokens a chunk, G
// heads a group.

#include <algorithm>
#include <cmath>
#include <cstdio>

#include "kernels/attention.h"
#include "kernels/embedding.h"
#include "kernels/gelu.h"
#include "kernels/layernorm.h"
#include "kernels/matmul.h"
#include "runtime/base/errors.h"
#include "runtime/base/random.h"
#include "runtime/loop/loop.h"
#include "runtime/loop/process.h"
#include "runtime/model/transformer.h"
#include "runtime/plan/plan.h"

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

FileType read_config(const FileReader& file, Gpt2Config& config) {
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

class Gpt2 : public Transformer {
public:
    Gpt2(const Device& device, const Gpt2Config& config, const Setup& setup);
    void init_weights(uint64_t seed);
    // `from` is the file's own configuration; a longer wpe than its is filled as `positions` says.
    void read_file(const FileReader& file, FileType type, const Gpt2Config& from, const Options& options);

    void allocate() override;
    Cost step_cost(int64_t B) const override;
    Work work(int64_t B) const override;
    const Family& family() const override { return kGpt2Family; }
    std::string describe() const override;

private:
    Gpt2Config c_;
    int32_t* positions_ = nullptr; // (N) rows of wpe, where positions are tied

    EmbeddingShape embedding_shape(int64_t B, int64_t start, int64_t T) const;
    void forward(int64_t B, int64_t start, int64_t T, Pass pass) override;
    void backward(int64_t B) override;
    void project_qkv(real* qkv, int64_t l, int64_t h, int64_t G, int64_t N, bool ln1_made);
    template <class T> Heads<T> qkv_part(T* qkv, int part, int64_t tokens, int64_t G) const;
    void attention(int64_t l, int64_t B, int64_t start, int64_t T, Pass pass, bool ln1_made);
    void mlp_hidden(int64_t l, int64_t n, int64_t K);
    void mlp(int64_t l, int64_t N);
    void mlp_backward(int64_t l, int64_t N);
    void attention_gradients(int64_t l, int64_t B);
    Header header() const override;
};

Gpt2::Gpt2(const Device& device, const Gpt2Config& config, const Setup& setup)
    : Transformer(device, config, gpt2_tensors(config), {wte, ln1w, lnfw, false}, setup), c_(config) {
    arena_.section("work space");
    arena_.place(positions_, c_.tied ? N_ : 0, "positions");
}

void Gpt2::allocate() {
    Transformer::allocate();
    if (!c_.tied) return;
    std::vector<int32_t> positions(N_);
    for (int64_t n = 0; n < N_; n++) positions[n] = int32_t(n % T_ % c_.maxT);
    upload(device_, positions_, positions.data(), N_ * sizeof(int32_t));
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

void Gpt2::read_file(const FileReader& file, FileType type, const Gpt2Config& from, const Options& options) {
    WeightsReader reader(file, type);
    for (size_t i = 0; i < params_.list.size(); i++) {
        if (i != wpe || from.maxT == c_.maxT) {
            reader.read(device_, params_.list[i]);
            continue;
        }
        std::vector<float> table = reader.read_floats(params_.list[i].name, from.maxT * c_.C);
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
    if (c_.tied) shape.positions = positions_ + start;
    return shape;
}

void Gpt2::forward(int64_t B, int64_t start, int64_t T, Pass pass) {
    embedding_forward(device_.stream, x(0), tokens_, w(wte), w(wpe), embedding_shape(B, start, T));
    for (int64_t l = 0; l < L_; l++) {
        residuals_.enter_forward(l, pass == Pass::training);
        attention(l, B, start, T, pass, l > 0); // the block before has made ln1
        residuals_.made_attention(l, pass == Pass::training);
        mlp(l, B * T);
    }
}

void Gpt2::backward(int64_t B) {
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
    embedding_backward(device_.stream, dw(wte), dw(wpe), d_.x, tokens_, scratch_, embedding_shape(B, 0, T_));
}

// Queries (part 0), keys or values of G heads: rows of q, k and v side by side where they are all heads, as GPT-2's
// weights have them, else the three one after the other, `tokens` rows each.
template <class T> Heads<T> Gpt2::qkv_part(T* qkv, int part, int64_t tokens, int64_t G) const {
    const int64_t D = c_.D(), width = G * D;
    return G == H_ ? Heads<T>{qkv + part * width, T_ * 3 * width, 3 * width, D}
                   : Heads<T>{qkv + part * tokens * width, T_ * width, width, D};
}

// qkv := queries, keys and values of heads h … h+G of N tokens.
void Gpt2::project_qkv(real* qkv, int64_t l, int64_t h, int64_t G, int64_t N, bool ln1_made) {
    const int64_t D = c_.D();
    for_chunks(N, [&](int64_t n, int64_t K) {
        const real* input = ln1(l, n, K, ln1_made);
        if (G == H_) {
            matmul_forward(device_.matmul, qkv + n * 3 * C_, nullptr, input, w(qkvw, l), w(qkvb, l), K, C_, 3 * C_);
            return;
        }
        for (int part = 0; part < 3; part++)
            matmul_forward(device_.matmul, qkv_part(qkv, part, N_, G).data + n * G * D, nullptr, input,
                           w(qkvw, l) + (part * C_ + h * D) * C_, w(qkvb, l) + part * C_ + h * D, K, C_, G * D);
    });
}

// x(l) to O and LSE. In sampling keys and values of the tokens before `start` are in the cache.
void Gpt2::attention(int64_t l, int64_t B, int64_t start, int64_t T, Pass pass, bool ln1_made) {
    const int64_t D = c_.D();
    auto group = [&](real* rows, int64_t h, int64_t G) {
        real* own = rows + start * 3 * C_;
        project_qkv(own, l, h, G, B * T, ln1_made || h > 0);
        auto part = [&](const real* qkv, int part) { return qkv_part(qkv, part, N_, G); };
        attention_forward(device_.stream, {atty(l) + h * D, T * C_, C_, D}, lse(l) + h * T, part(own, 0), part(rows, 1),
                          part(rows, 2), 1 / std::sqrt(float(D)), attention_scratch_, attention_shape(B, start, T, G));
    };
    if (pass == Pass::sampling)
        group(cache_.at(l, 0), 0, H_);
    else
        for_head_groups([&](int64_t h, int64_t G) { group(a_.qkv.at(l, 0), h, G); });
}

// O to what fcproj takes, for tokens n … n+K.
void Gpt2::mlp_hidden(int64_t l, int64_t n, int64_t K) {
    Matmul* mm = device_.matmul;
    real* branch = a_.branch.at(0, n);
    matmul_forward(mm, branch, nullptr, atty(l) + n * C_, w(attprojw, l), w(attprojb, l), K, C_, C_);
    residual_layernorm_forward(device_.stream, a_.x1.at(l, n), a_.ln2.at(l, n), a_.mean2.at(l, n), a_.rstd2.at(l, n),
                               x(l) + n * C_, branch, w(ln2w, l), w(ln2b, l), K, C_);
    matmul_forward(mm, a_.gelu.at(l, n), a_.fch.at(l, n), a_.ln2.at(l, n), w(fcw, l), w(fcb, l), K, C_, 4 * C_,
                   Gelu::tanh);
}

// O to x(l+1), and the LayerNorm that follows the block: the next block's first, or the last one.
void Gpt2::mlp(int64_t l, int64_t N) {
    for_chunks(N, [&](int64_t n, int64_t K) {
        real* branch = a_.branch.at(0, n);
        mlp_hidden(l, n, K);
        matmul_forward(device_.matmul, branch, nullptr, a_.gelu.at(l, n), w(fcprojw, l), w(fcprojb, l), K, 4 * C_, C_);
        end_block(l, n, K, a_.x1.at(l, n), branch);
    });
}

// From the gradient of x(l+1), in d_.x, to that of O, and d_.x on to the residual before the MLP.
void Gpt2::mlp_backward(int64_t l, int64_t N) {
    Matmul* mm = device_.matmul;
    for_chunks(N, [&](int64_t n, int64_t K) {
        if (!keeps_all_) mlp_hidden(l, n, K);
        real *dx = d_.x + n * C_, *dfch = d_.fch.at(0, n), *dln2 = d_.ln2.at(0, n);
        matmul_backward_weight(mm, dw(fcprojw, l), dw(fcprojb, l), dx, a_.gelu.at(l, n), K, 4 * C_, C_);
        matmul_backward_input(mm, dfch, dx, w(fcprojw, l), a_.fch.at(l, n), K, 4 * C_, C_, Gelu::tanh);
        matmul_backward_weight(mm, dw(fcw, l), dw(fcb, l), dfch, a_.ln2.at(l, n), K, C_, 4 * C_);
        matmul_backward_input(mm, dln2, dfch, w(fcw, l), nullptr, K, C_, 4 * C_);
        layernorm_backward(device_.stream, dx, dw(ln2w, l), dw(ln2b, l), dln2, a_.x1.at(l, n), w(ln2w, l),
                           a_.mean2.at(l, n), a_.rstd2.at(l, n), scratch_, K, C_);
        matmul_backward_weight(mm, dw(attprojw, l), dw(attprojb, l), dx, atty(l) + n * C_, K, C_, C_);
        matmul_backward_input(mm, d_.atty + n * C_, dx, w(attprojw, l), nullptr, K, C_, C_);
    });
}

// From the gradient of O to that of x(l).
void Gpt2::attention_gradients(int64_t l, int64_t B) {
    const int64_t N = B * T_, D = c_.D(), batch = T_ * C_;
    Matmul* mm = device_.matmul;
    for_head_groups([&](int64_t h, int64_t G) {
        real* qkv = a_.qkv.at(l, 0);
        if (!keeps_all_) project_qkv(qkv, l, h, G, N, h > 0);
        auto in = [&](int part) { return qkv_part<const real>(qkv, part, N_, G); };
        auto out = [&](int part) { return qkv_part(d_.qkv, part, N_, G); };
        attention_backward(device_.stream, out(0), out(1), out(2), {d_.atty + h * D, batch, C_, D}, in(0), in(1), in(2),
                           {atty(l) + h * D, batch, C_, D}, lse(l) + h * T_, 1 / std::sqrt(float(D)),
                           attention_backward_scratch_, attention_shape(B, 0, T_, G));
        for_chunks(N, [&](int64_t n, int64_t K) {
            const real* input = ln1(l, n, K, true);
            real* dinput = d_.ln1 + n * C_;
            if (G == H_) {
                const real* dout = d_.qkv + n * 3 * C_;
                matmul_backward_weight(mm, dw(qkvw, l), dw(qkvb, l), dout, input, K, C_, 3 * C_);
                matmul_backward_input(mm, dinput, dout, w(qkvw, l), nullptr, K, C_, 3 * C_);
                return;
            }
            for (int part = 0; part < 3; part++) {
                const int64_t row = part * C_ + h * D; // of the weights
                const real *dout = out(part).data + n * G * D, *weights = w(qkvw, l) + row * C_;
                matmul_backward_weight(mm, dw(qkvw, l) + row * C_, dw(qkvb, l) + row, dout, input, K, C_, G * D);
                if (row == 0)
                    matmul_backward_input(mm, dinput, dout, weights, nullptr, K, C_, G * D);
                else
                    matmul_backward_input_add(mm, dinput, dout, weights, K, C_, G * D);
            }
        });
    });
    ln1_backward(l, N);
}

Cost Gpt2::step_cost(int64_t B) const {
    int64_t C = c_.C, N = B * T_;
    AttentionShape shape = attention_shape(B, 0, T_, H_);
    Cost norms = layernorm_forward_cost(N, C) + layernorm_backward_cost(N, C);
    Cost block = linear_cost(N, C, 3 * C) + linear_cost(N, C, C) + linear_cost(N, C, 4 * C) + linear_cost(N, 4 * C, C) +
                 attention_forward_cost(shape) + attention_backward_cost(shape) + 2 * norms +
                 gelu_forward_cost(N * 4 * C) + gelu_backward_cost(N * 4 * C);
    EmbeddingShape embedding = embedding_shape(B, 0, T_);
    return c_.L * block + norms + unembedding_cost(c_, N) + embedding_forward_cost(embedding, true) +
           embedding_backward_cost(embedding, true);
}

Work Gpt2::work(int64_t B) const {
    EmbeddingShape embedding = embedding_shape(B, 0, T_);
    Work work = blocks_work(B, {}, {});
    work.other = work.other + embedding_forward_cost(embedding, true);
    if (training_) work.other = work.other + embedding_backward_cost(embedding, true);
    return work;
}

// ---------------------------------------------------------------------------------------------------------------------

void run_gpt2(Options& options, Ranks& ranks) {
    Origin<Gpt2Config> origin(options, ranks);
    auto make = [&](const Device& device, const Options& o) {
        const Gpt2Config& from = origin.config;
        int64_t T = o.context;
        Gpt2Config config = origin.from_scratch()
                                ? config_from_options(o)
                                : stretch(from, o, T ? T : std::max(from.maxT, from.tied), origin.start.weights);
        if (!T) T = std::max(config.maxT, config.tied);
        return std::make_unique<Gpt2>(device, config, make_setup(o, T));
    };
    if (ranks.first() && plan_memory(options, make)) return;
    if (ranks.first() && origin.from_scratch()) options.known_vocab = config_from_options(options).V;
    share_options(options, kGpt2Family, ranks);
    run(options, ranks, origin.start, make, [&](Gpt2& model) {
        if (origin.from_scratch())
            model.init_weights(options.seed);
        else
            model.read_file(*origin.file, origin.type, origin.config, options);
        origin.file.reset();
    });
}

int main(int argc, char** argv) {
    return run_program("train_gpt2", [&] { run_ranks(argc, argv, kGpt2Family, plan_target, run_gpt2); });
}
