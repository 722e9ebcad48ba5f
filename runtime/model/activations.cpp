#include "activations.h"

#include <algorithm>

// Slots of the store: x of even and odd layers, then O of even and odd layers.
static int x_slot(int64_t l) { return static_cast<int>(l % 2); }
static int atty_slot(int64_t l) { return 2 + static_cast<int>(l % 2); }

Residuals::Residuals(const Device& device, const ActivationMemory& memory, bool training, int64_t L, int64_t N,
                     int64_t C, int64_t H)
    : device_(device), L_(L), N_(N), C_(C), H_(H), x_bytes_(N * C * device.target.real_bytes) {
    const bool offload = training && memory.offload, keeps_atty = training && memory.recompute != Recompute::full;
    const int64_t turns = std::min<int64_t>(L, 2);
    x_.slots = training && !offload ? L : turns;
    atty_.slots = !keeps_atty ? 1 : offload ? turns : L;
    lse_.slots = keeps_atty ? L : 1; // small enough to stay
    if (!offload) return;
    host_layers_ = L - turns;
    if (keeps_atty) atty_bytes_ = x_bytes_;
}

void Residuals::place(Arena& arena) {
    auto rows = [&](auto& r, int64_t width) {
        r.tokens = N_, r.width = width;
        return r.slots * N_ * width;
    };
    arena.section("layer inputs");
    arena.place_reals(x_.data, rows(x_, C_), "layer inputs");
    arena.section("attention O and LSE");
    arena.place_reals(atty_.data, rows(atty_, C_), "attention");
    arena.place(lse_.data, rows(lse_, H_), "log-sum-exp");
    arena.section("work space", kForward | kLosses);
    arena.place_reals(last_, N_ * C_, "output of the last block");
}

void Residuals::allocate(const std::string& folder) {
    if (host_bytes()) store_ = std::make_unique<HostStore>(device_, folder, host_bytes());
}

// On the host: x of all its layers, then O of all.
void Residuals::enter_forward(int64_t l, bool keep) {
    if (!store_) return;
    store_->wait(x_slot(l + 1)); // x(l−1) has left the place of x(l+1)
    store_->wait(atty_slot(l));
    if (keep && waits(l)) store_->save(l * x_bytes_, x(l), x_bytes_, x_slot(l));
}

void Residuals::made_attention(int64_t l, bool keep) {
    if (keep && waits(l) && atty_bytes_)
        store_->save(host_layers_ * x_bytes_ + l * atty_bytes_, atty(l), atty_bytes_, atty_slot(l));
}

void Residuals::enter_backward(int64_t l) {
    if (!store_) return;
    store_->wait(x_slot(l));
    store_->wait(atty_slot(l));
}

void Residuals::leave_backward(int64_t l) {
    const int64_t next = l - 2;
    if (next < 0 || !waits(next)) return;
    store_->load(next * x_bytes_, x(next), x_bytes_, x_slot(next));
    if (atty_bytes_)
        store_->load(host_layers_ * x_bytes_ + next * atty_bytes_, atty(next), atty_bytes_, atty_slot(next));
}
