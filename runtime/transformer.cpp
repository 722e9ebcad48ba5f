#include "transformer.h"

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "../kernels/accumulate.h"
#include "../kernels/attention.h"
#include "../kernels/classifier.h"
#include "../kernels/global_norm.h"
#include "../kernels/matmul.h"
#include "errors.h"

void check_sizes(const ModelSizes& s, const std::string& where) {
    if (!attention_supports(s.D()))
        throw BadInput(where + ": head dim " + std::to_string(s.D()) + " (width " + std::to_string(s.C) + " over " +
                       std::to_string(s.H) + " heads) has no kernel; 32, 64, 80, 128 and 256 have");
    if (s.V > 65536)
        throw BadInput(where + ": vocabulary of " + std::to_string(s.V) + ", but shards hold 16-bit tokens");
}

ModelSizes read_sizes(const MappedFile& file, int32_t magic, const char* family, Header& header) {
    header = read_header(file);
    auto refuse = [&](const std::string& what) { throw BadInput(file.path() + ": " + what); };
    if (header[0] != magic)
        refuse(std::string("not a ") + family + " weights file (magic " + std::to_string(header[0]) + ")");
    ModelSizes s{header[2], header[3], header[7], header[4], header[5], header[6]};
    for (int64_t size : {s.maxT, s.V, s.Vp, s.L, s.H, s.C})
        if (size < 1) refuse("a size of " + std::to_string(size) + " in its header");
    // Bounds far beyond any model, so that no product of a lying header overflows.
    if (s.L > 10000 || s.C > 1000000 || s.Vp > 10000000) refuse("absurd sizes in its header");
    if (s.V > s.Vp) refuse("V " + std::to_string(s.V) + " > padded V " + std::to_string(s.Vp));
    if (s.C % s.H) refuse(std::to_string(s.H) + " heads do not divide width " + std::to_string(s.C));
    check_sizes(s, file.path());
    return s;
}

Header make_header(int32_t magic, const ModelSizes& s, FileType type) {
    Header header{};
    int64_t values[] = {magic, type == FileType::fp32 ? 3 : 5, s.maxT, s.V, s.L, s.H, s.C, s.Vp};
    std::transform(std::begin(values), std::end(values), header.begin(), [](int64_t x) { return int32_t(x); });
    return header;
}

TrainingMemory training_memory(const Options& options) {
    TrainingMemory memory;
    if (options.optimizer == "lion") memory.rule = Rule::lion;
    if (options.state != "fp32") memory.state = options.state == "bf16" ? StateType::bf16 : StateType::int8;
    memory.int8_embeddings = options.state_embeddings == "int8";
    memory.master = options.master == "fp32";
    memory.bf16_grads = options.grad == "bf16";
    memory.seed = options.seed;
    return memory;
}

// Tokens of logits held at a time: enough for the matmul's full rate, few enough to stay small beside the activations.
constexpr int64_t kClassifierChunk = 512;

Transformer::Transformer(const Device& device, const ModelSizes& sizes, Tensors tensors, size_t unembedding, int64_t B,
                         int64_t T, bool training, const TrainingMemory& memory)
    : device_(device), B_(B), T_(T), N_(B * T), training_(training), params_(std::move(tensors)), C_(sizes.C),
      H_(sizes.H), V_(sizes.V), Vp_(sizes.Vp), K_(std::min(N_, kClassifierChunk)), unembedding_(unembedding) {
    // Far beyond any machine, and the products of sizes still fit 63 bits.
    if (double(B) * T * sizes.L * 16 * C_ > 0x1p58)
        throw BadInput("--context " + std::to_string(T) + " and --batch " + std::to_string(B) +
                       " are more than any machine holds");
    params_.place(arena_, training, memory);
    arena_.place(tokens_, N_, "tokens");
    arena_.place(targets_, N_, "targets");
    arena_.place(lnf_, N_ * C_, "lnf");
    arena_.place(dlnf_, training ? N_ * C_ : 0, "gradient of lnf");
    arena_.place(losses_, N_, "losses");
    arena_.place(logits_, K_ * Vp_, "logits");
    arena_.place(loss_, 1, "loss");
    arena_.place(norm_, 1, "norm");
    arena_.place(norms_, 2, "norms");
    arena_.place(scale_, 1, "clip scale");
    arena_.place(counts_, 1, "counts");
    arena_.place(draw_, 1, "noise");
}

void Transformer::commit(size_t scratch) {
    if (training_) scratch = std::max(scratch, global_norm_scratch(params_.padded));
    char* bytes = nullptr;
    arena_.place(bytes, scratch, "scratch");
    arena_.commit();
    scratch_ = bytes;
    params_.link();
}

void Transformer::write_file(FileWriter& file) {
    Header h = header();
    file.write(h.data(), kHeaderBytes);
    write_weights(device_, file, params_);
}

// Logits and losses of N tokens, a chunk at a time, so that no more than a chunk of logits exists. With gradients also
// the unembedding's, and that of lnf_.
void Transformer::losses(int64_t N, double factor, bool gradients) {
    real* weights = w(unembedding_);
    for (int64_t n = 0; n < N; n += K_) {
        int64_t K = std::min(K_, N - n);
        real* lnf = lnf_ + n * C_;
        matmul_forward(device_.matmul, logits_, nullptr, lnf, weights, nullptr, K, C_, Vp_);
        if (!gradients) {
            classifier_forward(device_.stream, losses_ + n, logits_, targets_ + n, K, V_, Vp_);
            continue;
        }
        classifier_forward_backward(device_.stream, losses_ + n, logits_, targets_ + n, float(factor), K, V_, Vp_);
        matmul_backward_weight(device_.matmul, dw(unembedding_), nullptr, logits_, lnf, K, C_, Vp_);
        matmul_backward_input(device_.matmul, dlnf_ + n * C_, logits_, weights, nullptr, K, C_, Vp_);
    }
    classifier_add_losses(device_.stream, loss_, losses_, factor, N);
}

