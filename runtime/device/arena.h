// All of a run's device memory as one allocation, laid out before the first step: place() only notes sizes, commit()
// allocates once, zeroed, and sets every pointer. Nothing is allocated later.
//
// A step goes through phases; what no phase needs at the same time shares memory. The layout is made from sizes alone,
// so a plan for another machine is the same code without commit().
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "../../kernels/types.h"

// The phases of a step, and sets of them. The backward passes of MLP and attention take turns, layer by layer.
using Phases = unsigned;
constexpr Phases kForward = 1, kLosses = 2, kMlpBackward = 4, kAttentionBackward = 8, kUpdate = 16;
constexpr Phases kBackward = kMlpBackward | kAttentionBackward, kAlways = kForward | kLosses | kBackward | kUpdate;
constexpr Phases kEachPhase[] = {kForward, kLosses, kMlpBackward, kAttentionBackward, kUpdate};
const char* phase_name(Phases phase);

class Arena {
public:
    explicit Arena(const Target& target) : target_(target) {}
    ~Arena();
    Arena(const Arena&) = delete;
    Arena& operator=(const Arena&) = delete;

    // What is placed from here on is listed under `name` in a plan, and its content lasts through these phases.
    void section(const char* name, Phases phases = kAlways) { section_ = name, phases_ = phases; }

    // `pointer` must outlive commit(). count 0 leaves it null.
    template <class T> void place(T*& pointer, int64_t count, const char* name) {
        pointer = nullptr;
        place_bytes(reinterpret_cast<void**>(&pointer), static_cast<size_t>(count) * sizeof(T), name);
    }
    // Weights and activations, in the target's type.
    void place_reals(real*& pointer, int64_t count, const char* name) {
        pointer = nullptr;
        place_bytes(reinterpret_cast<void**>(&pointer), static_cast<size_t>(count * target_.real_bytes), name);
    }

    struct Item {
        std::string section, name;
        Phases phases;
        size_t bytes;  // rounded up to whole cache lines
        size_t offset; // once laid out
        void** pointer;
    };
    const Target& target() const { return target_; }
    const std::vector<Item>& items() const { return items_; }
    size_t bytes();                      // of the allocation
    size_t bytes_in(Phases phase) const; // of what one phase needs
    void commit();

private:
    const Target target_;
    const char* section_ = "";
    Phases phases_ = kAlways;
    std::vector<Item> items_;
    size_t bytes_ = 0;
    bool laid_out_ = false;
    void* memory_ = nullptr;

    void place_bytes(void** pointer, size_t bytes, const char* name);
    void lay_out();
    static size_t lay_out(const std::vector<Item*>& order);
};
