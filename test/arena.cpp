// The layout of a run's memory: what shares a phase never overlaps, what does not may, and sizes are the target's.
#include <doctest/doctest.h>

#include <random>

#include "../runtime/device/arena.h"
#include "check.h"

namespace {

const Target kHere{false, sizeof(real), 1}, kCudaBf16{true, 2, 1};

void check_layout(Arena& arena) {
    size_t end = 0;
    const auto& items = arena.items();
    for (size_t i = 0; i < items.size(); i++) {
        CHECK(items[i].offset % 256 == 0);
        CHECK(items[i].bytes % 256 == 0);
        end = std::max(end, items[i].offset + items[i].bytes);
        for (size_t j = 0; j < i; j++) {
            const bool apart = items[i].offset >= items[j].offset + items[j].bytes ||
                               items[j].offset >= items[i].offset + items[i].bytes;
            CHECK((apart || !(items[i].phases & items[j].phases)));
        }
    }
    for (Phases phase : kEachPhase) CHECK(arena.bytes_in(phase) <= arena.bytes());
    CHECK(end == arena.bytes());
}

} // namespace

TEST_CASE("random lifetimes never overlap") {
    std::mt19937 rng(7);
    for (int trial = 0; trial < 200; trial++) {
        Arena arena(kHere);
        std::vector<char*> pointers(1 + rng() % 30);
        for (char*& p : pointers) {
            arena.section("some", 1 + rng() % kAlways);
            arena.place(p, 1 + rng() % 5000, "array");
        }
        arena.bytes();
        check_layout(arena);
    }
}

TEST_CASE("phases share memory, and the largest one sets the size") {
    Arena arena(kHere);
    char *always, *forward, *mlp, *attention, *both;
    arena.section("kept");
    arena.place(always, 1000, "always");
    arena.section("work space", kForward);
    arena.place(forward, 8000, "forward");
    arena.section("work space", kMlpBackward);
    arena.place(mlp, 5000, "MLP");
    arena.section("work space", kAttentionBackward);
    arena.place(attention, 3000, "attention");
    arena.section("work space", kMlpBackward | kAttentionBackward);
    arena.place(both, 2000, "both");
    CHECK(arena.bytes_in(kForward) == 1024 + 8192);
    CHECK(arena.bytes_in(kMlpBackward) == 1024 + 5120 + 2048);
    CHECK(arena.bytes_in(kAttentionBackward) == 1024 + 3072 + 2048);
    CHECK(arena.bytes() == 1024 + 8192);
    check_layout(arena);
    arena.commit();
    for (const char* p : {always, forward, mlp, attention, both}) CHECK(*p == 0);
}

TEST_CASE("sizes are the target's, empty arrays are null") {
    for (const Target& target : {kHere, kCudaBf16}) {
        Arena arena(target);
        real *weights, *none = reinterpret_cast<real*>(&arena);
        float* statistics;
        arena.section("all");
        arena.place_reals(weights, 1024, "weights");
        arena.place(statistics, 1024, "statistics");
        arena.place_reals(none, 0, "none");
        CHECK(arena.bytes() == 1024 * (target.real_bytes + 4));
        CHECK(arena.items().size() == 2);
        CHECK(none == nullptr);
    }
}
