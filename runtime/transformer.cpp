#include "transformer.h"

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <type_traits>

#include "../kernels/accumulate.h"
#include "../kernels/attention.h"
#include "../kernels/classifier.h"
#include "../kernels/embedding.h"
#include "../kernels/gelu.h"
#include "../kernels/global_norm.h"
#include "../kernels/layernorm.h"
#include "../kernels/matmul.h"
#include "errors.h"
#include "host_update.h"

void check_sizes(const ModelSizes& s, const std::string& where) {
    if (!attention_supports(s.D()))
        throw BadInput(where + ": head dim " + std::to_string(s.D()) + " (width " + std::to_string(s.C) + " over " +
                       std::to_string(s.H) + " heads) has no kernel; 32, 64, 80, 128 and 256 have");
    if (s.V > 65536)
        throw BadInput(where + ": vocabulary of " + std::to_string(s.V) + ", but shards hold 16-bit tokens");
}

ModelSizes read_sizes(const FileReader& file, int32_t magic, const char* family, Header& header) {
    header = read_header(file);
    auto refuse = [&](const std::string& what) { throw BadInput(file.path() + ": " + what); };
    if (header[0] != magic)
        refuse(std::string("not a ") + family + " weights file (magic " + std::to_string(header[0]) +
               "); scripts/convert_hf.py makes one of a HuggingFace model");
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

static TrainingMemory training_memory(const Options& options) {
    TrainingMemory memory;
    if (options.optimizer == "lion") memory.rule = Rule::lion;
    if (options.state != "fp32") memory.state = options.state == "bf16" ? StateType::bf16 : StateType::int8;
    memory.int8_embeddings = options.state_embeddings == "int8";
    memory.master = options.master == "fp32";
    memory.bf16_grads = options.grad == "bf16";
    memory.host_states = waits_on_host(options, "state");
    memory.host_master = waits_on_host(options, "master");
    memory.seed = options.seed;
    return memory;
}

static ActivationMemory activation_memory(const Options& options) {
    ActivationMemory memory;
    if (!options.recompute.empty() && options.recompute != "none")
        memory.recompute = options.recompute == "block" ? Recompute::block : Recompute::full;
    memory.chunk = options.chunk;
    memory.head_group = options.head_group;
    memory.offload = waits_on_host(options, "residual");
    if (options.logits_rows) memory.logits_rows = options.logits_rows;
    return memory;
}

Setup make_setup(const Options& options, int64_t T) {
    Setup setup{options.batch, T, options.eval.empty()};
    const int64_t prompt = std::max<int64_t>(1, options.prompt_tokens.size());
    if (options.eval == "logits") setup.cached_rows = prompt;
    if (options.eval == "sample" || (setup.training && options.sample_every))
        setup.cached_rows = prompt + options.sample_tokens;
    setup.cached_rows = std::min(setup.cached_rows, T);
    setup.deterministic = options.deterministic == "on";
    setup.weights = training_memory(options);
    setup.activations = activation_memory(options);
    // --out is made when the run begins, and what waits on the host is no file of the run: any folder of that disk will
    // do.
    std::error_code error; // a path that cannot be is refused where the run begins
    std::filesystem::path folder = std::filesystem::absolute(options.out.empty() ? "." : options.out, error);
    while (!std::filesystem::is_directory(folder, error) && folder != folder.parent_path())
        folder = folder.parent_path();
    setup.folder = folder.string();
    return setup;
}

Transformer::Transformer(const Device& device, const ModelSizes& sizes, Tensors tensors, const Anatomy& anatomy,
                         const Setup& setup)
    : device_(device), setup_(setup), B_(setup.B), T_(setup.T), N_(B_ * T_), L_(sizes.L), C_(sizes.C), H_(sizes.H),
      V_(sizes.V), Vp_(sizes.Vp), K_(setup.activations.chunk ? std::min(N_, setup.activations.chunk) : N_),
      G_(setup.activations.head_group ? std::min(H_, setup.activations.head_group) : H_), training_(setup.training),
      keeps_all_(training_ && setup.activations.recompute == Recompute::none), params_(std::move(tensors)),
      arena_(device.target), residuals_(device, setup.activations, training_, L_, N_, C_, H_), anatomy_(anatomy) {
    // Far beyond any machine, and the products of sizes still fit 63 bits.
    if (double(B_) * T_ * L_ * 16 * C_ > 0x1p58)
        throw BadInput("--context " + std::to_string(T_) + " and --batch " + std::to_string(B_) +
                       " are more than any machine holds");
    if (keeps_all_ && (setup.activations.offload || G_ < H_))
        throw BadInput("--recompute none keeps all activations on the device and attention's heads together; --offload "
                       "residual and --head-group need --recompute block or full");
    params_.place(arena_, training_, setup.weights);
    residuals_.place(arena_);
    arena_.section("work space");
    arena_.place(tokens_, N_, "tokens");
    arena_.place(targets_, N_, "targets");
    arena_.place(losses_, N_, "losses");
    arena_.place(loss_, 1, "loss");
    arena_.place(norm_, 1, "norm");
    arena_.place(norms_, 2, "norms");
    arena_.place(scale_, 1, "clip scale");
    arena_.place(counts_, 1, "counts");
    arena_.place(draw_, 1, "noise");
    place_activations();
}

void Transformer::place_activations() {
    const Phases attention = kForward | kAttentionBackward, mlp = kForward | kMlpBackward, top = kForward | kLosses;
    const int64_t C = C_, qkv_width = 3 * G_ * (C_ / H_);
    const Target& target = arena_.target();
    const AttentionShape shape = attention_shape(B_, 0, T_, G_);
    place_kept(ln1_, C, "ln1", attention);
    for (Statistics* stats : {&mean1_, &rstd1_}) place_kept(*stats, 1, "LayerNorm statistics", attention, true);
    place_kept(a_.qkv, qkv_width, "qkv", attention, true);
    if (!anatomy_.parallel) place_kept(a_.x1, C, "residual after attention", mlp);
    place_kept(a_.ln2, C, "ln2", mlp);
    for (Statistics* stats : {&a_.mean2, &a_.rstd2}) place_kept(*stats, 1, "LayerNorm statistics", mlp);
    if (training_) place_kept(a_.fch, 4 * C, "fc before GELU", mlp);
    place_kept(a_.gelu, 4 * C, "fc after GELU", mlp);
    place_work(a_.branch, C, "branch", mlp);
    place_work(lnf_, C, "last LayerNorm", top, keeps_all_);
    for (Statistics* stats : {&meanf_, &rstdf_}) place_work(*stats, 1, "LayerNorm statistics", top, keeps_all_);
    place_rows(cache_, 3 * C, setup_.cached_rows, L_, "cache of sampling", top);
    arena_.section("work space", kLosses);
    arena_.place_reals(logits_, logits_rows() * Vp_, "logits");
    arena_.section("work space", attention);
    arena_.place(attention_scratch_, attention_forward_scratch(shape, target), "scratch of attention, forward");
    if (!training_) return;
    place_work(dlnf_, C, "gradient of the last LayerNorm", kLosses);
    arena_.section("work space", kLosses | kBackward);
    arena_.place_reals(d_.x, N_ * C, "gradient of the residual");
    arena_.section("work space", kBackward);
    arena_.place_reals(d_.atty, N_ * C, "gradient of attention");
    arena_.section("work space", kAttentionBackward);
    arena_.place_reals(d_.ln1, N_ * C, "gradient of ln1");
    arena_.place_reals(d_.qkv, N_ * qkv_width, "gradient of qkv");
    arena_.place(attention_backward_scratch_, attention_backward_scratch(shape, target), "scratch of attention");
    place_work(d_.ln2, C, "gradient of ln2", kMlpBackward);
    place_work(d_.fch, 4 * C, "gradient of fc", kMlpBackward);
    arena_.section("work space");
    arena_.place(scratch_,
                 std::max({layernorm_backward_scratch(K_, C, target), global_norm_scratch(params_.padded, target),
                           embedding_backward_scratch({B_, T_, C}, target)}),
                 "scratch of other layers");
    arena_.section("work space", kUpdate);
    arena_.place(pieces_, host_update_bytes(params_.memory), "pieces of the update");
}

void Transformer::allocate() {
    if (training_ && !setup_.deterministic) {
        const Target& target = device_.target;
        const bool matters = target.cuda && target.real_bytes == sizeof(bf16) && C_ / H_ == 64;
        warn(matters ? "--deterministic off: this run cannot be repeated to the bit"
                     : "--deterministic off changes nothing here: only a bf16 build on a GPU, with heads of 64, has a "
                       "faster order");
    }
    arena_.commit();
    residuals_.allocate(setup_.folder);
    if (params_.host_bytes()) host_ = std::make_unique<HostStore>(device_, setup_.folder, params_.host_bytes());
    params_.link(host_ ? host_->data() : nullptr);
}

std::string Transformer::write_file(FileWriter& file) {
    Header h = header();
    file.write(h.data(), kHeaderBytes);
    return write_weights(device_, file, params_);
}

int64_t Transformer::logits_rows() const { return std::min(K_, setup_.activations.logits_rows); }

const real* Transformer::ln1(int64_t l, int64_t n, int64_t K) {
    if (ln1_layer_ != l)
        layernorm_forward(device_.stream, ln1_.at(l, n), mean1_.at(l, n), rstd1_.at(l, n), x(l) + n * C_,
                          w(anatomy_.ln1w, l), w(anatomy_.ln1w + 1, l), K, C_);
    return ln1_.at(l, n);
}

void Transformer::ln1_backward(int64_t l, int64_t N) {
    for_chunks(N, [&](int64_t n, int64_t K) {
        layernorm_backward(device_.stream, d_.x + n * C_, dw(anatomy_.ln1w, l), dw(anatomy_.ln1w + 1, l),
                           d_.ln1 + n * C_, x(l) + n * C_, w(anatomy_.ln1w, l), mean1_.at(l, n), rstd1_.at(l, n),
                           scratch_, K, C_);
    });
}

void Transformer::end_block(int64_t l, int64_t n, int64_t K, const real* input, const real* branch) {
    const bool last = l + 1 == L_;
    const Rows<real>& next = last ? lnf_ : ln1_;
    const Statistics &mean = last ? meanf_ : mean1_, &rstd = last ? rstdf_ : rstd1_;
    const real *gain = last ? w(anatomy_.lnfw) : w(anatomy_.ln1w, l + 1),
               *bias = last ? w(anatomy_.lnfw + 1) : w(anatomy_.ln1w + 1, l + 1);
    residual_layernorm_forward(device_.stream, x(l + 1) + n * C_, next.at(l + 1, n), mean.at(l + 1, n),
                               rstd.at(l + 1, n), input, branch, gain, bias, K, C_);
}

void Transformer::enter_backward(int64_t l) {
    residuals_.enter_backward(l);
    ln1_layer_ = keeps_all_ ? l : -1;
}

// From the last block's output to the losses, a chunk at a time, and of logits no more than a part of one. With
// gradients also back to d_.x.
void Transformer::losses(int64_t N, double factor, bool gradients) {
    Stream s = device_.stream;
    Matmul* mm = device_.matmul;
    const real *weights = w(anatomy_.unembedding), *gain = w(anatomy_.lnfw), *bias = w(anatomy_.lnfw + 1);
    begin(kLosses);
    if (gradients) fill_zero(device_, d_.x, N * C_ * sizeof(real));
    for_chunks(N, [&](int64_t n, int64_t K) {
        if (lnf_.tokens < N_)
            layernorm_forward(s, lnf_.at(0, n), meanf_.at(0, n), rstdf_.at(0, n), x(L_) + n * C_, gain, bias, K, C_);
        for (int64_t m = n; m < n + K; m += logits_rows()) {
            const int64_t rows = std::min(logits_rows(), n + K - m);
            matmul_forward(mm, logits_, nullptr, lnf_.at(0, m), weights, nullptr, rows, C_, Vp_);
            if (!gradients) {
                classifier_forward(s, losses_ + m, logits_, targets_ + m, rows, V_, Vp_);
                continue;
            }
            classifier_forward_backward(s, losses_ + m, logits_, targets_ + m, float(factor), rows, V_, Vp_);
            matmul_backward_weight(mm, dw(anatomy_.unembedding), nullptr, logits_, lnf_.at(0, m), rows, C_, Vp_);
            matmul_backward_input(mm, dlnf_.at(0, m), logits_, weights, nullptr, rows, C_, Vp_);
        }
        if (gradients)
            layernorm_backward(s, d_.x + n * C_, dw(anatomy_.lnfw), dw(anatomy_.lnfw + 1), dlnf_.at(0, n),
                               x(L_) + n * C_, gain, meanf_.at(0, n), rstdf_.at(0, n), scratch_, K, C_);
    });
    classifier_add_losses(s, loss_, losses_, factor, N);
}

AttentionShape Transformer::attention_shape(int64_t B, int64_t start, int64_t T, int64_t H) const {
    AttentionShape shape{};
    shape.B = B, shape.Tq = T, shape.Tk = start + T, shape.H = H, shape.D = C_ / H_;
    shape.q_offset = start;
    shape.lse_batch = H_ * T;
    shape.deterministic = setup_.deterministic;
    return shape;
}

Cost Transformer::linear_cost(int64_t N, int64_t in, int64_t out) {
    return matmul_forward_cost(N, in, out) + matmul_backward_input_cost(N, in, out) +
           matmul_backward_weight_cost(N, in, out);
}

Work Transformer::blocks_work(int64_t B, Cost rotary_forward, Cost rotary_backward) const {
    const int64_t N = B * T_;
    // `of`(K) for every chunk, of(G) for every group of heads.
    auto in_parts = [](int64_t n, int64_t part, auto of) {
        Cost sum = double(n / part) * of(part);
        return n % part ? sum + of(n % part) : sum;
    };
    auto chunks = [&](auto of) { return in_parts(N, K_, of); };
    auto groups = [&](auto of) { return in_parts(H_, G_, of); };
    auto forward = [&](int64_t in, int64_t out) {
        return chunks([&](int64_t K) { return matmul_forward_cost(K, in, out); });
    };
    auto backward = [&](int64_t in, int64_t out) {
        return chunks([&](int64_t K) {
            return matmul_backward_input_cost(K, in, out) + matmul_backward_weight_cost(K, in, out);
        });
    };
    const int64_t qkv_width = 3 * (C_ / H_);
    const Cost norm = layernorm_forward_cost(N, C_), norm_of_sum = residual_layernorm_forward_cost(N, C_),
               norm_back = layernorm_backward_cost(N, C_), gelu = gelu_forward_cost(N * 4 * C_);
    const Cost qkv = groups([&](int64_t G) { return forward(C_, G * qkv_width); });
    const Cost qkv_back = groups([&](int64_t G) { return backward(C_, G * qkv_width); });
    const Cost scores = groups([&](int64_t G) { return attention_forward_cost(attention_shape(B, 0, T_, G)); });
    const Cost scores_back = groups([&](int64_t G) { return attention_backward_cost(attention_shape(B, 0, T_, G)); });
    const double groups_of_heads = double((H_ + G_ - 1) / G_);
    const Cost first_norms = (K_ < N_ ? groups_of_heads : 0) * norm; // beside the one at the end of the block before
    const Cost attproj = forward(C_, C_), fc = forward(C_, 4 * C_), fcproj = forward(4 * C_, C_);

    Work block;
    block.matmul = qkv + attproj + fc + fcproj;
    block.attention = scores;
    block.other = rotary_forward + first_norms + 2 * norm_of_sum + gelu;
    if (training_) {
        block.matmul = block.matmul + qkv_back + backward(C_, C_) + backward(C_, 4 * C_) + backward(4 * C_, C_);
        block.attention = block.attention + scores_back;
        block.other = block.other + rotary_backward + 2 * norm_back + gelu_backward_cost(N * 4 * C_);
        if (!keeps_all_) {
            block.matmul = block.matmul + qkv + fc + (anatomy_.parallel ? Cost{} : attproj);
            block.other = block.other + rotary_forward + (K_ < N_ ? 2 * first_norms : norm) +
                          (anatomy_.parallel ? norm : norm_of_sum) + gelu;
        }
        if (!keeps_attention()) {
            block.matmul = block.matmul + qkv;
            block.attention = block.attention + scores;
            block.other = block.other + rotary_forward + (K_ < N_ ? first_norms : norm);
        }
    }
    Work all{double(L_) * block.matmul, double(L_) * block.attention, double(L_) * block.other};
    auto logits = [&](int64_t K) { return training_ ? linear_cost(K, C_, Vp_) : matmul_forward_cost(K, C_, Vp_); };
    all.matmul = all.matmul + in_parts(N, logits_rows(), logits);
    all.other = all.other + norm +
                (training_ ? norm_back + classifier_forward_backward_cost(N, V_, Vp_) : classifier_forward_cost(N, V_));
    if (training_) all.copied = residuals_.copied_bytes();
    return all;
}

Cost Transformer::unembedding_cost(int64_t N) const {
    return linear_cost(N, C_, Vp_) + classifier_forward_backward_cost(N, V_, Vp_);
}

void Transformer::accumulate(const int32_t* tokens, const int32_t* targets, int64_t B, double factor) {
    upload(device_, tokens_, tokens, B * T_ * sizeof(int32_t));
    upload(device_, targets_, targets, B * T_ * sizeof(int32_t));
    if (params_.grads_bf16) upload(device_, draw_, &draws_, sizeof draws_);
    draws_++;
    residuals_.finish();
    repeat(training_step_, B, factor, [&] {
        begin(kForward);
        forward(B, 0, T_, Pass::training);
        losses(B * T_, factor, true);
        backward(B);
        residuals_.finish();
    });
}

// Recordings close the gaps between short kernels. The launches of many tokens come in as many more chunks, each of
// which keeps the device busy for longer than a launch takes, and would only make a graph of 10⁴ to 10⁵ nodes.
void Transformer::repeat(Recording& recording, int64_t B, double factor, const std::function<void()>& launches) {
    constexpr int64_t kMostTokens = int64_t(1) << 17;
    if (B * T_ > kMostTokens) return launches();
    recording.run(device_, {double(B), factor}, launches);
}

void Transformer::evaluate(const int32_t* tokens, const int32_t* targets, int64_t B, double factor) {
    upload(device_, tokens_, tokens, B * T_ * sizeof(int32_t));
    upload(device_, targets_, targets, B * T_ * sizeof(int32_t));
    repeat(evaluation_, B, factor, [&] {
        begin(kForward);
        forward(B, 0, T_, Pass::evaluation);
        losses(B * T_, factor, false);
    });
}

void Transformer::next_logits(const int32_t* tokens, int64_t start, int64_t n, float* logits) {
    upload(device_, tokens_, tokens, n * sizeof(int32_t));
    begin(kForward);
    forward(1, start, n, Pass::sampling);
    begin(kLosses);
    matmul_forward(device_.matmul, logits_, nullptr, lnf_.at(0, n - 1), w(anatomy_.unembedding), nullptr, 1, C_, Vp_);
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

void Transformer::leave_backward(int64_t l) {
    residuals_.leave_backward(l);
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
    begin(kUpdate);
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
        if (host_)
            update_from_host(device_, *host_, pieces_, params_.memory, t, gradients, scale_, counts_, o);
        else
            optimizer_update(device_.stream, t.param, t.master, t.states, gradients, scale_, counts_, t.count, o);
    }
    if (host_) host_->finish(); // what comes next may read them there
}

Work Transformer::update_work() const {
    Work work;
    for (const Tensor& t : params_.list)
        work.other = work.other + optimizer_cost(t.count, params_.memory.rule, params_.state_type(t),
                                                 params_.memory.bf16_grads && t.layers, params_.memory.master);
    work.other = work.other + global_norm_cost(params_.padded);
    work.copied = 2.0 * params_.host_bytes();
    return work;
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