AttentionShape Transformer::attention_shape(int64_t B, int64_t start, int64_t T) const {
    AttentionShape shape{};
    shape.B = B, shape.Tq = T, shape.Tk = start + T, shape.H = H_, shape.D = C_ / H_;
    shape.q_offset = start;
    return shape;
}

Cost Transformer::linear_cost(int64_t N, int64_t in, int64_t out) {
    return matmul_forward_cost(N, in, out) + matmul_backward_input_cost(N, in, out) +
           matmul_backward_weight_cost(N, in, out);
}

Cost Transformer::unembedding_cost(int64_t N) const {
    return linear_cost(N, C_, Vp_) + classifier_forward_backward_cost(N, V_, Vp_);
}

void Transformer::accumulate(const int32_t* tokens, const int32_t* targets, int64_t B, double factor) {
    upload(device_, tokens_, tokens, B * T_ * sizeof(int32_t));
    upload(device_, targets_, targets, B * T_ * sizeof(int32_t));
    if (params_.grads_bf16) upload(device_, draw_, &draws_, sizeof draws_);
    draws_++;
    training_step_.run(device_, {double(B), factor}, [&] {
        forward(B, 0, T_);
        losses(B * T_, factor, true);
        backward(B);
    });
}

void Transformer::evaluate(const int32_t* tokens, const int32_t* targets, int64_t B, double factor) {
    upload(device_, tokens_, tokens, B * T_ * sizeof(int32_t));
    upload(device_, targets_, targets, B * T_ * sizeof(int32_t));
    evaluation_.run(device_, {double(B), factor}, [&] {
        forward(B, 0, T_);
        losses(B * T_, factor, false);
    });
}

void Transformer::next_logits(const int32_t* tokens, int64_t start, int64_t n, float* logits) {
    upload(device_, tokens_ + start, tokens, n * sizeof(int32_t));
    forward(1, start, n);
    matmul_forward(device_.matmul, logits_, nullptr, lnf_ + (start + n - 1) * C_, w(unembedding_), nullptr, 1, C_, Vp_);
    std::vector<real> row(V_);
    download(device_, row.data(), logits_, V_ * sizeof(real));
    for (int64_t v = 0; v < V_; v++) logits[v] = to_float(row[v]);
}

void Transformer::clear_loss() { fill_zero(device_, loss_, sizeof(double)); }

void Transformer::begin_step(int64_t step) {
    constexpr int kMicroBits = 36; // no step has more micro-batches than tokens
    clear_loss();
    fill_zero(device_, counts_, sizeof *counts_);
    fill_zero(device_, params_.grads, params_.grads_padded * sizeof(float));
    if (params_.grads_bf16) fill_zero(device_, params_.grads_bf16, params_.grads_bf16_padded * sizeof(bf16));
    draws_ = uint64_t(step) << kMicroBits;
}

void Transformer::layer_done(int64_t l) {
    constexpr uint64_t kLayers = uint64_t(1) << 20; // no model has more; the numbers of noise stay below 2^24
    for (size_t i = 0; i < params_.list.size(); i++) {
        const Tensor& t = params_.list[i];
        const int64_t n = t.layer_count();
        if (t.grad_bf16)
            accumulate_gradients(device_.stream, t.grad_bf16 + l * n, t.staged, n, params_.memory.seed, i * kLayers + l,
                                 draw_);
    }
}

void Transformer::measure_gradients(double clip) {
    global_norm(device_.stream, norms_, params_.grads, scratch_, params_.grads_padded);
    global_norm(device_.stream, norms_ + 1, params_.grads_bf16, scratch_, params_.grads_bf16_padded);
    combine_norms(device_.stream, norm_, norms_, 2);
    clip_scale(device_.stream, scale_, norm_, loss_, float(clip));
}

void Transformer::update(const Optimizer& options) {
    for (size_t i = 0; i < params_.list.size(); i++) {
        const Tensor& t = params_.list[i];
        Optimizer o = options;
        o.rule = params_.memory.rule;
        o.tensor = static_cast<uint32_t>(i);
        if (!t.decay()) o.weight_decay = 0;
        Gradients gradients = t.grad ? Gradients(t.grad) : Gradients(t.grad_bf16);
        optimizer_update(device_.stream, t.param, t.master, t.states, gradients, scale_, counts_, t.count, o);
    }
}

// On the host, since it is asked for only when a step has failed.
int64_t Transformer::non_finite_gradients() {
    int64_t found = 0;
    auto count = [&](auto* run, int64_t n) {
        std::vector<std::remove_pointer_t<decltype(run)>> piece(std::min<int64_t>(n, 1 << 20));
        for (int64_t first = 0; first < n; first += piece.size()) {
            const int64_t size = std::min<int64_t>(piece.size(), n - first);
            download(device_, piece.data(), run + first, size * sizeof piece[0]);
            for (int64_t i = 0; i < size; i++) found += !std::isfinite(to_float(piece[i]));
        }
    };
    count(params_.grads, params_.grads_padded);
    count(params_.grads_bf16, params_.grads_bf16_padded);
    return found;
}

OptimizerCounts Transformer::counts() {
    OptimizerCounts counts;
    download(device_, &counts, counts_, sizeof counts);
    return counts;
}

double Transformer::loss() {
    double loss;
    download(device_, &loss, loss_, sizeof loss);
    return loss;
}

double Transformer::grad_norm() {
    float norm;
    download(device_, &norm, norm_, sizeof norm);
    return norm;
}
