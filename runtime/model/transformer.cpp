#include "transformer.h"

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "../../kernels/accumulate.h"
#include "../../kernels/attention.h"
#include "../../kernels/classifier.h"
#include "../../kernels/embedding.h"
#include "../../kernels/gelu.h"
#include "../../kernels/global_norm.h"
#include "../../kernels/layernorm.h"
#include "../../kernels/matmul.h"
#include "../base/errors.h"
#include "../ranks/comm.h"
#include "host_update.h"

Transformer::Transformer(const Device& device, const ModelSizes& sizes, Tensors tensors, const Anatomy& anatomy,
                         const Setup& setup)
    : device_(device), sizes_(sizes), setup_(setup), B_(setup.B), T_(setup.T), N_(B_ * T_), L_(sizes.L), C_(sizes.C),
      H_(sizes.H), V_(sizes.V), Vp_(sizes.Vp), K_(setup.chunk()), G_(setup.head_group(sizes.H)),
      training_(setup.training), keeps_all_(training_ && setup.activations.recompute == Recompute::none),
      params_(std::move(tensors)), arena_(device.target),
      residuals_(device, setup.activations, training_, L_, N_, C_, H_), anatomy_(anatomy) {
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
    arena_.place_reals(logits_, setup_.logits_rows() * Vp_, "logits");
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

const real* Transformer::ln1(int64_t l, int64_t n, int64_t K, bool made) {
    if (!made || ln1_.tokens < N_)
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
        for (int64_t m = n; m < n + K; m += setup_.logits_rows()) {
            const int64_t rows = std::min(setup_.logits_rows(), n + K - m);
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

Work Transformer::blocks_work(int64_t B, Cost rotary_forward, Cost rotary_backward) const {
    Work work = ::blocks_work(sizes_, setup_, anatomy_.parallel, B, rotary_forward, rotary_backward);
    if (training_) work.copied = residuals_.copied_bytes();
    return work;
}

void Transformer::mark() const {
    if (device_.comm) device_.comm->mark();
}

// Of several ranks: the next one's tokens would be waited for in a way that shows no sign of progress.
void Transformer::wait_for_micro_batch() const {
    if (device_.comm) device_.comm->finish();
}

void Transformer::accumulate(const int32_t* tokens, const int32_t* targets, int64_t B, double factor, bool last) {
    last_ = last;
    wait_for_micro_batch();
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
    if (B * T_ > kMostTokens || device_.comm) return launches();
    recording.run(device_, {double(B), factor}, launches);
}

void Transformer::evaluate(const int32_t* tokens, const int32_t* targets, int64_t B, double factor) {
    wait_for_micro_batch();
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

void Transformer::sum_loss() {
    if (device_.comm) device_.comm->wait(device_.comm->all_reduce(loss_, 1));
}

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
    if (device_.comm) sum_layer(l);
    constexpr uint64_t kLayers = uint64_t(1) << 20; // no model has more; the numbers of noise stay below 2^24
    for (size_t i = 0; i < params_.list.size(); i++) {
        const Tensor& t = params_.list[i];
        const int64_t n = t.layer_count();
        if (t.grad_bf16)
            accumulate_gradients(device_.stream, t.grad_bf16 + l * n, t.staged, n, params_.memory.seed, i * kLayers + l,
                                 draw_);
    }
}

// Gradients in bf16 are summed in float before they are rounded, in every micro-batch: all ranks then round the same
// sums with the same noise. Others are summed once, while the backward pass goes on.
void Transformer::sum_layer(int64_t l) {
    if (params_.grads_bf16)
        device_.comm->wait(device_.comm->all_reduce(params_.staging, params_.staged_padded));
    else if (last_)
        for (const Tensor& t : params_.list)
            if (t.layers) device_.comm->all_reduce(t.grad + l * t.layer_count(), t.layer_count());
}

// What has no layers: more is added to the embeddings' until the backward pass has ended.
void Transformer::sum_gradients() {
    Comm::Ticket ticket = 0;
    for (const Tensor& t : params_.list)
        if (!t.layers) ticket = device_.comm->all_reduce(t.grad, t.count);
    device_.comm->wait(ticket); // and with it for all before
}

void Transformer::measure_gradients(double clip) {
    begin(kUpdate);
    if (device_.comm) sum_loss(), sum_gradients();
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
    if (device_.comm) device_.comm->finish();
    double loss;
    download(device_, &loss, loss_, sizeof loss);
    return loss;
}

double Transformer::grad_norm() {
    float norm;
    download(device_, &norm, norm_, sizeof norm);
    return norm;
}
