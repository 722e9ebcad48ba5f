// How activations are kept from the forward to the backward pass, and where: all of them, or what passes between blocks
// to each other alone, on the device or on the host.
//
// B sequences of T tokens, N = B·T; L blocks, C channels, H heads.
#pragma once
#include <cstdint>
#include <memory>
#include <string>

#include "../device/arena.h"
#include "../device/device.h"
#include "../device/host_store.h"

enum class Recompute {
    none,  // everything is kept
    block, // the blocks' inputs and attention's O and LSE; the rest is recomputed in the backward pass
    full,  // the blocks' inputs alone
};

// Changes memory and time, not the mathematics.
struct ActivationMemory {
    // Enough for the matmul's full rate, few enough to stay small beside the activations.
    static constexpr int64_t kLogitsRows = 512;

    Recompute recompute = Recompute::none;
    int64_t chunk = 0;                 // tokens that LayerNorm, MLP and projections take at a time; 0: all
    int64_t head_group = 0;            // heads that attention takes at a time; 0: all, as it must be where all is kept
    bool offload = false;              // x, O and LSE are kept on the host; only where the rest is not kept
    int64_t logits_rows = kLogitsRows; // tokens whose logits are in memory at once

    bool operator==(const ActivationMemory&) const = default;
};

// An activation: rows of `width` elements, a row a token. Layers have a slot of their own each or take turns, and a
// slot holds all tokens or one chunk of them; at() finds token n of layer l whichever it is.
template <class T> struct Rows {
    T* data = nullptr;
    int64_t width = 0, tokens = 0, slots = 0;

    T* at(int64_t l, int64_t n) const { return data ? data + (l % slots * tokens + n % tokens) * width : nullptr; }
};
struct Statistics : Rows<float> {}; // a LayerNorm's, float in every build

// What passes between blocks: x(l), the input of block l, and x(L), the last one's output; O and LSE of attention. On
// the host wait all layers but the last two, whose turn in the backward pass comes first: two slots a tensor on the
// device, one in use and one on its way.
class Residuals {
public:
    Residuals(const Device& device, const ActivationMemory& memory, bool training, int64_t L, int64_t N, int64_t C,
              int64_t H);
    void place(Arena& arena);
    size_t host_bytes() const { return host_layers_ * (x_bytes_ + atty_bytes_); }
    double copied_bytes() const { return 2.0 * double(host_bytes()); } // in a forward and a backward pass
    void allocate(const std::string& folder);                          // after arena.commit()

    real* x(int64_t l) const { return l == L_ ? last_ : x_.at(l, 0); } // (N,C)
    real* atty(int64_t l) const { return atty_.at(l, 0); }             // (N,C)
    float* lse(int64_t l) const { return lse_.at(l, 0); }              // (B,H,T)

    // A forward pass says when it begins with block l and when it has made O. With `keep`, for a backward pass.
    void enter_forward(int64_t l, bool keep);
    void made_attention(int64_t l, bool keep);
    // A backward pass says when it begins with block l and when it is done with it.
    void enter_backward(int64_t l);
    void leave_backward(int64_t l);
    // Before and at the end of what a Recording holds: waits for all copies.
    void finish() {
        if (store_) store_->finish();
    }

private:
    const Device& device_;
    const int64_t L_, N_, C_, H_;
    int64_t host_layers_ = 0;
    size_t x_bytes_, atty_bytes_ = 0; // of a layer, on the host
    Rows<real> x_, atty_;
    Rows<float> lse_;
    real* last_ = nullptr;
    std::unique_ptr<HostStore> store_;

    bool waits(int64_t l) const { return store_ && l < host_layers_; }
};
